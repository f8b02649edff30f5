"""`trackpl track`: points of a video file, a folder of frames or a camera, from their pixels to useful files.

A video that can be held whole is tracked first and written then. A longer one, and a camera, is streamed: its files
grow while it is tracked (`trackpl.recording`).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trackpl import adapters, draw, labels
from trackpl.camera import Camera, open_camera
from trackpl.errors import Error, VideoError, closest
from trackpl.queries import GRID, read_queries
from trackpl.recording import COLUMNS, SHEET, Frame, Recorder
from trackpl.types import Tracks
from trackpl.usage import Parser, device_of
from trackpl.video import VideoReader, open_video
from trackpl.writing import replacing, write_video

OUTPUTS = ("tracks.npz", "tracks.csv", "tracks.mp4", "tracks.png")
FOR_POINTS, FOR_LABELS = "locotrack", "crw_multiscale"  # the methods that `track` takes by itself
_CHUNK = 16  # frames decoded at once while drawing


def run(args: list[str]) -> int:
    """Track points as the command line says; return 0.

    Raises:
        Error: bad input, always before anything is written; or a video that breaks off, after what came before is.
    """
    given = _parse(args)
    marked = bool(given.labels or given.keypoints)
    if marked:
        labels.check_options(given)
    device = device_of(given.device)
    # A bare name may be that of published weights (`trackpl weights`), which `load` finds.
    named = given.checkpoint and given.checkpoint.parent == Path() and not given.checkpoint.suffix
    if given.checkpoint and not named and not given.checkpoint.is_file():
        raise Error(f"no checkpoint at {given.checkpoint}: give the file, or none to use the weights that ship")
    if given.video.name.isdecimal() and not given.video.exists():
        with closing(open_camera(int(given.video.name))) as camera:
            out = given.out or Path("tracks") / camera.path
            _check_out(out, given.overwrite)
            _stream(given, device, camera, read_queries(given, camera), out)
        return 0
    video = open_video(given.video)
    video.frames = min(video.frames, given.frames or video.frames)
    out = given.out or Path("tracks") / _stem(given.video)
    if marked:
        _check_out(out, given.overwrite, labels.OUTPUTS["labels" if given.labels else "keypoints"])
        labels.follow(given, device, video, out)
        return 0
    _check_out(out, given.overwrite)
    queries = read_queries(given, video)
    work = _whole if adapters.fits(video) else _stream
    work(given, device, video, queries, out)
    return 0


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser(
        "track",
        "Track points through a video. Coordinates are pixels: x to the right, y down, (0, 0) the outer "
        "corner of the top-left pixel, whose centre is (0.5, 0.5). Points of all kinds add up; without any, "
        f"a grid of {GRID} x {GRID} is tracked.",
    )
    add = parser.add_argument
    add(
        "video",
        metavar="VIDEO",
        type=Path,
        help="a video file, a folder of jpg, png or webp frames, or the number of a camera, such as 0",
    )
    add(
        "--model",
        metavar="NAME",
        help=f"a method of `trackpl plugins` (default: {FOR_POINTS}, for --labels {FOR_LABELS})",
    )
    add(
        "--checkpoint",
        metavar="FILE",
        type=Path,
        help="its weights, or the name of published ones (default: those that ship with it)",
    )
    add("--grid", metavar="N", type=int, help=f"N x N points over the frame or the mask (default: {GRID})")
    add("--points", metavar="X,Y[@T]", nargs="+", action="extend", default=[], help="points, @T: of frame T")
    add("--points-file", metavar="FILE", type=Path, help="csv, txt or npy with columns t,x,y or x,y")
    add(
        "--mask",
        metavar="PNG",
        type=Path,
        help="keep grid points where it is not 0; the grid spans what it marks",
    )
    add(
        "--start",
        metavar="T",
        type=int,
        default=0,
        help="frame of the grid and of points without one (default: 0)",
    )
    add(
        "--labels",
        metavar="PNG",
        type=Path,
        help="follow what an indexed, grey or flatly coloured png marks in frame 0, instead of points",
    )
    add("--keypoints", metavar="CSV", type=Path, help="follow the joints name,x,y of frame 0, instead of points")
    add("--frames", metavar="N", type=int, help="only the first N frames (default: all; a camera: until Ctrl-C)")
    add("--out", metavar="DIR", type=Path, help="where the files go (default: tracks/<name of the video>)")
    add("--overwrite", action="store_true", help="replace the files of an earlier run in DIR")
    add(
        "--device",
        metavar="NAME",
        default="auto",
        help="cpu, cuda, or auto: a GPU where there is one (default)",
    )
    add(
        "--threshold",
        metavar="P",
        type=float,
        default=0.5,
        help="visible above this probability (default: 0.5)",
    )
    add(
        "--tail",
        metavar="N",
        type=int,
        default=draw.TAIL,
        help="frames that a tail reaches back (default: 10)",
    )
    add("--no-video", action="store_true", help="draw no tracks.mp4")
    # argparse would take a point left of the frame for an option; words with a blank in them it lets through.
    given, unknown = parser.parse_known_args([" " + a if re.match(r"-[\d.]+,", a) else a for a in args])
    if unknown:
        _refuse(unknown, parser)
    if given.grid is not None and given.grid < 1:
        raise Error(f"--grid {given.grid}: allowed is a whole number from 1 on")
    if given.frames is not None and given.frames < 1:
        raise Error(f"--frames {given.frames}: allowed is a whole number from 1 on")
    if given.tail < 0:
        raise Error(f"--tail {given.tail}: allowed is a whole number of frames from 0 on")
    if not 0 <= given.threshold < 1:
        raise Error(f"--threshold {given.threshold:g}: allowed is a probability of at least 0 and below 1")
    given.model = given.model or (FOR_LABELS if given.labels else FOR_POINTS)
    return given


def _refuse(unknown: list[str], parser: argparse.ArgumentParser) -> None:
    flag = next((word for word in unknown if word.startswith("-")), None)
    if flag is None:
        raise Error(f"one video at a time: do not know what to do with '{unknown[0]}'")
    flags = {f for action in parser._actions for f in action.option_strings if f.startswith("--")}
    raise Error(f"track has no option '{flag.split('=')[0]}'; {closest(flag.split('=')[0], flags)}")


def _stem(video: Path) -> str:
    path = video.resolve()
    return path.name if path.is_dir() else path.stem


def _check_out(out: Path, overwrite: bool, names: Sequence[str] = OUTPUTS) -> None:
    if out.exists() and not out.is_dir():
        raise Error(f"--out {out} is a file: give a folder")
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise Error(f"{out} already holds {there[0]}: add --overwrite to replace it, or choose another --out")
    parent = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Error(f"cannot write to {out}: {parent} is not a folder that you may write to; choose another --out")


# A video that can be held whole -----------------------------------------------------------------------------


def _whole(given: argparse.Namespace, device: str, video: VideoReader, queries: np.ndarray, out: Path) -> None:
    from trackpl import checkpoints  # heavy: a wrong option is answered without them

    began = time.perf_counter()
    method = checkpoints.load(given.model, given.checkpoint, device)
    points = torch.from_numpy(queries).float()
    with _bar(video.frames) as bar:
        tracks = adapters.track_video(method, video, points, progress=_progress(bar))
    seconds = time.perf_counter() - began
    xy = tracks.xy.detach().float().cpu().reshape(video.frames, len(queries), 2)
    visibility = tracks.visible.detach().float().cpu().reshape(xy.shape[:2])
    visible = visibility > given.threshold
    _save(out, xy, visible, visibility, queries, video, given)
    _tell(out, visible.shape, int(visible.sum()), seconds)


def _bar(frames: int | None) -> tqdm:
    return tqdm(total=frames, desc="tracking", unit="frame", dynamic_ncols=True)


def _progress(bar: tqdm) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return progress


def _save(
    out: Path,
    xy: Tensor,
    visible: Tensor,
    visibility: Tensor,
    queries: np.ndarray,
    video: VideoReader,
    given: argparse.Namespace,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in OUTPUTS[2:]:  # pictures of other tracks must not stand beside these, should drawing be stopped
        (out / name).unlink(missing_ok=True)
    with replacing(out / "tracks.npz") as part:
        np.savez_compressed(
            part,
            xy=xy.numpy(),
            visible=visible.numpy(),
            visibility=visibility.numpy(),
            queries=queries.astype(np.float32),
        )
    _save_csv(out / "tracks.csv", xy.numpy(), visible.numpy())
    sheet = sorted({round(i * (video.frames - 1) / (SHEET - 1)) for i in range(SHEET)})
    wanted = sheet if given.no_video else list(range(video.frames))
    starts = torch.from_numpy(queries[:, 1:])
    kept: list[Tensor] = []
    drawn = _drawn(video, wanted, xy, visible, starts, given.tail)
    noted = _noting(drawn, {wanted.index(t) for t in sheet}, kept)
    if given.no_video:
        for _ in noted:
            pass
    else:
        write_video(out / "tracks.mp4", noted, video.fps)
    titles = [f"frame {t}" for t in sheet]
    draw.save_png(draw.contact_sheet(torch.stack(kept), titles=titles), out / "tracks.png")


def _save_csv(path: Path, xy: np.ndarray, visible: np.ndarray) -> None:
    with replacing(path) as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        frames = range(len(xy))
        for n in range(xy.shape[1]):
            x, y = ([f"{v:.4f}" for v in xy[:, n, axis].tolist()] for axis in (0, 1))
            writer.writerows(zip([n] * len(xy), frames, x, y, visible[:, n].astype(int).tolist(), strict=True))


def _drawn(
    video: VideoReader, frames: list[int], xy: Tensor, visible: Tensor, starts: Tensor, tail: int
) -> Iterator[Tensor]:
    """Draw the wanted frames, reading a few at a time."""
    colours, radius = draw.start_colours(starts), draw.disc_radius(video.size, starts)
    with tqdm(total=len(frames), desc="drawing", unit="frame", dynamic_ncols=True) as bar:
        for begin in range(0, len(frames), _CHUNK):
            some = frames[begin : begin + _CHUNK]
            for t, frame in zip(some, video.read(some), strict=True):
                past = slice(max(0, t - tail), t + 1)
                yield draw.draw_frame(frame, xy[past], visible[past], colours, radius)
                bar.update()


def _noting(frames: Iterator[Tensor], places: set[int], kept: list[Tensor]) -> Iterator[Tensor]:
    """Pass frames on, and keep those at `places`."""
    for i, frame in enumerate(frames):
        if i in places:
            kept.append(frame)
        yield frame


# A long video, or a camera ----------------------------------------------------------------------------------


def _stream(
    given: argparse.Namespace, device: str, source: VideoReader | Camera, queries: np.ndarray, out: Path
) -> None:
    """Track and write frame by frame, until the frames end or the user ends it.

    Raises:
        VideoError: the frames broke off; what came before is written.
        KeyboardInterrupt: the user ended it before a video's end; what came before is written.
    """
    from trackpl import checkpoints

    began = time.perf_counter()
    method = checkpoints.load(given.model, given.checkpoint, device)
    points = torch.from_numpy(queries).float().to(method.device)
    broken: list[VideoError] = []
    with _bar(source.frames) as bar:
        before = None
        images: Iterable[Tensor]
        if isinstance(source, VideoReader):
            before = adapters.track_back(method, source, points, _progress(bar))
            images = (source.read([t])[0] for t in range(source.frames))
            images = adapters.counted(images, source, points, _progress(bar))
        else:
            bar.write(f"{source.path}: {source.size[1]}x{source.size[0]}; Ctrl-C ends it")
            images = _ticking(source, bar)
        out.mkdir(parents=True, exist_ok=True)
        options = {"threshold": given.threshold, "tail": given.tail, "video": not given.no_video}
        recorder = Recorder(out, queries, source.size, source.fps, **options)
        with _gently() as asked:
            images = _until(images, asked, given.frames, broken)
            pieces = adapters.track_on(method.stream(points), images, before)
            try:
                recorder.write(_frames(pieces))
            except Error as error:
                raise (broken[0] if broken and not recorder.frames else error) from None
            stopped = asked()
    _tell(out, (recorder.frames, len(queries)), recorder.seen, time.perf_counter() - began)
    if broken:
        raise VideoError(f"{broken[0]}; the {recorder.frames} frames before it are in {out}")
    if stopped and source.frames is not None:
        raise KeyboardInterrupt


def _until(
    images: Iterable[Tensor], asked: Callable[[], bool], limit: int | None, broken: list[VideoError]
) -> Iterator[Tensor]:
    """Pass frames on until the user asks to end, there are enough of them, or they break off, which is noted."""
    try:
        for n, image in enumerate(images, 1):
            yield image
            if asked() or n == limit:
                return
    except VideoError as error:
        broken.append(error)


def _ticking(images: Iterable[Tensor], bar: tqdm) -> Iterator[Tensor]:
    for image in images:
        yield image
        bar.update()


def _frames(pieces: Iterable[tuple[list[Tensor], Tracks]]) -> Iterator[Frame]:
    for images, tracks in pieces:
        yield from zip(images, tracks.xy[0], tracks.visible[0], strict=True)


@contextmanager
def _gently() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C (or kill) end the work after the frame at hand; the second stops it at once.

    Gives a function that says whether the user asked to end.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():  # where there are no signals
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: asked
    finally:
        restore()


# ------------------------------------------------------------------------------------------------------------


def _tell(out: Path, shape: tuple[int, int], seen: int, seconds: float) -> None:
    frames, points = shape
    share = 100 * seen / (frames * points)
    print(f"{frames} frames x {points} points in {seconds:.1f} s, {share:.0f} % visible; the files:")
    about = {
        "tracks.npz": f"xy {(frames, points, 2)}, visible {(frames, points)}, queries {(points, 3)}",
        "tracks.csv": "point,frame,x,y,visible",
        "tracks.mp4": "the tracks drawn: discs are visible, rings hidden",
        "tracks.png": "a contact sheet of it",
    }
    for name, what in about.items():
        if (out / name).exists():
            print(f"  {out / name}  {what}")
    print(f"next: look at {out / 'tracks.png'}; in Python: numpy.load('{out / 'tracks.npz'}')['xy']")
