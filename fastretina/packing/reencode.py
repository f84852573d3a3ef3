"""Images that cannot go into a .beton as they are: decode, orient, letterbox or crop, encode again, in worker processes.

Letterbox, not squash: squashing a 3:2 camera frame to a square turns the round disc of the retina into an ellipse whose
axes change with the camera, and a model would learn the camera. The longer side becomes SIZE, the rest is black, which
is what surrounds a fundus photograph anyway.

The workers are plain child processes of this module (`serve`), not multiprocessing's: they do not import the caller's
main module, hence never torch; a killed one is noticed at once, with the image it was at; and they end by themselves
when their parent dies.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastretina.errors import ConvertError, JpegError
from fastretina.packing.decode import Picture, decode
from fastretina.packing.inspect import read_file
from fastretina.packing.preprocessing import UNPREPARED, Preparation
from fastretina.system.interrupts import POLL, HeldSignals
from fastretina.system.malloc import keep_freed_memory

if TYPE_CHECKING:
    from fastretina.packing.fundus import Disc

QUALITY = 95
SUBSAMPLING = "4:4:4"  # full colour resolution: a microaneurysm is a red dot two or three pixels wide
_NO_CROP = {
    "whole frame": "nothing to crop to: the rim of the retina's disc is out of sight",
    "two eyes": "nothing to crop to: it shows two eyes or more (cut it into one picture for each)",
}
_LAST_WORDS = 1.0  # seconds for a worker that has failed to print its traceback
_ORPHANED = 1.0  # seconds after which an idle worker looks whether its parent still lives
_QUEUED = 2  # images in a worker's hands: the one it is at, and the next
_SPARE = 2.0  # times the final size that decoding to 1/2, 1/4 or 1/8 must leave, so that Lanczos does the last step
# The same for the disc's diameter. With 2.0 a frame of 3,000 x 2,000 px would be decoded whole for 512 px, at three times the cost;
# decoded at 1/2 its crop has a PSNR of 53 dB to that, encoding at quality 95 one of 45.
_SPARE_OF_DISC = 1.5


class Reencoded(NamedTuple):
    """A JPEG file, and what is to be told of the image besides, in words that are always the same."""

    jpeg: bytes
    notes: tuple[str, ...] = ()


class Square(NamedTuple):
    """`image`: RGB, SIZE x SIZE. done: what was done to the photograph, in words that are always the same. notes: as `Picture`.

    no_crop: why there was nothing to crop to, "whole frame" or "two eyes"; "" where it was cropped or nobody asked for that.
    """

    image: Image.Image
    done: tuple[str, ...]
    notes: tuple[str, ...]
    no_crop: str = ""


def reencode(data: bytes, size: int, preparation: Preparation = UNPREPARED) -> Reencoded:
    """Any image that can be read, as a baseline YCbCr JPEG of `size` x `size` pixels, quality 95, 4:4:4.

    Raises as `square`, and JpegError where there is nothing to crop to: a file in which some images show the disc and some the
    whole frame would teach a network the difference.
    """
    made = square(data, size, preparation)
    if made.no_crop:
        raise JpegError(f"{_NO_CROP.get(made.no_crop, made.no_crop)}; pack without --crop fundus, which letterboxes all images")
    return Reencoded(encode(made.image), made.notes)


def encode(image: Image.Image) -> bytes:
    """The JPEG file that a .beton holds of an RGB image."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING)
    return out.getvalue()


def square(data: bytes, size: int, preparation: Preparation = UNPREPARED) -> Square:
    """Any image that can be read, upright, RGB, `size` x `size` pixels: letterboxed, or as `preparation` says.

    Transparency becomes black, 16 bits are scaled to 8, EXIF orientation and colour profiles are applied; a JPEG that would pass
    through is shown as it is. Where there is nothing to crop to, the whole frame is letterboxed.

    Raises:
        JpegError: as `decode.decode`; dark all over, where a retina is prepared.
    """
    if preparation.crop == "none":
        picture = decode(data, longer=_SPARE * size, passes_at=0 if preparation else size)
    else:
        picture = decode(data, longer=_SPARE * size, shorter=_SPARE_OF_DISC * size)
    return squared(picture, size, preparation, lambda longer: decode(data, longer=longer))


def squared(
    picture: Picture, size: int, preparation: Preparation = UNPREPARED, larger: Callable[[float], Picture] | None = None
) -> Square:
    """As `square`, of a picture; larger: decodes one that is shrunk anew, with a longer side of so many pixels at least."""
    if preparation.crop == "none":
        image, done, no_crop = _letterbox(picture.image, size), _done(picture.image, size), ""
    else:
        image, no_crop = _cropped(picture, size, larger)
        done = no_crop or "cropped"
    if preparation.contrast == "local":
        from fastretina.packing.fundus import Disc, local_contrast  # not before: see _cropped

        pixels = np.asarray(image)
        # A cropped picture's disc is its own circle; looked for again, the rim of a dim one might not be found.
        disc = Disc((size - 1) / 2, (size - 1) / 2, size / 2) if done == "cropped" else _disc(pixels)
        image = Image.fromarray(local_contrast(pixels, None if isinstance(disc, str) else disc))
    return Square(image, (done,) if preparation.contrast == "none" else (done, "local contrast"), picture.notes, no_crop)


def _done(image: Image.Image, size: int) -> str:
    if image.width != image.height:
        return "letterboxed"
    return "as it was" if image.width == size else "scaled"


