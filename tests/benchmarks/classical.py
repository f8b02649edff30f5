"""Shipped weights against classical trackers on the held-out synthetic clips, in one run.

    python tests/benchmarks/classical.py [--clips 30] [--resolution 768]

Baselines: pyramidal Lucas-Kanade (`cv2.calcOpticalFlowPyrLK`) from frame to frame; DIS flow chained from frame to
frame, and by the steps that the platform makes of any flow (`trackpl.adapters.follow`), as ours is. All judge
visibility by the forward-backward error, as ours does; a point that LK loses stays where it was lost.
"""

import argparse
import time
from functools import partial

import cv2
import numpy as np
import torch
from tqdm import tqdm
from trackpl_prep.synthetic import default_set

import trackpl
from trackpl.adapters import SPANS, follow
from trackpl.metrics.tapvid import TapVid, first_queries
from trackpl.shards import decode, read_index, read_members
from trackpl.types import Tracks

SHOWN = ("AJ", "delta_avg", "OA", "delta_1", "delta_2", "delta_4", "delta_8", "delta_16")
FIELDS = ("video", "tracks", "visible", "valid")
CONSISTENT = 1.5  # px of forward-backward error up to which LK calls a point visible


def grey(clip):
    return [cv2.cvtColor(f.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY) for f in clip.video[0]]


def chained_dis(clip, queries, spans=(1,)):
    """DIS flow from frame to frame, or by longer steps too."""
    frames, dis = grey(clip), cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow_of(pairs):
        flows = [torch.from_numpy(dis.calc(frames[s], frames[t], None)).permute(2, 0, 1) for s, t in pairs]
        return torch.stack(flows)[None]

    return follow(flow_of, clip.frames, clip.size, queries, spans=spans)


def chained_lk(clip, queries):
    """Lucas-Kanade from frame to frame; OpenCV's pixel centres are at whole numbers."""
    frames, (h, w), n = grey(clip), clip.size, queries.shape[1]
    born = queries[0, :, 0].long().numpy()
    xy = np.repeat(queries[0, None, :, 1:].numpy(), len(frames), 0)
    seen = np.zeros((len(frames), n), np.float32)
    seen[born, np.arange(n)] = 1
    options = {"winSize": (21, 21), "maxLevel": 4}
    for step in (1, -1):
        for t in range(len(frames))[::step][1:]:
            alive = (born < t) if step > 0 else (born > t)
            if not alive.any():
                continue
            here = (xy[t - step, alive] - 0.5).astype(np.float32)[:, None]
            there, ok, _ = cv2.calcOpticalFlowPyrLK(frames[t - step], frames[t], here, None, **options)
            back, again, _ = cv2.calcOpticalFlowPyrLK(frames[t], frames[t - step], there, None, **options)
            gap = np.linalg.norm(back - here, axis=-1)[:, 0]
            good = (ok[:, 0] == 1) & (again[:, 0] == 1) & (gap < CONSISTENT)
            place = np.where(ok == 1, there[:, 0], here[:, 0]) + 0.5
            xy[t, alive] = place
            inside = ((place >= 0) & (place <= [w, h])).all(1)
            seen[t, alive] = good & inside & (seen[t - step, alive] > 0)
    return Tracks(torch.from_numpy(xy)[None].float(), torch.from_numpy(seen)[None])


def main():
    """Print a row for each tracker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=30)
    parser.add_argument("--resolution", type=int, help="shorter side that flow is computed on; default: the weights'")
    options = parser.parse_args()
    method = trackpl.load("crw_multiscale", **({"resolution": options.resolution} if options.resolution else {}))
    trackers = {
        "crw_multiscale": method.track,
        "chained DIS": chained_dis,
        "chained LK": chained_lk,
        "DIS, our steps": partial(chained_dis, spans=SPANS),
    }
    metrics, seconds = {name: TapVid() for name in trackers}, dict.fromkeys(trackers, 0.0)
    samples = read_index(default_set("val")).samples[: options.clips]
    for sample in tqdm(samples, unit="clip"):
        clip = decode(read_members(sample, FIELDS), fields=FIELDS)
        queries = first_queries(clip.tracks, clip.visible, clip.valid)
        for name, track in trackers.items():
            begin = time.perf_counter()
            tracks = track(clip, queries)
            seconds[name] += time.perf_counter() - begin
            metrics[name].update_clip(clip, queries, tracks)
    print(f"{len(samples)} held-out synthetic clips, {torch.get_num_threads()} threads, opencv {cv2.__version__}")
    print(f"{'':16}" + "".join(f"{k:>10}" for k in SHOWN) + "    s/clip")
    for name, metric in metrics.items():
        figures = metric.compute()
        cells = "".join(f"{float(figures[k]):10.1f}" for k in SHOWN)
        print(f"{name:16}{cells}{seconds[name] / len(samples):10.2f}")


if __name__ == "__main__":
    main()
