"""`trackpl data check` and `trackpl data index`: whether a set is whole, what is in it, and how it looks."""

from __future__ import annotations

import json
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trackpl.archives import describe
from trackpl.augment import resize
from trackpl.draw import contact_sheet, draw_tracks, flow_to_rgb, save_png
from trackpl.errors import DataError, UnreachableError
from trackpl.shards import Index, Sample, check_name, decode, index_text, open_members, read_index, verify_shards
from trackpl.types import Clip
from trackpl.writing import replacing

_CELL = 256  # pixels of the longer side of a picture on the sheet


@dataclass
class Report:
    """What a check found."""

    text: str
    checked: int
    broken: list[str] = field(default_factory=list)


def check(
    address: str,
    out: Path | None = None,
    *,
    samples: int | None = None,
    sheet: int = 12,
    seed: int = 0,
    workers: int = 1,
) -> Report:
    """Check a set of shards, and write ``report.json`` and ``sheet.png`` to `out`.

    Args:
        address: of the index.
        out: folder; none: ``<name>-check`` in the current one.
        samples: number of random samples to check; none: all, and the SHA-256 of every shard.
        sheet: clips on the contact sheet.
        seed: of the random choices.
        workers: processes.

    Raises:
        DataError: no index there, or a shard that is not what the index says; broken samples are in the report.
    """
    if workers < 1 or sheet < 0 or (samples is not None and samples < 1):
        raise DataError(f"workers and samples must be at least 1 and the sheet 0 or more, got {workers}, {samples}")
    index = read_index(address)
    out = Path(f"{index.name}-check") if out is None else out
    if samples is None:
        verify_shards(index)
    order = np.random.default_rng(seed).permutation(len(index.samples))
    chosen = [index.samples[i] for i in (order[:samples] if samples else range(len(index.samples)))]
    facts: list[dict[str, Any]] = []
    broken: list[str] = []
    with tqdm(total=len(chosen), desc=f"reading {index.name}", unit="clip", dynamic_ncols=True) as bar:
        for fact in _examine_all(chosen, workers):
            if isinstance(fact, str):
                broken.append(fact)
            else:
                facts.append(fact)
            bar.update()
    summary = _summary(index, facts)
    summary |= {"address": str(address), "checked": len(chosen), "broken": broken, "meta": index.meta}
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "report.json") as path:
        path.write_text(json.dumps(summary, indent=1, sort_keys=True))
    text = _text(index, summary)
    if sheet and facts:
        whole = [index.samples[i] for i in order if index.samples[i].key in {f["key"] for f in facts}][:sheet]
        save_png(draw_sheet(whole), out / "sheet.png")
        more = ", ..." if len(whole) > 4 else ""
        text += f"\nlook at it: {out / 'sheet.png'} ({', '.join(s.key for s in whole[:4])}{more})"
    return Report(f"{text}\nall of it:  {out / 'report.json'}", len(chosen), broken)


def _examine_all(samples: Sequence[Sample], workers: int) -> Iterator[dict[str, Any] | str]:
    if workers == 1:
        yield from map(examine, samples)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(examine, samples, chunksize=4)


def examine(sample: Sample) -> dict[str, Any] | str:
    """Decode one sample in full: its facts, or what is wrong with it."""
    try:
        with open_members(sample) as members:
            clip = decode(members, name=sample.key)
    except UnreachableError:
        raise
    except DataError as error:
        return str(error)
    h, w = clip.size
    facts: dict[str, Any] = {"key": sample.key, "frames": clip.frames, "height": h, "width": w}
    facts |= {"fields": [f for f in ("video", *_FIELDS) if getattr(clip, f) is not None]}
    video = clip.video.float()
    facts |= _range("brightness", video.mean((0, 2, 3, 4)))
    if clip.frames > 1:
        facts |= _range("frame difference", (video[:, 1:] - video[:, :-1]).abs().mean((0, 2, 3, 4)))
    if clip.tracks is not None and clip.tracks.numel():
        facts |= _track_facts(clip, clip.tracks)
    if clip.depth is not None:
        facts |= _range("depth", clip.depth[clip.depth.isfinite()])
    if clip.flow is not None:
        facts |= {"flow pairs": len(clip.flow.pairs)}
        length = clip.flow.xy.norm(dim=2)
        facts |= _range("flow", length if clip.flow.valid is None else length[clip.flow.valid])
    if clip.labels is not None:
        facts |= {"segments": len(set(clip.labels.unique().tolist()) - {0, 255})}
    return facts


