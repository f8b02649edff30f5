"""Samples from servers: every one arrives and is right, whatever the server does; the cache keeps to its limit."""

import asyncio
import contextlib
import errno
import hashlib
import logging
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import pytest
from filelock import FileLock
from flaky_server import at_random, serve
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import assume, given
from hypothesis import strategies as st

from trackpl import cache as cache_module
from trackpl.addresses import beside, is_remote, local_path, shown
from trackpl.cache import Cache, default_cache
from trackpl.errors import DataError, UnreachableError
from trackpl.remote import Patience, read_file, read_sample

QUICK = Patience(first=0.002, longest=0.02, connect=2.0, stall=0.15)
SHARD = random.Random(0).randbytes(200_000)
PLACES = [(0, 512), *((512 + 9_000 * n, 9_000) for n in range(20))]


def digest(data):
    return hashlib.sha256(data).hexdigest()


def facts(address, place, shard=SHARD):
    """Return the arguments of `read_sample` for the piece `place` of a shard."""
    offset, size = place
    return address, len(shard), digest(shard), offset, size, digest(shard[offset : offset + size])


def piece(place, shard=SHARD):
    return shard[place[0] : sum(place)]


@pytest.fixture
def store(tmp_path):
    return Cache(tmp_path / "cache", 10**6)


@pytest.fixture
def no_cache(tmp_path):
    return Cache(tmp_path / "cache", 0)


@pytest.fixture
def read(store):
    return partial(read_sample, patience=QUICK, cache=store)


def size_of(folder):
    """Return the bytes of all entries, finished or not, at one moment: under the lock, a file that moves once."""
    with FileLock(folder / "locks" / "used"):
        files = {}
        for path in (*folder.glob("partial/*"), *folder.glob("??/*")):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                files[stat.st_ino] = stat.st_size
    return sum(files.values())


def entries(store):
    return {path.name for path in store.folder.glob("??/*")}


# A server that fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_arrives_and_every_retry_is_logged(read, caplog, seed):
    faults = ("drop", "stall", "truncate", "wrong", "500", "503", "429")
    with serve({"a.tar": SHARD}, fault=at_random(0.4, seed, faults)) as server:
        address = server.url("a.tar")
        for place in PLACES:
            assert read(*facts(address, place)) == piece(place)
        failed = [(wanted, fault) for _, wanted, fault in server.requests if fault]
    told = [r.getMessage() for r in caplog.records if r.name == "trackpl.remote" and r.levelno == logging.WARNING]
    assert len(failed) == len(told) > 3
    for (wanted, _), line in zip(failed, told, strict=True):
        assert f"{address} bytes {wanted.removeprefix('bytes=')}: try " in line
        assert re.search(r"try \d of 8 failed: .+; again in [0-9.]+ s", line)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("drop", "the connection was dropped"),
        ("refuse", "the connection was dropped"),
        ("stall", "no bytes for 0.15 s"),
        ("truncate", "the answer is 4500 of 9000 bytes short"),
        ("wrong", "its SHA-256 is not the one in the index"),
        ("503", "the server answers 503 Service Unavailable"),
        ("429", "the server answers 429 Too Many Requests"),
    ],
)
def test_a_fault_is_named_and_tried_again(read, caplog, fault, cause):
    twice = iter([fault, fault])  # aiohttp itself asks once more where there was no answer at all
    with serve({"a.tar": SHARD}, fault=lambda _: next(twice, None)) as server:
        assert read(*facts(server.url("a.tar"), PLACES[1])) == piece(PLACES[1])
        assert len(server.requests) == 3
    assert {r.getMessage().split(" failed: ")[1].split(";")[0] for r in caplog.records} == {cause}


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("drop", UnreachableError, "tried 3 times"),
        ("stall", UnreachableError, "no bytes for"),
        ("500", UnreachableError, "answers 500"),
        ("wrong", DataError, "its SHA-256 is not the one in the index"),
        ("truncate", DataError, "bytes short"),
    ],
)
def test_patience_ends(store, fault, kind, says):
    patience = Patience(tries=3, first=0.001, stall=0.1)
    with serve({"a.tar": SHARD}, fault=lambda _: fault) as server:
        with pytest.raises(DataError, match=says) as caught:
            read_sample(*facts(server.url("a.tar"), PLACES[1]), patience=patience, cache=store)
        assert type(caught.value) is kind
        assert len(server.requests) == 3
    assert not entries(store)


