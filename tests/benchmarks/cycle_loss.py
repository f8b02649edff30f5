"""Time and memory of the cycle loss against its own local correlations, in one run.

    python tests/benchmarks/cycle_loss.py            # 2 frames at 96 x 128 nodes, 32 channels, window 11, one thread
    python tests/benchmarks/cycle_loss.py --levels   # 3 and 4 frames too, every level of 384 x 512

`shifted` is the plain way to the two transitions, one product per offset of the window and a softmax; `tiles` is ours.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from trackpl_crw.transition import inside, transition, warp
from trackpl_crw.walk import cycle_loss

RADIUS, TAU, CHANNELS = 5, 0.07, 32


def clip(k, h, w, seed=0):
    """Embeddings of k frames that move smoothly, and incoming flows both ways."""
    g = torch.Generator().manual_seed(seed)
    e = [F.avg_pool2d(torch.randn(1, CHANNELS, h + 4, w + 4, generator=g), 5, 1) for _ in range(k)]
    small = max(2, h // 16), max(2, w // 16)
    up = {"size": (h, w), "mode": "bilinear"}
    return e, [[F.interpolate(torch.randn(1, 2, *small, generator=g) * 2, **up) for _ in range(k - 1)] for _ in "ab"]


def both(e, flows):
    """Transitions forwards and backwards."""
    pairs = range(len(e) - 1)
    return (
        [transition(e[i], e[i + 1], flows[0][i], RADIUS, TAU) for i in pairs],
        [transition(e[i + 1], e[i], flows[1][i], RADIUS, TAU) for i in pairs],
    )


def shifted(s, t, flow):
    """One transition by a product per offset."""
    h, w = s.shape[-2:]
    s, t = F.normalize(s, dim=1), F.pad(F.normalize(warp(t, flow), dim=1), [RADIUS] * 4)
    ok = F.pad(inside(flow), [RADIUS] * 4)
    side = range(2 * RADIUS + 1)
    cos = [
        (s * t[..., y : y + h, x : x + w]).sum(1).masked_fill(~ok[:, y : y + h, x : x + w], -1e30)
        for y in side
        for x in side
    ]
    return (torch.stack(cos, -1) / TAU).softmax(-1)


def step(e, flows, starts=512):
    """Loss and gradient."""
    e = [x.clone().requires_grad_() for x in e]
    cycle_loss(*both(e, flows), starts=starts).backward()


@torch.no_grad()
def plain(e, flows):
    """The two transitions of a pair, the plain way."""
    shifted(e[0], e[1], flows[0][0])
    shifted(e[1], e[0], flows[1][0])


def seconds(functions, runs):
    """Median seconds of each, in turn, after one run that does not count."""
    times = [[] for _ in functions]
    for run in range(runs + 1):
        for taken, function in zip(times, functions, strict=True):
            begin = time.perf_counter()
            function()
            if run:
                taken.append(time.perf_counter() - begin)
    return [statistics.median(t) for t in times]


def peak(k, h, w):
    """Megabytes that one step adds to a process, measured in a process of its own (Linux)."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import cycle_loss as c; torch.set_num_threads(1)\n"
        "a = [int(x) for x in sys.argv[2:]]; c.step(*c.clip(a[0], 16, 16)); e = c.clip(*a)\n"
        "read = lambda k: int(next(x for x in open('/proc/self/status') if x.startswith(k)).split()[1])\n"
        "before = read('VmRSS'); open('/proc/self/clear_refs', 'w').write('5'); c.step(*e)\n"
        "print((read('VmHWM') - before) // 1024)"
    )
    args = [sys.executable, "-c", code, __file__.rpartition("/")[0] or ".", *map(str, (k, h, w))]
    return max(0, int(subprocess.run(args, check=True, capture_output=True, text=True).stdout))


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", action="store_true", help="3 and 4 frames, every level of 384 x 512")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    e, flows = clip(2, 96, 128)
    tiles = torch.no_grad()(lambda: both(e, flows))
    slow, fast, full = seconds([lambda: plain(e, flows), tiles, lambda: step(e, flows)], options.runs)
    print("2 frames, 96 x 128 nodes, 32 channels, window 11, float32, one thread; medians of", options.runs)
    print(f"  two correlations with softmax, shifted products  {slow * 1e3:7.1f} ms")
    print(f"  two correlations with softmax, tiles             {fast * 1e3:7.1f} ms")
    print(f"  cycle loss, forward and backward                 {full * 1e3:7.1f} ms")
    print(f"  ratio to shifted products {full / slow:.2f}, to tiles {full / fast:.2f}; peak {peak(2, 96, 128)} MB")
    if options.levels:
        for k in (3, 4):
            for stride in (64, 32, 16, 8, 4):
                h, w = 384 // stride, 512 // stride
                data = clip(k, h, w)
                (taken,) = seconds([lambda d=data: step(*d)], 1 if h > 40 else 3)
                print(f"  {k} frames, {h:3} x {w:3} nodes: {taken:7.3f} s, peak {peak(k, h, w)} MB")


if __name__ == "__main__":
    main()
