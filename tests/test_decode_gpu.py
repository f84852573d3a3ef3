"""The device decoders themselves, on a GPU, or the same libraries on a CPU: pixels, order, damage."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import resources

import numpy as np
import pytest
import simplejpeg
import torch
from devices import DEVICES
from numpy.typing import NDArray
from PIL import Image

from fastretina.decode import gpu
from fastretina.decode.gpu import DECODERS, NvImageCodec, make_decoder

SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
# On a GPU every engine alone as well; the library on a CPU has one.
ON_CUDA = [name for name in DECODERS if name not in ("nvimgcodec", "torchvision")]
CASES = [
    *(pytest.param(*param.values, name, marks=param.marks) for param in DEVICES for name in ("nvimgcodec", "torchvision")),
    *(pytest.param(*DEVICES[1].values, name, marks=DEVICES[1].marks) for name in ON_CUDA),
]


@pytest.fixture(scope="module")
def photograph() -> NDArray[np.uint8]:
    with resources.files("fastretina.assets").joinpath("retina_cc0.jpg").open("rb") as file:
        return simplejpeg.decode_jpeg(file.read())


def crops(photograph: NDArray[np.uint8], count: int, side: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    places = rng.integers(0, np.array(photograph.shape[:2]) - side, (count, 2))
    return [np.ascontiguousarray(photograph[y : y + side, x : x + side]) for y, x in places]


def encode(image: NDArray[np.uint8], quality: int = 90, subsampling: str = "420") -> memoryview:
    if subsampling == "Gray":
        file = io.BytesIO()
        Image.fromarray(image).convert("L").save(file, "JPEG", quality=quality)
        return memoryview(file.getvalue())
    return memoryview(simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling=subsampling))


def make(name: str, device: str) -> gpu.Backend:
    if name.startswith("nvimgcodec"):
        pytest.importorskip("nvidia.nvimgcodec")
    try:
        return make_decoder(torch.device(device), name, 2)
    except gpu.LoaderError as error:
        if "hardware" in name:
            pytest.skip(f"this GPU has no JPEG engine: {error}")
        raise


def interleaved(decoded: gpu.Decoded) -> list[NDArray[np.uint8] | None]:
    """Each image as (H, W, 3) on the host."""
    planes = (1, 2, 0) if decoded.planar else (0, 1, 2)
    return [None if image is None else image.permute(planes).cpu().numpy() for image in decoded.images]


def sizes_of(jpegs: list[memoryview]) -> list[tuple[int, int]]:
    return [simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs]


def close(image: NDArray[np.uint8] | None, jpeg: memoryview, levels: int = 3) -> float:
    """The share of values within so many grey levels of libjpeg-turbo's."""
    assert image is not None
    return float((np.abs(image.astype(int) - simplejpeg.decode_jpeg(jpeg).astype(int)) <= levels).mean())


@pytest.mark.parametrize(("device", "name"), CASES)
def test_pixels_are_those_of_the_cpu_for_every_subsampling(photograph, device, name):
    images = crops(photograph, 216 if device == "cuda" else 12, 512 if device == "cuda" else 96)
    jpegs = [encode(image, 75 + n % 25, SUBSAMPLINGS[n % 6]) for n, image in enumerate(images)]
    decoder = make(name, device)
    found = interleaved(decoder.decode(jpegs, sizes_of(jpegs)))
    shares: dict[str, list[float]] = {}
    for n, (image, jpeg) in enumerate(zip(found, jpegs, strict=True)):
        # The hardware engine knows no 4:1:1; where a decoder gives up, the CPU decodes.
        if image is None and "hardware" in name and SUBSAMPLINGS[n % 6] == "411":
            continue
        shares.setdefault(SUBSAMPLINGS[n % 6], []).append(close(image, jpeg))
    means = {subsampling: round(float(np.mean(part)), 4) for subsampling, part in shares.items()}
    assert all(share >= 0.99 for share in means.values()), means


@pytest.mark.parametrize(("device", "name"), CASES)
def test_one_corrupt_jpeg_among_many_is_none_and_leaves_its_neighbours_and_the_next_ten_batches_alone(photograph, device, name):
    count, places = (256, 20) if device == "cuda" else (12, 3)
    jpegs = [encode(image) for image in crops(photograph, count, 64)]
    decoder = make(name, device)
    for place in np.linspace(0, count - 1, places).astype(int).tolist():
        damaged = [*jpegs[:place], memoryview(b"\xff\xd8\xff\xe0" + bytes(200)), *jpegs[place + 1 :]]
        found = interleaved(decoder.decode(damaged, [(64, 64)] * count))
        decoder.release(None)
        # One that fails may take its batch with it: none of them, then, is another's.
        assert found[place] is None
        assert all(image is None or close(image, jpeg) > 0.99 for image, jpeg in zip(found, damaged, strict=True))
        for turn in range(10):
            rolled = jpegs[turn:] + jpegs[:turn]
            found = interleaved(decoder.decode(rolled, [(64, 64)] * count))
            decoder.release(None)
            assert all(close(image, jpeg) > 0.99 for image, jpeg in zip(found, rolled, strict=True))