def test_a_server_that_is_not_there_is_unreachable(store):
    with serve({}) as server:
        address = server.url("a.tar")
    with pytest.raises(UnreachableError, match="TRACKPL_TRIES"):
        read_sample(*facts(address, PLACES[0]), patience=Patience(tries=2, first=0.001), cache=store)


def test_a_trickle_counts_as_a_stall(store):
    patience = Patience(tries=1, connect=0.2, stall=0.2, slowest=1e6)
    with (
        serve({"a.tar": SHARD}, fault=lambda _: "trickle") as server,
        pytest.raises(UnreachableError, match=r"slower than 1e\+06 bytes a second"),
    ):
        read_sample(*facts(server.url("a.tar"), PLACES[1]), patience=patience, cache=store)


@pytest.mark.parametrize(
    ("path", "fault", "says"),
    [
        ("b.tar", None, "404 Not Found: there is no such file"),
        ("a.tar", "403", "403 Forbidden: it may not be read"),
        ("a.tar", "401", "401 Unauthorized: it wants a password"),
        ("a.tar", "400", "400 Bad Request"),
        ("a.tar", "gzip", "compresses"),
        ("short.tar", None, "416 .*shorter than the index says"),
    ],
)
def test_what_will_not_change_is_not_tried_again(read, path, fault, says):
    with serve({"a.tar": SHARD, "short.tar": SHARD[:100]}, fault=lambda _: fault) as server:
        with pytest.raises(DataError, match=says) as caught:
            read(*facts(server.url(path), PLACES[1]))
        assert isinstance(caught.value, UnreachableError) == (fault in ("401", "403"))  # which must stop a run
        assert len(server.requests) == 1


def test_the_server_may_ask_for_a_pause(read, monkeypatch):
    pauses, once = [], iter(["503"])
    monkeypatch.setattr("trackpl.remote.time.sleep", pauses.append)
    with serve({"a.tar": SHARD}, fault=lambda _: next(once, None), headers={"Retry-After": "3600"}) as server:
        read(*facts(server.url("a.tar"), PLACES[0]))
    assert pauses == [QUICK.longest]  # but not for any length of time


def test_pauses_double_with_jitter_that_leaves_the_seeded_generators_alone():
    patience = Patience()
    state = random.getstate()
    for number, longest in enumerate([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0], start=1):
        assert all(longest / 2 <= patience.pause(number) <= longest for _ in range(20))
    assert random.getstate() == state


def test_patience_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("TRACKPL_TRIES", "3")
    monkeypatch.setenv("TRACKPL_STALL", "1.5")
    assert Patience.from_environment() == Patience(tries=3, stall=1.5)
    for wrong in ("0", "-1", "many", "1e9"):
        monkeypatch.setenv("TRACKPL_TRIES", wrong)
        with pytest.raises(DataError, match="TRACKPL_TRIES"):
            Patience.from_environment()


# A server without ranges -------------------------------------------------------------------------------------


def test_without_ranges_the_shard_is_fetched_once(read, store, caplog):
    with serve({"a.tar": SHARD}, fault=lambda _: "whole") as server, ThreadPoolExecutor(8) as pool:
        jobs = [facts(server.url("a.tar"), place) for place in PLACES]
        assert list(pool.map(lambda job: read(*job), jobs)) == [piece(place) for place in PLACES]
        assert sum(wanted is None for _, wanted, _ in server.requests) == 1
    assert entries(store) == {digest(SHARD)}
    assert "gives no ranges; fetching all 200000 bytes" in caplog.text


def test_a_flaky_server_without_ranges(read, store, caplog):
    faults = iter(["whole", "drop", "wrong", "truncate", "stall", "500"])
    with serve({"a.tar": SHARD}, fault=lambda _: next(faults, "whole")) as server:
        assert [read(*facts(server.url("a.tar"), p)) for p in PLACES] == [piece(p) for p in PLACES]
        assert len(server.requests) == 7
    assert entries(store) == {digest(SHARD)}
    assert caplog.text.count("failed") == 5


@pytest.mark.parametrize("limit", [0, 50_000])
def test_without_ranges_or_room_it_reads_up_to_the_sample(tmp_path, limit):
    shard = random.Random(2).randbytes(5_000_000)
    with serve({"a.tar": shard}, fault=lambda _: "whole") as server:
        for place in (PLACES[0], PLACES[1], (2_345_678, 2_000_000), (4_990_000, 10_000)):
            job = facts(server.url("a.tar"), place, shard)
            assert read_sample(*job, patience=QUICK, cache=Cache(tmp_path, limit)) == piece(place, shard)


