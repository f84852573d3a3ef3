"""The device half of the loader: the batches of the CPU loader, by way of any decoder. See devices.py for where it runs."""

from __future__ import annotations

import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from devices import DEVICES, DeviceLoader, write_blocks
from test_jpeg import encode, photo

from fastretina import Loader
from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import LoaderError, SampleError, UsageError
from fastretina.loading import device_stage as stage
from fastretina.loading.augment import Augment
from fastretina.loading.config import LoaderConfig
from fastretina.loading.decode import choice, gpu
from fastretina.loading.loader import CHECKING_THREADS
from fastretina.loading.resident import plan_residence

SIDE = 16  # px
PATIENTLY = {"batch_size": 5, "resolution": SIDE, "seed": 7}
GREY_LEVEL = 0.018  # of a normalised image: 1 / 255 / 0.224


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> Path:
    return write_blocks(tmp_path_factory.mktemp("device") / "good.beton", 12, SIDE)


class StandIn:
    """Decodes as a device library would: all at full size, into the memory that it gets, and not what it does not like."""

    name = "stand-in"

    def __init__(self, dislikes: set[int] = frozenset(), skips: set[int] = frozenset()) -> None:
        """By number of the JPEG, from the first that the loader asks for: dislikes: is not decoded; skips: is only said to be."""
        self.dislikes, self.skips, self.calls, self.batches = dislikes, skips, 0, []

    def wrap(self, target):
        return target

    def decode(self, jpegs, targets):
        self.batches.append(len(jpegs))
        return [self._one(jpeg, target) for jpeg, target in zip(jpegs, targets, strict=True)]

    def _one(self, jpeg, target):
        if len(self.batches) > 1:  # the first batch is the loader's trial
            self.calls += 1
            if self.calls - 1 in self.dislikes:
                return False
            if self.calls - 1 in self.skips:
                return True
        try:
            target.copy_(torch.from_numpy(simplejpeg.decode_jpeg(jpeg)))
        except ValueError:
            return False
        return True


def provide(monkeypatch, codec) -> None:
    monkeypatch.setitem(gpu.DECODERS, "stand-in", lambda settings: codec)


