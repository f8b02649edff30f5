import dataclasses
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trackpl.errors import DataError
from trackpl.parsing import read_json, read_npy
from trackpl.shards import decode, encode, read_index, read_members, write_shards
from trackpl.types import Camera, Clip, Flow

T, N, H, W = 5, 11, 20, 26


def make_clip(seed: int = 0, pairs=((0, 1), (1, 2), (3, 1), (4, 0))) -> Clip:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g)

    video = torch.nn.functional.interpolate(rand(1, 3, 3, 3, 3), (T, H, W), mode="trilinear")
    flow = (rand(1, len(pairs), 2, H, W) - 0.5) * 40
    return Clip(
        video=(video.transpose(1, 2) * 255).byte(),
        tracks=rand(1, T, N, 2) * 20,
        visible=rand(1, T, N) > 0.5,
        valid=rand(1, T, N) > 0.2,
        depth=rand(1, T, 1, H, W) * 7 + 1,
        flow=Flow(flow, pairs, rand(1, len(pairs), H, W) > 0.5, rand(1, len(pairs), H, W) > 0.1),
        labels=(rand(1, T, H, W) * 4).long(),
        camera=Camera(rand(1, T, 4), rand(1, T, 4, 4)),
        name=(f"clip {seed}",),
        fps=24.0,
    )


CLIP = make_clip()
MEMBERS = encode(CLIP)


def with_meta(**changes) -> dict[str, bytes]:
    meta = json.loads(MEMBERS["meta.json"]) | changes
    return MEMBERS | {"meta.json": json.dumps(meta).encode()}


def test_round_trip_keeps_every_field():
    out = decode(MEMBERS)
    for field in ("tracks", "visible", "valid", "labels"):
        assert torch.equal(getattr(out, field), getattr(CLIP, field)), field
    assert (out.video.int() - CLIP.video.int()).abs().max() <= 8
    assert (out.depth - CLIP.depth).abs().max() <= 7 * 2**-16
    assert (out.flow.xy - CLIP.flow.xy).abs().max() <= 1 / 128
    assert out.flow.pairs == CLIP.flow.pairs
    assert torch.equal(out.flow.visible, CLIP.flow.visible)
    assert torch.equal(out.flow.valid, CLIP.flow.valid)
    assert torch.equal(out.camera.pose, CLIP.camera.pose)
    assert torch.equal(out.camera.intrinsics, CLIP.camera.intrinsics)
    assert (out.name, out.fps) == (CLIP.name, CLIP.fps)


def test_a_bare_video_is_a_sample_too_and_takes_its_key_for_a_name():
    members = encode(Clip(CLIP.video.float() / 255))
    assert set(members) == {"meta.json", "rgb.bin", "rgb.idx.npy"}
    out = decode(members, name="key")
    assert out.tracks is None and out.flow is None and out.camera is None
    assert out.name == ("key",)
    assert torch.equal(out.video, decode(MEMBERS).video)


def test_wanted_frames_come_in_the_wanted_order_with_their_flow_renumbered():
    whole, frames = decode(MEMBERS), [3, 0, 1]
    out = decode(MEMBERS, frames)
    for field in ("video", "tracks", "visible", "valid", "depth", "labels"):
        assert torch.equal(getattr(out, field), getattr(whole, field)[:, frames]), field
    assert out.flow.pairs == ((1, 2), (0, 2))  # (0, 1) and (3, 1)
    assert torch.equal(out.flow.xy, whole.flow.xy[:, [0, 2]])
    assert torch.equal(out.flow.visible, whole.flow.visible[:, [0, 2]])
    assert decode(MEMBERS, [2, 4]).flow is None


def test_fields_that_are_not_wanted_are_neither_decoded_nor_needed():
    members = {k: v for k, v in MEMBERS.items() if k.startswith(("rgb", "tracks", "meta"))}
    out = decode(members, fields=["tracks"])
    assert out.tracks is not None and out.visible is None and out.depth is None
    with pytest.raises(DataError, match=r"visible\.npy: is missing"):
        decode(members)


