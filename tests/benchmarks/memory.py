"""Memory of the stream over many samples: the trainer's and its workers', every thousand samples.

    python tests/benchmarks/memory.py [--samples 10000] [--workers 2] [--source INDEX]

Counted is the proportional set size, in which memory that processes share is divided among them.
"""

import argparse
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
from trackpl_prep.synthetic import make

from trackpl.data import ShardDataModule


def megabytes(pid: int) -> float:
    """Return the proportional set size of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--source", help="index of the clips to read, again and again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = options.source or str(make(folder, 48, workers=2))
        data = ShardDataModule(
            train=source, val={}, frames=24, batch_size=1, workers=options.workers, steps_per_epoch=options.samples
        )
        print("| samples | trainer MB | workers MB |\n| --- | --- | --- |")
        for i, _ in enumerate(data.train_dataloader(), 1):
            if i in (100, 500) or i % 1000 == 0:
                workers = [p.pid for p in multiprocessing.active_children() if p.pid]
                sizes = [megabytes(pid) for pid in workers]
                print(f"| {i} | {megabytes(os.getpid()):.0f} | {sum(sizes):.0f} |", flush=True)


if __name__ == "__main__":
    main()
