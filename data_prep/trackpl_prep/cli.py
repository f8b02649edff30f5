"""`trackpl data`: make data sets, and list what can be made and what is there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trackpl.errors import DataError, Error, closest
from trackpl.usage import Parser

_HELP = """\
usage: trackpl data make NAME OUT [options]     make a data set as shards in the folder OUT
       trackpl data list                        list what can be made, and the default sets that are there

  make synthetic   clips rendered here, with exact truth; needs no downloads
"""
SETS = {"synthetic": "clips rendered here, with exact tracks, visibility, flow, depth and segmentation"}


def run(args: list[str]) -> int:
    """Run `trackpl data ARGS`; returns the exit status, raises `trackpl.errors.Error` for mistakes of the user."""
    if not args or args[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    verbs = {"make": _make, "list": _list}
    if args[0] not in verbs:
        raise Error(f"`trackpl data` has no verb '{args[0]}'; {closest(args[0], verbs)}")
    return verbs[args[0]](args[1:])


def _make(args: list[str]) -> int:
    """Run `trackpl data make NAME OUT`."""
    if args and args[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0
    if not args or args[0].startswith("-"):
        raise Error("say which data set to make, and where: trackpl data make synthetic OUT")
    if args[0] not in SETS:
        raise DataError(f"no data set is called '{args[0]}'; {closest(args[0], SETS)}")
    options = _parser().parse_args(args[1:])
    from trackpl_prep import synthetic  # torch: not before the arguments are known to be right

    index = synthetic.make(
        options.out,
        options.clips,
        seed=options.seed,
        size=tuple(options.size),
        frames=options.frames,
        points=options.points,
        textures=options.textures,
        workers=options.workers,
        name=options.name,
        overwrite=options.overwrite,
    )
    if not options.quiet:
        print(f"{options.clips} clips: {index}")
        print(f"train on them: trackpl fit --config crw_multiscale --data.train {index}")
    return 0


def _parser() -> Parser:
    """Build the parser of `trackpl data make synthetic`."""
    parser = Parser(
        "data make synthetic",
        "Render clips with exact truth into shards. The same options give the same bytes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the shards and their index")
    parser.add_argument("--clips", type=int, default=96, metavar="N", help="number of clips")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed gives other clips")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 256], metavar=("H", "W"), help="pixels")
    parser.add_argument("--frames", type=int, default=24, metavar="T", help="frames in each clip")
    parser.add_argument("--points", type=int, default=256, metavar="N", help="tracks in each clip")
    parser.add_argument("--textures", type=Path, metavar="DIR", help="images to use as textures")
    parser.add_argument("--workers", type=int, default=1, metavar="W", help="processes")
    parser.add_argument("--name", default="synthetic", help="name of the set")
    parser.add_argument("--overwrite", action="store_true", help="replace another set of that name")
    parser.add_argument("--quiet", action="store_true", help="do not say where the set is")
    return parser


def _list(args: list[str]) -> int:
    """Run `trackpl data list`."""
    Parser("data list", "List data sets.").parse_args(args)
    from trackpl_prep import synthetic

    for name, text in SETS.items():
        print(f"{name}: {text}")
        print(f"  make it: trackpl data make {name} OUT --clips 2000 --workers 2")
    folder = synthetic.cache_folder() / f"synthetic-v{synthetic.VERSION}"
    for split in synthetic.DEFAULT_SETS:
        path = folder / f"{split}.index.json"
        print(f"  default {split} set: {path if path.exists() else 'made on first use in ' + str(folder)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except Error as error:
        print(f"trackpl data: {error}", file=sys.stderr)
        sys.exit(2)
