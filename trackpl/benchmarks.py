"""What each benchmark asks and what others reached on it, decided once, one record each.

How points, flow, masks and poses are asked for and scored stands in `trackpl.protocols`.
"""

from __future__ import annotations

from collections.abc import Mapping

from trackpl.errors import Error, closest
from trackpl.protocols import Benchmark, Reference
from trackpl.protocols.flow import FlowPairs
from trackpl.protocols.masks import Masks
from trackpl.protocols.points import Points
from trackpl.protocols.pose import Poses


def find(name: str) -> Benchmark:
    """Return the benchmark `name`; raises `Error` with the closest match where there is none."""
    if name not in BENCHMARKS:
        raise Error(f"no benchmark is called '{name}'; {closest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


_LOCOTRACK = "Cho et al., LocoTrack, 2024"
_COTRACKER = "Karaev et al., CoTracker, 2023"
_DELTA = "Ngo et al., DELTAv2, 2025"
_CRW = "Bian et al., 2022"  # {}: trained on the frames of the benchmark, without their truth


def _references(source: str, **figures: tuple[float | None, ...]) -> tuple[Reference, ...]:
    """Make references of one paper; in the names __ stands for a blank and _ for a hyphen."""
    return tuple(Reference(n.replace("__", " ").replace("_", "-"), f, source) for n, f in figures.items())


def _crw(figures: Mapping[str, tuple[float | None, ...]]) -> tuple[Reference, ...]:
    """Make references of Bian et al., by the names that they give."""
    return tuple(Reference(name, values, _CRW) for name, values in figures.items())


def _sintel(rendering: str, figures: Mapping[str, float]) -> FlowPairs:
    return FlowPairs(
        f"sintel_{rendering}",
        f"MPI Sintel, training sequences, {rendering} pass: flow of every frame to the next",
        "sintel",
        23,
        {
            "EPE": ("EPE", "pixels"),
            "EPE_visible": ("EPE_visible", "pixels"),
            "EPE_occluded": ("EPE_occluded", "pixels"),
            **{f"px{x}": (f"px{x}", "pixels") for x in (1, 3, 5)},
        },
        whole=True,
        made={"--split": "training", "--pass": rendering},
        headline=("EPE", "EPE_visible", "EPE_occluded"),
        metrics=("EPE", "EPE_visible", "EPE_occluded", "px1", "px3", "px5"),
        asks=1041,
        references=_crw({name: (value, None, None) for name, value in figures.items()}),
    )


_ALL: tuple[Benchmark, ...] = (
    Points(
        "tapvid_davis_first",
        "TAP-Vid-DAVIS, each track queried where it is first visible",
        "tapvid_davis",
        30,
        "first",
        references=_references(_COTRACKER, TAP_Net=(33.0, 48.6, 78.8), PIPs=(42.2, 64.8, 77.7), MFT=(47.3, 66.8, 77.8))
        + _references(_COTRACKER, OmniMotion=(46.4, 62.7, 85.3), TAPIR=(56.2, 70.0, 86.5), CoTracker=(60.6, 75.4, 89.3))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(62.0, 74.3, 86.1), LocoTrack_B__256x256=(63.0, 75.3, 87.2))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(63.2, 76.2, 84.6), LocoTrack_B__384x512=(64.8, 77.4, 86.2))
        + _references(_DELTA, DELTA=(62.7, 76.7, 88.2), DELTAv2=(62.5, 76.2, 87.9)),
    ),
    Points(
        "tapvid_davis_strided",
        "TAP-Vid-DAVIS, queried every 5 frames, tracked both ways",
        "tapvid_davis",
        30,
        "strided",
        references=_references(_COTRACKER, TAP_Net=(38.4, 53.1, 82.3), PIPs=(52.4, 70.0, 83.6), MFT=(56.1, 70.8, 86.9))
        + _references(_COTRACKER, OmniMotion=(51.7, 67.5, 85.3), TAPIR=(61.3, 73.6, 88.8), CoTracker=(64.8, 79.1, 88.7))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(66.9, 78.8, 88.9), LocoTrack_B__256x256=(67.8, 79.6, 89.9))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(68.4, 80.4, 87.5), LocoTrack_B__384x512=(69.4, 81.3, 88.6)),
    ),
    Points(
        "tapvid_kinetics_first",
        "TAP-Vid-Kinetics, each track queried where it is first visible",
        "tapvid_kinetics",
        1189,
        "first",
        references=_references(
            _COTRACKER, TAP_Net=(38.5, 54.4, 80.6), PIPs=(31.7, 53.7, 72.9), TAPIR=(49.6, 64.2, 85.0)
        )
        + _references(_COTRACKER, CoTracker=(48.7, 64.3, 86.5))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(52.8, 66.5, 84.9), LocoTrack_B__256x256=(52.9, 66.8, 85.3))
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(51.9, 66.1, 81.2), LocoTrack_B__384x512=(52.3, 66.4, 82.1))
        + _references(_DELTA, MFT=(39.6, 60.4, 72.7), DELTA=(49.5, 63.3, 82.2), DELTAv2=(47.8, 61.3, 82.0)),
    ),
    Points(
        "tapvid_kinetics_strided",
        "TAP-Vid-Kinetics, queried every 5 frames, tracked both ways",
        "tapvid_kinetics",
        1189,
        "strided",
        references=_references(
            _LOCOTRACK, LocoTrack_S__256x256=(59.6, 72.7, 88.1), LocoTrack_B__256x256=(59.5, 73.0, 88.5)
        )
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(58.7, 72.2, 84.5), LocoTrack_B__384x512=(59.1, 72.5, 85.7)),
    ),
    Points(
        "tapvid_rgb_stacking_first",
        "TAP-Vid-RGB-Stacking, each track queried where it is first visible",
        "tapvid_rgb_stacking",
        50,
        "first",
        references=_references(
            _COTRACKER, TAP_Net=(54.6, 68.3, 87.7), PIPs=(15.7, 28.4, 77.1), OmniMotion=(69.5, 82.5, 90.3)
        )
        + _references(_COTRACKER, TAPIR=(54.2, 69.8, 84.4), CoTracker=(63.1, 77.0, 87.8))
        + _references(_DELTA, LocoTrack_B=(69.0, 83.2, 89.5), DELTA=(74.2, 83.5, 90.0), DELTAv2=(74.0, 82.9, 89.3)),
    ),
    Points(
        "tapvid_rgb_stacking_strided",
        "TAP-Vid-RGB-Stacking, queried every 5 frames, tracked both ways",
        "tapvid_rgb_stacking",
        50,
        "strided",
        references=_references(
            _LOCOTRACK, LocoTrack_S__256x256=(77.4, 87.0, 92.9), LocoTrack_B__256x256=(77.1, 86.9, 93.2)
        )
        + _references(_LOCOTRACK, LocoTrack_S__384x512=(71.0, 84.4, 83.3), LocoTrack_B__384x512=(70.8, 83.2, 84.1)),
    ),
    Points(
        "robotap_first",
        "RoboTAP, each track queried where it is first visible",
        "robotap",
        265,
        "first",
        references=_references(_LOCOTRACK, TAPIR=(59.6, 73.4, 87.0))
        + _references(_LOCOTRACK, LocoTrack_S__256x256=(62.5, 76.0, 87.0), LocoTrack_B__256x256=(62.3, 76.2, 87.1)),
    ),
    Points(
        "tapvid_kubric",
        "TAP-Vid-Kubric validation, 256 queries a clip as the data set names them, tracked both ways",
        "tapvid_kubric",
        250,
        "given",
    ),
    Points(
        "synthetic",
        "held-out clips with exact truth that are made here on first use, queried first",
        "synthetic",
        30,
        "first",
    ),
    FlowPairs(
        "synthetic_flow",
        "flow of the held-out clips that are made here on first use, hidden pixels apart",
        "synthetic",
        30,
        {
            "EPE": ("EPE", "pairs"),
            "EPE_visible": ("EPE_visible", "pairs"),
            "EPE_occluded": ("EPE_occluded", "pairs"),
            "Fl": ("Fl_all", "pairs"),
            "EPE_zero": ("EPE_zero", "pairs"),
        },
        headline=("EPE", "EPE_visible", "EPE_occluded", "Fl"),
        metrics=("EPE", "EPE_visible", "EPE_occluded", "Fl", "EPE_zero"),
    ),
    _sintel(
        "clean",
        {
            "EPIFlow": 3.94,
            "{UFlow}": 2.50,
            "SMURF-PWC": 2.63,
            "{SMURF-RAFT}": 1.71,
            "{CRW 2-cycle}": 2.84,
            "{CRW 3-cycle}": 2.77,
            "{CRW 4-cycle}": 2.72,
            "CRW multiscale, YouTube-VOS": 3.01,
        },
    ),
    _sintel(
        "final",
        {
            "EPIFlow": 5.08,
            "{UFlow}": 3.39,
            "SMURF-PWC": 3.66,
            "{SMURF-RAFT}": 2.58,
            "{CRW 2-cycle}": 3.82,
            "{CRW 3-cycle}": 3.61,
            "{CRW 4-cycle}": 3.55,
            "CRW multiscale, YouTube-VOS": 4.02,
        },
    ),
    FlowPairs(
        "kitti2015",
        "KITTI 2015, training pairs: noc without pixels that leave the frame, occ those alone",
        "kitti2015",
        200,
        {
            "EPE_noc": ("EPE_visible", "pairs"),
            "EPE_all": ("EPE", "pairs"),
            "EPE_occ": ("EPE_occluded", "pairs"),
            "ER": ("Fl_all", "pairs"),
            "ER_noc": ("Fl_visible", "pairs"),
            "ER_pooled": ("Fl_all", "pixels"),
        },
        made={"--split": "training"},
        headline=("EPE_noc", "EPE_all", "EPE_occ", "ER"),
        metrics=("EPE_noc", "EPE_all", "EPE_occ", "ER", "ER_noc", "ER_pooled"),
        asks=200,
        references=_crw(
            {
                "EPIFlow": (2.56, 5.56, None, None),
                "{UFlow}": (1.88, 2.71, None, 9.05),
                "SMURF-PWC": (None, 2.73, None, 9.33),
                "{SMURF-RAFT}": (1.41, 2.00, None, 6.42),
                "Jabri et al.": (12.63, 19.41, None, 64.50),
                "{CRW non-parametric}": (2.18, 9.42, None, 27.98),
                "{CRW 2-cycle}": (2.09, 3.86, None, 12.45),
                "{CRW 3-cycle}": (2.05, 3.46, None, 12.28),
                "{CRW 4-cycle}": (2.04, 3.39, None, 12.14),
                "{CRW 3-frame + Census}": (2.02, 3.03, None, 10.67),
                "CRW multiscale, YouTube-VOS": (2.20, 3.83, None, 13.17),
            }
        ),
    ),
    Masks(
        "davis2017",
        "DAVIS-2017 val, 480p: masks of the first frame followed through the video",
        "davis2017",
        30,
        made={"--split": "val", "--resolution": "480p"},
        asks=61,
        references=_crw(
            {
                "TimeCycle": (50.1, None, None),
                "UVC": (59.5, None, None),
                "CRW, one scale": (67.6, None, None),
                "VFS": (68.8, None, None),
                "UFlow, chained": (42.0, None, None),
                "CRW multiscale, Sintel": (57.1, None, None),
                "CRW multiscale, YouTube-VOS": (57.9, None, None),
            }
        ),
    ),
    Poses(
        "jhmdb",
        "JHMDB, test clips of split 1: joints of the first frame followed through the clip",
        "jhmdb",
        268,
        made={"--split": "test", "--fold": "1"},
        references=_crw(
            {
                "TimeCycle": (None, 57.3, 78.1, None),
                "UVC": (None, 58.6, 79.6, None),
                "CRW, one scale": (29.1, 59.3, 80.6, None),
                "VFS": (None, 60.9, 80.7, None),
                "UFlow, chained": (24.1, 51.3, 72.1, None),
                "CRW multiscale, Sintel": (38.0, 63.1, 81.4, None),
                "CRW multiscale, YouTube-VOS": (38.2, 62.6, 80.9, None),
            }
        ),
    ),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