def test_a_shard_without_ranges_that_is_another_one_is_refused(read, store):
    with serve({"a.tar": SHARD[::-1]}, fault=lambda _: "whole") as server, pytest.raises(DataError, match="SHA-256"):
        read(*facts(server.url("a.tar"), PLACES[1]))
    assert size_of(store.folder) == 0


# Index files, facts, addresses -------------------------------------------------------------------------------


def test_a_file_of_any_length_up_to_the_limit_is_read():
    once = iter(["drop", "503"])
    with serve({"x.index.json": SHARD, "empty": b""}, fault=lambda _: next(once, None)) as server:
        assert read_file(server.url("x.index.json"), len(SHARD), patience=QUICK) == SHARD
        assert read_file(server.url("empty"), 10, patience=QUICK) == b""
        with pytest.raises(DataError, match="longer than 1999 bytes"):
            read_file(server.url("x.index.json"), 1999, patience=QUICK)


@pytest.mark.parametrize(
    "change",
    [
        {"offset": -1},
        {"size": 0},
        {"size": len(SHARD) + 1},
        {"size": 2**40, "shard_bytes": 2**41},
        {"sha256": "../../etc/passwd"},
        {"shard_sha256": "A" * 64},
    ],
)
def test_facts_that_cannot_be_are_refused(read, change):
    names = ("shard", "shard_bytes", "shard_sha256", "offset", "size", "sha256")
    with pytest.raises(DataError, match="the index"):
        read(**(dict(zip(names, facts("http://127.0.0.1:1/a.tar", PLACES[0]), strict=True)) | change))


@pytest.mark.parametrize(
    ("address", "remote"),
    [
        ("http://host/a.index.json", True),
        ("HTTPS://user:pw@host:8443/a/b.index.json?key=1", True),
        ("http://[::1]:80/a", True),
        ("s3://bucket/a/{0..3}.tar", True),
        ("gs://bucket/a", True),
        ("gcs://bucket/a", True),
        ("a.index.json", False),
        ("./pipe:cat", False),
        ("C:\\data\\a.index.json", False),
        ("file:///data/a.index.json", False),
    ],
)
def test_addresses(address, remote):
    assert is_remote(address) is remote


@pytest.mark.parametrize(
    "address",
    [
        "pipe:cat /etc/passwd",
        "ftp://host/a",
        "memory://a",
        "simplecache::http://host/a",
        "http://host/a::s3://bucket/b",
        "http://host/a.tar::http://host/b.tar",
        "s3://bucket/a::http://h/b",
        "zip://a::http://h/b",
        "http:/host/a",
        "http:///a",
        "http://host:99999/a",
        "http://host/a b",
        "http://host/a\nb",
        "http://host/a#part",
        "s3://bucket",
        "s3:///key",
        "file://elsewhere/a",
        "file:a",
        "a\0b",
        "gs:bucket/a",
        "data:text/plain,x",
    ],
)
def test_addresses_that_are_refused(address):
    with pytest.raises(DataError, match=r"allowed: a local path.*http://.*s3://.*gs://"):
        is_remote(address)


@given(st.sampled_from(["", "http://h", "https://", "s3://b/", "gcs://", "file:///"]), st.text(max_size=30))
def test_any_text_is_remote_or_local_or_refused(start, rest):
    text = start + rest
    try:
        remote = is_remote(text)
    except DataError:
        return
    if remote:
        assert text.lower().startswith(("http://", "https://", "s3://", "gs://", "gcs://"))
        assert is_remote(beside(text, "a-000000.tar"))
        with pytest.raises(DataError):
            local_path(text)
    else:
        assert local_path(text) == Path(text) or text.lower().startswith("file:/")


@given(
    st.from_regex(r"[A-Za-z][A-Za-z0-9+.-]{1,9}", fullmatch=True),
    st.sampled_from([":", "::", "://", ":///", "::http://h/", "://h/::s3://b/"]),
    st.from_regex(r"[a-z/.]{0,9}", fullmatch=True),
)
def test_no_other_scheme_gets_through(scheme, between, rest):
    assume(scheme.lower() not in ("http", "https", "s3", "gs", "gcs", "file"))
    with pytest.raises(DataError):
        is_remote(scheme + between + rest)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30))
