import io
import random
import struct
import subprocess
import sys
import time
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from trackpl_prep.files.flow import Motion, flow_sample, read_flo, read_kitti_flow, write_flo, write_kitti_flow

from trackpl.errors import DataError
from trackpl.shards import decode

sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))
flows = sizes.flatmap(lambda s: arrays("<f4", (*s, 2), elements=st.floats(-1e6, 1e6, width=32)))
codes = sizes.flatmap(lambda s: arrays("<u2", (*s, 3)))


@given(flows)
def test_flo_round_trip(flow):
    data = write_flo(flow)
    assert data[:4] == b"PIEH" and struct.unpack("<ii", data[4:12]) == (flow.shape[1], flow.shape[0])
    again = read_flo(data)
    assert again.dtype == np.float32 and again.flags.writeable
    np.testing.assert_array_equal(again, flow)


@given(codes)
def test_kitti_maps_that_opencv_wrote(code):
    _, png = cv2.imencode(".png", code[..., ::-1])
    flow, valid = read_kitti_flow(png.tobytes())
    np.testing.assert_array_equal(valid, code[..., 2] > 0)
    expected = (code[..., :2].astype(np.float64) - 32768) / 64
    np.testing.assert_array_equal(flow, np.where(valid[..., None], expected, 0))


@given(flows, st.randoms(use_true_random=False))
def test_opencv_reads_the_kitti_maps_that_we_write(flow, rng):
    valid = np.array([[rng.random() < 0.7 for _ in row] for row in flow])
    flow[~valid] = np.nan  # unknown: must not matter
    png = write_kitti_flow(flow, valid)
    code = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert code.dtype == np.uint16
    expected = np.clip(np.rint(64 * np.where(valid[..., None], flow, 0).astype(np.float64) + 32768), 0, 65535)
    np.testing.assert_array_equal(code[..., :2], expected * valid[..., None])
    np.testing.assert_array_equal(code[..., 2], valid)
    again, known = read_kitti_flow(png)
    np.testing.assert_array_equal(known, valid)
    near = (np.abs(flow) < 511).all(-1) & valid
    assert np.abs(again[near] - flow[near]).max(initial=0) <= 1 / 128


def test_kitti_maps_round_to_the_nearest_step_and_are_cut():
    flow = np.array([[[1 / 64, -1 / 64], [0.009, -0.009], [600, -600]]], np.float32)
    again, valid = read_kitti_flow(write_kitti_flow(flow))
    assert valid.all()
    np.testing.assert_array_equal(again[0, 0], flow[0, 0])
    np.testing.assert_array_equal(again[0, 1], [1 / 64, -1 / 64])  # cut off instead of rounded it would be 0 and -1/64
    np.testing.assert_array_equal(again[0, 2], [(65535 - 32768) / 64, -512])


@pytest.mark.parametrize("level", range(5))
def test_every_filter_of_png(level):
    """KITTI's files use all five; each row of this one uses one of them, as a writer of PNG may."""
    rng = np.random.default_rng(level)
    code = rng.integers(0, 65536, (6, 5, 3), dtype=np.uint16)
    raw = code.astype(">u2").tobytes()
    rows = [raw[i * 30 : i * 30 + 30] for i in range(6)]
    lines = b"".join(
        bytes([level]) + _filtered(level, row, above) for row, above in zip(rows, [bytes(30), *rows[:-1]], strict=True)
    )
    flow, valid = read_kitti_flow(png(5, 6, lines))
    np.testing.assert_array_equal(valid, code[..., 2] > 0)
    np.testing.assert_array_equal(flow[valid], ((code[..., :2].astype(np.float64) - 32768) / 64)[valid])


def _filtered(kind: int, row: bytes, above: bytes) -> bytes:
    def predict(i: int) -> int:
        a, b, c = (row[i - 6] if i >= 6 else 0), above[i], (above[i - 6] if i >= 6 else 0)
        nearest = min((a, b, c), key=lambda x: abs(a + b - c - x))
        return (0, a, b, (a + b) // 2, nearest)[kind]

    return bytes((x - predict(i)) % 256 for i, x in enumerate(row))


def png(w: int, h: int, lines: bytes, depth: int = 16, colour: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no .flo file"),
        (b"PIEH\x01\0\0\0", "no .flo file"),
        (b"HEIP" + struct.pack("<ii", 1, 1) + bytes(8), "no .flo file"),
        (b"PIEH" + struct.pack("<ii", 2, 1) + bytes(8), "1x2 pixels, which take 28 bytes, but has 20"),
        (b"PIEH" + struct.pack("<ii", 1, 1) + bytes(12), "take 20 bytes, but has 24"),
        (b"PIEH" + struct.pack("<ii", -1, -1) + bytes(8), "is -1x-1"),
        (b"PIEH" + struct.pack("<ii", 0, 5), "is 5x0"),
        (b"PIEH" + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bytes(8), "is 2147483647x2147483647"),
        (b"PIEH" + struct.pack("<ii", 8192, 8192) + bytes(8), "is 8192x8192"),
        (b"PIEH" + struct.pack("<iiff", 1, 1, 0, float("nan")), "not finite"),
    ],
)
def test_flo_files_that_lie(data, message):
    with pytest.raises(DataError, match=message):
        read_flo(data, "x.flo")


