"""TAP-Vid: how well points are followed, and how well it is known when they are hidden.

Doersch et al., "TAP-Vid: A Benchmark for Tracking Any Point in a Video", 2022; equal to
`compute_tapvid_metrics` of google-deepmind/tapnet. Positions are pixels of a 256x256 frame, whatever the
size of the video.

OA         occlusion accuracy: share of frames in which visibility is right
delta_x    share of the visible points whose prediction is less than x pixels away
jaccard_x  true positives / (true and false positives and false negatives); positive: visible and within x
delta_avg, AJ   their means over x = 1, 2, 4, 8, 16
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from trackpl.errors import DataError, closest
from trackpl.types import Clip, Tracks

Queried = Literal["first", "strided"]

THRESHOLDS = (1, 2, 4, 8, 16)
SIZE = (256, 256)
FIGURES = (
    "AJ",
    "delta_avg",
    "OA",
    *(f"delta_{x}" for x in THRESHOLDS),
    *(f"jaccard_{x}" for x in THRESHOLDS),
)


def first_queries(tracks: Tensor, visible: Tensor, valid: Tensor | None = None) -> Tensor:
    """Query every track where it is first visible (and valid).

    Args:
        tracks: (B, T, N, 2) pixels.
        visible: (B, T, N) bool.
        valid: (B, T, N) bool.

    Returns:
        (B, N, 3) of (t, x, y), row n for track n. A track that is never visible gets the centre of the first
        pixel of frame 0, which lies inside any frame; `TapVid` does not score it.
    """
    seen = visible if valid is None else visible & valid
    return _queries(tracks, seen, seen.int().argmax(1))  # argmax: the first of equals; 0 where never seen


def strided_queries(tracks: Tensor, visible: Tensor, valid: Tensor | None = None, stride: int = 5) -> Tensor:
    """Query every track in each of the frames 0, stride, 2 stride, ...

    Args:
        tracks: (B, T, N, 2) pixels.
        visible: (B, T, N) bool.
        valid: (B, T, N) bool.
        stride: frames between queries.

    Returns:
        (B, K * N, 3) of (t, x, y) for K frames, row k * N + n for track n in frame k * stride. A track
        that is not visible there gets the centre of the first pixel; `TapVid.update_clip` does not score
        that row.
    """
    b, frames, n = visible.shape
    t = torch.arange(0, frames, stride, device=visible.device).repeat_interleave(n).expand(b, -1)
    return _queries(tracks, visible if valid is None else visible & valid, t)


def sample_queries(
    tracks: Tensor, visible: Tensor, queried: Queried = "first", stride: int = 5
) -> tuple[Tensor, Tensor]:
    """Sample the queries of one video as the benchmark does, without rows for tracks that are hidden there.

    Args:
        tracks: (T, N, 2) pixels.
        visible: (T, N) bool.
        queried: the benchmark's protocol.
        stride: frames between queries, for "strided".

    Returns:
        (M, 3) of (t, x, y), and (M,) the track of each row: the truth of the rows is ``tracks[:, index]``.
    """
    _check_protocol(queried)
    one = tracks[None], visible[None]
    queries = (first_queries(*one) if queried == "first" else strided_queries(*one, stride=stride))[0]
    index = torch.arange(visible.shape[1], device=visible.device).repeat(len(queries) // max(visible.shape[1], 1))
    keep = visible[queries[:, 0].long(), index]
    return queries[keep], index[keep]


def rescale(xy: Tensor, size: tuple[int, int], to: tuple[int, int] = SIZE) -> Tensor:
    """Carry positions (..., 2) from frames of `size` (H, W) to frames of `to`: x W'/W, y H'/H; float64."""
    return xy.double() * xy.new_tensor([to[1] / size[1], to[0] / size[0]], dtype=torch.float64)


def tapvid_scores(
    queries: Tensor,
    tracks: Tensor,
    visible: Tensor,
    pred_tracks: Tensor,
    pred_visible: Tensor,
    valid: Tensor | None = None,
    *,
    queried: Queried = "first",
    per_track: bool = False,
) -> dict[str, Tensor]:
    """Score each video by the sums over all its tracks and frames, or each track by itself.

    Args:
        queries: (B, N, 3) of (t, x, y); only t is used, rounded half to even.
        tracks: (B, T, N, 2) truth in pixels of a 256x256 frame.
        visible: (B, T, N) bool, truth.
        pred_tracks: (B, T, N, 2) in pixels of a 256x256 frame; what is not finite is a miss.
        pred_visible: (B, T, N) bool.
        valid: (B, T, N) bool; what is not valid is in no sum.
        queried: "first" scores the frames after the query, "strided" all but the query's.
        per_track: give figures of shape (B, N) instead of (B,).

    Returns:
        The `FIGURES` as fractions in float64, (B,) or (B, N); NaN where a ratio is 0/0.
    """
    _check_protocol(queried)
    t = torch.arange(tracks.shape[1], device=tracks.device)[:, None]
    q = queries[:, None, :, 0].round()  # half to even, as the reference's rint
    evaluated = t > q if queried == "first" else t != q  # E (B, T, N)
    if valid is not None:
        evaluated = evaluated & valid
    v, v_hat = evaluated & visible, evaluated & pred_visible  # V and V^ under E

    def total(mask: Tensor) -> Tensor:
        return mask.sum(1 if per_track else (1, 2), dtype=torch.float64)

    squared = (pred_tracks.double() - tracks.double()).square().sum(-1)
    scores = {"OA": total(evaluated & (pred_visible == visible)) / total(evaluated)}  # sum[o^ = o] / sum E
    for x in THRESHOLDS:
        within = squared < x**2  # W: strict, and never so for NaN and infinity
        hit = within & v
        scores[f"delta_{x}"] = total(hit) / total(v)  # sum[W V] / sum V
        false = v_hat & ~(visible & within)  # V^ (not V or not W)
        scores[f"jaccard_{x}"] = total(hit & v_hat) / (total(v) + total(false))
    scores["delta_avg"] = torch.stack([scores[f"delta_{x}"] for x in THRESHOLDS]).mean(0)
    scores["AJ"] = torch.stack([scores[f"jaccard_{x}"] for x in THRESHOLDS]).mean(0)
    return {name: scores[name] for name in FIGURES}


class TapVid(Metric):
    """Mean over all videos of all processes of the TAP-Vid figures, times 100.

    Args:
        queried: the benchmark's protocol, "first" or "strided".
        threshold: a point is predicted visible if its probability is above this.
        kwargs: of `torchmetrics.Metric`.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    defined: Tensor
    videos: Tensor

    def __init__(self, queried: Queried = "first", threshold: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_protocol(queried)
        self.queried: Queried = queried
        self.threshold = threshold
        self._latest = torch.empty(0, len(FIGURES))
        # Sums and not a list of videos: a list state cannot be gathered from a process that saw no video.
        self.add_state("total", torch.zeros(len(FIGURES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("defined", torch.zeros(len(FIGURES), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("videos", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(
        self,
        queries: Tensor,
        gt_tracks: Tensor,
        gt_visible: Tensor,
        pred_tracks: Tensor,
        pred_visible: Tensor,
        valid: Tensor | None = None,
        size: tuple[int, int] = SIZE,
    ) -> None:
        """Add a batch of videos, row n of everything belonging to query n.

        Args:
            queries: (B, N, 3) of (t, x, y).
            gt_tracks: (B, T, N, 2) pixels; a row that is never visible (and valid) is in no sum.
            gt_visible: (B, T, N) bool.
            pred_tracks: (B, T, N, 2) pixels.
            pred_visible: (B, T, N) probability.
            valid: (B, T, N) bool.
            size: height and width of the frames whose pixels the positions are.

        Raises:
            DataError: shapes that do not belong together.
        """
        b, t, n = gt_visible.shape
        for name, tensor, shape in (
            ("queries", queries, (b, n, 3)),
            ("true tracks", gt_tracks, (b, t, n, 2)),
            ("predicted tracks", pred_tracks, (b, t, n, 2)),
            ("predicted visibility", pred_visible, (b, t, n)),
            ("validity", gt_visible if valid is None else valid, (b, t, n)),
        ):
            if tensor.shape != shape:
                raise DataError(f"the {name} must have shape {shape}, got {tuple(tensor.shape)}")
        valid = torch.ones_like(gt_visible) if valid is None else valid
        valid = valid & (gt_visible & valid).any(1, keepdim=True)
        scores = tapvid_scores(
            queries.to(self.device),
            rescale(gt_tracks.to(self.device), size),
            gt_visible.to(self.device),
            rescale(pred_tracks.to(self.device), size),
            pred_visible.to(self.device) > self.threshold,
            valid.to(self.device),
            queried=self.queried,
        )
        self._latest = torch.stack(list(scores.values()), -1)  # (B, figures)
        self.total = self.total + self._latest.nansum(0)
        self.defined = self.defined + (~self._latest.isnan()).sum(0)
        self.videos = self.videos + b

    def update_clip(self, clip: Clip, queries: Tensor, tracks: Tracks) -> list[dict[str, Any]]:
        """Add the videos of a clip and return a row for each: its name and its figures times 100.

        Args:
            clip: with `tracks` and `visible`.
            queries: those of `first_queries` or of `strided_queries`, as `queried` says.
            tracks: predicted for them, in pixels of the clip.

        Raises:
            DataError: a clip without truth, or queries that are not of its tracks.
        """
        if clip.tracks is None or clip.visible is None:
            raise DataError("TAP-Vid figures need a clip with both `tracks` and `visible`")
        b, _, n = clip.visible.shape
        rows = queries.shape[1]
        copies = rows // n if n else 0
        if rows != copies * n or (self.queried == "first" and rows != n):
            multiple = "" if self.queried == "first" else " for each queried frame"
            raise DataError(f"a clip of {n} tracks needs {n} queries{multiple}, got {rows}")
        seen = clip.visible if clip.valid is None else clip.visible & clip.valid
        valid = torch.ones_like(seen) if clip.valid is None else clip.valid
        valid = valid.repeat(1, 1, copies)
        if self.queried == "strided":  # a track that is hidden in the frame of the row was not queried there
            frame = queries[:, None, :, 0].long().to(seen.device)
            valid = valid & seen.repeat(1, 1, copies).gather(1, frame)
        self.update(
            queries,
            clip.tracks.repeat(1, 1, copies, 1),
            clip.visible.repeat(1, 1, copies),
            tracks.xy,
            tracks.visible,
            valid,
            size=clip.size,
        )
        first = int(self.videos) - b
        names = clip.name or [f"video {first + i}" for i in range(b)]
        values = (100 * self._latest).tolist()
        return [{"name": name} | dict(zip(FIGURES, row, strict=True)) for name, row in zip(names, values, strict=True)]

    def compute(self) -> dict[str, Tensor]:
        """Return the `FIGURES` times 100, the number of `videos` and of undefined figures, `nan_entries`."""
        figures = 100 * self.total / self.defined  # 0/0 = NaN where no video defines a figure
        return dict(zip(FIGURES, figures, strict=True)) | {
            "videos": self.videos.double(),
            "nan_entries": (self.videos - self.defined).sum().double(),
        }


def _queries(tracks: Tensor, seen: Tensor, t: Tensor) -> Tensor:
    """Query track m % N in frame t[b, m]; (B, T, N, 2), (B, T, N) and (B, M) to (B, M, 3)."""
    batch = torch.arange(len(t), device=t.device)[:, None]
    n = torch.arange(t.shape[1], device=t.device) % max(tracks.shape[2], 1)
    # A track hidden here may be anywhere, even at NaN; methods refuse queries outside the frame.
    xy = torch.where(seen[batch, t, n][..., None], tracks[batch, t, n], 0.5)
    return torch.cat([t[..., None].to(xy), xy], -1)


def _check_protocol(queried: str) -> None:
    if queried not in get_args(Queried):
        raise DataError(f"there is no TAP-Vid protocol '{queried}'; {closest(queried, get_args(Queried))}")
