"""`trackpl test --compare A B`: two results of one benchmark, video by video.

Both methods saw the same videos, so what counts is the difference on each of them: its mean, and how far that could
be chance, by bootstrap over videos (10,000 samples with replacement, percentiles 2.5 and 97.5, fixed seed).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trackpl.benchmarks import HEADLINE
from trackpl.errors import Error
from trackpl.results import read_result
from trackpl.usage import Parser

SAMPLES = 10_000
_CHUNK = 500  # samples drawn at once
_SHOWN = 3  # videos that differ most
_FEW = 10  # videos, below which the bootstrap's intervals are far too narrow


@dataclass(frozen=True)
class Difference:
    """How one figure differs between two results, over the videos that define it in both."""

    metric: str
    a: float  # mean
    b: float
    mean: float  # of b - a
    low: float  # of the 95 % interval of that mean
    high: float
    better: int  # videos in which b is above a
    worse: int
    same: int
    left_out: int  # videos in which one of the two is undefined

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def run(args: list[str]) -> int:
    """Compare as the command line says; return 0.

    Raises:
        Error: not two results, or of different benchmarks or data.
    """
    usage = "trackpl test --compare A B [--all]"
    parser = Parser(
        "test --compare", "Compare two results of the same benchmark, video by video: B minus A.", usage=usage
    )
    about = "A and B: result.json of two runs, or their folders"
    parser.add_argument("--compare", metavar="A B", nargs="*", type=Path, required=True, help=about)
    parser.add_argument("--all", action="store_true", help="all figures, not only " + ", ".join(HEADLINE))
    given: argparse.Namespace = parser.parse_args(args)
    if len(given.compare) != 2:
        raise Error(f"--compare takes two results, got {len(given.compare)}; see trackpl test --compare --help")
    a, b = (read_result(path) for path in given.compare)
    check_comparable(a, b)
    metrics = tuple(a["protocol"]["metrics"]) if given.all else HEADLINE
    print(table(a, b, compare(a, b, metrics)), end="")
    return 0


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise `Error` unless two results are of one benchmark and one data set and have videos in common."""
    if a["benchmark"] != b["benchmark"]:
        raise Error(f"results of different benchmarks cannot be compared: {a['benchmark']} and {b['benchmark']}")
    if other := [k for k in {**a["protocol"], **b["protocol"]} if a["protocol"].get(k) != b["protocol"].get(k)]:
        raise Error(f"the results follow different protocols of {a['benchmark']}: {', '.join(other)} differ")
    if a["data"] != b["data"]:
        raise Error(
            f"the results are of different data ({a['data'][:8]}... and {b['data'][:8]}...): "
            "score both methods on the same shards"
        )
    if not _common(a, b):
        raise Error("the results have no video in common: score the same ones")


def compare(a: Mapping[str, Any], b: Mapping[str, Any], metrics: tuple[str, ...] = HEADLINE) -> list[Difference]:
    """Return how each figure of result `b` differs from that of `a`."""
    keys = _common(a, b)
    one, two = _rows(a), _rows(b)
    return [_difference(m, _values(one, keys, m), _values(two, keys, m)) for m in metrics]


def _difference(metric: str, a: np.ndarray, b: np.ndarray) -> Difference:
    defined = ~np.isnan(a) & ~np.isnan(b)
    a, b = a[defined], b[defined]
    left_out = int((~defined).sum())
    if not len(a):
        nan = float("nan")
        return Difference(metric, nan, nan, nan, nan, nan, 0, 0, 0, left_out)
    change = b - a
    low, high = interval(change)
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    means = float(a.mean()), float(b.mean()), float(change.mean())
    return Difference(metric, *means, low, high, better, worse, len(change) - better - worse, left_out)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of values (n,), the same each time; NaN for less than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    shape = (_CHUNK, len(values))
    means = [values[random.integers(len(values), size=shape)].mean(1) for _ in range(SAMPLES // _CHUNK)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def table(a: Mapping[str, Any], b: Mapping[str, Any], differences: list[Difference]) -> str:
    """Lay out the differences, and the videos that differ most."""
    keys = _common(a, b)
    lines = [f"{a['benchmark']}: {len(keys)} videos in both results, B - A"]
    lines += [f"  {name}: {_label(r, other)}" for name, r, other in (("A", a, b), ("B", b, a))]
    if len(keys) < max(len(a["rows"]), len(b["rows"])):
        lines.append(f"  NOT ALL: A has {len(a['rows'])} videos, B {len(b['rows'])}; the others are left out")
    heads = ("A", "B", "B - A", "95 % interval", "B better", "worse", "same")
    widths = (9, 9, 9, 18, 10, 7, 6)
    cells = [("", *heads)]
    for d in differences:
        span = "-" if np.isnan(d.low) else f"{d.low:+.2f} .. {d.high:+.2f}"
        counts = (str(d.better), str(d.worse), str(d.same))
        cells.append((d.metric, f"{d.a:.2f}", f"{d.b:.2f}", f"{d.mean:+.2f}", span, *counts))
    lines += ["", *(f"{m:<11}" + "".join(f"{c:>{w}}" for c, w in zip(r, widths, strict=True)) for m, *r in cells), ""]
    lines += [f"{d.metric}: undefined in {d.left_out} videos, left out" for d in differences if d.left_out]
    lines.append(_verdict(differences[0]))
    lines += _extremes(a, b, keys, differences[0].metric)
    return "\n".join(lines) + "\n"


def _verdict(d: Difference) -> str:
    if (videos := d.better + d.worse + d.same) < _FEW:
        return f"{d.metric}: of {videos} videos an interval says little; score at least {_FEW}"
    if not d.certain:
        return f"{d.metric}: no difference beyond chance (the interval holds 0)"
    return f"{d.metric}: B is {'better' if d.mean > 0 else 'worse'} beyond chance (the interval leaves 0 out)"


def _extremes(a: Mapping[str, Any], b: Mapping[str, Any], keys: list[str], metric: str) -> list[str]:
    """Name the videos in which B loses and gains most."""
    one, two = _rows(a), _rows(b)
    change = _values(two, keys, metric) - _values(one, keys, metric)
    order = [int(i) for i in np.argsort(change, kind="stable") if not np.isnan(change[i])]
    lost = [i for i in order[:_SHOWN] if change[i] < 0]
    gained = [i for i in order[::-1][:_SHOWN] if change[i] > 0]
    named = (("loses", lost), ("gains", gained))
    return [f"B {word} most in {', '.join(f'{keys[i]} ({change[i]:+.1f})' for i in of)}" for word, of in named if of]


def _label(result: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say what was measured, with those options that the other result has not alike."""
    size = "x".join(map(str, result.get("input_size") or ()))
    mine, theirs = ({"threshold": r.get("threshold"), **_dict(r.get("options"))} for r in (result, other))
    own = [f", {k} {v}" for k, v in mine.items() if k not in theirs or theirs[k] != v]
    shown = own if result["method"] == other["method"] else []
    return f"{result['method']}, weights {str(result.get('weights'))[:8]}, frames of {size}{''.join(shown)[:200]}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _common(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    there = _rows(b)
    return [key for key in _rows(a) if key in there]


def _rows(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in result["rows"] if "skipped" not in row}


def _values(rows: Mapping[str, dict[str, Any]], keys: list[str], metric: str) -> np.ndarray:
    """Return one figure of the videos `keys`, (n,) float64, NaN where it is undefined."""
    return np.array([np.nan if rows[key][metric] is None else rows[key][metric] for key in keys], np.float64)