def _grey(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (3, 2)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no PNG image"),
        (_grey("RGB"), "8 bits and colour type 2"),
        (_grey("I;16"), "16 bits and colour type 0"),
        (png(2, 2, bytes(25)), "no whole PNG image"),
        (png(2, 2, bytes(26))[:-20], "no whole PNG image"),
        (png(2, 2, bytes([9] + [0] * 25)), "no whole PNG image"),
        (png(2**31 - 1, 2**31 - 1, bytes(26)), "is 2147483647x2147483647"),
        (png(8192, 8192, bytes(26)), "is 8192x8192"),
        (png(0, 2, bytes(2)), "is 2x0"),
    ],
)
def test_kitti_maps_that_lie(data, message):
    with pytest.raises(DataError, match=message):
        read_kitti_flow(data, "x.png")


BOMB = """
import resource, struct, sys, zlib
from trackpl.errors import DataError
from trackpl_prep.files.flow import read_kitti_flow, write_kitti_flow
import numpy as np
small = write_kitti_flow(np.zeros((2, 2, 2)))
stream = zlib.compressobj()
zeros = b"".join(stream.compress(bytes(10**6)) for _ in range(400)) + stream.flush()
idat = b"IDAT" + zeros
end = small.index(b"IEND") - 4
bomb = small[:33] + struct.pack(">I", len(zeros)) + idat + struct.pack(">I", zlib.crc32(idat)) + small[end:]
read_kitti_flow(small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_kitti_flow(bomb)
except DataError:
    pass
print(len(bomb), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_does_not_grow():
    """400 MB of zeros in 400 kB, in a map that says that it has four pixels."""
    run = subprocess.run([sys.executable, "-c", BOMB], capture_output=True, text=True, check=True, timeout=60)
    size, growth = map(int, run.stdout.split())
    assert size < 10**6
    assert growth < 32 * 1024  # kB


def test_any_bytes_give_numbers_or_a_message():
    rng = random.Random(0)
    numbers = np.random.default_rng(0).normal(0, 30, (7, 9, 2)).astype(np.float32)
    for read, whole in ((read_flo, write_flo(numbers)), (read_kitti_flow, write_kitti_flow(numbers))):
        refused = 0
        for _ in range(600):
            data = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
            for _ in range(rng.randrange(1, 5)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                read(bytes(data), "the broken one")
            except DataError as error:
                assert str(error).startswith("the broken one") and "\n" not in str(error)
                refused += 1
        assert refused > 150


def test_paths_name_themselves(tmp_path):
    path = tmp_path / "frame_0001.flo"
    with pytest.raises(DataError, match=r"frame_0001\.flo cannot be read: No such file"):
        read_flo(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"frame_0001\.flo is no \.flo file"):
        read_flo(str(path))
    with pytest.raises(DataError, match=r"frame_0001\.flo is no PNG"):
        read_kitti_flow(path)


@pytest.mark.parametrize("write", [write_flo, write_kitti_flow])
def test_only_flows_are_written(write):
    with pytest.raises(DataError, match=r"shape \(H, W, 2\), got \(4, 5, 3\)"):
        write(np.zeros((4, 5, 3)))
    with pytest.raises(DataError, match="0x5"):
        write(np.zeros((0, 5, 2)))


def test_kitti_maps_need_numbers_where_they_are_valid():
    flow = np.full((1, 2, 2), np.nan)
    with pytest.raises(DataError, match="finite"):
        write_kitti_flow(flow, np.array([[True, False]]))
    with pytest.raises(DataError, match="valid is"):
        write_kitti_flow(flow, np.array([True, False]))


def test_a_kitti_map_of_full_size_is_fast():
    """README of the data sets: about 10 ms, where a reader in Python takes 270."""
    rng = np.random.default_rng(0)
    flow = np.cumsum(rng.normal(0, 0.1, (375, 1242, 2)), 1)
    data = write_kitti_flow(flow, rng.random((375, 1242)) < 0.2)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        read_kitti_flow(data)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


def test_a_sample_is_without_loss():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    motions = [
        Motion((s, t), rng.normal(0, 300, (6, 8, 2)).astype(np.float32), rng.random((6, 8)) < 0.5)
        for s, t in ((0, 2), (1, 0))
    ]
    clip = decode(flow_sample(frames, motions, name="a/b", licence="free", fps=5, source={"n": 1}))
    np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), frames)
    np.testing.assert_array_equal(clip.flow.xy[0].permute(0, 2, 3, 1), np.stack([m.flow for m in motions]))
    np.testing.assert_array_equal(clip.flow.visible[0], np.stack([m.visible for m in motions]))
    assert clip.flow.pairs == ((0, 2), (1, 0)) and clip.flow.valid is None and clip.name == ("a/b",) and clip.fps == 5


def test_sizes_that_differ_are_named():
    frames = np.zeros((2, 6, 8, 3), np.uint8)
    flow = np.zeros((6, 8, 2), np.float32)
    for motion, word in (
        (Motion((0, 1), flow[:5]), "flow"),
        (Motion((0, 1), flow, np.ones((8, 6), bool)), "visible mask"),
    ):
        with pytest.raises(DataError, match=rf"scene 3: the {word} of the pair \(0, 1\) is"):
            flow_sample(frames, [motion], name="scene 3", licence="")
