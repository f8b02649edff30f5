"""`trackpl data`: make data sets as shards, look at them, check them."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from trackpl.errors import DataError, Error, closest
from trackpl.usage import Parser
from trackpl_prep.dataset import Dataset

_HELP = """\
usage: trackpl data make NAME [SOURCE] OUT [options]   make a data set as shards in the folder OUT
       trackpl data pack FOLDER [OUT] [options]        make shards of your own videos, with or without tracks
       trackpl data list                               list what can be made, and the default sets that are there
       trackpl data check ADDRESS [options]            check a set: hashes, every sample, ranges, a contact sheet
       trackpl data index FOLDER [options]             write the index of shards that have none
       trackpl data merge FOLDER                       finish a set whose parts were made on several machines

`trackpl data make NAME --help` says where a data set is to be had, its licence and the folder expected.
"""
MODULES = {
    "synthetic": "synthetic",
    "kubric-blender": "blender.dataset",
    "movi_e": "movi",
    "movi_f": "movi",
    "movi_e_panning": "movi",
    "tapvid_kubric": "movi",
    "cotracker_kubric": "cotracker_kubric",
    "cotracker3_kubric": "cotracker_kubric",
    "delta_kubric3d": "delta_kubric",
    "point_odyssey": "point_odyssey",
    "youtube_vos": "youtube_vos",
    "davis2017": "davis",
    "jhmdb": "jhmdb",
    "badja": "badja",
    "tapvid_davis": "tapvid",
    "tapvid_kinetics": "tapvid",
    "tapvid_rgb_stacking": "tapvid",
    "robotap": "tapvid",
    "tapvid3d": "tapvid3d",
    "flying_chairs": "flying_chairs",
    "sintel": "sintel",
    "kitti2015": "kitti",
    "kitti2015_multiview": "kitti",
    "cvo": "cvo",
    "videos": "videos",
}
"""Module of `trackpl_prep` of each data set, so that only the one asked for is imported."""


def run(args: list[str]) -> int:
    """Run `trackpl data ARGS`; returns the exit status, raises `trackpl.errors.Error` for mistakes of the user."""
    if not args or args[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    verbs = {"make": _make, "pack": _pack, "list": _list, "check": _check, "index": _index, "merge": _merge}
    if args[0] not in verbs:
        raise Error(f"`trackpl data` has no verb '{args[0]}'; {closest(args[0], verbs)}")
    return verbs[args[0]](args[1:])


def find(name: str) -> Dataset:
    """Return the data set of that name.

    Raises:
        DataError: there is none; the message names the closest one.
    """
    if name not in MODULES:
        raise DataError(f"no data set is called '{name}'; {closest(name, MODULES)}")
    return next(d for d in _datasets(MODULES[name]) if d.name == name)


def _datasets(module: str) -> tuple[Dataset, ...]:
    loaded = import_module(f"trackpl_prep.{module}")
    return getattr(loaded, "DATASETS", None) or (loaded.DATASET,)


# make and pack ----------------------------------------------------------------------------------------------


def _make(args: list[str]) -> int:
    """Run `trackpl data make NAME [SOURCE] OUT`."""
    if args and args[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if not args or args[0].startswith("-"):
        raise Error("say which data set to make, and where: trackpl data make synthetic OUT")
    return _convert(find(args[0]), f"data make {args[0]}", args[1:])


def _pack(args: list[str]) -> int:
    """Run `trackpl data pack FOLDER OUT`."""
    return _convert(find("videos"), "data pack", args)


def _convert(dataset: Dataset, verb: str, args: list[str]) -> int:
    options = _parser(dataset, verb).parse_args(args)
    if options.out is None:
        options.out = Path(f"{options.source.resolve()}-shards")
    own = Namespace(**{k: v for k, v in vars(options).items() if k not in _ENGINE})
    from trackpl_prep.convert import convert

    index = convert(
        dataset,
        getattr(options, "source", ""),
        options.out,
        own,
        workers=options.workers,
        part=_part(options.part),
        name=options.name,
        per_shard=options.per_shard,
        overwrite=options.overwrite,
        max_broken=options.max_broken,
        ray=options.ray,
        quiet=options.quiet,
    )
    if options.quiet:
        return 0
    if index is None:
        print(f"part {options.part} is done; the index follows when the last part is, in {options.out}")
        return 0
    _say(index)
    print(f"look at it:  trackpl data check {index}")
    if dataset.scores(own):
        print(f"score on it: trackpl validate --model NAME --data.val '{{{dataset.name}: {index}}}'")
    else:
        print(f"train on it: trackpl fit --config crw_multiscale --data.train {index}")
    return 0


_ENGINE = {"source", "out", "workers", "part", "name", "per_shard", "overwrite", "max_broken", "ray", "quiet"}


def _parser(dataset: Dataset, verb: str) -> Parser:
    """Build the parser of one data set: its own options, and those of the engine."""
    facts = [dataset.about, "", f"licence: {dataset.licence}", f"where:   {dataset.where}"]
    if dataset.layout:
        facts += ["expects:", *(f"  {line}" for line in dataset.layout.strip("\n").splitlines())]
    parser = Parser(verb, "\n".join(facts), formatter_class=_Formatter)
    if dataset.needs_source:
        parser.add_argument("source", type=Path, metavar="SOURCE", help="folder as its publisher lays it out")
    nargs, default = ("?", " (default: SOURCE-shards)") if verb == "data pack" else (None, "")
    parser.add_argument("out", type=Path, metavar="OUT", nargs=nargs, help=f"folder for the shards and index{default}")
    dataset.options(parser)
    engine = parser.add_argument_group("how it is made (changes no byte but --per-shard)")
    engine.add_argument("--workers", type=int, default=1, metavar="W", help="processes")
    engine.add_argument("--part", default="1/1", metavar="I/N", help="make the I-th of N parts; for N machines")
    engine.add_argument("--ray", action="store_true", help="make the shards as a Ray Data job")
    engine.add_argument("--per-shard", type=int, metavar="N", help=f"items a shard (default: {dataset.per_shard})")
    engine.add_argument("--max-broken", type=int, default=0, metavar="N", help="broken items that may be left out")
    engine.add_argument("--name", help="name of the set (default: that of the data set and its split)")
    engine.add_argument("--overwrite", action="store_true", help="replace another set of that name")
    engine.add_argument("--quiet", action="store_true", help="no progress, and not where the set is")
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the description, and says the defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _part(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isascii() and i.isdigit() and n.isascii() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise Error(f"--part must be I/N with 1 <= I <= N, such as 3/8, got '{text}'")
    return int(i), int(n)


def _say(path: Path) -> None:
    from trackpl.shards import read_index
    from trackpl_prep.check import counts

    index = read_index(path)
    print(f"{counts(len(index.samples), len(index.shards), sum(s.bytes for s in index.shards))}: {path}")
    for message in index.meta.get("broken", []):
        print(f"  left out: {message}")


# list, check, index, merge ----------------------------------------------------------------------------------


def _list(args: list[str]) -> int:
    """Run `trackpl data list`."""
    Parser("data list", "List data sets.").parse_args(args)
    print(
        "trackpl data make NAME [SOURCE] OUT; `--help` after a NAME says where it is to be had and what is expected\n"
    )
    for dataset in _all():
        print(f"  {dataset.name:20} {dataset.about}")
        print(f"  {'':20} licence: {dataset.licence}")
    from trackpl_prep import synthetic

    folder = synthetic.cache_folder() / f"synthetic-v{synthetic.VERSION}"
    print()
    for split in synthetic.DEFAULT_SETS:
        path = folder / f"{split}.index.json"
        print(f"default {split} set: {path if path.exists() else 'made on first use in ' + str(folder)}")
    return 0


def _all() -> Iterator[Dataset]:
    for module in dict.fromkeys(MODULES.values()):
        yield from _datasets(module)


def _check(args: list[str]) -> int:
    """Run `trackpl data check ADDRESS`."""
    parser = Parser(
        "data check",
        "Check a set of shards: every hash, every sample, the ranges of what is in them; draw a contact sheet.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("address", metavar="ADDRESS", help="index or folder; a path or an http(s), s3, gs address")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for report and sheet (default: NAME-check)")
    parser.add_argument("--samples", type=int, metavar="N", help="check N random samples only, and no shard as a whole")
    parser.add_argument("--sheet", type=int, default=12, metavar="N", help="clips on the contact sheet")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed draws other samples")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes")
    options = parser.parse_args(args)
    from trackpl_prep.check import check

    report = check(
        options.address,
        options.out,
        samples=options.samples,
        sheet=options.sheet,
        seed=options.seed,
        workers=options.workers,
    )
    print(report.text)
    if report.broken:
        raise DataError(f"{len(report.broken)} of {report.checked} samples are broken: {report.broken[0]}")
    return 0


def _index(args: list[str]) -> int:
    """Run `trackpl data index FOLDER`."""
    parser = Parser("data index", "Write the index of the shards (*.tar) in a folder, after a strict look at each.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds the shards NAME-000000.tar ...")
    parser.add_argument("--name", help="of the set (default: what the shards are called)")
    parser.add_argument("--licence", default="", help="of the data")
    parser.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    options = parser.parse_args(args)
    from trackpl_prep.check import index_folder

    _say(index_folder(options.folder, options.name, options.licence, options.overwrite))
    return 0


def _merge(args: list[str]) -> int:
    """Run `trackpl data merge FOLDER`."""
    parser = Parser("data merge", "Finish sets whose parts (--part) were made on several machines.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds the NAME.partial folders, joined by copying")
    parser.add_argument("--overwrite", action="store_true", help="replace another set of that name")
    parser.add_argument("--max-broken", type=int, default=0, metavar="N", help="broken items that may be left out")
    options = parser.parse_args(args)
    from trackpl_prep.convert import merge, missing

    partials = sorted(options.folder.glob("*.partial"))
    if not partials:
        raise DataError(f"{options.folder} holds no NAME.partial folder, as `trackpl data make --part I/N` makes them")
    for partial in partials:
        index = merge(partial, options.overwrite, options.max_broken)
        if index is None:
            numbers = missing(partial)
            shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
            raise DataError(
                f"{partial} still lacks {len(numbers)} shards (number {shown}); run the parts that make them"
            )
        _say(index)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except Error as error:
        with suppress(BrokenPipeError):
            print(f"trackpl data: {error}", file=sys.stderr)
        sys.exit(2)
