"""`trackpl weights`: what is listed, fetched from a server of this machine, refused, and found again by `load`."""

import hashlib
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flaky_server import serve
from plugin_site import install
from safetensors.torch import save

import trackpl
from trackpl import cli
from trackpl.downloads import Download
from trackpl.errors import CheckpointError, DataError, Error, UnreachableError
from trackpl.plugins import find
from trackpl.published import Published, resolve
from trackpl.remote import Patience
from trackpl.weights import get

CONTENT = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(tries=4, first=0.002, longest=0.02, connect=2.0, stall=0.3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRACKPL_TRIES", raising=False)
    return tmp_path / "cache" / "weights"


@pytest.fixture
def server():
    with serve({"a/toy.ckpt": CONTENT}) as flaky:
        yield flaky


@pytest.fixture
def command(capsys):
    def run(*args):
        status = cli.main(["weights", *args])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Install the tiny method, publishing what is given."""

    def run(*records):
        name = f"tiny{abs(hash((tmp_path, records))) % 10**8}"  # modules of earlier tests stay imported
        code = Path(__file__).with_name("tiny.py").read_text()
        listed = ", ".join(repr(r) for r in records)
        code += f"\nfrom trackpl.published import Published\nTiny.published = ({listed},)\n"
        module = f"trackpl_{name}"
        install(
            tmp_path / "site",
            name,
            code,
            entry_points=f"[trackpl.methods]\ntiny = {module}:Tiny\n",
            package=f"trackpl-{name}",
        )
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return run


def record(address="https://example.invalid/a/toy.ckpt", **more):
    return Published(**{"name": "toy", "method": "tiny", "address": address, "licence": "MIT", **more})


def left(cache):
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


@pytest.mark.parametrize("verb", ["weights", "bench"])
def test_help_is_cheap(verb):
    code = (
        "import sys; from trackpl.cli import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit(bool({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, verb], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: trackpl {verb}" in done.stdout


def test_list_shows_what_ships_and_what_is_published(publish, command):
    nc = record(
        licence="CC BY-NC 4.0", bytes=2_500_000, figures={"tapvid_davis_first": "AJ 12.3 (table 1)"}, note="Toy."
    )
    publish(nc, record(name="free"))
    status, out, err = command()
    assert (status, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "Apache-2.0" in lines["crw_multiscale"] and "ships with trackpl" in lines["crw_multiscale"]
    assert "ships no weights" in lines["tiny"]
    assert (
        "2.5 MB" in lines["toy"] and "NON-COMMERCIAL (CC BY-NC 4.0)" in lines["toy"] and "not fetched" in lines["toy"]
    )
    assert "unknown" in lines["free"] and "MIT" in lines["free"] and "NON-COMMERCIAL (" not in lines["free"]
    assert "    tapvid_davis_first: AJ 12.3 (table 1)\n    Toy.\n" in out
    assert out.count(nc.address) == 2 and "NON-COMMERCIAL: " in out
    assert command("list")[1] == out
    nc.path.parent.mkdir(parents=True)
    nc.path.write_bytes(b"x")
    assert str(nc.path) in command()[1]


def test_a_long_licence_stands_in_full_below(publish, command):
    long = "CC-BY-NC 4.0, and whatever else the page of the authors says of it"
    publish(record(licence=long))
    _, out, _ = command()
    assert "NON-COMMERCIAL (CC-BY-NC 4.0" in out and f"    licence: {long}\n" in out
    (row,) = [line for line in out.splitlines() if line.startswith("toy ")]
    assert "…" in row and len(row) < 120


def test_a_broken_plugin_is_named_and_hides_nothing(publish, command, tmp_path):
    publish(record())
    install(tmp_path / "site", "broken", "raise ValueError('always')")
    install(
        tmp_path / "site",
        "odd",
        "from trackpl import Method\nclass Good(Method):\n    contract = 1\n    published = 3\n",
    )
    status, out, err = command("list")
    assert status == 0 and "toy" in out
    assert "'broken'" in err and "always" in err and "`published` must be a tuple" in err and len(err.splitlines()) == 2


def test_nobody_publishes_under_the_name_of_another(publish, command, tmp_path):
    publish(record())
    code = (
        "from trackpl import Method\nfrom trackpl.published import Published\nclass Good(Method):\n    contract = 1\n"
    )
    others = {
        "heir": record(),  # a subclass inherits the list of its parent
        "another": record(licence="GPL"),
        "zeta": record(method="zeta", licence="GPL"),
    }
    for name, other in others.items():
        install(tmp_path / "site", name, f"{code}    published = ({other!r},)\n")
    _, out, err = command()
    assert out.count("\ntoy ") == 1
    lines = err.splitlines()
    assert len(lines) == 2
    assert "'another'" in lines[1] and "publishes 'toy' for 'tiny', which is not its own name" in lines[1]
    assert "'zeta'" in lines[0] and "other weights under the name 'toy', which is taken" in lines[0]


def test_get_fetches_verifies_and_says_what_next(publish, command, server, cache):
    toy = record(server.url("a/toy.ckpt"), bytes=len(CONTENT), sha256=DIGEST, licence="for non-commercial use")
    publish(toy)
    status, out, _ = command("get", "toy")
    assert status == 0 and toy.path == cache / "toy.ckpt" and toy.path.read_bytes() == CONTENT
    lines = out.splitlines()
    assert lines[1] == "licence of these weights: NON-COMMERCIAL (for non-commercial use)"
    assert DIGEST in lines[2] and "as published" in lines[2] and str(toy.path) in lines[2]
    assert lines[-1] == f"next: trackpl track VIDEO --model tiny --checkpoint {toy.path}"
    assert command("path", "toy")[1] == f"{toy.path}\n"
    assert left(cache) == ["toy.ckpt", "toy.ckpt.sha256"]
    assert "already here, verified" in command("get", "toy.ckpt")[1] and len(server.requests) == 1
    toy.path.write_bytes(b"broken")
    assert "has 6 bytes" in command("get", "toy")[1] and toy.path.read_bytes() == CONTENT


def test_get_of_what_ships_and_names_that_are_none(publish, command):
    publish(record())
    status, out, _ = command("get", "crw_multiscale")
    assert status == 0 and "ships with" in out and out.endswith("next: trackpl track VIDEO --model crw_multiscale\n")
    assert Path(command("path", "crw_multiscale")[1].strip()).is_file()
    for args, message in {
        ("get", "tooy"): "did you mean 'toy'?",
        ("get", "tiny"): "crw_multiscale, crw_regressor, locotrack, locotrack_base, ",  # it ships none
        ("path", "toy"): "fetch it: trackpl weights get toy",
        ("get",): "needs a NAME",
        ("list", "toy"): "takes no NAME",
        ("gett", "toy"): "did you mean 'get'?",
    }.items():
        status, out, err = command(*args)
        assert status == 2 and message in err and len(err.splitlines()) == 1, err


def test_what_has_no_stated_hash_is_remembered(server, cache):
    toy = record(server.url("a/toy.ckpt"))
    assert DIGEST in get(toy) and toy.known_sha256 == DIGEST
    assert (cache / "toy.ckpt.sha256").read_text() == f"{DIGEST}  toy.ckpt\n"
    toy.path.write_bytes(CONTENT[:-1] + b"?")
    assert "fetched again" in get(toy) and toy.path.read_bytes() == CONTENT
    toy.path.unlink()
    server.files["a/toy.ckpt"] = b"another"
    with pytest.raises(DataError, match=r"SHA-256.*if its publisher replaced it, delete .*toy\.ckpt\.sha256"):
        get(toy)
    assert left(cache) == ["toy.ckpt.sha256"]


def test_a_file_put_there_by_hand_is_taken(cache):
    toy = record()
    cache.mkdir(parents=True)
    toy.path.write_bytes(CONTENT)
    assert "put there by hand" in get(toy) and toy.known_sha256 == DIGEST


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"bytes": 5}, {"bytes": len(CONTENT) + 1}])
def test_another_file_is_refused_and_nothing_is_left(server, cache, wrong):
    with pytest.raises(DataError, match="refused"):
        get(record(server.url("a/toy.ckpt"), **wrong))
    assert left(cache) == []


def test_no_such_file_and_no_place_to_write(server, cache, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="404"):
        get(record(server.url("gone.ckpt")))
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path / "file"))
    with pytest.raises(Error, match=r"cannot write .*TRACKPL_CACHE names another folder"):
        get(record(server.url("a/toy.ckpt")))


def test_without_a_network_one_line_says_what_to_do(publish, command, cache, monkeypatch):
    monkeypatch.setenv("TRACKPL_TRIES", "2")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    address = f"http://127.0.0.1:{port}/toy.ckpt"
    toy = record(address)
    publish(toy)
    status, _, err = command("get", "toy")
    assert status == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"trackpl: {address} gives no answer (") and "is there a network?" in err
    assert err.endswith(f"put that file at {toy.path}\n")
    assert left(cache) == []


def fetch(server, folder, **more):
    with open(folder / "part", "w+b") as file:
        download = Download(server.url("a/toy.ckpt"), file, patience=QUICK, **more)
        download.run()
        file.seek(0)
        return file.read()


@pytest.mark.parametrize("fault", ["drop", "refuse", "stall", "503", "truncate"])
def test_a_broken_connection_is_gone_on_with(server, tmp_path, fault):
    faults = iter([fault, fault])
    server.fault = lambda path: next(faults, None)
    if fault == "truncate":  # half a file, said to be whole: only who knows the size can tell
        with pytest.raises(DataError, match="150000 bytes, not the 300000"):
            fetch(server, tmp_path, size=len(CONTENT), sha256=DIGEST)
        return
    assert fetch(server, tmp_path, sha256=DIGEST) == CONTENT
    ranges = [wanted for _, wanted, _ in server.requests]
    if fault in ("drop", "stall"):
        assert ranges == [None, "bytes=150000-299999", "bytes=225000-299999"]
    else:
        assert ranges == [None, None, None]


def test_without_hash_or_tag_it_begins_anew_and_with_a_tag_it_does_not(server, tmp_path):
    faults = iter(["drop"])
    server.fault = lambda path: next(faults, None)
    assert fetch(server, tmp_path) == CONTENT
    assert [wanted for _, wanted, _ in server.requests] == [None, None]
    faults = iter(["drop"])
    server.headers = {"ETag": '"one"'}
    assert fetch(server, tmp_path) == CONTENT
    assert server.requests[-1][1] == "bytes=150000-299999"


def test_a_server_that_ignores_ranges_or_never_gives_all(server, tmp_path):
    faults = iter(["drop", "whole"])
    server.fault = lambda path: next(faults, None)
    assert fetch(server, tmp_path, sha256=DIGEST) == CONTENT
    faults = iter(["503"] * 100)
    with pytest.raises(UnreachableError, match=r"503.*tried 4 times in a row"):
        fetch(server, tmp_path)
    faults = iter(["drop"] * 100)
    with pytest.raises(UnreachableError, match="dropped"):
        fetch(server, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../evil"},
        {"name": ""},
        {"address": "http://example.com/a.ckpt"},
        {"address": "file:///etc/passwd"},
        {"address": "https:///a"},
        {"sha256": "abc"},
    ],
)
def test_records_that_are_refused(wrong):
    with pytest.raises(Error, match=r"published weights|SHA-256 of published"):
        record(**wrong)


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [("MIT", True), ("CC-BY-NC 4.0", False), ("Non-Commercial only", False), ("CC BY 4.0, once", True)],
)
def test_licences_that_forbid_commercial_use(licence, allowed):
    assert record(licence=licence).commercial is allowed


def test_load_finds_cached_weights_by_name(publish, cache, tmp_path, monkeypatch):
    toy = record("https://example.invalid/toy.safetensors")
    publish(toy)
    with pytest.raises(CheckpointError, match=r"no checkpoint at toy; .* trackpl weights get toy"):
        trackpl.load("tiny", checkpoint="toy")
    cache.mkdir(parents=True)
    toy.path.write_bytes(save({"shift": torch.tensor([3.0, 4.0])}))
    get(toy)
    for name in ("toy", "toy.safetensors"):
        assert trackpl.load("tiny", checkpoint=name).shift.tolist() == [3, 4]
    toy.path.write_bytes(save({"shift": torch.tensor([5.0, 4.0])}))
    with pytest.raises(CheckpointError, match=r"has the SHA-256 .* trackpl weights get toy"):
        trackpl.load("tiny", checkpoint="toy")
    monkeypatch.chdir(tmp_path)
    Path("toy").touch()
    assert resolve("toy", find("tiny").load()) == Path("toy")  # a file goes before a name


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Install the tiny method as a package that ships several weights."""

    def run(more, taken=""):
        site, package = tmp_path / "site", f"trackpl_box{abs(hash(tmp_path)) % 10**8}"
        folder = site / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        code = Path(__file__).with_name("tiny.py").read_text()
        (folder / "method.py").write_text(f"{code}\nTiny.more_weights = {more!r}\nclass Child(Tiny): pass\n")
        lines = f"[trackpl.methods]\ntiny = {package}.method:Tiny\nchild = {package}.method:Child\n{taken}"
        install(site, "box", "", entry_points=lines, package="trackpl-a-box")
        monkeypatch.syspath_prepend(str(site))
        return folder

    return run


def test_a_method_may_ship_several_weights_by_name(ship, command, tmp_path, monkeypatch):
    folder = ship({"tiny_far": "far.safetensors"})
    assert "MISSING" in command()[1]
    (folder / "far.safetensors").write_bytes(save({"shift": torch.tensor([30.0, 4.0])}))
    for name in ("tiny", "child"):
        assert trackpl.load(name, checkpoint="tiny_far").shift.tolist() == [30, 4]
    _, out, err = command()
    row = next(line.split() for line in out.splitlines() if line.startswith("tiny_far "))
    assert err == "" and row[1] == "tiny" and out.count("tiny_far") == 1
    assert command("path", "tiny_far")[1].strip() == str(folder / "far.safetensors")
    assert "trackpl track VIDEO --model tiny --checkpoint tiny_far" in command("get", "tiny_far")[1]
    monkeypatch.chdir(tmp_path)
    Path("tiny_far").touch()
    assert resolve("tiny_far", find("tiny").load()) == Path("tiny_far")


@pytest.mark.parametrize(
    ("more", "told"),
    [({"tiny": "far.safetensors"}, "the name 'tiny', which is taken"), (["far"], "must map names to files")],
)
def test_wrong_names_of_shipped_weights_are_told(ship, command, more, told):
    ship(more)
    status, out, err = command()
    assert status == 0 and told in err and "crw_multiscale" in out
