"""The loader: the same batches every time, nothing lost, nothing left behind."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import reference
import simplejpeg
import torch
from loader_cases import COUNT, SIDE, epoch, kwargs, same, settled, threads, write

from fastretina.beton.reader import Beton
from fastretina.beton.writer import BetonWriter
from fastretina.errors import LoaderError, SampleError, UsageError
from fastretina.loading import batches as feed
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD, Augment, draw
from fastretina.loading.config import LoaderConfig
from fastretina.loading.loader import Loader


@pytest.fixture
def corrupt(path, tmp_path) -> tuple[Path, set[int]]:
    """A copy in which five samples have a flipped byte."""
    bad = {0, 33, 34, 80, 149}
    data = bytearray(path.read_bytes())
    beton = Beton(path)
    for index in bad:
        at = bytes(data).find(bytes(beton.jpeg(index)))
        data[at + len(beton.jpeg(index)) // 2] ^= 0x10
    copy = tmp_path / "corrupt.beton"
    copy.write_bytes(data)
    return copy, bad


def test_a_batch_is_channels_last_normalised_and_labelled(path):
    with Loader(path, **kwargs()) as loader:
        assert len(loader) == 10
        batches = list(loader)
    for batch in batches:
        images, labels, ids = batch
        assert (images, labels, ids) == (batch.images, batch.labels, batch.ids)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert torch.equal(batch.labels, (batch.ids - 1) // 3 % 5)
    assert [len(b.ids) for b in batches] == [16] * 9 + [6]
    assert sorted(torch.cat([b.ids for b in batches]).tolist()) == [3 * n + 1 for n in range(COUNT)]


@pytest.mark.parametrize("augment", [Augment(), Augment.full(), Augment.none()])
def test_pixels_are_those_of_the_float64_reference(path, augment):
    beton = Beton(path)
    for batch in epoch(path, augment=augment)[:2]:
        for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
            decoded = simplejpeg.decode_jpeg(beton.jpeg((sample - 1) // 3))
            affine, colour = draw(augment, SIDE, np.array([SIDE]), np.array([SIDE]), 5, 0, np.array([sample]))
            expected = reference.normalise(reference.warp(decoded, affine[0], colour[0], SIDE), IMAGENET_MEAN, IMAGENET_STD)
            grey_levels = np.abs(image.permute(1, 2, 0).numpy() - expected) * 255 * IMAGENET_STD
            assert grey_levels.max() < 0.1


@pytest.mark.parametrize("change", [{"workers": 1}, {"workers": 4}, {"resident": "on"}, {"workers": 4, "resident": "on"}])
def test_batches_are_bit_identical_for_any_number_of_workers_and_from_memory(path, change):
    for a, b in zip(epoch(path), epoch(path, **change), strict=True):
        assert same(a, b)


def test_a_sample_is_augmented_the_same_in_any_batch_size(path):
    whole = {int(i): image for batch in epoch(path) for i, image in zip(batch.ids, batch.images, strict=True)}
    for batch in epoch(path, batch_size=7):
        for i, image in zip(batch.ids, batch.images, strict=True):
            assert torch.equal(image, whole[int(i)])


def test_epochs_and_seeds_differ(path):
    with Loader(path, **kwargs()) as loader:
        first, second = list(loader), list(loader)
    assert not torch.equal(first[0].ids, second[0].ids)
    assert not torch.equal(first[0].ids, epoch(path, seed=6)[0].ids)
    again = epoch(path)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_evaluation_is_file_order_and_every_epoch_the_same(path):
    with Loader(path, **kwargs(train=False)) as loader:
        first, second = list(loader), list(loader)
    assert torch.cat([b.ids for b in first]).tolist() == [3 * n + 1 for n in range(COUNT)]
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_drop_last_leaves_out_the_short_batch(path):
    assert [len(b.ids) for b in epoch(path, drop_last=True)] == [16] * 9


def test_the_loader_tells_its_data_set_and_its_batch_size(path):
    with Beton(path) as beton, Loader(beton, **kwargs()) as loader:
        assert loader.dataset is beton
        assert loader.batch_size == 16


def test_balanced_sampling_augments_a_returning_sample_differently(path, tmp_path):
    beton = Beton(path)
    with BetonWriter(tmp_path / "rare.beton", 40) as writer:
        for n in range(40):
            jpeg = bytes(beton.jpeg(n))
            writer.add(jpeg, zlib.crc32(jpeg), name=str(n), label=int(n == 39), id=n, width=SIDE, height=SIDE)
        writer.finish({})
    seen = [
        image
        for b in epoch(tmp_path / "rare.beton", sampling="balanced")
        for image, i in zip(b.images, b.ids, strict=True)
        if i == 39
    ]
    assert len(seen) == 20
    assert len({image.numpy().tobytes() for image in seen}) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_hold_the_same_images(path, dtype):
    for wide, narrow in zip(epoch(path), epoch(path, dtype=dtype), strict=True):
        assert narrow.images.dtype == dtype
        assert (wide.images - narrow.images.float()).abs().max() < 0.02


def test_uint8_gives_the_decoded_pixels(path):
    beton = Beton(path)
    for batch in epoch(path, train=False, dtype=torch.uint8):
        for image, sample in zip(batch.images, batch.ids.tolist(), strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), simplejpeg.decode_jpeg(beton.jpeg((sample - 1) // 3)))


@pytest.mark.parametrize("resolution", [16, 32, 21, 100])
def test_a_smaller_resolution_averages_and_does_not_alias(tmp_path, resolution):
    """One-pixel stripes become their mean; sampling every n-th pixel would give black or white."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    jpeg = simplejpeg.encode_jpeg(stripes, quality=95, colorsubsampling="444")
    with BetonWriter(tmp_path / "stripes.beton", 1) as writer:
        writer.add(jpeg, zlib.crc32(jpeg), name="stripes", label=0, id=0, width=128, height=128)
        writer.finish({})
    (batch,) = epoch(tmp_path / "stripes.beton", train=False, dtype=torch.uint8, resolution=resolution)
    inner = batch.images[0, :, 3:-3, 3:-3].float()
    assert abs(float(inner.mean()) - 127.5) < 4
    if resolution < 64:
        assert float(inner.std()) < 12


