"""The device decoders, on a GPU, or the same library on a CPU: pixels, order, corrupt JPEGs, and proof of what was written."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib import resources

import numpy as np
import pytest
import simplejpeg
import torch
from devices import DEVICES, write_blocks
from numpy.typing import NDArray
from PIL import Image

from fastretina.beton.reader import Beton
from fastretina.loading.decode import gpu
from fastretina.loading.decode.gpu import DECODERS, CodecSettings, DeviceDecoder, NvImageCodec, make_decoder

pytest.importorskip("nvidia.nvimgcodec")

SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")
# On a GPU every engine alone as well; the library on a CPU has one.
CASES = [
    *(pytest.param(*param.values, "nvimgcodec", marks=param.marks) for param in DEVICES),
    *(pytest.param(*DEVICES[1].values, name, marks=DEVICES[1].marks) for name in DECODERS if name != "nvimgcodec"),
]


@pytest.fixture(scope="module")
def photograph() -> NDArray[np.uint8]:
    with resources.files("fastretina.sample").joinpath("retina_cc0.jpg").open("rb") as file:
        return simplejpeg.decode_jpeg(file.read())


def crops(photograph: NDArray[np.uint8], count: int, side: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, np.array(photograph.shape[:2]) - side, (count, 2))
    return [np.ascontiguousarray(photograph[y : y + side, x : x + side]) for y, x in corners]


def encode(image: NDArray[np.uint8], quality: int = 90, subsampling: str = "420") -> memoryview:
    if subsampling == "Gray":
        file = io.BytesIO()
        Image.fromarray(image).convert("L").save(file, "JPEG", quality=quality)
        return memoryview(file.getvalue())
    return memoryview(simplejpeg.encode_jpeg(image, quality=quality, colorsubsampling=subsampling))


def make(device: str, name: str = "nvimgcodec", smallest: int = 64 * 64 * 3, wrap=lambda codec: codec) -> DeviceDecoder:
    """smallest: bytes of the smallest image. wrap: what is to stand between the decoder and its codec."""
    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    try:
        return DeviceDecoder(wrap(DECODERS[name](CodecSettings(where, 2, 64, 64, 16))), where, smallest)
    except RuntimeError as error:
        if "hardware" in name:
            pytest.skip(f"this GPU has no JPEG engine: {error}")
        raise


def pixels(decoded: gpu.Decoded) -> list[NDArray[np.uint8] | None]:
    """Each image on the host."""
    return [decoded.image(n).cpu().numpy().copy() if done else None for n, done in enumerate(decoded.done)]


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
    found = pixels(make(device, name).decode(jpegs, sizes_of(jpegs)))
    shares: dict[str, list[float]] = {}
    for n, (image, jpeg) in enumerate(zip(found, jpegs, strict=True)):
        # The hardware engine knows no 4:1:1; where a decoder gives up, the CPU decodes.
        if image is None and "hardware" in name and SUBSAMPLINGS[n % 6] == "411":
            continue
        shares.setdefault(SUBSAMPLINGS[n % 6], []).append(close(image, jpeg))
    means = {subsampling: round(float(np.mean(part)), 4) for subsampling, part in shares.items()}
    assert all(share >= 0.99 for share in means.values()), means


@pytest.mark.parametrize(("device", "name"), CASES)
def test_one_corrupt_jpeg_among_many_is_not_done_and_leaves_its_neighbours_and_the_next_ten_batches_alone(photograph, device, name):
    count, tried = (256, 20) if device == "cuda" else (12, 3)
    jpegs = [encode(image) for image in crops(photograph, count, 64)]
    decoder = make(device, name)
    for number in np.linspace(0, count - 1, tried).astype(int).tolist():
        mixed = [*jpegs[:number], memoryview(b"\xff\xd8\xff\xe0" + bytes(200)), *jpegs[number + 1 :]]
        found = pixels(decoder.decode(mixed, [(64, 64)] * count))
        decoder.release(None)
        # One that fails may take its batch with it: none of them, then, is another's.
        assert found[number] is None
        assert all(image is None or close(image, jpeg) > 0.99 for image, jpeg in zip(found, mixed, strict=True))
        for turn in range(10):
            rolled = jpegs[turn:] + jpegs[:turn]
            found = pixels(decoder.decode(rolled, [(64, 64)] * count))
            decoder.release(None)
            assert all(close(image, jpeg) > 0.99 for image, jpeg in zip(found, rolled, strict=True))


@pytest.mark.parametrize(("device", "name"), CASES)
@pytest.mark.parametrize("entry", [(64, 48), (80, 64)], ids=["larger than its entry", "smaller than its entry"])
def test_an_image_of_another_size_than_its_entry_says_is_not_done(photograph, device, name, entry):
    jpegs = [encode(image) for image in crops(photograph, 3, 64)]
    decoder = make(device, name)
    for sizes in ([(64, 64), entry, (64, 64)], [(64, 64)] * 3):  # the second time in the same memory
        decoded = decoder.decode(jpegs, sizes)
        decoder.release(None)
        assert decoded.done == [True, sizes[1] == (64, 64), True]
        assert decoded.unwritten == []
        assert all(image is None or close(image, jpeg) > 0.99 for image, jpeg in zip(pixels(decoded), jpegs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_images_of_any_number_and_size_come_and_those_not_asked_for_keep_their_places(photograph, device):
    decoder = make(device, smallest=24 * 24 * 3)
    rng = np.random.default_rng(1)
    assert decoder.decode([], []).done == []
    decoder.release(None)
    for _ in range(12):
        sides = rng.choice([24, 40, 64], rng.integers(1, 7))
        jpegs = [encode(crops(photograph, 1, int(side), int(side))[0]) for side in sides]
        asked = rng.random(len(sides)) < 0.8
        decoded = decoder.decode([jpeg if ask else None for jpeg, ask in zip(jpegs, asked, strict=True)], sizes_of(jpegs))
        decoder.release(None)
        assert decoded.done == asked.tolist()
        assert np.array_equal(decoded.offsets, np.cumsum(3 * sides**2) - 3 * sides**2)
        assert all(image is None or close(image, jpeg) > 0.99 for image, jpeg in zip(pixels(decoded), jpegs, strict=True))


class Liar:
    """A codec that leaves some images, or the last part of them, as they are, and says that all went well."""

    def __init__(self, codec: NvImageCodec, skips: set[int], written: float = 0.0) -> None:
        self.name, self._codec, self._skips, self._written = codec.name, codec, skips, written

    def wrap(self, target):
        return target, self._codec.wrap(target)

    def decode(self, jpegs, targets):
        before = [target.clone() for target, _ in targets]
        found = self._codec.decode(jpegs, [wrapped for _, wrapped in targets])
        for n in self._skips:
            target, rows = targets[n][0], int(len(before[n]) * self._written)
            target[rows:] = before[n][rows:]
        return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("side", "written"), [(8, 0.0), (64, 0.0), (64, 0.85)], ids=str)
def test_what_the_codec_did_not_write_is_named_whatever_it_says(photograph, device, side, written):
    jpegs = [encode(image) for image in crops(photograph, 9, side)]
    decoder = make(device, smallest=side * side * 3, wrap=lambda codec: Liar(codec, {0, 4, 8}, written))
    for _ in range(5):  # each buffer more than once: what was there before is the same photograph
        decoded = decoder.decode(jpegs, [(side, side)] * 9)
        decoder.release(None)
        assert decoded.unwritten == [0, 4, 8]
        assert decoded.done == [n not in (0, 4, 8) for n in range(9)]


def test_what_comes_late_is_waited_for_and_counted_and_what_never_comes_is_named(photograph, monkeypatch):
    jpegs = [encode(image) for image in crops(photograph, 4, 64)]
    late = {}

    class Late(Liar):
        def decode(self, jpegs, targets):
            found = super().decode(jpegs, targets)
            late.update({1: targets[1][0]})
            return found

    def synchronize(device):
        late[1].copy_(torch.from_numpy(simplejpeg.decode_jpeg(jpegs[1])))

    decoder = make("cpu", wrap=lambda codec: Late(codec, {1, 3}))
    decoder._cuda = True
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    decoded = decoder.decode(jpegs, [(64, 64)] * 4)
    assert (decoded.unwritten, decoded.done, decoder.late) == ([3], [True, True, True, False], 1)
    assert close(decoded.image(1).numpy(), jpegs[1]) == 1.0


@pytest.mark.parametrize("device", DEVICES)
def test_no_flat_image_is_taken_for_one_that_was_not_written(device):
    jpegs = [encode(np.full((16, 16, 3), level, np.uint8), 100, "444") for level in range(256)]
    decoder = make(device, smallest=16 * 16 * 3)
    for _ in range(4):
        assert all(decoder.decode(jpegs, [(16, 16)] * 256).done)
        decoder.release(None)


def test_exif_rotates_no_image_because_the_cpu_does_not_rotate_it_either(photograph):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    Image.fromarray(crops(photograph, 1, 64)[0][:40]).save(file, "JPEG", exif=exif)
    jpeg = memoryview(file.getvalue())
    assert close(pixels(make("cpu", smallest=40 * 64 * 3).decode([jpeg], [(40, 64)]))[0], jpeg) == 1.0


def test_loaders_of_one_process_share_a_decoder():
    settings = CodecSettings(torch.device("cpu"), 1, 64, 64, 16)
    assert NvImageCodec(settings)._decoder is NvImageCodec(settings)._decoder


def test_a_decoder_is_told_the_sizes_to_come_and_first_sees_a_batch_of_the_usual_number(tmp_path, monkeypatch):
    from nvidia import nvimgcodec

    made, calls = [], []
    real, decode = nvimgcodec.Decoder, NvImageCodec.decode

    def noted(**given):
        made.append(given)
        return real(**given)

    monkeypatch.setattr(nvimgcodec, "Decoder", noted)
    monkeypatch.setattr(
        NvImageCodec, "decode", lambda self, jpegs, targets: calls.append(len(jpegs)) or decode(self, jpegs, targets)
    )
    beton = Beton(write_blocks(tmp_path / "blocks.beton", 5, 24))
    decoder = make_decoder(beton, torch.device("cpu"), threads=1, batch=16)
    assert calls == [16]
    assert all(decoder.decode([beton.jpeg(0)], [(24, 24)]).done)
    (given,) = made
    assert given["max_num_cpu_threads"] == 1
    options = given["options"].split()
    assert options == [
        ":fancy_upsampling=1", ":preallocate_width_hint=24", ":preallocate_height_hint=24", ":preallocate_batch_size=16",
    ]  # fmt: skip


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


def corrupted(decoder: DeviceDecoder, batches: list[list[memoryview]], device: str, rounds: int, ordered: bool = True) -> int:
    """How many of so many batches were overwritten while a late reader still read them."""
    sizes = sizes_of(batches[0])

    def images(decoded: gpu.Decoded) -> list[torch.Tensor]:
        return [decoded.image(n) for n in range(len(sizes))]

    expected = []
    for jpegs in batches:
        expected.append(torch.stack(images(decoder.decode(jpegs, sizes))))
        decoder.release(None)
    if device == "cuda":
        torch.cuda.synchronize()
    events, copies = [], [torch.zeros_like(expected[0]) for _ in range(rounds)]
    for n in range(rounds):
        event = LateReader(device).read(images(decoder.decode(batches[n % len(batches)], sizes)), copies[n])
        events.append(event)
        decoder.release(event if ordered else None)
    for event in events:
        event.synchronize()
    # Two engines of one library may differ by a few levels; another batch's image differs by more nearly everywhere.
    near = [(copy.int() - expected[n % len(batches)].int()).abs() <= 3 for n, copy in enumerate(copies)]
    return sum(bool((part.flatten(1).float().mean(dim=1) < 0.99).any()) for part in near)


@pytest.mark.parametrize(("device", "name"), CASES)
@pytest.mark.parametrize("turns", [1, 3])
def test_a_buffer_is_not_decoded_into_while_a_long_kernel_still_reads_it(photograph, device, name, turns, monkeypatch):
    monkeypatch.setattr(gpu, "_TURNS", turns)
    images = crops(photograph, 4 * 16 if device == "cuda" else 8, 512 if device == "cuda" else 64, seed=5)
    jpegs = [encode(image) for image in images]
    batches = [jpegs[k::4] for k in range(4)]
    assert corrupted(make(device, name), batches, device, 200) == 0


def test_the_order_test_finds_a_decoder_that_does_not_wait(photograph, monkeypatch):
    monkeypatch.setattr(gpu, "_TURNS", 1)
    jpegs = [encode(image) for image in crops(photograph, 8, 64, seed=5)]
    batches = [jpegs[k::4] for k in range(4)]
    # All but every fourth: what is read in the end is the last batch.
    assert corrupted(make("cpu"), batches, "cpu", 20, ordered=False) == 15