def assert_same_batches(loader: Loader, path: Path, epochs: int = 2, **settings) -> None:
    with Loader(path, **PATIENTLY, **settings) as expected:
        for _ in range(epochs):
            for ours, theirs in zip(loader, expected, strict=True):
                assert torch.equal(ours.ids.cpu(), theirs.ids)
                assert torch.equal(ours.labels.cpu(), theirs.labels)
                assert ours.images.shape == theirs.images.shape
                assert ours.images.is_contiguous(memory_format=torch.channels_last)
                assert bool(((ours.images.cpu() - theirs.images).abs() < 3 * GREY_LEVEL).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", ["off", "on"])
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_each_rank_has_its_part_of_the_batches_though_of_the_last_it_be_empty(beton, device, decode, resident, monkeypatch):
    provide(monkeypatch, StandIn())
    for rank in (0, 3):
        ranks = {"rank": rank, "world_size": 4}
        with DeviceLoader(
            beton, device=device, decode=decode, decoder="stand-in", resident=resident, **PATIENTLY, **ranks
        ) as loader:
            assert_same_batches(loader, beton, epochs=1, **ranks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", ["off", "on"])
@pytest.mark.parametrize("augment", [Augment(), Augment.full()], ids=["default", "full"])
def test_pixels_decoded_by_the_cpu_make_the_same_batches(beton, device, resident, augment):
    with DeviceLoader(beton, device=device, decode="cpu", resident=resident, augment=augment, **PATIENTLY) as loader:
        assert "CPU thread" in loader.description
        assert_same_batches(loader, beton, augment=augment)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", ["off", "on"])
def test_pixels_decoded_by_a_library_make_the_same_batches(beton, device, resident, monkeypatch):
    codec = StandIn(dislikes={1, 9})
    provide(monkeypatch, codec)
    with DeviceLoader(beton, device=device, decode="gpu", decoder="stand-in", resident=resident, **PATIENTLY) as loader:
        assert loader.description.startswith("decode on the GPU (stand-in), ")
        assert_same_batches(loader, beton)
    # First a batch of the usual number. Then three batches an epoch and two epochs; resident, all twelve at once before the first,
    # and never again. Streaming, the third epoch's first may have been decoded by when the loader was closed.
    assert codec.batches[:7] == ([256, 12] if resident == "on" else [5, 5, 5, 2, 5, 5, 2])
    assert codec.batches[7:] in ([], [5])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", ["off", "on"])
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_what_a_decoder_only_says_that_it_decoded_is_an_error_by_name(beton, device, resident, on_bad, monkeypatch):
    provide(monkeypatch, StandIn(skips={7, 8}))
    settings = {"decode": "gpu", "decoder": "stand-in", "resident": resident, "on_bad": on_bad, "max_bad": 1.0}
    with DeviceLoader(beton, train=False, device=device, **settings, **PATIENTLY) as loader:
        given = []
        with pytest.raises(LoaderError, match=r"sample 7 \(eye_7\) and 1 more of .* stand-in says .* use decode='cpu'"):
            given += [batch.ids.tolist() for batch in loader]
        assert not any(107 in ids for ids in given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", ["off", "on"])
def test_what_nobody_can_decode_is_skipped_though_it_be_all_of_a_batch(beton, device, resident, monkeypatch):
    provide(monkeypatch, StandIn(dislikes=set(range(100))))
    settings = {"decode": "gpu", "decoder": "stand-in", "resident": resident, "on_bad": "skip", "max_bad": 1.0}

    def decode(index, target):
        raise loader.dataset.sample_error(index, "cannot be decoded")

    with DeviceLoader(beton, device=device, **settings, **PATIENTLY) as loader:
        monkeypatch.setattr(loader._feed, "decode", decode)
        assert list(loader) == []
        assert sorted(error.index for error in loader.skipped) == list(range(12))


@pytest.mark.parametrize("device", DEVICES)
def test_the_real_decoder_makes_the_same_batches(beton, device):
    pytest.importorskip("nvidia.nvimgcodec")
    for resident in ("off", "on"):
        with DeviceLoader(beton, device=device, decode="gpu", decoder="nvimgcodec", resident=resident, **PATIENTLY) as loader:
            assert_same_batches(loader, beton)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("resident", ["off", "on"])
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_bad_samples_are_named_and_no_neighbour_takes_their_place(tmp_path, beton, device, decode, resident, monkeypatch):
    bad = {0, 9}
    corrupt = write_blocks(tmp_path / "corrupt.beton", 12, SIDE, bad)
    provide(monkeypatch, StandIn())
    settings = {"device": device, "decode": decode, "resident": resident, "decoder": "stand-in"} | PATIENTLY
    with Loader(beton, batch_size=12, resolution=SIDE, seed=7, sampling="sequential", augment=Augment()) as good:
        expected = next(iter(good)).images
    with DeviceLoader(corrupt, on_bad="skip", max_bad=0.5, **settings) as loader:
        seen = []
        for batch in loader:
            for id, image in zip(batch.ids.tolist(), batch.images.cpu(), strict=True):
                seen.append(id - 100)
                assert (image - expected[id - 100]).abs().max() < 3 * GREY_LEVEL
        assert sorted(seen) == sorted(set(range(12)) - bad)
        assert [error.index for error in loader.skipped] == sorted(bad)
    with DeviceLoader(corrupt, **settings) as loader, pytest.raises(SampleError) as raised:
        list(loader)
    assert raised.value.index in bad


@pytest.mark.parametrize("device", DEVICES)
def test_a_jpeg_that_claims_too_much_is_named_and_never_reaches_the_decoder(tmp_path, device, monkeypatch):
    scans = encode(photo(SIDE, SIDE), progressive=True)
    bomb = scans[:-2] + scans[scans.rindex(b"\xff\xda") : -2] * 100 + b"\xff\xd9"
    path = tmp_path / "bomb.beton"
    with BetonWriter(path, 12) as writer:
        for n in range(12):
            jpeg = encode(photo(SIDE, SIDE)) if n else bomb
            writer.add(jpeg, zlib.crc32(jpeg), name=f"eye_{n}", label=0, id=n, width=SIDE, height=SIDE)
        writer.finish({})
    codec = StandIn()
    provide(monkeypatch, codec)
    settings = {"device": device, "decode": "gpu", "decoder": "stand-in"} | PATIENTLY
    with DeviceLoader(path, on_bad="skip", max_bad=0.5, **settings) as loader:
        assert sorted(torch.cat([batch.ids for batch in loader]).tolist()) == list(range(1, 12))
        assert [(error.index, f"scans of {SIDE} x {SIDE}" in error.reason) for error in loader.skipped] == [(0, True)]
    assert sum(codec.batches[1:4]) == 11  # of the first epoch
    with (
        DeviceLoader(path, **settings) as loader,
        pytest.raises(SampleError, match=f"scans of {SIDE} x {SIDE} pixels, past the limit"),
    ):
        list(loader)


def test_auto_leaves_decoding_to_threads_that_are_enough_and_knows_no_clock(beton, monkeypatch):
    provide(monkeypatch, StandIn())
    monkeypatch.setattr(choice, "seconds_per_image", lambda feed: 1e-3)
    for workers, demand, where in (
        (3, 2000.0, "3 CPU threads"),
        (2, 2000.0, "the GPU"),
        (2, None, "the GPU"),
        (2, 10.0, "2 CPU threads"),
    ):
        with DeviceLoader(beton, decoder="stand-in", workers=workers, demand=demand, **PATIENTLY) as loader:
            # What a ResNet18 on an H200 might take of images of 16 px.
            rates = f"{workers} CPU threads may decode {1000 * workers:,} img/s, the step may take {demand or 4_714_820:,.0f}"
            assert loader.description == f"decode on {where} ({'stand-in; ' * (where == 'the GPU')}{rates}), streaming"
            assert_same_batches(loader, beton, epochs=1)


def test_what_a_thread_needs_goes_by_bytes_and_pixels(tmp_path):
    beton = Beton(write_blocks(tmp_path / "blocks.beton", 3, 64))
    mean = np.mean([len(beton.jpeg(n)) for n in range(3)])
    assert beton.mean_bytes == mean
    with Loader(beton, resolution=64) as loader:
        assert choice.seconds_per_image(loader._feed) == pytest.approx(28e-9 * mean + 3.9e-9 * 64 * 64)
    # The photographs that the two numbers were measured on.
    seconds = choice.SECONDS_PER_BYTE * 45.2e3 + choice.SECONDS_PER_PIXEL * 512**2
    assert 15 / seconds == pytest.approx(6510, rel=0.01)


class Broken(StandIn):
    def decode(self, jpegs, targets):
        return [False] * len(jpegs)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda settings: Broken(), "stand-in decoded 0 of 5 images"),
        (lambda settings: (_ for _ in ()).throw(RuntimeError("no driver\nmore")), "no decoder for cpu: stand-in: no driver"),
    ],
    ids=["decodes nothing", "does not start"],
)
def test_auto_falls_back_to_the_cpu_in_one_line_where_the_device_cannot_decode(beton, make, reason, monkeypatch):
    monkeypatch.setitem(gpu.DECODERS, "stand-in", make)
    with DeviceLoader(beton, decoder="stand-in", workers=1, **PATIENTLY) as loader:
        assert loader.description.startswith(f"decode on 1 CPU thread ({reason}")
        assert "\n" not in loader.description
        assert_same_batches(loader, beton, epochs=1)