def test_a_file_address_is_its_path(name):
    path = Path("/data") / name.lstrip("/")
    assert local_path(path.as_uri()) == path
    assert not is_remote(path)


def test_the_file_beside():
    assert beside("https://h/a/x.index.json?sig=1", "x-000000.tar") == "https://h/a/x-000000.tar?sig=1"
    assert beside("http://h", "x.tar") == "http://h/x.tar"
    assert beside("gcs://b/x.index.json", "x.tar") == "gs://b/x.tar"
    assert beside("s3://b/what?/x.index.json", "x.tar") == "s3://b/what?/x.tar"
    assert Path(beside("d/x.index.json", "x.tar")) == Path("d/x.tar")


def test_no_secret_is_shown(read, caplog):
    assert shown("https://me:secret@h/a?key=secret") == "https://h/a?..."
    once = iter(["500"])
    with serve({"a.tar": SHARD}, fault=lambda _: next(once, "404")) as server:
        address = server.url("a.tar?key=secret").replace("//", "//me:secret@")
        with pytest.raises(DataError) as caught:
            read(*facts(address, PLACES[0]))
    assert "try 1 of 8" in caplog.text
    assert "secret" not in caplog.text + str(caught.value)


# Object stores -----------------------------------------------------------------------------------------------


@pytest.fixture
def implement():
    """Let a test register a file system for a scheme; take it out afterwards."""
    before = dict(_registry)
    yield partial(fsspec.register_implementation, clobber=True)
    _registry.clear()
    _registry.update(before)
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("scheme", ["s3", "gs", "gcs"])
def test_object_stores(implement, read, store, scheme):
    implement(scheme.replace("gcs", "gs"), MemoryFileSystem)
    MemoryFileSystem().pipe({"/bucket/set/a.tar": SHARD, "/bucket/set/x.index.json": b"{}", "/bucket/empty": b""})
    address = f"{scheme}://bucket/set/x.index.json"
    assert read_file(address, 2, patience=QUICK) == b"{}"
    assert read_file(f"{scheme}://bucket/empty", 2, patience=QUICK) == b""
    with pytest.raises(DataError, match="longer than 1 bytes"):
        read_file(address, 1, patience=QUICK)
    for place in PLACES:
        assert read(*facts(beside(address, "a.tar"), place)) == piece(place)
    assert len(entries(store)) == len(PLACES)
    with pytest.raises(DataError, match="FileNotFoundError") as caught:
        read(*facts(f"{scheme}://bucket/none.tar", PLACES[0], SHARD[::-1]))
    assert not isinstance(caught.value, UnreachableError)


class Bucket(AsyncFileSystem):
    """A store that raises or waits as the list `faults` says, then answers; asynchronous as s3fs and gcsfs are."""

    protocol = "s3"
    faults: list = []  # noqa: RUF012

    async def _cat_file(self, path, start=None, end=None, **_):
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault:
            await asyncio.sleep(fault)
        assert path == "bucket/a.tar"
        return SHARD[start:end]


@pytest.mark.parametrize(
    "fault", [OSError(errno.EBUSY, "SlowDown"), TimeoutError(), ConnectionResetError(), RuntimeError("?"), 5.0]
)
def test_an_object_store_that_fails_is_asked_again(implement, store, caplog, monkeypatch, fault):
    implement("s3", Bucket)
    monkeypatch.setattr(Bucket, "faults", [fault])
    patience = Patience(first=0.001, connect=0.1, stall=0.1)
    assert read_sample(*facts("s3://bucket/a.tar", PLACES[2]), patience=patience, cache=store) == piece(PLACES[2])
    assert "s3://bucket/a.tar bytes 9512-18511: try 1 of 8 failed" in caplog.text


class NoCredentialsError(Exception):
    """As botocore has it."""


@pytest.mark.parametrize(
    "fault", [PermissionError("AccessDenied"), OSError(errno.EINVAL, "InvalidRange"), NoCredentialsError("none")]
)
def test_an_object_store_that_refuses_is_not_asked_again(implement, read, monkeypatch, fault):
    implement("s3", Bucket)
    monkeypatch.setattr(Bucket, "faults", [fault] * 8)
    with pytest.raises(DataError, match=type(fault).__name__) as caught:
        read(*facts("s3://bucket/a.tar", PLACES[2]))
    assert not isinstance(caught.value, UnreachableError)
    assert len(Bucket.faults) == 7