def test_a_batch_stays_as_it_is_while_anything_refers_to_it(path):
    with Loader(path, **kwargs()) as loader:
        kept = [(batch.images[3], batch.images[3].clone()) for _ in range(4) for batch in loader]
    assert all(torch.equal(view, copy) for view, copy in kept)


def test_batch_memory_is_used_again(path):
    with Loader(path, **kwargs()) as loader:
        addresses = [batch.images.data_ptr() for _ in range(20) for batch in loader]
    assert len(set(addresses)) <= 8


def test_images_of_several_sizes_come_letterboxed(tmp_path):
    wide = write(tmp_path / "wide.beton", count=4, side=32, width=64)
    (batch,) = epoch(wide, train=False, dtype=torch.uint8, resolution=64)
    assert batch.images.shape == (4, 3, 64, 64)
    assert (batch.images[:, :, :15] == 0).all()
    assert batch.images[:, :, 20:44].float().mean() > 60


def test_a_corrupt_sample_is_an_error_that_names_it(corrupt):
    path, _ = corrupt
    with Loader(path, **kwargs(train=False)) as loader, pytest.raises(SampleError) as caught:
        list(loader)
    assert caught.value.index == 0
    assert caught.value.name == "0_left"
    assert str(path) in str(caught.value)


def test_good_epochs_follow_an_error(corrupt):
    path, bad = corrupt
    with Loader(path, **kwargs(train=False)) as loader:
        for _ in range(5):
            with pytest.raises(SampleError):
                list(loader)
        state = loader.state_dict() | {"epoch": 7, "batch": 6}
        loader.load_state_dict(state)
        rest = iter(loader)
        assert next(rest).ids.tolist() == [3 * n + 1 for n in range(96, 112)]
    assert 80 in bad


