"""Reading clips for training: shards, the loose files that reference trainers read, and bare JPEG decoding, in one run.

    python tests/benchmarks/reading.py [--clips 48] [--rounds 3] [--workers 2] [--source INDEX]

Each round reads every clip once by every way, in turn; the table gives medians of the rounds, of the ratios too.
"""

import argparse
import io
import itertools
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from trackpl_prep.synthetic import make

from trackpl.data import ShardDataModule
from trackpl.encoding import encode
from trackpl.shards import decode, read_index, read_members, write_shards


class Loose(Dataset):
    """A folder a clip, a PNG a frame, tracks and visibility in one npy: what the reference trainers read."""

    def __init__(self, folder: Path) -> None:
        self.folders = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, i: int):
        folder = self.folders[i]
        frames = np.stack([np.array(Image.open(p)) for p in sorted(folder.glob("*.png"))])
        tracks, visible = np.load(folder / "tracks.npy"), np.load(folder / "visible.npy")
        return torch.from_numpy(frames).permute(0, 3, 1, 2), torch.from_numpy(tracks), torch.from_numpy(visible)


def write_loose(folder: Path, index) -> None:
    for sample in index.samples:
        clip = decode(read_members(sample))
        (folder / sample.key).mkdir(parents=True)
        for t, frame in enumerate(clip.video[0]):
            Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy())).save(
                folder / sample.key / f"{t:03d}.png"
            )
        np.save(folder / sample.key / "tracks.npy", clip.tracks[0].numpy())
        np.save(folder / sample.key / "visible.npy", clip.visible[0].numpy())


def jpegs_of(index) -> list[list[bytes]]:
    out = []
    for sample in index.samples:
        members = read_members(sample, ["video"])
        offsets = np.load(io.BytesIO(members["rgb.idx.npy"]))
        out.append([members["rgb.bin"][a:b] for a, b in itertools.pairwise(offsets)])
    return out


def bare(clips: list[list[bytes]], size: tuple[int, int]) -> None:
    """Decode everything in memory, into one buffer that is used again: no reading, no tensor, no hand-over."""
    out = np.empty((*size, 3), np.uint8)
    for clip in clips:
        for jpeg in clip:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=out)


def worker(clips, size, start, done, stop) -> None:
    while True:
        start.acquire()
        if stop.value:
            return
        bare(clips, size)
        done.release()


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(index, loose: Path, workers: int, rounds: int) -> dict[str, float]:
    """Clips a second by each way and how they compare within a round, medians of the rounds."""
    count = len(index.samples)
    clip = decode(read_members(index.samples[0]))
    data = ShardDataModule(
        train=str(index.path), val={}, frames=clip.frames, batch_size=1, workers=workers, points=None, augment=None
    )
    ours, theirs = data.train_dataloader(), DataLoader(Loose(loose), 1, num_workers=workers, persistent_workers=True)
    jpegs, context = jpegs_of(index), multiprocessing.get_context("fork")
    start, done, stop = context.Semaphore(0), context.Semaphore(0), context.Value("b", 0)
    processes = [
        context.Process(target=worker, args=(jpegs[w::workers], clip.size, start, done, stop)) for w in range(workers)
    ]
    for process in processes:
        process.start()

    def decode_only() -> None:
        for _ in processes:
            start.release()
        for _ in processes:
            done.acquire()

    ways = {
        "shards": lambda: [None for _ in ours],
        "loose PNG + npy": lambda: [None for _ in theirs],
        "bare JPEG": decode_only,
    }
    for way in ways.values():
        way()  # warm cache, workers started
    rounds_of = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds)]
    stop.value = 1
    for _ in processes:
        start.release()

    def median(of) -> float:
        return statistics.median(of(r) for r in rounds_of)

    out = {name: count / median(lambda r, name=name: r[name]) for name in ways}
    out["shards / loose"] = median(lambda r: r["loose PNG + npy"] / r["shards"])
    out["bare / shards"] = median(lambda r: r["shards"] / r["bare JPEG"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--source", help="index of other clips to read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = read_index(options.source or make(folder / "synthetic", options.clips, workers=options.workers))
        clips = [decode(read_members(s), fields=["tracks", "visible"]) for s in source.samples[: options.clips]]
        print(
            "| frames | kB a frame | shards | loose PNG + npy | bare JPEG | shards / loose | bare / shards |\n|"
            + " --- |" * 7
        )
        for label, way in (("quality 95", 95), ("quality 90", 90)):
            samples = ((f"{i:04d}", encode(c, way)) for i, c in enumerate(clips))
            index = read_index(write_shards(folder / label.replace(" ", "_"), "set", samples, samples_per_shard=16))
            loose = folder / f"loose-{label}"
            write_loose(loose, index)
            size = sum(s.members["rgb.bin"][1] / s.frames for s in index.samples) / len(index.samples) / 1e3
            rate = measure(index, loose, options.workers, options.rounds)
            print(f"| {label} | {size:.1f} | " + " | ".join(f"{v:.2f}" for v in rate.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
