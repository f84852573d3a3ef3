"""No batch is spoilt by work that runs late: the device half of the loader on simulated streams (see simulated_cuda.py)."""

from __future__ import annotations

from pathlib import Path

import devices
import numpy as np
import pytest
import torch
from simulated_cuda import SimulatedCuda, Stream, bytes_at, write

from fastretina import Loader, device
from fastretina.augment import Augment
from fastretina.decode import gpu

SIDE, COUNT, EPOCHS = 8, 24, 4
IMAGE = SIDE * SIDE * 3  # bytes
SOURCES = [
    {"decode": "cpu"},
    {"decode": "gpu", "decoder": "nvimgcodec"},
    {"decode": "gpu", "decoder": "torchvision"},
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


def spoilt_batches(beton: Path, expected: dict[int, np.ndarray], settings: dict, seed: int, monkeypatch, fault=None) -> int:
    """How many batches the consumer sees otherwise than they are. fault: called with the patch and the stage."""
    if settings.get("decoder") == "nvimgcodec":
        pytest.importorskip("nvidia.nvimgcodec")
    spoilt = []

    def warp(addresses, heights, widths, affine, colour, norm, recolour, output, planar=False):
        """Copies the sources as they are, when its turn comes."""
        sources, target, rows = addresses.data_ptr(), output.data_ptr(), len(output)

        def kernel() -> None:
            for row, source in enumerate(bytes_at(sources, 8 * rows).view(np.int64).tolist()):
                pixels = bytes_at(source, IMAGE)
                write(target + row * IMAGE, pixels.reshape(3, -1).T.copy() if planar else pixels)

        cuda.launch(kernel)

    def use(batch) -> None:
        pixels, ids, rows = batch.images.data_ptr(), batch.ids.data_ptr(), len(batch.ids)

        def kernel() -> None:
            seen = bytes_at(pixels, rows * IMAGE).reshape(rows, -1)
            named = bytes_at(ids, 8 * rows).view(np.int64).tolist()
            spoilt.append(any(not np.array_equal(expected.get(name), image) for name, image in zip(named, seen, strict=True)))

        cuda.launch(kernel)

    with monkeypatch.context() as patch:
        arguments = {"batch_size": 5, "resolution": SIDE, "augment": Augment.none(), "dtype": torch.uint8, "workers": 1}
        with devices.DeviceLoader(beton, **arguments, **settings) as loader:
            cuda = SimulatedCuda(patch, np.random.default_rng(seed))
            patch.setattr(device, "warp", warp)
            stage = loader._stage
            stage._cuda, stage._sourcing, stage._warping = True, Stream(cuda), Stream(cuda)
            if fault is not None:
                fault(patch, stage)
            for _ in range(EPOCHS):
                for batch in loader:
                    use(batch)
                    del batch
                    cuda.run(int(cuda.random.integers(0, 6)))
            cuda.finish()
    assert len(spoilt) == EPOCHS * -(-COUNT // 5)
    return sum(spoilt)


@pytest.mark.parametrize("settings", SOURCES, ids=str)
def test_no_batch_is_spoilt_by_work_that_runs_late(beton, expected, settings, monkeypatch):
    assert [spoilt_batches(beton, expected, settings, seed, monkeypatch) for seed in range(10)] == [0] * 10


def never(*_: object) -> None:
    pass


FAULTS = {
    "streams that do not wait": lambda patch, stage: patch.setattr(Stream, "wait_event", never),
    "memory not marked as the consumer's": lambda patch, stage: patch.setattr(torch.Tensor, "record_stream", never),
    "nothing held until it has been read": lambda patch, stage: patch.setattr(stage, "_in_use", Forgetful()),
    "a decoder that does not wait": lambda patch, stage: patch.setattr(stage._backend, "release", lambda event: forget(stage)),
}


class Forgetful(list):
    """Keeps nothing."""

    def append(self, _: object) -> None:
        pass


def forget(stage) -> None:
    gpu.NvImageCodec.release(stage._backend, None)


@pytest.mark.parametrize("name", FAULTS)
def test_the_simulation_finds_faults(beton, expected, name, monkeypatch):
    settings = SOURCES[1] if name == "a decoder that does not wait" else SOURCES[0]
    assert any(spoilt_batches(beton, expected, settings, seed, monkeypatch, FAULTS[name]) for seed in range(5))