def test_motion_that_does_not_fit_the_fixed_point_is_stored_coarser():
    clip = dataclasses.replace(CLIP, flow=Flow(CLIP.flow.xy * 100, CLIP.flow.pairs))
    out = decode(encode(clip)).flow
    assert (out.xy - clip.flow.xy).abs().max() <= 1 / 32
    assert out.visible is None and out.valid is None


def test_infinite_depth_stays_infinite():
    depth = CLIP.depth.clone()
    depth[0, 1, 0, :3] = torch.inf
    out = decode(encode(dataclasses.replace(CLIP, depth=depth))).depth
    assert torch.equal(out.isinf(), depth.isinf())
    assert (out - depth)[~depth.isinf()].abs().max() <= 7 * 2**-16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": CLIP.video.repeat(2, 1, 1, 1, 1)}, "batch of 2"),
        ({"tracks": CLIP.tracks * torch.nan}, "tracks must be finite"),
        ({"labels": CLIP.labels - 1}, "segment ids"),
        ({"depth": -CLIP.depth * torch.inf}, "depth"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        encode(dataclasses.replace(CLIP, **change))


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


BROKEN = {
    "no meta": ({k: v for k, v in MEMBERS.items() if k != "meta.json"}, "meta.json"),
    "meta is text": (MEMBERS | {"meta.json": b"hello"}, "meta.json"),
    "meta is a list": (MEMBERS | {"meta.json": b"[]"}, "meta.json"),
    "other schema": (with_meta(schema=99), "schema 99"),
    "no frames": (with_meta(T=0), "T must be"),
    "infinite rate": (MEMBERS | {"meta.json": MEMBERS["meta.json"].replace(b": 24.0", b": 1e999")}, "fps must be"),
    "true frames": (with_meta(T=True), "T must be"),
    "huge frame": (with_meta(H=10**9), "H must be"),
    "other size": (with_meta(H=H + 1), "rgb.bin"),
    "other length": (with_meta(T=T + 1), "npy"),
    "strange fields": (with_meta(fields=["video", "soul"]), "fields"),
    "pair outside": (with_meta(flow={"pairs": [[0, T]], "scale": 64, "visible": True, "valid": True}), "flow pair"),
    "no scale": (with_meta(flow={"pairs": [], "visible": True, "valid": True}), "scale"),
    "zero scale": (with_meta(flow={"pairs": [], "scale": 0, "visible": True, "valid": True}), "scale"),
    "no depth range": (with_meta(depth={}), "range"),
    "depth of distance": (with_meta(depth={"range": [0, 1], "kind": "distance"}), "kind"),
    "pickle member": (MEMBERS | {"boxes.pyd": b"cos\nsystem\n(S'true'\ntR."}, "boxes.pyd"),
    "object array": (MEMBERS | {"tracks.npy": npy(np.array([{}], dtype=object))}, "tracks.npy"),
    "other dtype": (MEMBERS | {"tracks.npy": npy(np.zeros((T, N, 2)))}, "tracks.npy"),
    "other shape": (MEMBERS | {"tracks.npy": npy(np.zeros((T, N, 3), "f4"))}, "tracks.npy"),
    "not finite": (MEMBERS | {"tracks.npy": npy(np.full((T, N, 2), np.nan, "f4"))}, "tracks.npy"),
    "short array": (MEMBERS | {"tracks.npy": MEMBERS["tracks.npy"][:-1]}, "tracks.npy"),
    "no JPEG": (MEMBERS | {"rgb.bin": bytes(len(MEMBERS["rgb.bin"]))}, "rgb.bin"),
    "cut JPEG": (MEMBERS | {"rgb.bin": MEMBERS["rgb.bin"][:-9]}, "rgb.idx.npy"),
    "offsets down": (
        MEMBERS | {"rgb.idx.npy": npy(np.array([0, 9, 5, 9, 9, len(MEMBERS["rgb.bin"])], "u8"))},
        "rgb.idx",
    ),
    "no zlib": (MEMBERS | {"depth.bin": bytes(len(MEMBERS["depth.bin"]))}, "depth.bin"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_defect_names_sample_and_member_in_one_line(case):
    members, member = BROKEN[case]
    with pytest.raises(DataError) as error:
        decode(members, name="sample-7")
    assert "sample-7" in str(error.value) and member in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bomb_inflates_to_no_more_than_its_plane():
    bomb = zlib.compress(bytes(2**27), 9)
    bombs = MEMBERS | {"seg.bin": bomb * T, "seg.idx.npy": npy(np.arange(T + 1).astype("u8") * len(bomb))}
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(DataError, match=r"seg\.bin"):
        decode(bombs, fields=["labels"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("frames", [[], [0, 0], [-1], [T]])
def test_frames_that_are_not_there_are_refused(frames):
    with pytest.raises(DataError, match=r"frames 0\.\.4"):
        decode(MEMBERS, frames)


def test_an_unknown_field_gets_the_closest_one():
    with pytest.raises(DataError, match="did you mean 'tracks'"):
        decode(MEMBERS, fields=["track"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_gives_a_clip_or_a_data_error(data):
    member = data.draw(st.sampled_from(sorted(MEMBERS)))
    content = bytearray(MEMBERS[member])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            del content[place : place + data.draw(st.integers(1, 40))]
        if not content:
            break
    try:
        assert decode(MEMBERS | {member: bytes(content)}).frames == T
    except DataError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_json_and_npy_or_a_value_error(data):
    header = np.lib.format.magic(1, 0) + len(data).to_bytes(2, "little")
    for read, content in ((read_json, data), (read_npy, data), (read_npy, header + data)):
        try:
            read(content)
        except ValueError:
            continue


@pytest.mark.parametrize(
    "text", [b"[" * 65 + b"]" * 65, b"[" * 10**5, b"NaN", b"Infinity", b"\xff", b'"' + b"a" * 2**24 + b'"']
)
def test_json_out_of_bounds_is_refused(text):
    with pytest.raises(ValueError):
        read_json(text)


# Sets ------------------------------------------------------------------------------------------------------------


def samples(count: int, seed: int = 0):
    return ((f"clip-{i:04d}", encode(make_clip(seed + i))) for i in range(count))


def test_a_set_reads_back_whole(tmp_path):
    path = write_shards(tmp_path / "a", "set", samples(5), samples_per_shard=2, meta={"licence": "CC0"})
    assert path == tmp_path / "a" / "set.index.json"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "set-000000.tar",
        "set-000001.tar",
        "set-000002.tar",
        "set.index.json",
    ]
    for given_path in (path, path.parent, str(path.parent)):
        index = read_index(given_path)
        assert [s.key for s in index.samples] == [f"clip-{i:04d}" for i in range(5)]
        assert index.meta == {"licence": "CC0"} and index.name == "set"
        assert {s.frames for s in index.samples} == {T}
    for i, sample in enumerate(index.samples):
        assert read_members(sample) == encode(make_clip(i))
    assert set(read_members(index.samples[0], ["tracks"])) == {"meta.json", "rgb.bin", "rgb.idx.npy", "tracks.npy"}


def test_the_tars_are_plain_web_datasets(tmp_path):
    import webdataset

    path = write_shards(tmp_path, "set", samples(3), samples_per_shard=2)
    urls = sorted(str(p) for p in path.parent.glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in found] == ["clip-0000", "clip-0001", "clip-0002"]
    assert found[2]["tracks.npy"] == encode(make_clip(2))["tracks.npy"]


def test_the_same_input_gives_the_same_bytes(tmp_path):
    folders = [write_shards(tmp_path / x, "set", samples(3), samples_per_shard=2).parent for x in "ab"]
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second
    assert write_shards(tmp_path / "a", "set", samples(3), samples_per_shard=2).exists()  # once more is no conflict


def test_another_set_is_replaced_only_on_demand(tmp_path):
    write_shards(tmp_path, "set", samples(5), samples_per_shard=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(DataError, match="another set"):
        write_shards(tmp_path, "set", samples(2, seed=9), samples_per_shard=2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    write_shards(tmp_path, "set", samples(2, seed=9), samples_per_shard=2, overwrite=True)
    assert len(read_index(tmp_path).samples) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set-000000.tar", "set.index.json"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    def failing():
        yield from samples(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "set", failing(), samples_per_shard=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"must hold one \*\.index\.json"):
        read_index(tmp_path)


@pytest.mark.parametrize("key", ["a.b", "../a", "/a", "", "a b", "a" * 80])
def test_a_key_that_could_mislead_is_refused(tmp_path, key):
    with pytest.raises(DataError, match="key"):
        write_shards(tmp_path, "set", [(key, MEMBERS)])


def test_a_key_may_come_once(tmp_path):
    with pytest.raises(DataError, match="the key 'a' comes twice"):
        write_shards(tmp_path, "set", [("a", MEMBERS), ("b", MEMBERS), ("a", MEMBERS)], samples_per_shard=1)
    with pytest.raises(DataError, match="no samples"):
        write_shards(tmp_path, "set", [])


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_entry(*keys):
    *inner, last, value = keys

    def change(content):
        for key in inner:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_entry("schema", 2),
        set_entry("shards", "x"),
        set_entry("shards", []),
        set_entry("meta", None),
        set_entry("shards", 0, "file", "../a.tar"),
        set_entry("shards", 0, "file", "/etc/passwd"),
        set_entry("shards", 0, "file", "pipe:true"),
        set_entry("shards", 0, "file", "gone.tar"),
        set_entry("shards", 0, "bytes", 10**6),
        set_entry("shards", 0, "samples", 0, "key", "../x"),
        set_entry("shards", 0, "samples", 0, "key", "clip-0001"),
        set_entry("shards", 0, "samples", 0, "frames", -1),
        set_entry("shards", 0, "samples", 0, "members", "tracks.npy", [512, 10**12]),
        set_entry("shards", 0, "samples", 0, "members", "tracks.npy", [-512, 10]),
        set_entry("shards", 0, "samples", 0, "members", "a.pyd", [512, 10]),
    ],
)
def test_a_broken_index_is_refused_in_one_line(tmp_path, change):
    path = write_shards(tmp_path, "set", samples(2))
    edit(path, change)
    with pytest.raises(DataError, match=r"set\.index\.json") as error:
        read_index(path)
    assert "\n" not in str(error.value)


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_index(tmp_path / "nothing")
    (tmp_path / "text.index.json").write_text("hello")
    with pytest.raises(DataError, match="is no index of shards"):
        read_index(tmp_path)
    (tmp_path / "two.index.json").write_text("{}")
    with pytest.raises(DataError, match=r"text\.index\.json, two\.index\.json"):
        read_index(tmp_path)


def test_a_shard_that_is_not_what_the_index_says_is_noticed(tmp_path):
    path = write_shards(tmp_path, "set", samples(2))
    edit(path, lambda c: c["shards"][0]["samples"][0]["members"]["tracks.npy"].__setitem__(0, 1024))
    with pytest.raises(DataError, match=r"clip-0000.*set-000000\.tar"):
        read_members(read_index(path).samples[0])
    assert read_members(read_index(path).samples[1])
    shard = tmp_path / "set-000000.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match="clip-0001"):
        read_members(read_index(path).samples[1])


def test_json_may_be_nested_to_the_limit():
    assert read_json(b"[" * 64 + b"1" + b"]" * 64)