def _letterbox(image: Image.Image, size: int) -> Image.Image:
    """`image` scaled (Lanczos) so that its longer side is `size`, centred on black."""
    scale = size / max(image.size)
    width, height = (min(size, max(1, round(side * scale))) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if (width, height) == (size, size):
        return image
    canvas = Image.new("RGB", (size, size))
    canvas.paste(image, ((size - width) // 2, (size - height) // 2))
    return canvas


def _cropped(picture: Picture, size: int, larger: Callable[[float], Picture] | None) -> tuple[Image.Image, str]:
    """The square of the retina's disc; or the whole frame, letterboxed, and why."""
    # OpenCV takes 0.2 s to import: as long as packing 2,000 images that pass through. Only those wait for it who need it.
    from fastretina.packing.fundus import crop_to_disc

    image = picture.image
    disc = _disc(np.asarray(image))
    if picture.shrunk and not isinstance(disc, str) and (missing := _SPARE_OF_DISC * size / (2 * disc.radius)) > 1:
        assert larger is not None  # who shrinks it can decode it again
        image = larger(missing * max(image.size)).image  # a small disc in a large frame
        disc = _disc(np.asarray(image))
    if isinstance(disc, str):
        return _letterbox(image, size), disc
    return Image.fromarray(crop_to_disc(np.asarray(image), disc, size)), ""


def _disc(pixels: npt.NDArray[np.uint8]) -> Disc | str:
    """The retina's disc, or in a word why there is nothing to crop to. JpegError: the image is dark all over."""
    from fastretina.packing.fundus import NoDisc, find_disc

    try:
        return find_disc(pixels)
    except NoDisc as none:
        return none.word


# ---- worker processes ------------------------------------------------------------------------------------------------


def serve(descriptor: int, parent: int) -> None:
    """A worker's life: (path, size, preparation) in, `Reencoded` or the reason in words out, until the parent closes or dies.

    parent: the number of its process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    warnings.simplefilter("ignore")  # odd metadata is not worth a line of anybody's terminal
    Image.MAX_IMAGE_PIXELS = None  # our own limit is checked before decoding, and does not only warn
    # Without it memory took 10 of the 26 ms of an image of 512 px with --contrast local.
    keep_freed_memory(largest=64 << 20, most=256 << 20)
    with Connection(descriptor) as pipe:
        while True:
            try:
                # Another process may hold the parent's end, forked by it meanwhile: then nothing closes as the parent dies.
                while not pipe.poll(_ORPHANED):
                    if os.getppid() != parent:
                        return
                path, size, preparation = pipe.recv()
                answer: Reencoded | str
                try:
                    answer = reencode(read_file(path), size, preparation)
                except (JpegError, MemoryError) as error:
                    answer = str(error) or "not enough memory to decode it"
                pipe.send(answer)
            except (EOFError, ConnectionError):
                return


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    rows: deque[int] = field(default_factory=deque)  # in its hands, oldest first


class WorkerDied(ConvertError):
    """A worker process ended on its own. `row`: what it was at, None if it was idle."""

    def __init__(self, row: int | None, code: int) -> None:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        super().__init__(f"a worker process {how} (out of memory, or killed by hand?)")
        self.row = row


class ReencodePool:
    """Worker processes for `reencode`. Use from one thread; results are asked for by row, in any order."""

    def __init__(self, workers: int, size: int, preparation: Preparation = UNPREPARED) -> None:
        self._size, self._preparation, self._count = size, preparation, workers
        self._workers: list[_Worker] = []
        self._backlog: deque[tuple[int, str]] = deque()
        self._done: dict[int, Reencoded | str] = {}

    def submit(self, row: int, path: str) -> None:
        """Re-encode the image at `path`. Starts a worker while there are fewer than asked for. ConvertError where it cannot."""
        self._backlog.append((row, path))
        if len(self._workers) < self._count:
            try:
                self._workers.append(_start())
            except OSError as error:
                raise ConvertError(f"a worker process cannot be started: {error.strerror}; fewer --workers need less") from error
        self._feed()

    def poll(self) -> None:
        """Take finished images and hand out new ones, without waiting. Raises WorkerDied."""
        self._pump(0.0)

    def result(self, row: int, signals: HeldSignals) -> Reencoded | str:
        """The image submitted as `row`, or why there is none; waits for it, and lets signals in. Raises WorkerDied."""
        while row not in self._done:
            self._pump(POLL)
            signals.check()
        return self._done.pop(row)

    def _pump(self, timeout: float) -> None:
        pipes = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(pipes), timeout):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                answer = worker.pipe.recv()
            except (EOFError, ConnectionError):
                raise self._died(worker) from None
            self._done[worker.rows.popleft()] = answer
        self._feed()

    def _feed(self) -> None:
        for depth in range(_QUEUED):  # everyone's first before anyone's second
            for worker in self._workers:
                if self._backlog and len(worker.rows) <= depth:
                    row, path = self._backlog.popleft()
                    worker.rows.append(row)
                    try:
                        worker.pipe.send((path, self._size, self._preparation))
                    except ConnectionError:
                        raise self._died(worker) from None

    def _died(self, worker: _Worker) -> WorkerDied:
        # It closed its pipe, so that it is of no use any more; but how it ends by itself is what the user should read.
        try:
            worker.process.wait(_LAST_WORDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
        return WorkerDied(worker.rows[0] if worker.rows else None, worker.process.wait())

    def close(self) -> None:
        """End all workers now, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
            worker.pipe.close()
        for worker in self._workers:
            worker.process.wait()


def _start() -> _Worker:
    ours, theirs = Pipe()
    code = f"import sys; sys.path[:] = {sys.path!r}; from fastretina.packing.reencode import serve\n"
    # Asked for its parent after that had died, it would be told of another.
    code += f"serve({theirs.fileno()}, parent={os.getpid()})"
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,  # a Ctrl-C while it starts must not print a traceback
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"},
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return _Worker(process, ours)