def test_a_decoder_asked_for_by_name_that_cannot_be_had_is_an_error_with_the_way_out(beton, monkeypatch):
    monkeypatch.setattr(gpu, "installed", lambda: False)
    with pytest.raises(LoaderError, match=r"nvImageCodec is not installed .* use decode='cpu'"):
        gpu.make_decoder(Beton(beton), torch.device("cpu"), "nvimgcodec")
    with pytest.raises(UsageError, match="decoder must be one of nvimgcodec, nvimgcodec-hardware"):
        gpu.make_decoder(Beton(beton), torch.device("cpu"), "turbo")
    with pytest.raises(UsageError, match="decodes at full size, 16 x 16 px; for resolution 8"):
        DeviceLoader(beton, batch_size=2, resolution=8, decode="gpu", decoder="nvimgcodec")


def test_files_that_the_cpu_decodes_at_a_fraction_are_left_to_it(beton, monkeypatch):
    provide(monkeypatch, StandIn())
    with DeviceLoader(beton, batch_size=2, resolution=8, decoder="stand-in", workers=1) as loader:
        assert "at a fraction of the files' size" in loader.description


def test_resident_auto_leaves_the_model_its_memory(beton, monkeypatch):
    needed = 12 * SIDE * SIDE * 3
    monkeypatch.setattr("fastretina.loading.resident.device_available_bytes", lambda device: 4 * needed)

    def plan(reserve):
        return plan_residence(Beton(beton), LoaderConfig(resolution=SIDE, resident="auto", device="cuda", reserve=reserve))

    assert plan(None).size == plan(2 * needed).size == (SIDE, SIDE)
    none = plan(3 * needed)
    assert none.size is None
    assert none.note == "streaming (resident would take 0.0 of 0.0 GB of device memory free, 0.0 GB of it for the model)"