@pytest.mark.parametrize(("scheme", "module"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(implement, read, monkeypatch, scheme, module):
    _registry.pop(scheme, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf'pip install "trackpl\[{scheme}\]"'):
        read(*facts(f"{scheme}://bucket/a.tar", PLACES[0]))


# Processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_children_read_too(tmp_path, no_cache, method):
    read = partial(read_sample, patience=QUICK, cache=no_cache)
    with serve({"a.tar": SHARD}, fault=at_random(0.2, 3, ("drop", "500", "wrong"))) as server:
        jobs = [facts(server.url("a.tar"), place) for place in PLACES]
        assert read(*jobs[0]) == piece(PLACES[0])  # the parent has a connection, and a thread, when it forks
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            assert list(pool.map(read, *zip(*jobs, strict=True))) == [piece(place) for place in PLACES]
            assert [read(*job) for job in jobs] == [piece(place) for place in PLACES]
        assert read(*jobs[0]) == piece(PLACES[0])


def test_a_process_ends_in_silence():
    script = "import sys; from trackpl.remote import read_file; assert read_file(sys.argv[1], 10**6)"
    with serve({"a.tar": SHARD}) as server:
        command = [sys.executable, "-W", "always", "-c", script, server.url("a.tar")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_memory_does_not_grow(no_cache):
    read = partial(read_sample, patience=QUICK, cache=no_cache)
    shard = random.Random(1).randbytes(2**20)
    with serve({"a.tar": shard}, fault=at_random(0.05, 5, ("drop", "500", "wrong"))) as server:
        jobs = [facts(server.url("a.tar"), (n * 2**14, 2**14), shard) for n in range(64)]
        for n in range(100):
            read(*jobs[n % 64])
        tracemalloc.start()
        start = tracemalloc.get_traced_memory()[0]
        for n in range(300):
            read(*jobs[n % 64])
        grown = tracemalloc.get_traced_memory()[0] - start
        tracemalloc.stop()
    assert grown < 2**20  # of 4.9 MB that were read


# The cache ---------------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_not_fetched_again(read, store):
    with serve({"a.tar": SHARD}) as server:
        for _ in range(2):
            assert read(*facts(server.url("a.tar"), PLACES[1])) == piece(PLACES[1])
        assert len(server.requests) == 1
        [path] = store.folder.glob("??/*")
        path.write_bytes(b"x" * 9_000)
        assert read(*facts(server.url("a.tar"), PLACES[1])) == piece(PLACES[1])
        assert len(server.requests) == 2
    assert path.read_bytes() == piece(PLACES[1])


def test_a_broken_shard_in_the_cache_is_fetched_again(read, store):
    with serve({"a.tar": SHARD}, fault=lambda _: "whole") as server:
        read(*facts(server.url("a.tar"), PLACES[1]))
        path = store.folder / digest(SHARD)[:2] / digest(SHARD)
        path.write_bytes(SHARD[:-1])
        assert read(*facts(server.url("a.tar"), PLACES[1])) == piece(PLACES[1])
    assert path.read_bytes() == SHARD


def test_what_was_used_longest_ago_goes_first(tmp_path):
    store = Cache(tmp_path, 10_000)
    data = [bytes([n]) * 1_000 for n in range(11)]
    for n, entry in enumerate(data[:10]):
        store.write(digest(entry), entry)
        os.utime(tmp_path / digest(entry)[:2] / digest(entry), (n, n))
    assert len(entries(store)) == 10
    assert store.read(digest(data[0]), 1_000) == data[0]
    store.write(digest(data[10]), data[10])
    assert entries(store) == {digest(entry) for entry in data} - {digest(data[1])}


def test_the_files_are_listed_seldom(tmp_path, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(cache_module.os, "scandir", lambda path: listed.append(path) or scandir(path))
    store = Cache(tmp_path, 50_000)
    for n in range(300):
        entry = n.to_bytes(2, "big") * 250
        store.write(digest(entry), entry)
    assert listed.count(tmp_path) <= 1 + 300 / 10


def fill(folder, limit, seed, seconds):
    """Write and read entries of any size for a while; return the largest sum of sizes that was seen."""
    draw, store, most = random.Random(seed), Cache(folder, limit), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        entry = draw.randbytes(2) * draw.randint(1, 4_000)
        store.write(digest(entry), entry)
        assert store.read(digest(entry), len(entry)) in (entry, None)
        most = max(most, size_of(folder))
    return most


def test_many_processes_keep_to_the_limit(tmp_path):
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(4, multiprocessing.get_context(method)) as pool:
        most = list(pool.map(partial(fill, tmp_path, 100_000), range(4), [1.0] * 4))
    assert 50_000 < max(most) <= 100_000
    for path in tmp_path.glob("??/*"):
        assert digest(path.read_bytes()) == path.name
    assert not list((tmp_path / "partial").iterdir())


def test_what_killed_processes_leave_is_dropped(tmp_path):
    store = Cache(tmp_path, 10_000)
    entry = b"x" * 6_000
    context = store.new(digest(entry), 6_000)
    context.__enter__()  # and it never ends
    [left] = (tmp_path / "partial").iterdir()
    other = b"y" * 6_000
    store.write(digest(other), other)
    assert not entries(store)  # there may be life in it
    assert store.keeps(1)
    os.utime(left, (0, 0))
    store.write(digest(other), other)
    assert entries(store) == {digest(other)}
    assert not left.exists()


def test_a_lost_sum_is_counted_anew(tmp_path):
    store = Cache(tmp_path, 10_000)
    for n in range(9):
        store.write(digest(bytes([n]) * 1_000), bytes([n]) * 1_000)
    for text in ("", "none", "0 0"):
        (tmp_path / "used").write_text(text)
        store.write(digest(text.encode() * 500 + b"."), text.encode() * 500 + b".")
        assert int((tmp_path / "used").read_text().split()[0]) == size_of(tmp_path) <= 10_000


def test_a_reader_keeps_what_it_has_open(tmp_path):
    store = Cache(tmp_path, 1_500)
    store.write(digest(b"a" * 1_000), b"a" * 1_000)
    [path] = tmp_path.glob("??/*")
    with open(path, "rb") as file:
        store.write(digest(b"b" * 1_000), b"b" * 1_000)
        assert entries(store) == {digest(b"b" * 1_000)}
        assert file.read() == b"a" * 1_000


@pytest.fixture
def full_disk(monkeypatch):
    """Let every file of the cache end on a device that is full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    reserve = Cache._reserve

    def on_full_disk(self, sha256, size):
        partial = reserve(self, sha256, size)
        partial.unlink()
        partial.symlink_to("/dev/full")
        return partial

    monkeypatch.setattr(Cache, "_reserve", on_full_disk)


@pytest.mark.parametrize("fault", [None, "whole"])
def test_a_full_disk_is_reported_once_and_reading_goes_on(full_disk, read, store, caplog, fault):
    with serve({"a.tar": SHARD}, fault=lambda _: fault) as server:
        for place in PLACES[:4]:
            assert read(*facts(server.url("a.tar"), place)) == piece(place)
    assert caplog.text.count("going on without the cache") == 1
    assert "No space left on device" in caplog.text
    assert size_of(store.folder) == 0


def test_a_cache_that_cannot_be_made_is_reported_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store = Cache(tmp_path / "file" / "cache", 10**6)
    with serve({"a.tar": SHARD}) as server:
        for place in PLACES[:4]:
            assert read_sample(*facts(server.url("a.tar"), place), patience=QUICK, cache=store) == piece(place)
    assert caplog.text.count("going on without the cache") == 1


def test_one_waits_while_another_fetches(store):
    events = []

    def other():
        with store.fetching("ab", 5):
            events.append("other")

    with store.fetching("ab", 5):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.1)
        events.append("first")
    thread.join()
    assert events == ["first", "other"]


def test_the_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKPL_CACHE", str(tmp_path))
    monkeypatch.delenv("TRACKPL_CACHE_GB", raising=False)
    assert default_cache() == Cache(tmp_path / "shards", 20 * 10**9)
    monkeypatch.setenv("TRACKPL_CACHE_GB", "0.5")
    assert default_cache().limit == 5 * 10**8
    monkeypatch.setenv("TRACKPL_CACHE_GB", "0")
    with serve({"a.tar": SHARD}) as server:
        read_sample(*facts(server.url("a.tar"), PLACES[1]), patience=QUICK)
    assert not (tmp_path / "shards").exists()
    for wrong in ("-1", "much", "nan", "inf"):
        monkeypatch.setenv("TRACKPL_CACHE_GB", wrong)
        with pytest.raises(DataError, match="TRACKPL_CACHE_GB"):
            default_cache()
