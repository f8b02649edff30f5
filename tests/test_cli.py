"""The command line: dispatch, exit statuses, one-line errors, and no torch where none is needed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from plugin_site import install

import trackpl
from trackpl import cli
from trackpl.errors import DataError


def trackpl_command(*args, code="", **kwargs):
    """Run `python -m trackpl` in a process of its own."""
    command = [sys.executable, "-c", code, *args] if code else [sys.executable, "-m", "trackpl", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.fixture
def stand_in(monkeypatch):
    """Replace the module of a verb by one whose `run` does what the test says."""

    def replace(module, run):
        package, _, leaf = module.rpartition(".")
        fake = SimpleNamespace(run=run)
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(__import__(package), leaf, fake, raising=False)

    return replace


@pytest.mark.parametrize("args", [["--help"], ["-h"], [], ["--version"], ["plugins"], ["new", "--help"]])
def test_cheap_verbs_do_not_import_torch(args):
    code = (
        "import sys; from trackpl.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "assert status == 0 and not heavy, (status, heavy)"
    )
    done = trackpl_command(*args, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_shows_verbs_and_methods(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in cli._VERBS)
    assert "methods: " in text and "crw_multiscale" in text


def test_help_and_other_verbs_work_beside_a_broken_plugin(tmp_path):
    install(tmp_path, "broken", "raise ValueError('always')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert "broken" in trackpl_command("--help", env=env).stdout
    done = trackpl_command("new", "fresh", "--out", str(tmp_path), env=env)
    assert done.returncode == 0, done.stderr


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trackpl {trackpl.__version__}\n"


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_training_verbs(stand_in, verb):
    calls = []
    stand_in("trackpl.training", lambda verb, args: calls.append((verb, args)) or 7)
    assert cli.main([verb, "--model", "x", "--help"]) == 7
    assert calls == [(verb, ["--model", "x", "--help"])]


@pytest.mark.parametrize(("verb", "module"), [("track", "trackpl.tracking"), ("data", "trackpl_prep.cli")])
def test_other_verbs(stand_in, verb, module):
    calls = []
    stand_in(module, lambda args: calls.append(args) or 0)
    assert cli.main([verb, "a", "--b"]) == 0
    assert calls == [["a", "--b"]]


def test_unknown_verb_gives_the_closest(capsys):
    for given in ("train", "trakc", "zzz"):
        assert cli.main([given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "trackpl: no verb is called 'train'; did you mean 'fit'?",
        "trackpl: no verb is called 'trakc'; did you mean 'track'?",
        "trackpl: no verb is called 'zzz'; "
        "allowed: bench, data, fit, new, plugins, predict, sweep, test, track, validate, weights",
    ]


def test_wrong_arguments_are_one_line(capsys):
    assert cli.main(["plugins", "--chec"]) == 2
    assert cli.main(["new"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "trackpl: unrecognized arguments: --chec; see trackpl plugins --help",
        "trackpl: the following arguments are required: NAME; see trackpl new --help",
    ]


def test_errors_of_the_user_are_one_line_and_status_2(stand_in, capsys):
    def run(args):
        raise DataError("clip 3 is empty; remove it")

    stand_in("trackpl.tracking", run)
    assert cli.main(["track", "x.mp4"]) == 2
    assert capsys.readouterr() == ("", "trackpl: clip 3 is empty; remove it\n")


@pytest.mark.parametrize("line", ["--debug track x", "track --debug x", "track x --debug"])
def test_debug_anywhere_lets_the_trace_through(stand_in, line):
    seen = []

    def run(args):
        seen.append(args)
        raise DataError("empty")

    stand_in("trackpl.tracking", run)
    with pytest.raises(DataError, match="empty"):
        cli.main(line.split())
    assert seen == [["x"]]


def test_debug_trace_in_the_shell():
    done = trackpl_command("fitt", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "did you mean 'fit'?" in done.stderr
    done = trackpl_command("fitt")
    assert (done.returncode, done.stderr) == (2, "trackpl: no verb is called 'fitt'; did you mean 'fit'?\n")


def test_a_bug_is_not_dressed_as_the_users_error(stand_in):
    def run(args):
        raise ZeroDivisionError("ours")

    stand_in("trackpl.tracking", run)
    with pytest.raises(ZeroDivisionError):
        cli.main(["track"])


def test_interrupt(stand_in, capsys):
    def run(*args):
        raise KeyboardInterrupt

    stand_in("trackpl.training", run)
    stand_in("trackpl.tracking", run)
    assert cli.main(["track"]) == 130
    assert capsys.readouterr().err == "\ntrackpl: interrupted\n"
    assert cli.main(["fit"]) == 130
    assert "--ckpt_path last" in capsys.readouterr().err


def test_interrupt_that_lightning_has_turned_into_an_exit(stand_in):
    def run(verb, args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    stand_in("trackpl.training", run)
    assert cli.main(["fit"]) == 130


def test_other_exits_keep_their_status(stand_in):
    stand_in("trackpl.training", lambda verb, args: sys.exit(5))
    with pytest.raises(SystemExit) as left:
        cli.main(["fit"])
    assert left.value.code == 5


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipe_is_quiet(unbuffered):
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "trackpl", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_broken_pipe_of_somebody_else_is_a_bug():
    code = (
        "import sys; from types import SimpleNamespace; import trackpl; from trackpl.cli import main\n"
        "def run(args): raise BrokenPipeError('a worker died')\n"
        "sys.modules['trackpl.tracking'] = trackpl.tracking = SimpleNamespace(run=run)\n"
        "main(['track'])"
    )
    done = trackpl_command(code=code)
    assert done.returncode == 1 and "a worker died" in done.stderr