def test_a_store_that_cannot_be_allocated_streams_or_is_an_error(beton, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("fastretina.loading.resident.DeviceStore", full)
    with DeviceLoader(beton, resident="auto", **PATIENTLY) as loader:
        assert loader.description.endswith(
            "streaming (resident would take 0.0 GB of device memory in one piece, which cannot be had)"
        )
        assert_same_batches(loader, beton, epochs=1)
    with pytest.raises(LoaderError, match="use resident='auto'"):
        DeviceLoader(beton, resident="on", **PATIENTLY)


@pytest.mark.parametrize("device", DEVICES)
def test_filling_midway_and_resuming_go_on_with_the_very_next_batch(beton, device):
    with DeviceLoader(beton, device=device, resident="on", **PATIENTLY) as loader:
        iterator = iter(loader)
        next(iterator)
        state = loader.state_dict()
        rest = [batch.ids.tolist() for batch in iterator]
    with DeviceLoader(beton, device=device, resident="on", **PATIENTLY) as again:
        again.load_state_dict(state)
        again.fill()
        again.fill()  # nothing is left to do
        assert [batch.ids.tolist() for batch in again] == rest


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{"decode": "cpu"}, {"decode": "gpu"}, {"decode": "cpu", "resident": "on"}], ids=str)
def test_a_batch_that_is_let_go_is_not_overwritten_while_a_long_kernel_still_reads_it(beton, device, settings):
    """Two hundred batches on a GPU, each read by a copy behind a kernel of some 2 ms, by when the next ones are made."""
    if settings["decode"] == "gpu":
        pytest.importorskip("nvidia.nvimgcodec")
    with DeviceLoader(beton, device=device, augment=Augment.none(), **settings, **PATIENTLY) as loader:
        late = []
        for _ in range(67 if device == "cuda" else 1):
            for batch in loader:
                if device == "cuda":
                    torch.cuda._sleep(4_000_000)
                late.append((batch.ids, batch.images.clone()))
                del batch
    with Loader(beton, batch_size=12, resolution=SIDE, train=False) as expected:
        images = next(iter(expected)).images
    for ids, found in late:
        assert (found.cpu() - images[ids.cpu() - 100]).abs().max() < 3 * GREY_LEVEL


@pytest.mark.skipif(torch.cuda.is_available(), reason="decodes on the CPU device")
def test_resident_batches_take_no_work_of_the_threads_and_checking_takes_few(tmp_path, monkeypatch):
    provide(monkeypatch, StandIn())
    path = write_blocks(tmp_path / "blocks.beton", 6, 8)
    with DeviceLoader(path, batch_size=4, resolution=8, workers=16, decode="cpu", resident="on") as loader:
        assert len(loader._pipeline._shared.threads) == 16
        loader.fill()
        assert [job.pieces for job in islice(loader._feed.jobs(0, 0), 2)] == [0, 0]
        assert sum(len(batch.ids) for batch in loader) == 6
    with DeviceLoader(path, batch_size=4, resolution=8, workers=16, decode="gpu", decoder="stand-in") as loader:
        assert len(loader._pipeline._shared.threads) == CHECKING_THREADS
        assert [job.pieces for job in islice(loader._feed.jobs(0, 0), 2)] == [4, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_what_describes_the_rows_of_any_batch_is_aligned_as_the_kernel_was_compiled_for(beton, device, monkeypatch):
    seen = []
    real = stage.warp

    def noted(*tensors):
        seen.append([tensor.data_ptr() % 16 for tensor in tensors if isinstance(tensor, torch.Tensor)])
        if device == "cuda":  # Triton looks at them itself; the interpreter does not
            real(*tensors)

    monkeypatch.setattr(stage, "warp", noted)
    for batch_size in range(1, 8):
        with DeviceLoader(beton, batch_size=batch_size, resolution=16, device=device, decode="cpu") as loader:
            for _ in loader:
                pass
    assert len(seen) == sum(-(-12 // size) for size in range(1, 8))
    assert not any(map(any, seen))