@pytest.mark.parametrize(("device", "name"), CASES)
def test_an_image_of_another_size_than_its_entry_says_is_none(photograph, device, name):
    jpegs = [encode(image) for image in crops(photograph, 3, 64)]
    found = make(name, device).decode(jpegs, [(64, 64), (64, 48), (64, 64)]).images
    assert [image is None for image in found] == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_every_byte_of_a_buffer_that_is_used_again_is_written(photograph, device, monkeypatch):
    monkeypatch.setattr(gpu, "_TURNS", 1)
    jpegs = [encode(image) for image in crops(photograph, 6, 64)]
    decoder = make("nvimgcodec", device)
    found = {}
    for poison in (0x00, 0xFF):
        before = decoder.decode(jpegs, [(64, 64)] * 6).images
        for image in before:
            image.fill_(poison)
        if device == "cuda":
            torch.cuda.synchronize()
        decoder.release(None)
        decoded = decoder.decode(jpegs, [(64, 64)] * 6)
        decoder.release(None)
        assert [a.data_ptr() for a in decoded.images] == [b.data_ptr() for b in before]
        found[poison] = np.stack(interleaved(decoded))
    assert not ((found[0x00] == 0x00) & (found[0xFF] == 0xFF)).any()


def test_sets_of_any_number_and_size_use_the_same_images_again(photograph):
    pytest.importorskip("nvidia.nvimgcodec")
    decoder = NvImageCodec(torch.device("cpu"), threads=1)
    rng = np.random.default_rng(1)
    for _ in range(12):
        sides = rng.choice([24, 40, 64], rng.integers(1, 7))
        jpegs = [encode(crops(photograph, 1, int(side), int(side))[0]) for side in sides]
        decoded = decoder.decode(jpegs, sizes_of(jpegs))
        decoder.release(None)
        assert all(close(image, jpeg) == 1.0 for image, jpeg in zip(interleaved(decoded), jpegs, strict=True))
    assert all(len(held) <= 6 for held in decoder._sets)


def test_exif_turns_no_image_because_the_cpu_does_not_turn_it_either(photograph):
    pytest.importorskip("nvidia.nvimgcodec")
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(crops(photograph, 1, 64)[0][:40]).save(file, "JPEG", exif=exif)
    jpeg = memoryview(file.getvalue())
    decoder = NvImageCodec(torch.device("cpu"), threads=1)
    assert close(interleaved(decoder.decode([jpeg], [(40, 64)]))[0], jpeg) == 1.0


def test_loaders_of_one_process_share_a_decoder():
    pytest.importorskip("nvidia.nvimgcodec")
    cpu = torch.device("cpu")
    assert NvImageCodec(cpu, threads=1)._decoder is NvImageCodec(cpu, threads=1)._decoder


class LateReader:
    """Reads a decoder's output late: on a CPU when its event is waited for, on CUDA behind a long kernel."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._stream = torch.cuda.Stream() if self._cuda else None
        self._pending: Callable[[], None] | None = None

    def read(self, images: list[torch.Tensor], into: torch.Tensor) -> LateReader | torch.cuda.Event:
        """Copy the images to `into` (N, ...), some day; the event of that."""

        def copy() -> None:
            for target, image in zip(into, images, strict=True):
                target.copy_(image)

        if not self._cuda:
            self._pending = copy
            return self
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(4_000_000)  # cycles: some 2 ms, in which a decode is over
            copy()
            event = torch.cuda.Event()
            event.record(self._stream)
        return event

    def synchronize(self) -> None:
        if self._pending is not None:
            self._pending()
            self._pending = None

    def query(self) -> bool:
        return self._pending is None


def corrupted(decoder: gpu.Backend, batches: list[list[memoryview]], device: str, rounds: int, ordered: bool = True) -> int:
    """How many of so many batches were overwritten while a late reader still read them."""
    size = sizes_of(batches[0][:1])[0]
    expected = []
    for jpegs in batches:
        expected.append(torch.stack([image.clone() for image in decoder.decode(jpegs, [size] * len(jpegs)).images]))
        decoder.release(None)
    if device == "cuda":
        torch.cuda.synchronize()
    events, copies = [], [torch.zeros_like(expected[0]) for _ in range(rounds)]
    for n in range(rounds):
        decoded = decoder.decode(batches[n % len(batches)], [size] * len(batches[0]))
        event = LateReader(device).read(decoded.images, copies[n])
        events.append(event)
        decoder.release(event if ordered else None)
        del decoded
    for event in events:
        event.synchronize()
    # Two engines of one library may differ by a few levels; another batch's image differs by more nearly everywhere.
    near = [(copy.int() - expected[n % len(batches)].int()).abs() <= 3 for n, copy in enumerate(copies)]
    return sum(bool((part.flatten(1).float().mean(dim=1) < 0.99).any()) for part in near)


@pytest.mark.parametrize(("device", "name"), [case for case in CASES if "torchvision" not in case.values or "cuda" in case.values])
@pytest.mark.parametrize("turns", [1, 3])
def test_a_buffer_is_not_decoded_into_while_a_long_kernel_still_reads_it(photograph, device, name, turns, monkeypatch):
    monkeypatch.setattr(gpu, "_TURNS", turns)
    images = crops(photograph, 4 * 16 if device == "cuda" else 8, 512 if device == "cuda" else 64, seed=5)
    jpegs = [encode(image) for image in images]
    batches = [jpegs[k::4] for k in range(4)]
    assert corrupted(make(name, device), batches, device, 200) == 0


def test_the_order_test_finds_a_decoder_that_does_not_wait(photograph, monkeypatch):
    pytest.importorskip("nvidia.nvimgcodec")
    monkeypatch.setattr(gpu, "_TURNS", 1)
    jpegs = [encode(image) for image in crops(photograph, 8, 64, seed=5)]
    batches = [jpegs[k::4] for k in range(4)]
    # All but every fourth: what is read in the end is the last batch.
    assert corrupted(NvImageCodec(torch.device("cpu"), threads=1), batches, "cpu", 20, ordered=False) == 15
