"""No batch is overwritten by work that runs late: the device half of the loader on simulated streams (see simulated_cuda.py)."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import devices
import numpy as np
import pytest
import torch
from interrupting import At, interrupt
from simulated_cuda import SimulatedCuda, Stream, bytes_at, write

from fastretina import Loader
from fastretina.errors import LoaderError
from fastretina.loading import device_stage as device
from fastretina.loading.augment import Augment
from fastretina.loading.batches import Batch
from fastretina.loading.decode import gpu

SIDE, COUNT, EPOCHS = 8, 24, 4
IMAGE = SIDE * SIDE * 3  # bytes
SOURCES = [
    {"decode": "cpu"},
    {"decode": "gpu", "decoder": "nvimgcodec"},
    {"decode": "cpu", "resident": "on"},
    {"decode": "gpu", "decoder": "nvimgcodec", "resident": "on"},
]


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    return devices.write_blocks(tmp_path_factory.mktemp("order") / "blocks.beton", COUNT, SIDE)


@pytest.fixture(scope="module")
def expected(beton) -> dict[int, np.ndarray]:
    with Loader(beton, COUNT, train=False, resolution=SIDE, dtype=torch.uint8) as loader:
        (batch,) = list(loader)
    pixels = batch.images.permute(0, 2, 3, 1).contiguous().numpy().reshape(COUNT, -1)
    return dict(zip(batch.ids.tolist(), pixels.copy(), strict=True))


def seeds(count: int) -> pytest.MarkDecorator:
    """Four seeds in `make test`, of each kind that there is, and the rest in `make test-faults`."""
    rest = pytest.param(range(4, count), id="rest", marks=pytest.mark.slow_faults)
    return pytest.mark.parametrize("seeds", [pytest.param(range(4), id="quick"), rest])


def wrong_batches(
    beton: Path,
    expected: dict[int, np.ndarray],
    settings: dict,
    seed: int,
    monkeypatch,
    fault=None,
    interrupts: bool = False,
    resumes: bool = False,
) -> int:
    """How many batches the consumer sees otherwise than they are. fault: called with the patch and the stage. interrupts: it is
    interrupted at random places of the stage. resumes: what was decoded ahead is dropped, and made anew, half of the time. By every
    other seed the consumer goes on only when the next batch has been decoded."""
    if settings.get("decoder") == "nvimgcodec":
        pytest.importorskip("nvidia.nvimgcodec")
    wrong, turns, entered = [], [], set()

    def warp(addresses, heights, widths, affine, colour, norm, recolour, output):
        """Copies the sources as they are, when its turn comes."""
        sources, target, rows = addresses.data_ptr(), output.data_ptr(), len(output)

        def kernel() -> None:
            for row, source in enumerate(bytes_at(sources, 8 * rows).view(np.int64).tolist()):
                write(target + row * IMAGE, bytes_at(source, IMAGE))

        cuda.launch(kernel)

    def use(batch) -> None:
        pixels, ids, rows = batch.images.data_ptr(), batch.ids.data_ptr(), len(batch.ids)

        def kernel() -> None:
            seen = bytes_at(pixels, rows * IMAGE).reshape(rows, -1)
            named = bytes_at(ids, 8 * rows).view(np.int64).tolist()
            wrong.append(any(not np.array_equal(expected.get(name), image) for name, image in zip(named, seen, strict=True)))

        cuda.launch(kernel)

    def every(probes):
        """Where these bytes are, and how to read the memory that they are spread over."""
        at, step, nbytes = probes.data_ptr(), probes.stride(0), len(probes) * probes.stride(0)
        return at, step, lambda: bytes_at(at, nbytes).copy()

    def write_poison(probes, noise):
        (at, step, read), source, count = every(probes), noise.data_ptr(), len(noise)

        def kernel() -> None:
            memory = read()
            memory[::step] = bytes_at(source, count)
            write(at, memory)

        cuda.launch(kernel)

    def compare_poison(probes, noise, equal):
        (_, step, read), source, target, count = every(probes), noise.data_ptr(), equal.data_ptr(), len(noise)
        cuda.launch(lambda: write(target, read()[::step] == bytes_at(source, count)))

    with monkeypatch.context() as patch:
        arguments = {"batch_size": 5, "resolution": SIDE, "augment": Augment.none(), "dtype": torch.uint8, "workers": 1}
        with devices.DeviceLoader(beton, **arguments, **settings) as loader:
            cuda = SimulatedCuda(patch, np.random.default_rng(seed))
            patch.setattr(device, "warp", warp)
            stage = loader._stage
            stage._cuda, stage._sourcing, stage._warping = True, Stream(cuda), Stream(cuda)
            # The library decodes at once, whatever has been queued: as an H100's JPEG engine does.
            patch.setattr(gpu, "current_stream", lambda device: cuda.current)
            patch.setattr(gpu.NvImageCodec, "_stream", lambda codec: entered.add(cuda.current) or 0)
            patch.setattr(gpu, "_write_poison", write_poison)
            patch.setattr(gpu, "_compare_poison", compare_poison)
            if stage._decoder is not None:
                note_turns(patch, stage._decoder, turns)
            if fault is not None:
                fault(patch, stage)
            for _ in range(EPOCHS):
                batches = iter(loader)
                while (batch := following(batches, int(cuda.random.integers(1, 200)) * interrupts)) is not None:
                    use(batch)
                    del batch
                    if loader._ahead and seed % 2:
                        wait_for_next(loader)
                    cuda.run(int(cuda.random.integers(0, 6)))
                    if resumes and loader.state_dict()["batch"] and cuda.random.random() < 0.5:
                        loader.load_state_dict(loader.state_dict())
                        batches = iter(loader)
            loader.close()
            cuda.finish()
            assert entered <= {stage._sourcing}
    assert fault or "dd" not in "".join(turns)
    assert len(wrong) == EPOCHS * -(-COUNT // 5)
    return sum(wrong)


def note_turns(patch, decoder, turns: list[str]) -> None:
    """d: it decodes, r: what it decoded last is released."""
    decode, release = decoder.decode, decoder.release
    patch.setattr(decoder, "decode", lambda *given: turns.append("d") or decode(*given))
    patch.setattr(decoder, "release", lambda event: turns.append("r") or release(event))


def wait_for_next(loader: Loader) -> None:
    """Until it has been decoded."""
    deadline = time.monotonic() + 30
    running = loader._ahead.pipeline._shared.stream.running
    while not (running and running[0].finished):
        assert time.monotonic() < deadline
        time.sleep(0.0002)


def following(batches: Iterator[Batch], place: int) -> Batch | None:
    """The next batch, asked for again where that was interrupted; None at the end."""
    for number in itertools.chain((place, place // 2), itertools.repeat(0)):
        with suppress(KeyboardInterrupt), At(number, interrupt, ("device_stage.py", "decode_ahead.py")):
            for batch in batches:
                return batch
            return None
    raise AssertionError


@seeds(8)
@pytest.mark.parametrize("settings", SOURCES, ids=str)
def test_no_batch_is_overwritten_though_some_were_interrupted_while_they_were_made(beton, expected, settings, seeds, monkeypatch):
    found = [wrong_batches(beton, expected, settings, seed, monkeypatch, interrupts=True) for seed in seeds]
    assert found == [0] * len(seeds)


@seeds(12)
def test_no_batch_is_overwritten_though_what_was_decoded_ahead_was_dropped(beton, expected, seeds, monkeypatch):
    found = [wrong_batches(beton, expected, SOURCES[1], seed, monkeypatch, interrupts=seed % 4 > 1, resumes=True) for seed in seeds]
    assert found == [0] * len(seeds)


@seeds(10)
@pytest.mark.parametrize("settings", SOURCES, ids=str)
def test_no_batch_is_overwritten_by_work_that_runs_late(beton, expected, settings, seeds, monkeypatch):
    assert [wrong_batches(beton, expected, settings, seed, monkeypatch) for seed in seeds] == [0] * len(seeds)


def test_a_batch_in_whose_midst_another_iteration_began_does_not_release_what_is_being_decoded_for_that(
    beton, expected, monkeypatch
):
    loaders, turns = [], []
    real = devices.DeviceLoader
    monkeypatch.setattr(devices, "DeviceLoader", lambda *given, **named: loaders.append(real(*given, **named)) or loaders[0])

    def handler(patch, stage) -> None:
        warp, decode, begun = device.warp, stage._decoder.decode, threading.Event()

        def interrupted(*given) -> None:
            patch.setattr(device, "warp", warp)
            (loader,) = loaders
            loader.load_state_dict(loader.state_dict())
            next(iter(loader))
            assert begun.wait(30)
            warp(*given)

        def waiting(*given):
            if turns.count("d") == 3:
                begun.set()
                time.sleep(0.3)  # in which the outer batch comes to its end
            return decode(*given)

        patch.setattr(device, "warp", interrupted)
        patch.setattr(stage._decoder, "decode", waiting)
        note_turns(patch, stage._decoder, turns)

    with pytest.raises(LoaderError, match="a later iteration has begun"):
        wrong_batches(beton, expected, SOURCES[1], 0, monkeypatch, handler)
    assert "".join(turns) == "drdrd"


def never(*_: object) -> None:
    pass


FAULTS = {
    "streams that do not wait": lambda patch, stage: patch.setattr(Stream, "wait_event", never),
    "memory not marked as the consumer's": lambda patch, stage: patch.setattr(torch.Tensor, "record_stream", never),
    "nothing held until it has been read": lambda patch, stage: patch.setattr(stage, "_in_use", Forgetful()),
    "a decoder that does not wait": lambda patch, stage: impatient(patch, stage._decoder),
    "poison that is not waited for": lambda patch, stage: patch.setattr(
        gpu._Buffer, "poison", lambda buffer: gpu._write_poison(buffer._probes, buffer._noise)
    ),
    "a proof that is not waited for": lambda patch, stage: patch.setattr(gpu._Buffer, "intact_poison", too_early),
}


ON_DECODED = ("a decoder that does not wait", "poison that is not waited for", "a proof that is not waited for")


class Forgetful(list):
    """Keeps nothing."""

    def append(self, _: object) -> None:
        pass


def impatient(patch, decoder):
    """With one buffer: of three, the waits for what was written leave the oldest time enough."""
    patch.setattr(gpu, "_TURNS", 1)
    decoder._buffers = [None]
    patch.setattr(decoder, "release", lambda event: None)


def too_early(buffer):
    gpu._compare_poison(buffer._probes, buffer._noise, buffer._equal)
    return buffer._equal.numpy()


@pytest.mark.parametrize("name", FAULTS)
def test_the_simulation_finds_faults(beton, expected, name, monkeypatch):
    settings = SOURCES[1] if name in ON_DECODED else SOURCES[0]

    def found(seed: int) -> bool:
        try:
            return wrong_batches(beton, expected, settings, seed, monkeypatch, FAULTS[name]) > 0
        except LoaderError as error:  # poison that comes late looks as if nothing had been written
            return "did not write it" in str(error)

    assert any(found(seed) for seed in range(5))
