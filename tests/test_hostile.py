"""Shards from strangers: nothing is executed, followed or inflated, whatever the bytes."""

import builtins
import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trackpl_prep.check import index_folder

from trackpl.encoding import encode
from trackpl.errors import DataError
from trackpl.images import decode_image
from trackpl.shards import decode, read_index, read_members, write_shards
from trackpl.types import Camera, Clip, Flow

GOLDEN = np.load(Path(__file__).parent / "golden" / "data_metrics" / "hostile_shards.npz")
HOSTILE = sorted(k for k in GOLDEN.files if k.endswith("__tar"))


def full_clip(i: int = 0) -> Clip:
    g = torch.Generator().manual_seed(i)
    t, n, h, w = 3, 5, 8, 12
    seen = torch.ones(1, t, n, dtype=torch.bool)
    mask = torch.ones(1, 1, h, w, dtype=torch.bool)
    return Clip(
        torch.randint(256, (1, t, 3, h, w), generator=g, dtype=torch.uint8), torch.rand(1, t, n, 2, generator=g), seen,
        seen, torch.rand(1, t, n, generator=g), torch.zeros(1, n, 3), torch.rand(1, t, 1, h, w, generator=g),
        Flow(torch.rand(1, 1, 2, h, w, generator=g), ((0, 1),), mask, mask, torch.rand(1, 1, h, w, generator=g)),
        torch.randint(5, (1, t, h, w), generator=g),
        Camera(torch.ones(1, t, 4), torch.eye(4).expand(1, t, 4, 4)), ("x",), 12.0,
    )  # fmt: skip


MEMBERS = encode(full_clip())


