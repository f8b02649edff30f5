"""What `trackpl bench` runs for one method in a process of its own: load it, then measure what the parent asks for.

One JSON object a line: a `Settings` as the only argument, commands on standard input, answers on standard output. What
the plugin prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from torch import Tensor

    from trackpl.method import Method
    from trackpl.types import Clip


def main() -> None:
    """Load the method named by the argument, answer that, then each command until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    try:
        bench = Bench(settings)
        _answer(answers, bench.facts)
        for line in sys.stdin:
            _answer(answers, bench.measure(**json.loads(line)))
    except KeyboardInterrupt:
        sys.exit(130)  # the parent got it too, and says so
    except (Exception, SystemExit) as error:  # a stranger's method may raise anything
        _answer(answers, {"fault": reason(error)})


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    print(json.dumps(content), file=answers, flush=True)


def reason(error: BaseException) -> str:
    """Return an error as one short line."""
    from trackpl.errors import Error

    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, Error) else f"{type(error).__name__}: {text}".rstrip(": ")


class Bench:
    """One method, ready to track clips of one size."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        self.device = settings["device"]
        self.frames, self.size = settings["frames"], tuple(settings["size"])
        self.method, weights = _load(settings["method"], self.device)
        self.synchronize()
        self.resting = _now(self.device)
        self.facts = {
            "weights": weights,
            "parameters": sum(p.numel() for p in self.method.parameters()),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(self.device) if self.device != "cpu" else "cpu",
            "resting_bytes": self.resting,
        }

    def measure(self, points: int, seed: int) -> dict[str, Any]:
        """Track `points` points of a clip that was never seen, then as many others of the same clip.

        Returns:
            seconds of the `first` and the `second` call, and the most bytes that the first held above what the loaded
            method holds at rest; or a `fault`.
        """
        try:
            clip, queries = self._clip(points, seed)
            _, others = self._clip(points, seed + 1)
            _forget_peak(self.device)
            first = self._time(clip, queries)
            peak = _peak(self.device)
            return {"first": first, "second": self._time(clip, others), "peak_bytes": max(0, peak - self.resting)}
        except Exception as error:  # out of memory, or a method that cannot track so many
            return {"fault": reason(error)}

    def _time(self, clip: Clip, queries: Tensor) -> float:
        import torch

        self.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            tracks = self.method.track(clip, queries)
        self.synchronize()
        seconds = time.perf_counter() - began
        if tracks.xy.shape != (1, self.frames, queries.shape[1], 2):
            raise RuntimeError(f"it gave tracks of shape {tuple(tracks.xy.shape)}")
        return seconds

    def _clip(self, points: int, seed: int) -> tuple[Clip, Tensor]:
        """Make a moving texture and choose points of its first frame, where the method computes."""
        import torch

        from trackpl.testing import moving_clip

        clip = moving_clip(self.frames, self.size, points, seed=seed)
        assert clip.tracks is not None
        queries = torch.cat([torch.zeros(1, points, 1), clip.tracks[:, 0]], -1)
        return clip.to(self.device), queries.to(self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def _load(name: str, device: str) -> tuple[Method, str]:
    """Return a method with the weights that ship with it, or fresh ones, on which its speed does not depend."""
    from trackpl.checkpoints import load
    from trackpl.plugins import find

    cls: type[Method] = find(name).load()
    if cls.weights is not None:
        return load(name, device=device), "shipped"
    return cls().to(device).eval(), "freshly initialised"


# Memory -----------------------------------------------------------------------------------------------------


def _now(device: str) -> int:
    """Return the bytes that are held now: of the device, or of this process."""
    import torch

    if device != "cpu":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):
        return _status("VmRSS")
    return _most()


def _peak(device: str) -> int:
    """Return the most bytes that were held since `_forget_peak`; on systems that cannot forget, ever."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        return _status("VmHWM")
    return _most()


def _forget_peak(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux alone has it
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _most() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