@pytest.mark.parametrize("resident", ["off", "on"])
def test_skipped_samples_are_left_out_counted_once_and_reported(corrupt, path, resident):
    bad_path, bad = corrupt
    with Loader(bad_path, **kwargs(on_bad="skip", max_bad=0.05, train=False, resident=resident)) as loader:
        for _ in range(2):
            seen = list(loader)
            got = torch.cat([b.ids for b in seen]).tolist()
            assert got == [3 * n + 1 for n in range(COUNT) if n not in bad]
            assert all(b.images.is_contiguous(memory_format=torch.channels_last) for b in seen)
        assert {error.index for error in loader.skipped} == bad
        assert len(loader.skipped) == 5
    good = {int(i): image for b in epoch(path, train=False) for i, image in zip(b.ids, b.images, strict=True)}
    assert all(torch.equal(image, good[int(i)]) for b in seen for i, image in zip(b.ids, b.images, strict=True))


def test_more_bad_samples_than_allowed_stop_the_epoch(corrupt):
    path, _ = corrupt
    with Loader(path, **kwargs(on_bad="skip", max_bad=0.02, train=False)) as loader, pytest.raises(LoaderError, match="max_bad"):
        list(loader)


def test_resident_is_refused_with_both_numbers_where_it_does_not_fit(path, monkeypatch):
    monkeypatch.setattr("fastretina.loading.resident.available_bytes", lambda: 10**6)
    with pytest.raises(LoaderError, match=r"0\.00 GB of RAM and 0\.00 GB are free"):
        Loader(path, **kwargs(resident="on"))
    with Loader(path, **kwargs(resident="auto")) as loader:
        assert "streaming" in loader.description
    monkeypatch.setattr("fastretina.loading.resident.available_bytes", lambda: 10**9)
    with Loader(path, **kwargs(resident="auto")) as loader:
        assert "resident" in loader.description


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"resolution": 0}, {"workers": 0}, {"dtype": torch.float64}, {"decode": "gpu"}]
)
def test_settings_that_cannot_work_are_refused(path, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Loader(path, **kwargs(**wrong))


def test_each_option_is_an_argument_of_the_loader_by_place_as_well_as_by_name(path):
    _, *arguments = inspect.signature(Loader).parameters.values()
    options = [(field.name, field.default, field.kw_only) for field in dataclasses.fields(LoaderConfig)]
    assert [(one.name, one.default, one.kind is one.KEYWORD_ONLY) for one in arguments] == options
    with Loader(path, 16, False, SIDE, "cpu", 5, 2, "auto", "off", torch.uint8, True) as loader:
        assert [len(batch.ids) for batch in loader] == [16] * 9
    with Loader(path=path, batch_size=7, resolution=SIDE) as loader:
        assert len(loader) == 22
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        Loader(path, batchsize=7)


def test_a_closed_loader_says_so(path):
    loader = Loader(path, **kwargs())
    loader.close()
    loader.close()
    with pytest.raises(LoaderError, match="closed"):
        iter(loader)


def footprint() -> tuple[int, int, int]:
    gc.collect()
    return threads(), len(list(Path("/proc/self/fd").iterdir())), psutil.Process().memory_info().rss


def test_breaks_epochs_and_loaders_leave_threads_descriptors_and_memory_flat(path):
    def use() -> None:
        with Loader(path, **kwargs()) as loader:
            for _ in range(100):
                for _ in loader:
                    break
        with Loader(path, **kwargs()) as loader:
            for _ in range(50):
                for _ in loader:
                    pass
        for _ in range(10):
            forgotten = Loader(path, **kwargs())
            next(iter(forgotten))
            del forgotten

    alone = threads()
    use()
    assert settled(alone)
    before = footprint()
    use()
    assert settled(alone)
    after = footprint()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] * 1.02 + 2**20


@pytest.mark.parametrize("ending", ["", "loader.close()", "raise SystemExit(0)", "del loader, it"])
def test_interpreter_exit_is_silent_and_prompt(path, ending):
    code = f"""
from fastretina import Loader
loader = Loader({str(path)!r}, batch_size=16, resolution={SIDE}, workers=3)
it = iter(loader)
next(it)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("size", [1, 49_152, 786_432, 3_000_000])
def test_decoders_are_kept_from_storing_past_the_cache(size):
    # libjpeg-turbo does so where rows begin at a multiple of 32; each thread has memory of its own, and keeps the largest.
    memory = feed._thread_memory(size)
    assert len(memory) >= size
    assert memory.ctypes.data % 32 == 16
    assert feed._thread_memory(size) is memory