_FIELDS = ("tracks", "visible", "valid", "track_depth", "queries", "depth", "flow", "labels", "camera")


def _track_facts(clip: Clip, tracks: Tensor) -> dict[str, Any]:
    known = torch.ones_like(tracks[..., 0], dtype=torch.bool) if clip.valid is None else clip.valid
    h, w = clip.size
    facts: dict[str, Any] = {"points": tracks.shape[2], "valid": float(known.float().mean())}
    facts |= _range("x", tracks[..., 0][known]) | _range("y", tracks[..., 1][known])
    if clip.visible is not None:
        seen = clip.visible & known
        inside = (tracks >= 0).all(-1) & (tracks <= tracks.new_tensor([w, h])).all(-1)
        facts |= {"visible": float(seen.float().mean()), "visible outside": int((seen & ~inside).sum())}
    step = (tracks[:, 1:] - tracks[:, :-1]).norm(dim=-1)[known[:, 1:] & known[:, :-1]]
    return facts | _range("step", step)


def _range(name: str, values: Tensor) -> dict[str, float]:
    if not values.numel():
        return {}
    return {
        f"{name} min": float(values.min()),
        f"{name} max": float(values.max()),
        f"{name} mean": float(values.mean()),
    }


def _summary(index: Index, facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the facts of all samples."""
    out: dict[str, Any] = {"name": index.name, "clips": len(index.samples), "shards": len(index.shards)}
    out["bytes"] = sum(s.bytes for s in index.shards)
    out["fields"] = dict(Counter(f for fact in facts for f in fact["fields"]))
    out["sizes"] = {f"{h}x{w}": n for (h, w), n in Counter((f["height"], f["width"]) for f in facts).most_common(8)}
    names = dict.fromkeys(k for fact in facts for k in fact if k not in ("key", "fields", "height", "width"))
    ranges: dict[str, Any] = {}
    for name in names:
        values = [fact[name] for fact in facts if name in fact]
        best = {"min": min, "max": max}.get(name.rsplit(" ", 1)[-1])
        if best is not None:
            ranges[name] = best(values)
        else:
            ranges[name] = float(np.mean(values))
            if name in ("frames", "points", "segments", "flow pairs"):
                ranges[name] = {"min": min(values), "max": max(values), "mean": ranges[name]}
            if name == "visible outside":
                ranges[name] = int(sum(values))
    return out | {"ranges": ranges}


def _text(index: Index, summary: dict[str, Any]) -> str:
    """Say it in a few lines."""
    r = summary["ranges"]
    lines = [f"{index.name}: {counts(summary['clips'], summary['shards'], summary['bytes'])}"]
    lines.append(f"  source {index.meta.get('source', 'unknown')}, licence {index.meta.get('licence') or 'not stated'}")
    lines.append("  fields " + ", ".join(f"{k} ({n})" for k, n in summary["fields"].items()))
    lines.append("  frames " + _span(r.get("frames")) + ", sizes " + ", ".join(summary["sizes"]))
    if "points" in r:
        lines.append(
            f"  points {_span(r['points'])}, x {r['x min']:.1f} to {r['x max']:.1f}, y {r['y min']:.1f} to "
            f"{r['y max']:.1f} px" + (f", visible {r['visible']:.1%}" if "visible" in r else "")
        )
        if r.get("visible outside"):
            lines.append(f"  ! {r['visible outside']} points are called visible outside of their frame")
    for name, unit in (("step", "px a frame"), ("flow", "px"), ("depth", "m"), ("brightness", "of 255")):
        if f"{name} min" in r:
            lines.append(
                f"  {name} {r[f'{name} min']:.4g} to {r[f'{name} max']:.4g} {unit}, mean {r[f'{name} mean']:.4g}"
            )
    if "segments" in r:
        lines.append(f"  segments {_span(r['segments'])}")
    lines += [f"  left out when it was made: {m}" for m in index.meta.get("broken", [])]
    lines += [f"  ! {m}" for m in summary["broken"][:10]]
    verdict = f"{len(summary['broken'])} broken" if summary["broken"] else "all whole"
    return "\n".join([*lines, f"  {summary['checked']} samples read: {verdict}"])


def counts(clips: int, shards: int, size: int) -> str:
    """Say how large a set is."""
    several = "s" if shards > 1 else ""
    return f"{clips} clip{'s' if clips > 1 else ''} in {shards} shard{several}, {tqdm.format_sizeof(size, 'B', 1000)}"


def _span(fact: Any) -> str:
    if fact is None:
        return "none"
    low, high = fact["min"], fact["max"]
    return f"{low}" if low == high else f"{low} to {high}"


# Pictures ---------------------------------------------------------------------------------------------------


def draw_sheet(samples: Iterable[Sample]) -> Tensor:
    """Draw a clip a cell, its middle frame with its tracks or else its flow: uint8 (3, h, w)."""
    cells = [_cell(sample) for sample in samples]
    h, w = (max(c.shape[i] for c in cells) for i in (1, 2))
    sheet = torch.full((len(cells), 3, h, w), 255, dtype=torch.uint8)
    for place, cell in zip(sheet, cells, strict=True):
        place[:, : cell.shape[1], : cell.shape[2]] = cell
    return contact_sheet(sheet)


def _cell(sample: Sample) -> Tensor:
    """Draw one clip, shrunk to the cell."""
    middle = sample.frames // 2
    frames = range(max(0, middle - 6), middle + 1)
    with open_members(sample) as members:
        clip = decode(members, frames, ["video", "tracks", "visible", "valid", "flow", "labels"], sample.key)
    factor = min(1.0, _CELL / max(clip.size))
    clip = resize(clip, (max(1, round(clip.size[0] * factor)), max(1, round(clip.size[1] * factor))))
    video = clip.video[0]
    if clip.tracks is not None and clip.tracks.shape[2]:
        keep = torch.linspace(0, clip.tracks.shape[2] - 1, min(256, clip.tracks.shape[2])).long()
        seen = torch.ones_like(clip.tracks[..., 0], dtype=torch.bool) if clip.visible is None else clip.visible
        tracks, seen = clip.tracks[0][:, keep], seen[0][:, keep]
        if clip.valid is not None:
            tracks = tracks.masked_fill(~clip.valid[0][:, keep][..., None], torch.nan)
        return draw_tracks(video, tracks, seen)[-1]
    if clip.labels is not None:
        return _tinted(video[-1], clip.labels[0, -1])
    if clip.flow is not None:
        flow = clip.flow.xy[0, -1]
        if clip.flow.valid is not None:
            flow = flow.masked_fill(~clip.flow.valid[0, -1], torch.nan)
        return torch.cat([video[clip.flow.pairs[-1][0]], flow_to_rgb(flow)], -1)
    return video[-1]


def _tinted(frame: Tensor, labels: Tensor) -> Tensor:
    """Tint the segments of a frame, void white."""
    palette = torch.randint(40, 256, (65536, 3), generator=torch.Generator().manual_seed(7))
    palette[255] = 255
    colours = palette[labels].permute(2, 0, 1)
    return torch.where(labels > 0, (frame.int() + colours) // 2, frame.int()).to(torch.uint8)


# Index ------------------------------------------------------------------------------------------------------


def index_folder(folder: Path, name: str | None = None, licence: str = "", overwrite: bool = False) -> Path:
    """Write the index of the shards in a folder after a strict look at each; returns its path.

    Raises:
        DataError: no shards, shards of several sets and no `name`, an index is there already, or a shard that is broken
            or holds what the format does not allow.
    """
    files = sorted(folder.glob("*.tar"))
    sets = sorted({re.sub(r"-\d+$", "", f.stem) for f in files})
    if not files or (name is None and len(sets) > 1):
        raise DataError(f"{folder} must hold the shards of one set, NAME-000000.tar ...; found: {', '.join(sets[:5])}")
    name = name or sets[0]
    check_name(name)
    files = [f for f in files if re.sub(r"-\d+$", "", f.stem) == name] or files
    index = folder / f"{name}.index.json"
    if index.exists() and not overwrite:
        raise DataError(f"{index} is there already; --overwrite replaces it")
    shards = [describe(f) for f in tqdm(files, desc=f"reading {name}", unit="shard", dynamic_ncols=True)]
    keys = Counter(s["key"] for shard in shards for s in shard["samples"])
    if keys.most_common(1)[0][1] > 1:
        raise DataError(f"the key '{keys.most_common(1)[0][0]}' comes twice in the shards of {folder}")
    with replacing(index) as path:
        path.write_text(index_text(name, shards, {"source": "own shards", "licence": licence}))
    read_index(index)
    return index
