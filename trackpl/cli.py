"""The `trackpl` command: dispatch on the first word, so that cheap verbs answer without importing torch."""

import os
import select
import sys
from collections.abc import Callable

from trackpl import __version__
from trackpl.errors import Error, PluginError, closest
from trackpl.plugins import Plugin, plugins
from trackpl.usage import Parser

HELP = """\
usage: trackpl VERB [options]          trackpl VERB --help shows the options of a verb

  fit        train a method            trackpl fit --config crw_multiscale
  validate   score on validation data  trackpl validate --model NAME --ckpt_path FILE
  test       score on benchmarks       trackpl test --benchmark synthetic --model NAME
  predict    run on a data set         trackpl predict --model NAME --ckpt_path FILE
  sweep      train a grid, tabulate    trackpl sweep windows
  track      track points in a video   trackpl track VIDEO --model NAME --grid 20
  data       make data sets            trackpl data make synthetic OUT
  plugins    list installed methods    trackpl plugins [--check]
  weights    list, fetch weights       trackpl weights [get NAME]
  bench      measure speed, memory     trackpl bench [--models A,B] [--device cuda]
  new        start a method            trackpl new NAME [--out DIR]

  --version  show the version
  --debug    show the whole trace of an error (anywhere on the line)

methods: {methods}
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return 0 done, 1 a check failed, 2 a user's error, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        status = _run(args)
        sys.stdout.flush()  # a closed pipe must show here and not when the interpreter ends
        return status
    except Error as error:
        if debug:
            raise
        print(f"trackpl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted(args)
    except SystemExit as leaving:  # Lightning turns Ctrl-C into sys.exit(1) once it has shut down
        if isinstance(leaving.__context__, KeyboardInterrupt):
            return _interrupted(args)
        raise
    except BrokenPipeError:
        if not _stdout_closed():
            raise
        return 141  # what a shell reports for a command whose reader went away


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(HELP.format(methods=", ".join(plugins()) or "none installed"), end="")
        return 0
    if args[0] == "--version":
        print(f"trackpl {__version__}")
        return 0
    verb = _VERBS.get(args[0])
    if verb is None:
        meant = _MEANT.get(args[0])
        hint = f"did you mean '{meant}'?" if meant else closest(args[0], _VERBS)
        raise Error(f"no verb is called '{args[0]}'; {hint}")
    return verb(args[1:])


def _training(verb: str) -> Callable[[list[str]], int]:
    def run(args: list[str]) -> int:
        from trackpl import training

        return training.run(verb, args)

    return run


def _test(args: list[str]) -> int:
    flags = {arg.partition("=")[0] for arg in args}
    if "--compare" in flags:
        from trackpl import comparison

        return comparison.run(args)
    if "--benchmark" in flags:
        from trackpl import evaluation

        return evaluation.run(args)
    status = _training("test")(args)
    if {"-h", "--help"} & flags:
        print("\nOn a published benchmark: trackpl test --benchmark --help; two results: trackpl test --compare --help")
    return status


def _track(args: list[str]) -> int:
    from trackpl import tracking

    return tracking.run(args)


def _data(args: list[str]) -> int:
    from trackpl_prep import cli

    return cli.run(args)


def _weights(args: list[str]) -> int:
    from trackpl import weights

    return weights.run(args)


def _sweep(args: list[str]) -> int:
    from trackpl import sweep

    return sweep.run(args)


def _bench(args: list[str]) -> int:
    from trackpl import bench

    return bench.run(args)


def _plugins(args: list[str]) -> int:
    parser = Parser("plugins", "List the installed methods, with the package that each comes from.")
    parser.add_argument("--check", action="store_true", help="import each and report the broken ones")
    check = parser.parse_args(args).check
    found = list(plugins().values())
    states = [_state(plugin, check) for plugin in found]
    rows = [("NAME", "PACKAGE", "VERSION", "CLASS", "")]
    rows += [(p.name, p.package, p.version, p.class_path, s) for p, s in zip(found, states, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    for *cells, state in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{line}  {state}".rstrip())
    if not found:
        print("no method is installed; pip install one, or start one: trackpl new NAME")
    return 1 if check and set(states) - {"ok"} else 0


def _state(plugin: Plugin, check: bool) -> str:
    if not check:
        return plugin.fault and f"BROKEN {plugin.fault}"
    try:
        plugin.load()
    except PluginError as error:
        return f"BROKEN {str(error).removeprefix(f'{plugin}: ')}"
    return "ok"


def _new(args: list[str]) -> int:
    from trackpl import scaffold

    parser = Parser("new", "Write the package of a new method that trains and passes its tests.")
    parser.add_argument("name", metavar="NAME", help="what users will type after --model, such as my_tracker")
    parser.add_argument("--out", metavar="DIR", default=".", help="where to put trackpl-NAME (default: here)")
    given = parser.parse_args(args)
    print(scaffold.guide(scaffold.write(given.name, given.out), given.name))
    return 0


_VERBS: dict[str, Callable[[list[str]], int]] = {
    **{verb: _training(verb) for verb in ("fit", "validate", "predict")},
    "test": _test,
    "track": _track,
    "data": _data,
    "plugins": _plugins,
    "weights": _weights,
    "bench": _bench,
    "sweep": _sweep,
    "new": _new,
}

_MEANT = {"train": "fit", "val": "validate", "eval": "test", "infer": "predict", "list": "plugins"}
"""Verbs of other tools, whose closest match by letters would mislead."""


def _interrupted(args: list[str]) -> int:
    hint = "; to go on, repeat the command with --ckpt_path last" if args[:1] == ["fit"] else ""
    if args[:1] == ["sweep"] or (args[:1] == ["test"] and "--benchmark" in args):
        hint = "; to go on, repeat the command"
    print(f"\ntrackpl: interrupted{hint}", file=sys.stderr)
    return 130


def _stdout_closed() -> bool:
    """Whether the reader of our output went away; if so, silence the flush at exit."""
    if not hasattr(select, "poll"):  # Windows has no poll, and no broken pipes of this kind
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed
