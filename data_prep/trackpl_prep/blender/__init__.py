"""The data set `kubric-blender`: physically simulated, ray-traced scenes in Kubric's spirit, with exact truth.

`bodies` makes meshes, `physics` moves them, `scene` chooses what a clip shows, `truth` computes all truth from the
geometry, `render` has Blender draw the frames; `clip` puts one clip together in `child`, a process of its own, and
`dataset` is what `trackpl data make kubric-blender` runs. Axes of the world: x, y on the floor, z up; metres.
"""

INSTALL = (
    'with Python 3.11: pip install "trackpl[blender]"; and Blender\'s system libraries, on Debian: '
    "apt-get install libsm6 libxi6 libxrender1 libxkbcommon0 libgl1 libegl1"
)
