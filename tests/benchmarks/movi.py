"""Time of MOVi's steps for one clip of 24 x 256 x 256 with 20 objects (half of all pixels), in one process.

    OMP_NUM_THREADS=1 python tests/benchmarks/movi.py              # a minute, of which the scene takes a quarter
    OMP_NUM_THREADS=1 python tests/benchmarks/movi.py --repeat 50

The goals: 256 tracks under 20 ms, the dense tracks of a frame (all pixels x 24 frames) under 50 ms, on one core.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "prep"))

from movi_scene import annotations, flows, movi_record, record, truth
from trackpl_prep.dataset import make_options
from trackpl_prep.files.tfrecord import read_record
from trackpl_prep.movi import MOVI_E
from trackpl_prep.movi_records import SCENE, read_features, scene_of
from trackpl_prep.movi_tracks import depth_map, every_pixel, sample, track


def timed(name, work, repeat):
    """Run, and print minimum and median."""
    work()
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e3)
    print(f"{name:46s} min {min(times):7.1f} ms   median {statistics.median(times):7.1f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    world = truth(24, (options.size, options.size), 20)
    features = annotations(world)
    for step, key in ((1, "forward_flow"), (-1, "backward_flow")):
        features[key], features[f"metadata/{key}_range"] = flows(world, step)
    payload = record(movi_record(features))
    objects = (world.ids > 0).mean()
    print(f"24 x {options.size} x {options.size}, {objects:.0%} on objects, a record of {len(payload) / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "movi_e-train.tfrecord-00000-of-00001"
        file.write_bytes(payload)
        data, everything = read_record(file, 0), [*SCENE, "video"]
        scene = scene_of(read_features(data, everything, "record"), "record")

        def sparse(points):
            track(scene, sample(scene, points, np.random.default_rng(0))[0])

        run = partial(timed, repeat=options.repeat)
        run("256 tracks: choose and follow", partial(sparse, 256))
        run("2,048 tracks: choose and follow", partial(sparse, 2048))
        run("dense tracks of the first frame", lambda: track(scene, every_pixel(scene, 0)))
        run("depth along the axis", lambda: depth_map(scene))
        few = partial(timed, repeat=max(2, options.repeat // 4))
        few("record: read and check", lambda: read_record(file, 0))
        few("record: decode what tracks need, and video", lambda: read_features(data, everything, "record"))
        few("record: decode one flow", lambda: read_features(data, ["forward_flow"], "record"))
        variants = {"2,048 tracks": {}, "and dense of both ends": {"dense": "both"}, "and flow": {"flow": "published"}}
        for name, changes in variants.items():
            chosen = make_options(MOVI_E, **changes)
            few(f"whole sample, {name}", lambda c=chosen: list(MOVI_E.read(Path(folder), (file.name, 0, 0), c)))
            ((_, members),) = MOVI_E.read(Path(folder), (file.name, 0, 0), chosen)
            print(f"{'':46s} {sum(map(len, members.values())) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
