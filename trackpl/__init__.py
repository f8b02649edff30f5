"""One platform to train, compare and use point trackers and dense video correspondence.

The two lines to start with::

    method = trackpl.load("locotrack")
    tracks = method.track(trackpl.Clip(video=video), queries)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackpl.checkpoints import load
    from trackpl.errors import Error
    from trackpl.method import Info, Method
    from trackpl.types import Camera, Clip, DenseTracks, Flow, Tracks

__version__ = "0.1.0"
__all__ = ["Camera", "Clip", "DenseTracks", "Error", "Flow", "Info", "Method", "Tracks", "load"]

_HOME = {
    "Error": "trackpl.errors",
    "load": "trackpl.checkpoints",
    "Info": "trackpl.method",
    "Method": "trackpl.method",
} | dict.fromkeys(["Camera", "Clip", "DenseTracks", "Flow", "Tracks"], "trackpl.types")


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `trackpl --help` need not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'trackpl' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
