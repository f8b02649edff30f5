"""Where CoTracker's CPU time goes on one thread, what sharing features saves, and memory of many points.

    OMP_NUM_THREADS=1 python tests/benchmarks/cotracker.py [--frames 24] [--points 73] [--skip-memory]
    OMP_NUM_THREADS=1 python tests/benchmarks/cotracker.py --targets 20 --frames 24    # the single-point protocol alone

384 x 512, all points joint. Weights are random: time does not depend on them. On one core of another machine the
authors' version 1 took 0.63 s a frame for the encoder, 0.33 s an update for the transformer, and about 20 % more.
"""

import argparse
import threading
import time
from pathlib import Path

import torch
from trackpl_cotracker.method import CoTracker
from trackpl_cotracker.version1 import Version1
from trackpl_cotracker.version2 import Version2
from trackpl_cotracker.version3 import Version3
from trackpl_cotracker.windows import track_groups

from trackpl import Clip

SIZE = (384, 512)


class Clock:
    """CPU seconds spent inside some modules."""

    def __init__(self, modules):
        self.seconds = dict.fromkeys(modules, 0.0)
        for name, module in modules.items():
            self._wrap(name, module)

    def _wrap(self, name, module):
        forward = module.forward

        def timed(*args):
            start = time.thread_time()
            try:
                return forward(*args)
            finally:
                self.seconds[name] += time.thread_time() - start

        module.forward = timed


class Peak:
    """Peak memory above the start, in MB, sampled twenty times a second."""

    def __enter__(self):
        self.start = self.peak = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.wait(0.05):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @property
    def above(self):
        return self.peak - self.start


def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def versions():
    """The published variants, by name."""
    return {
        "1, stride 4, window 8": lambda: Version1(4, 8),
        "1, stride 8, window 16": lambda: Version1(8, 16),
        "2, window 8": lambda: Version2(window=8),
        "3 online, window 16": lambda: Version3(window=16, sliding=True),
        "3 offline": lambda: Version3(window=60, sliding=False),
    }


@torch.no_grad()
def run(model, frames, points, updates=None):
    """Track random points through random frames, given as uint8."""
    g = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (frames, 3, *SIZE), generator=g, dtype=torch.uint8)
    place = torch.rand(1, points, 2, generator=g) * torch.tensor([SIZE[1] - 1, SIZE[0] - 1]) / model.stride
    features = model.encode(video, lambda some: some.float() / 127.5 - 1)
    index = torch.arange(frames)[None]
    start = torch.zeros(1, points, dtype=torch.long)
    updates = model.iterations[1] if updates is None else updates
    return track_groups(model, features, index, torch.tensor([frames]), start, place, updates)


def profile(name, make, frames, points):
    model = make().eval()
    run(model, 2, points, updates=1)  # warm up
    clock = Clock({"encoder": model.encoder, "transformer": model.transformer})
    start = time.thread_time()
    run(model, frames, points)
    total = time.thread_time() - start
    encoder, transformer = clock.seconds.values()
    rest = total - encoder - transformer
    row = (f"{encoder:.2f}", f"{transformer:.2f}", f"{rest:.2f}", f"{100 * rest / (encoder + transformer):.1f} %")
    print("|", name, "|", points, "|", frames, "|", " | ".join(row), "|", flush=True)


def protocol(targets, frames):
    """Version 1, each target with its support points, strided: all at once, and in a loop that shares nothing."""
    torch.manual_seed(0)
    method = CoTracker(protocol="single", chunk=73 * targets).eval()
    clip = Clip(video=torch.randint(0, 256, (1, frames, 3, *SIZE), dtype=torch.uint8))
    time_of = torch.randint(0, frames, (1, targets, 1)).float()
    queries = torch.cat([time_of, torch.rand(1, targets, 2) * torch.tensor([SIZE[1], SIZE[0]])], -1)
    start = time.thread_time()
    together = method.track(clip, queries)
    middle = time.thread_time()
    alone = []
    for one in queries.split(1, 1):
        method.forget()
        alone.append(method.track(clip, one).xy)
    loop, ours = time.thread_time() - middle, middle - start
    gap = (torch.cat(alone, 2) - together.xy).abs().max()
    print(
        f"{targets} targets, {frames} frames: {ours:.1f} s together, {loop:.1f} s in a loop, {loop / ours:.2f} times;"
    )
    print(f"largest difference {gap:.2g} px")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--points", type=int, default=73)
    parser.add_argument("--only", default="", help="versions whose name holds this")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--targets", type=int, help="measure the single-point protocol for so many, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.targets:
        protocol(options.targets, options.frames)
        return
    chosen = {k: v for k, v in versions().items() if options.only in k}
    print("| version | points | frames | encoder s | transformer s | everything else s | of the two |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, make in chosen.items():
        profile(name, make, options.frames, options.points)
    if not options.skip_memory:
        for name, make in chosen.items():
            model = make().eval()
            with Peak() as peak:
                run(model, model.window, 6400, updates=1)
            print(
                f"version {name}: 6400 points, 24 frames, one update: {peak.above:.0f} MB above the start", flush=True
            )


if __name__ == "__main__":
    main()