def tar_of(*entries) -> bytes:
    """A tar of (name, bytes) or of ready TarInfo objects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        for entry in entries:
            name, data = entry if isinstance(entry, tuple) else (entry, b"")
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def link(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.rgb.bin")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


SAMPLE = [(f"a.{e}", m) for e, m in MEMBERS.items()]
OURS = {
    "symlink": tar_of(link(tarfile.SYMTYPE), *SAMPLE),
    "hard link": tar_of(link(tarfile.LNKTYPE), *SAMPLE),
    "device": tar_of(link(tarfile.CHRTYPE), *SAMPLE),
    "fifo": tar_of(link(tarfile.FIFOTYPE), *SAMPLE),
    "folder": tar_of(link(tarfile.DIRTYPE), *SAMPLE),
    "climbing": tar_of(("../a.rgb.bin", b"x"), *SAMPLE),
    "absolute": tar_of(("/tmp/a.rgb.bin", b"x"), *SAMPLE),
    "backslash": tar_of(("..\\a.rgb.bin", b"x"), *SAMPLE),
    "dot": tar_of((".a.rgb.bin", b"x"), *SAMPLE),
    "no extension": tar_of(("a", b"x"), *SAMPLE),
    "newline": tar_of(("a\n.rgb.bin", b"x"), *SAMPLE),
    "other extension": tar_of(*SAMPLE, ("a.pickle", b"cposix\nsystem\n.")),
    "capital": tar_of(*SAMPLE[:-1], ("a.META.json", SAMPLE[-1][1])),
    "missing member": tar_of(*SAMPLE[1:]),
    "unlisted member": tar_of(
        *[(f"a.{e}", m) for e, m in encode(dataclasses.replace(full_clip(), flow=None)).items()], ("a.flow.bin", b"")
    ),
    "no meta data": tar_of(*[s for s in SAMPLE if s[0] != "a.meta.json"]),
    "cut": tar_of(*SAMPLE)[:-12000],
    "long names": tar_of(*SAMPLE).replace(b"ustar\x0000", b"ustar\x0000").replace(b"a.camera", b"\xff.camera"),
    "not a tar": b"not a tar" * 1000,
    "gzip": __import__("gzip").compress(tar_of(*SAMPLE)),
    "zeros": bytes(100),
}
PAX = io.BytesIO()
with tarfile.open(fileobj=PAX, mode="w:", format=tarfile.PAX_FORMAT, pax_headers={"path": "../../etc/x"}) as _tar:
    _tar.addfile(tarfile.TarInfo("a.rgb.bin"))
OURS["extended header"] = PAX.getvalue()


@pytest.mark.parametrize("case", [*HOSTILE, *OURS])
def test_hostile_archives_are_refused_and_nothing_runs(case, tmp_path):
    data = OURS[case] if case in OURS else GOLDEN[case].tobytes()
    (tmp_path / "set-000000.tar").write_bytes(data)
    before = set(tmp_path.iterdir())
    tracemalloc.start()
    with pytest.raises(DataError) as error:
        index_folder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "set-000000.tar" in str(error.value) and "\n" not in str(error.value)
    assert not hasattr(builtins, "TRACKPL_PWNED") and set(tmp_path.iterdir()) == before and peak < 2**25


def test_a_good_archive_is_accepted(tmp_path):
    other = [(f"b.{e}", m) for e, m in encode(full_clip(1)).items()]
    (tmp_path / "set-000000.tar").write_bytes(tar_of(*SAMPLE, *other))
    index = read_index(index_folder(tmp_path, licence="mine"))
    assert [s.key for s in index.samples] == ["a", "b"] and index.meta["licence"] == "mine"
    assert decode(read_members(index.samples[0])).tracks.equal(full_clip().tracks)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), base=st.sampled_from([tar_of(*SAMPLE), b"", bytes(10240)]), edits=st.integers(0, 6),
    cut=st.none() | st.integers(0, 20000),
)  # fmt: skip
def test_any_bytes_give_samples_or_one_line(data, base, edits, cut, tmp_path_factory):
    content = bytearray(base)
    for _ in range(edits if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content += data.draw(st.binary(max_size=64)) if not base else b""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "set-000000.tar").write_bytes(content[:cut])
    try:
        index = read_index(index_folder(folder))
        for sample in index.samples:
            decode(read_members(sample))
    except DataError as error:
        assert "\n" not in str(error)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), extension=st.sampled_from(sorted(MEMBERS)), edits=st.integers(1, 8), cut=st.booleans())
def test_any_bytes_in_a_member_give_a_clip_or_one_line(data, extension, edits, cut):
    content = bytearray(MEMBERS[extension])
    for _ in range(edits):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if cut:
        del content[data.draw(st.integers(0, len(content))) :]
    try:
        clip = decode(MEMBERS | {extension: bytes(content)}, name="a")
        assert clip.video.shape[-1] <= 8192
    except DataError as error:
        assert "\n" not in str(error) and "'a'" in str(error)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), edits=st.integers(1, 5))
def test_any_index_gives_a_set_or_one_line(data, edits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    path = write_shards(folder, "set", [("a", MEMBERS)])
    content = bytearray(path.read_bytes())
    for _ in range(edits):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(32, 126))
    path.write_bytes(content)
    try:
        for sample in read_index(path).samples:
            decode(read_members(sample))
    except DataError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../set-000000.tar"}, "only tar files beside the index"),
        ({"file": "/etc/passwd"}, "only tar files beside the index"),
        ({"file": "pipe:cat x"}, "only tar files beside the index"),
        ({"sha256": "0" * 63}, "no SHA-256"),
        ({"bytes": 10**6}, "missing or has not"),
        ({"bytes": -1}, "whole number"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(change, message, tmp_path):
    path = write_shards(tmp_path, "set", [("a", MEMBERS)])
    content = json.loads(path.read_text())
    content["shards"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_index(path)


@pytest.mark.parametrize("address", ["pipe:cat set.index.json", "ftp://x/y.json", "simplecache::http://x/y.json"])
def test_addresses_of_other_kinds_are_refused(address):
    with pytest.raises(DataError, match="allowed: a local path"):
        read_index(address)


BOMB = """
import resource, sys, zlib, struct
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
from trackpl.images import decode_image
from trackpl.errors import DataError
try:
    decode_image(Path(sys.argv[1]).read_bytes(), "bomb")
    print("decoded")
except DataError as error:
    print("refused", error)
"""


def png(w: int, h: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = w.to_bytes(4, "big") + h.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "said"),
    [
        (png(60000, 60000, bytes(2**20)), "refused bomb is 60000x60000"),
        (png(8, 8, bytes(2**29)), "decoded"),  # far more rows than the header calls for
    ],
)
def test_an_image_makes_no_more_than_its_header_allows(image, said, tmp_path):
    (tmp_path / "x").write_bytes(image)
    command = [sys.executable, "-c", BOMB, tmp_path / "x", str(2**33)]
    assert said in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"\x89PNG\r\n\x1a\n" * 9])
def test_what_is_no_image_is_named(data):
    with pytest.raises(DataError, match=r"^frame 3 "):
        decode_image(data, "frame 3")


@settings(max_examples=200, deadline=None)
@given(data=st.data(), lossless=st.booleans())
def test_any_image_bytes_give_pixels_or_one_line(data, lossless):
    members = encode(full_clip(), None if lossless else 95)
    end = int(np.load(io.BytesIO(members["rgb.idx.npy"]))[1])
    content = bytearray(members["rgb.bin"][:end])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_image(bytes(content[: data.draw(st.none() | st.integers(0, end))]), "it")
        assert pixels.ndim == 3 and pixels.dtype == np.uint8
    except DataError as error:
        assert str(error).startswith("it ") and "\n" not in str(error)
