"""The process that makes one clip: reads a request from its standard input, writes the members of the sample as files.

``python -m trackpl_prep.blender.child FOLDER``; exit status 2 and one line on standard error for a user's mistake. It
ends when its standard input ends, so that no renderer outlives the program that asked for it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from pathlib import Path

MARK = "kubric-blender: "  # before the one line that is meant for the user


def main(folder: Path) -> int:
    """Make the clip that is asked for on standard input; returns the exit status."""
    request_line = sys.stdin.readline()
    threading.Thread(target=_watch, daemon=True).start()
    import torch

    from trackpl.encoding import encode
    from trackpl.errors import Error
    from trackpl_prep.blender.clip import LICENCE, Request, make

    torch.set_num_threads(1)  # sums split over several threads differ in the last bit
    values = json.loads(request_line)
    request = Request(**{**values, "size": (values["size"][0], values["size"][1])})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            clip, facts = make(request, Path(scratch))
        licence = LICENCE if request.textures is None else "that of the textures"
        members = encode(clip, licence=licence, source=facts)
    except Error as error:
        print(f"{MARK}{error}", file=sys.stderr)
        return 2
    for extension, data in members.items():
        (folder / extension).write_bytes(data)
    return 0


def _watch() -> None:
    """End this process when the other end of standard input is gone."""
    sys.stdin.read()
    os._exit(3)


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Without Blender's own tidying up at exit, which may crash after all the work is done.
    os._exit(status)
