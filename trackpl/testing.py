"""Conformance suite: what every method must do, whatever is inside it.

    from trackpl.testing import check_method

    def test_conformance():
        check_method("mymethod")

Each check is a public function that can be run by itself while a method is being written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trackpl.checkpoints import load
from trackpl.method import Method
from trackpl.plugins import find
from trackpl.streams import Stream, join
from trackpl.types import Clip, Tracks

Make = Callable[[], Method]


def moving_clip(
    frames: int = 4, size: tuple[int, int] = (128, 128), points: int = 8, batch: int = 1, seed: int = 0
) -> Clip:
    """Make a textured plane that moves by (2, 1) pixels a frame, with exact tracks of points that stay inside."""
    h, w = size
    g = torch.Generator().manual_seed(seed)
    reach_x, reach_y = 2 * frames, frames
    canvas = torch.zeros(batch, 3, h + reach_y, w + reach_x)
    for cell in (4, 8, 16, 32):
        coarse = torch.rand(batch, 3, (h + reach_y) // cell + 2, (w + reach_x) // cell + 2, generator=g)
        canvas += F.interpolate(coarse, canvas.shape[-2:], mode="bicubic", align_corners=False) / 4
    video = torch.stack(
        [canvas[..., reach_y - t : reach_y - t + h, reach_x - 2 * t : reach_x - 2 * t + w] for t in range(frames)], 1
    )
    start = torch.rand(batch, 1, points, 2, generator=g) * torch.tensor([max(w - reach_x, 1), max(h - reach_y, 1)])
    step = torch.stack([2.0 * torch.arange(frames), 1.0 * torch.arange(frames)], -1)
    tracks = start + step[None, :, None]
    seen = ((tracks >= 0) & (tracks <= torch.tensor([w, h]))).all(-1)
    name = tuple(f"moving-{seed}-{i}" for i in range(batch))
    return Clip(video=video.clamp(0, 1), tracks=tracks, visible=seen, valid=torch.ones_like(seen), name=name, fps=24.0)


def check_method(
    name: str, *, train_size: tuple[int, int] = (128, 128), train_frames: int = 2, **init_args: Any
) -> list[str]:
    """Run every check on the method called `name`; return what was checked.

    Args:
        name: short name of an installed plugin.
        train_size: height and width of clips that the method can train on.
        train_frames: frames of such a clip.
        **init_args: options of the method; choose a small model, the checks run it some thirty times.

    Raises:
        AssertionError: a check failed; the message says which and how.
    """
    cls: type[Method] = find(name).load()

    def make() -> Method:
        torch.manual_seed(0)
        return cls(**init_args).eval()

    done = []
    for check in (
        check_info,
        check_sizes,
        check_queries_return,
        check_points,
        check_batch,
        check_leaves_no_gradient,
        check_half_precision,
        check_stream,
        check_propagate,
    ):
        check(make)
        done.append(check.__name__)
    check_checkpoint(name, make, init_args)
    done.append("check_checkpoint")
    if cls.losses is not Method.losses:
        clip = moving_clip(train_frames, train_size)
        check_gradients(make, clip)
        check_overfit(make, clip)
        done += ["check_gradients", "check_overfit"]
    if cls.weights is not None and not init_args:
        check_mirror(load(name))
        done.append("check_mirror")
    return done


def check_info(make: Make) -> None:
    """Check that a method says what it is and has a native capability."""
    method = make()
    info = getattr(type(method), "info", None)
    assert info is not None and info.title and info.paper and info.licence, "info needs a title, a paper and a licence"
    native = [c for c in ("track", "flow", "track_dense") if method.has(c)]
    assert native, "a method needs at least one of track, flow, track_dense"


def check_sizes(make: Make) -> None:
    """Check that odd sizes, tiny ones and a single frame work, and give back pixels of the clip."""
    method = make()
    for frames, size in ((1, (64, 64)), (2, (97, 131)), (3, (33, 150))):
        clip = moving_clip(frames, size, points=3)
        tracks = method.track(clip, _queries(clip))
        _check_shapes(tracks, clip, 3)
    clip = moving_clip(2)
    _check_shapes(method.track(clip, torch.zeros(1, 0, 3)), clip, 0)
    byte = Clip(video=(clip.video * 255).round().to(torch.uint8))
    same = Clip(video=byte.video.float() / 255)
    _close(method.track(byte, _queries(clip)), method.track(same, _queries(clip)), "uint8 and float video differ")


def check_queries_return(make: Make) -> None:
    """Check that a query on any frame comes back as itself, visible."""
    clip = moving_clip(4, points=6)
    queries = _queries(clip)
    queries[..., 0] = torch.tensor([0, 1, 2, 3, 3, 0])
    tracks = make().track(clip, queries)
    rows = queries[..., 0].long()
    xy = tracks.xy.gather(1, rows[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]
    gap = (xy - queries[..., 1:]).abs().max()
    assert gap < 1e-2, f"a point is {gap:.3g} px away from its own query in its query frame"
    seen = tracks.visible.gather(1, rows[:, None])
    assert seen.min() > 0.5, "a point is hidden in its own query frame"


def check_points(make: Make) -> None:
    """Check that permuting points permutes the result; for independent points a subset gives the same rows."""
    method, clip = make(), moving_clip(3, points=6)
    queries = _queries(clip)
    queries[..., 0] = torch.tensor([0, 1, 2, 0, 1, 2])
    tracks = method.track(clip, queries)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    _close(_rows(tracks, order), method.track(clip, queries[:, order]), "permuted points")
    if not method.info.joint_points:
        some = torch.tensor([4, 1])
        _close(_rows(tracks, some), method.track(clip, queries[:, some]), "a subset of the points")


def check_batch(make: Make) -> None:
    """Check that a video gives the same result whatever else is in its batch."""
    method = make()
    both = moving_clip(3, points=4, batch=2)
    queries = _queries(both)
    queries[1, :, 0] = 2
    together = method.track(both, queries)
    for i in range(2):
        one = both.map(lambda x, i=i: x[i : i + 1])  # type: ignore[misc]
        part = Tracks(together.xy[i : i + 1], together.visible[i : i + 1])
        _close(part, method.track(one, queries[i : i + 1]), f"video {i} alone and in a batch of two")


def check_leaves_no_gradient(make: Make) -> None:
    """Check that tracking neither builds a graph nor changes the method."""
    method, clip = make(), moving_clip(2)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    tracks = method.track(clip, _queries(clip))
    assert not tracks.xy.requires_grad and not tracks.visible.requires_grad, "track leaves a gradient behind"
    changed = [k for k, v in method.state_dict().items() if not torch.equal(v, before[k])]
    assert not changed, f"track changes the method's state: {changed}"


def check_half_precision(make: Make) -> None:
    """Check that under bf16 autocast tracks are finite and close to pixels of the frame."""
    method, clip = make(), moving_clip(2)
    with torch.autocast("cpu", torch.bfloat16):
        tracks = method.track(clip, _queries(clip))
    assert tracks.xy.isfinite().all() and tracks.visible.isfinite().all(), "NaN or infinity under bf16 autocast"


def check_stream(make: Make, frames: int = 10, size: tuple[int, int] = (64, 64)) -> None:
    """Check that streams count right, forget on reset, do not depend on how frames come, and keep what they claim.

    Claims are `Stream.equals_track` and `Stream.adds_alike`. Better, `frames` are more than the method's window has.
    """
    method, clip = make(), moving_clip(frames, size, points=4)
    queries = _queries(clip)[0]
    queries[2:, 0] = torch.tensor([frames // 2, frames - 1])
    stream = method.stream(queries)
    assert (stream.frames, stream.settled) == (0, 0), "a new stream has taken frames"
    whole = run_stream(stream, clip.video[0], [frames])
    _check_shapes(whole, clip, 4)
    assert not whole.xy.requires_grad, "a stream leaves a gradient behind"
    t = torch.arange(frames)[:, None]
    early = t < queries[:, 0]
    rest = torch.where(early[..., None], whole.xy[0] - queries[:, 1:], 0).abs().max()
    assert rest == 0 and not whole.visible[0][early].any(), "before its query a point is not hidden at its query"
    own = torch.where((t == queries[:, 0])[..., None], whole.xy[0] - queries[:, 1:], 0).abs().max()
    assert own < 1e-2, f"a point is {own:.3g} px away from its own query in its query frame"
    stream.reset()
    stream.add(queries)
    _close(whole, run_stream(stream, clip.video[0], [1, 2, 3]), "frames in other portions, after a reset")
    if stream.equals_track:
        found = method.track(clip, queries[None])
        xy, visible = found.xy.masked_fill(early[None, ..., None], 0), found.visible.masked_fill(early, 0)
        same = Tracks(whole.xy.masked_fill(early[None, ..., None], 0), whole.visible)
        _close(Tracks(xy, visible), same, "streamed and whole, which the stream claims to be equal")
    stream = method.stream(queries[:2])
    stream.step(clip.video[0, : frames // 2])
    settled = stream.settled
    stream.add(queries[2:])
    late = run_stream(stream, clip.video[0, frames // 2 :], [2])
    assert late.xy.shape[1:3] == (frames - settled, 4), f"{late.xy.shape[1]} frames after {settled} of {frames}"
    if stream.adds_alike:
        _close(Tracks(whole.xy[:, settled:], whole.visible[:, settled:]), late, "points added later and at the start")


def run_stream(stream: Stream, video: Tensor, portions: Sequence[int]) -> Tracks:
    """Feed frames (T, 3, H, W) to a stream in portions of these sizes, over and over, and finish it: all its tracks."""
    parts, begin, k = [], 0, 0
    while begin < len(video):
        n = portions[k % len(portions)]
        before = stream.settled
        parts.append(stream.step(video[begin : begin + n]))
        begin, k = begin + n, k + 1
        assert stream.settled - before == parts[-1].xy.shape[1], "a stream hands out other frames than it counts"
    parts.append(stream.finish())
    assert stream.settled == stream.frames, "a finished stream has frames left"
    return join(parts)


def check_propagate(make: Make) -> None:
    """Check that labels go through a clip: frame 0 as given, shares that add up, at any grid and any size.

    Of a method with a way of its own also that the order of classes and the rest of the batch change nothing.
    """
    method = make()
    native = method.has("propagate")
    clip = moving_clip(2, (64, 64), batch=2 if native else 1)
    labels = torch.zeros(len(clip.video), 3, 64, 64)
    labels[:, 1, 8:18, 8:18], labels[:, 2, 8:18, 24:32] = 1, 1
    labels[:, 0] = 1 - labels.sum(1)
    found = method.propagate(clip, labels)
    _check_labels(found, labels, 2)
    if not native:
        return  # the platform's way: it has tests of its own
    _check_labels(method.propagate(Clip(video=clip.video[:, :1]), labels), labels, 1)
    coarse = F.adaptive_avg_pool2d(labels, method.label_size((64, 64)))
    _check_labels(method.propagate(clip, coarse), coarse, 2)
    order = torch.tensor([2, 0, 1])
    gap = (method.propagate(clip, labels[:, order]) - found[:, :, order]).abs().max()
    assert gap < 1e-3, f"classes in another order: labels differ by {gap:.3g}"
    for i in range(2):
        alone = method.propagate(Clip(video=clip.video[i : i + 1]), labels[i : i + 1])
        gap = (alone - found[i : i + 1]).abs().max()
        assert gap < 1e-3, f"video {i} alone and in a batch of two: labels differ by {gap:.3g}"
    odd = moving_clip(3, (33, 150))
    _check_labels(method.propagate(odd, labels[:1, :, :11, :50]), labels[:1, :, :11, :50], 3)


def check_gradients(make: Make, clip: Clip) -> None:
    """Check that losses are finite scalars, also under bf16, and give finite gradients."""
    method = make().train()
    for half in (False, True):
        method.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = method.losses(clip)
        assert losses, "losses returns nothing"
        for key, value in losses.items():
            assert value.ndim == 0 and value.isfinite(), f"loss '{key}' is not a finite scalar: {value} (bf16: {half})"
        torch.stack(list(losses.values())).sum().backward()
        grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
        assert grads, "no parameter has a gradient"
        bad = [k for k, g in grads.items() if not g.isfinite().all()]
        assert not bad, f"gradients are not finite: {bad} (bf16: {half})"
        assert any(g.abs().max() > 0 for g in grads.values()), "every gradient is zero"


def check_checkpoint(name: str, make: Make, init_args: dict[str, Any]) -> None:
    """Check that, saved and loaded by name, a method gives the same tracks."""
    method, clip = make(), moving_clip(2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "method.ckpt"
        hyper = {k: v for k, v in method.hparams.items() if k not in ("optimizer", "lr_scheduler")}
        torch.save({"state_dict": method.state_dict(), "hyper_parameters": hyper}, path)
        again = load(name, path, **init_args)
    _close(method.track(clip, _queries(clip)), again.track(clip, _queries(clip)), "a saved and loaded method")


def check_overfit(make: Make, clip: Clip, steps: int = 20) -> None:
    """Check that twenty steps of Adam on one clip lower its loss."""
    method = make().train()
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    values = []
    for _ in range(steps + 1):
        torch.manual_seed(0)  # the same random choices inside the losses every time
        loss = torch.stack(list(method.losses(clip).values())).sum()
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raised = f"{steps} steps on one clip raise its loss from {values[0]:.4g} to {values[-1]:.4g}"
    assert values[-1] < values[0], raised


def check_mirror(method: Method, tolerance: float = 1.0) -> None:
    """Check that, with shipped weights, a mirrored video gives mirrored tracks to `tolerance` pixels, in the median."""
    clip = moving_clip(4, (128, 160), points=32)
    queries = _queries(clip)
    tracks = method.track(clip, queries)
    width = clip.size[1]
    mirrored = queries * queries.new_tensor([1, -1, 1]) + queries.new_tensor([0, width, 0])
    other = method.track(Clip(video=clip.video.flip(-1)), mirrored)
    back = other.xy * other.xy.new_tensor([-1, 1]) + other.xy.new_tensor([width, 0])
    gap = (back - tracks.xy).norm(dim=-1).median()
    assert gap < tolerance, f"tracks of a mirrored video differ by {gap:.2f} px (median); is a pixel centre off?"


def _queries(clip: Clip) -> Tensor:
    assert clip.tracks is not None
    start = clip.tracks[:, 0]
    return torch.cat([torch.zeros_like(start[..., :1]), start], -1)


def _rows(tracks: Tracks, index: Tensor) -> Tracks:
    return Tracks(tracks.xy[:, :, index], tracks.visible[:, :, index])


def _check_shapes(tracks: Tracks, clip: Clip, n: int) -> None:
    b, t = clip.video.shape[:2]
    assert tracks.xy.shape == (b, t, n, 2), f"xy has shape {tuple(tracks.xy.shape)}, expected {(b, t, n, 2)}"
    assert tracks.visible.shape == (b, t, n), f"visible has shape {tuple(tracks.visible.shape)}"
    assert tracks.xy.isfinite().all(), f"tracks are not finite for frames of {clip.size}"
    if n:
        low, high = tracks.visible.min(), tracks.visible.max()
        assert low >= 0 and high <= 1, f"visible is a probability, got {low:.3g} to {high:.3g}"


def _check_labels(found: Tensor, labels: Tensor, frames: int) -> None:
    b, *rest = labels.shape
    assert found.shape == (b, frames, *rest), f"labels have shape {tuple(found.shape)}, not {(b, frames, *rest)}"
    assert not found.requires_grad, "propagate leaves a gradient behind"
    assert torch.equal(found[:, 0], labels), "the labels of frame 0 are not those that were given"
    low, high = found.min(), found.max()
    assert low > -1e-3 and high < 1 + 1e-3, f"shares of labels are in [0, 1], got {low:.3g} to {high:.3g}"
    gap = (found.sum(2) - labels.sum(1, keepdim=True)).abs().max()
    assert gap < 1e-3, f"shares of labels that add up to 1 no longer do, by {gap:.3g}"


def _close(a: Tracks, b: Tracks, what: str, pixels: float = 0.02) -> None:
    gap = (a.xy - b.xy).abs().max() if a.xy.numel() else torch.zeros(())
    assert gap < pixels, f"{what}: tracks differ by {gap:.3g} px"
    seen = (a.visible - b.visible).abs().max() if a.visible.numel() else torch.zeros(())
    assert seen < 0.02, f"{what}: visibility differs by {seen:.3g}"
