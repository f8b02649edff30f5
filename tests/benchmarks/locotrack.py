"""CPU seconds of LocoTrack for 24 frames of 256 x 256 on one thread, of a second call, and memory of a long clip.

    OMP_NUM_THREADS=1 python tests/benchmarks/locotrack.py [--skip-memory]

The authors' PyTorch code took 11.3 s (small, 64 points), 34.0 s (small, 512) and 24.2 s (base, 256) of CPU time on a
machine where the product of two 2048 x 2048 matrices takes 0.19 s. Weights are random: time does not depend on them.
"""

import argparse
import time
from pathlib import Path

import torch
from trackpl_locotrack.method import LocoTrack

import trackpl
from trackpl.testing import moving_clip

PUBLISHED = {("small", 64): 11.3, ("small", 512): 34.0, ("base", 256): 24.2}


def seconds(function):
    """CPU seconds of this process."""
    start = time.process_time()
    function()
    return time.process_time() - start


def product():
    """The yardstick, the best of three."""
    a = torch.randn(2048, 2048)
    return min(seconds(lambda: torch.mm(a, a)) for _ in range(3))


def random_queries(points, frames, size=256):
    g = torch.Generator().manual_seed(0)
    t = torch.randint(0, frames, (1, points, 1), generator=g).float()
    return torch.cat([t, torch.rand(1, points, 2, generator=g) * size], -1)


def resident(key="VmHWM"):
    """Peak (VmHWM) or present (VmRSS) memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


def memory():
    """Peak memory above the method's, for 10,000 points in 100 frames."""
    method = LocoTrack().eval()
    clip = trackpl.Clip(video=torch.randint(0, 256, (1, 100, 3, 256, 256), dtype=torch.uint8))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    for points in (64, 1000, 10_000):
        taken = seconds(lambda n=points: method.track(clip, random_queries(n, 100)))
        print(f"100 frames, {points} points: {resident() - before:.0f} MB above the start, {taken:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| size | points | first call s | second call s | ratio | authors' s | times faster | mm s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    video = moving_clip(24, (256, 256)).video
    for (size, points), theirs in PUBLISHED.items():
        method = LocoTrack(size=size).eval()
        clip, queries = trackpl.Clip(video=video), random_queries(points, 24)
        method.track(trackpl.Clip(video=video[:, :2]), queries.clamp(max=1))  # warm up
        first, second = (seconds(lambda m=method, c=clip, q=queries: m.track(c, q)) for _ in range(2))
        row = (
            f"{first:.2f}",
            f"{second:.2f}",
            f"{second / first:.2f}",
            theirs,
            f"{theirs / first:.2f}",
            f"{product():.3f}",
        )
        print("|", size, "|", points, "|", " | ".join(map(str, row)), "|", flush=True)
    if not options.skip_memory:
        memory()


if __name__ == "__main__":
    main()
