"""`trackpl test --compare A B`: two results of one benchmark, video by video.

Both methods saw the same videos, so what counts is the difference on each of them: its mean, and how far that could
be chance, by bootstrap over videos (10,000 samples with replacement, percentiles 2.5 and 97.5, fixed seed). Means are
those of the benchmark, weights included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trackpl.benchmarks import BENCHMARKS
from trackpl.errors import Error, closest
from trackpl.protocols import mean, numbers
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
    better: int  # videos in which b is better than a
    worse: int
    same: int
    left_out: int  # videos in which one of the two is undefined
    less: bool = False  # less is better

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def run(args: list[str]) -> int:
    """Compare as the command line says; return 0.

    Raises:
        Error: not two results, or of different benchmarks or data.
    """
    usage = "trackpl test --compare A B [--metric NAME] [--all]"
    parser = Parser(
        "test --compare", "Compare two results of the same benchmark, video by video: B minus A.", usage=usage
    )
    about = "A and B: result.json of two runs, or their folders"
    parser.add_argument("--compare", metavar="A B", nargs="*", type=Path, required=True, help=about)
    parser.add_argument("--metric", metavar="NAME", action="append", help="this figure; may be given several times")
    parser.add_argument("--all", action="store_true", help="all figures, not only those of the benchmark's table")
    given: argparse.Namespace = parser.parse_args(args)
    if len(given.compare) != 2:
        raise Error(f"--compare takes two results, got {len(given.compare)}; see trackpl test --compare --help")
    a, b = (read_result(path) for path in given.compare)
    check_comparable(a, b)
    known = a["protocol"]["metrics"]
    for name in given.metric or ():
        if name not in known:
            raise Error(f"{a['benchmark']} has no figure '{name}'; {closest(name, known)}")
    metrics = tuple(given.metric or (known if given.all else BENCHMARKS[a["benchmark"]].headline))
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


def compare(a: Mapping[str, Any], b: Mapping[str, Any], metrics: Sequence[str] | None = None) -> list[Difference]:
    """Return how each figure of result `b` differs from that of `a`; none named: those of the benchmark's table."""
    benchmark, keys = BENCHMARKS[a["benchmark"]], _common(a, b)
    one, two = _rows(a), _rows(b)
    return [
        _difference(m, [one[k] for k in keys], [two[k] for k in keys], benchmark.less_is_better(m))
        for m in metrics or benchmark.headline
    ]


def _difference(metric: str, a: list[dict[str, Any]], b: list[dict[str, Any]], less: bool) -> Difference:
    defined = [i for i in range(len(a)) if a[i][metric] is not None and b[i][metric] is not None]
    left_out = len(a) - len(defined)
    a, b = [a[i] for i in defined], [b[i] for i in defined]
    if not defined:
        nan = float("nan")
        return Difference(metric, nan, nan, nan, nan, nan, 0, 0, 0, left_out, less)
    one, two = numbers(a, metric), numbers(b, metric)
    means = float(mean(*one)), float(mean(*two))
    low, high = _interval(len(a), lambda drawn: _mean_of(two, drawn) - _mean_of(one, drawn))
    change = np.array([y[metric] - x[metric] for x, y in zip(a, b, strict=True)])
    gain = -change if less else change
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    same = len(gain) - better - worse
    return Difference(metric, *means, means[1] - means[0], low, high, better, worse, same, left_out, less)


def _mean_of(figure: tuple[np.ndarray, np.ndarray], drawn: np.ndarray) -> np.ndarray:
    values, weights = figure
    return mean(values[drawn], weights[drawn])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of values (n,), the same each time; NaN for less than two."""
    return _interval(len(values), lambda drawn: values[drawn].mean(1))


def _interval(count: int, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> tuple[float, float]:
    """Bootstrap a statistic, which maps drawn indices (samples, count) to (samples,)."""
    if count < 2:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    values = [statistic(random.integers(count, size=(_CHUNK, count))) for _ in range(SAMPLES // _CHUNK)]
    low, high = np.nanpercentile(np.concatenate(values), [2.5, 97.5])
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
    first = max(11, *(len(d.metric) + 1 for d in differences))
    table = [f"{m:<{first}}" + "".join(f"{c:>{w}}" for c, w in zip(r, widths, strict=True)) for m, *r in cells]
    lines += ["", *table, ""]
    lines += [f"{d.metric}: undefined in {d.left_out} videos, left out" for d in differences if d.left_out]
    lines.append(_verdict(differences[0]))
    lines += _extremes(a, b, keys, differences[0])
    return "\n".join(lines) + "\n"


def _verdict(d: Difference) -> str:
    if (videos := d.better + d.worse + d.same) < _FEW:
        return f"{d.metric}: of {videos} videos an interval says little; score at least {_FEW}"
    if not d.certain:
        return f"{d.metric}: no difference beyond chance (the interval holds 0)"
    word = "better" if (d.mean > 0) != d.less else "worse"
    return f"{d.metric}: B is {word} beyond chance (the interval leaves 0 out)"


def _extremes(a: Mapping[str, Any], b: Mapping[str, Any], keys: list[str], d: Difference) -> list[str]:
    """Name the videos in which B loses and gains most."""
    one, two = _rows(a), _rows(b)
    known = [k for k in keys if one[k][d.metric] is not None and two[k][d.metric] is not None]
    gain = {k: (two[k][d.metric] - one[k][d.metric]) * (-1 if d.less else 1) for k in known}
    order = sorted(known, key=gain.__getitem__)
    lost = [k for k in order[:_SHOWN] if gain[k] < 0]
    gained = [k for k in order[::-1][:_SHOWN] if gain[k] > 0]
    sign = -1 if d.less else 1
    named = (("loses", lost), ("gains", gained))
    return [f"B {word} most in {', '.join(f'{k} ({sign * gain[k]:+.1f})' for k in of)}" for word, of in named if of]


def _label(result: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Say what was measured, with those options that the other result has not alike."""
    size = "x".join(map(str, result.get("input_size") or ("their own size",)))
    mine, theirs = ({"threshold": r.get("threshold"), **_jitter(r), **_dict(r.get("options"))} for r in (result, other))
    own = [f", {k} {v}" for k, v in mine.items() if k not in theirs or theirs[k] != v]
    shown = own if result["method"] == other["method"] else []
    return f"{result['method']}, weights {str(result.get('weights'))[:8]}, frames of {size}{''.join(shown)[:200]}"


def _jitter(result: Mapping[str, Any]) -> dict[str, Any]:
    return {f"jitter_{k}": v for k, v in _dict(result.get("jitter")).items()}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _common(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    there = _rows(b)
    return [key for key in _rows(a) if key in there]


def _rows(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in result["rows"] if "skipped" not in row}
