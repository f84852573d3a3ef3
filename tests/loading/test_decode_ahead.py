"""Decoding one batch ahead of the consumer, in a thread of its own: what overlaps, what is dropped, and who hears of what."""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import ahead_cases
import devices
import numpy as np
import pytest
import torch
from ahead_cases import COUNT, SIDE, TIMEOUT, Codec, decoded_ahead
from interrupting import At, interrupt
from loader_cases import settled, threads

from fastretina import Loader
from fastretina.beton.reader import Beton
from fastretina.errors import LoaderError, SampleError
from fastretina.loading import device_stage, pipeline
from fastretina.loading.batches import Batch
from fastretina.loading.decode.gpu import DeviceDecoder

pytestmark = ahead_cases.needs_no_gpu


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return devices.write_blocks(tmp_path_factory.mktemp("ahead") / "blocks.beton", COUNT, SIDE)


@pytest.fixture(scope="module")
def images(file) -> dict[int, np.ndarray]:
    return ahead_cases.pixels(file)


@pytest.fixture(scope="module")
def orders(file) -> list[list[list[int]]]:
    """The ids of each batch of a few epochs, by the loader for CPUs."""
    with Loader(file, **ahead_cases.SETTINGS) as loader:
        return [[batch.ids.tolist() for batch in loader] for _ in range(5)]


@pytest.fixture
def codec(monkeypatch) -> Codec:
    return ahead_cases.provide(monkeypatch)


@pytest.fixture
def check(images) -> Callable[[list[Batch], list[list[int]]], None]:
    def check(found: list[Batch], expected: list[list[int]]) -> None:
        assert [batch.ids.tolist() for batch in found] == expected
        for batch in found:
            for name, image in zip(batch.ids.tolist(), batch.images, strict=True):
                assert np.array_equal(image.permute(1, 2, 0).numpy(), images[name])

    return check


def jpegs(file: Path, ids: list[int]) -> set[bytes]:
    with Beton(file) as beton:
        return {bytes(beton.jpeg(name - 100)) for name in ids}


def gated(codec: Codec, number: int) -> threading.Event:
    """What this decode waits for."""
    return codec.gates.setdefault(number, threading.Event())


def test_the_next_batch_is_decoded_in_another_thread_while_the_consumer_has_this_one(file, orders, codec, check):
    with ahead_cases.make(file) as loader:
        found = []
        for number, batch in enumerate(itertools.chain(loader, loader)):
            found.append(batch)
            assert codec.begun(number + 1).wait(TIMEOUT)  # and nobody has asked for it
        assert threading.get_ident() not in codec.threads[1:]
    check(found, orders[0] + orders[1])


def test_a_batch_is_handed_over_while_the_next_one_is_being_decoded(file, orders, codec, check):
    gate = gated(codec, 1)
    with ahead_cases.make(file) as loader:
        batches = iter(loader)
        first = next(batches)
        assert codec.begun(1).wait(TIMEOUT)
        check([first], orders[0][:1])
        gate.set()
        check(list(batches), orders[0][1:])


def test_one_batch_is_decoded_at_a_time_and_none_before_the_last_was_released(file, codec, monkeypatch):
    turns: list[str] = []
    decode, release = DeviceDecoder.decode, DeviceDecoder.release
    with ahead_cases.make(file) as loader:
        monkeypatch.setattr(DeviceDecoder, "decode", lambda *given: turns.append("decode") or decode(*given))
        monkeypatch.setattr(DeviceDecoder, "release", lambda *given: turns.append("release") or release(*given))
        # While a batch is launched there is time enough for another decode to begin.
        monkeypatch.setattr(device_stage, "warp", ahead_cases.copying(lambda: codec.begun(codec.count).wait(0.1)))
        for count, _ in enumerate(loader, start=1):
            assert decoded_ahead(loader)
            assert turns == ["decode", "release"] * count + ["decode"]
        codec.begun(codec.count).wait(0.1)
        assert turns == ["decode", "release"] * 3 + ["decode"]


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [({}, True), ({"decode": "cpu"}, False), ({"resident": "on"}, False)],
    ids=str,
)
def test_there_is_a_thread_that_decodes_only_where_a_device_decodes_what_is_streamed(file, codec, settings, ahead):
    with ahead_cases.make(file, **settings) as loader:
        assert (loader._ahead is not None) == ahead
        assert sum(len(batch.ids) for batch in loader) == COUNT
        assert all((ident != threading.get_ident()) == ahead for ident in codec.threads[1:])
    assert codec.threads or settings == {"decode": "cpu"}


def test_the_thread_works_on_the_loaders_device(file, codec, monkeypatch):
    at = threading.local()
    seen = []
    decode = Codec.decode

    class On:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            at.number = self.number

        def __exit__(self, *_: object) -> None:
            at.number = 0

    with ahead_cases.make(file) as loader:
        loader._stage._number = 3
        monkeypatch.setattr(torch.cuda, "device", On)
        monkeypatch.setattr(Codec, "decode", lambda *given: seen.append(getattr(at, "number", 0)) or decode(*given))
        assert len(list(loader)) == 3
    assert set(seen) == {3}


BAD = {
    "cannot be decoded": (SampleError, "cannot be decoded by anybody"),
    "is not written": (LoaderError, "stand-in says that it decoded it, and did not write it"),
    "has another checksum": (SampleError, "checksum"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("number", [1, 2])
def test_the_error_of_a_batch_comes_in_its_place_and_ends_its_iteration(
    file, orders, codec, check, kind, number, monkeypatch, tmp_path
):
    bad = orders[0][number][1]
    with ahead_cases.make(
        devices.write_blocks(tmp_path / "bad.beton", COUNT, SIDE, {bad - 100}) if kind == "has another checksum" else file
    ) as loader:

        def decode(index: int, target: np.ndarray) -> None:
            raise loader.dataset.sample_error(index, "cannot be decoded by anybody")

        monkeypatch.setattr(loader._feed, "decode", decode)
        if kind != "has another checksum":
            (codec.refuses if kind == "cannot be decoded" else codec.claims).update(jpegs(file, [bad]))
        batches, found = iter(loader), []
        for _ in range(number):
            found.append(next(batches))
            assert decoded_ahead(loader)
        assert loader.state_dict()["batch"] == number
        with pytest.raises(BAD[kind][0], match=BAD[kind][1]) as raised:
            next(batches)
        assert f"eye_{bad - 100}" in str(raised.value)
        assert loader.state_dict()["batch"] == number
        assert next(batches, None) is None
        check(found, orders[0][:number])
        codec.refuses.clear()
        codec.claims.clear()
        if kind != "has another checksum":
            check(list(loader), orders[1])


def test_bad_samples_are_skipped_in_their_own_batch(file, orders, codec, monkeypatch):
    bad = orders[0][1][2]
    with ahead_cases.make(file, on_bad="skip", max_bad=1.0) as loader:

        def decode(index: int, target: np.ndarray) -> None:
            raise loader.dataset.sample_error(index, "cannot be decoded by anybody")

        monkeypatch.setattr(loader._feed, "decode", decode)
        codec.refuses.update(jpegs(file, [bad]))
        batches = iter(loader)
        next(batches)
        assert decoded_ahead(loader)
        assert loader.skipped == []
        assert next(batches).ids.tolist() == [name for name in orders[0][1] if name != bad]
        assert [error.index for error in loader.skipped] == [bad - 100]


TURNS = {
    "set_epoch": (lambda loader: loader.set_epoch(3), 3, 0),
    "load_state_dict": (lambda loader: loader.load_state_dict(loader.state_dict() | {"epoch": 2, "batch": 2}), 2, 2),
    "the batch again": (lambda loader: loader.load_state_dict(loader.state_dict()), 0, 1),
    "a break": (lambda loader: None, 1, 0),
    "fill": (lambda loader: loader.fill(), 1, 0),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("under_way", [False, True], ids=["decoded", "being decoded"])
def test_what_was_decoded_ahead_is_dropped_where_the_loader_goes_elsewhere(file, orders, codec, check, turn, under_way):
    action, epoch, batch = TURNS[turn]
    with ahead_cases.make(file) as loader:
        gate = gated(codec, 1)
        if not under_way:
            gate.set()
        next(iter(loader))
        assert codec.begun(1).wait(TIMEOUT) if under_way else decoded_ahead(loader)
        action(loader)
        batches = iter(loader)
        threading.Timer(0.05, gate.set).start()
        check(list(batches), orders[epoch][batch:])
        check(list(loader), orders[epoch + 1])


def test_an_interrupt_while_the_next_batch_is_being_decoded_loses_nothing(file, orders, codec, check, monkeypatch):
    monkeypatch.setattr(pipeline, "_LOOK", 0.001)
    waited = 0
    with ahead_cases.make(file) as loader:
        for place in range(1, 700, 11):
            loader.set_epoch(0)
            codec.gates.clear()
            gate, found = gated(codec, codec.count + 1), []
            with suppress(KeyboardInterrupt), At(place, interrupt) as at:
                for batch in loader:
                    found.append(batch)  # noqa: PERF402  # as far as it comes
            assert at.came
            waited += len(found) == 1
            state = loader.state_dict()
            assert (state["epoch"], state["batch"]) == (0, len(found))
            gate.set()
            loader.load_state_dict(state)
            found += loader
            check(found, orders[0])
    assert waited > 5


@pytest.mark.parametrize("patience", [pipeline.CLOSING, 0.1])
def test_closing_waits_for_a_decode_under_way_but_not_for_ever(file, codec, patience, monkeypatch):
    monkeypatch.setattr(pipeline, "CLOSING", patience)
    before = threads()
    gate = gated(codec, 1)
    loader = ahead_cases.make(file)
    batches = iter(loader)
    next(batches)
    assert codec.begun(1).wait(TIMEOUT)
    if patience < 1:
        with pytest.warns(UserWarning, match="still at work"):
            loader.close()
        gate.set()
    else:
        timer = threading.Timer(0.1, gate.set)
        timer.start()
        loader.close()
        assert gate.is_set()
        timer.join()
    with pytest.raises(LoaderError, match="closed"):
        next(batches)
    assert settled(before)


def test_closing_wakes_a_consumer_that_waits_for_a_decode(file, codec, monkeypatch):
    monkeypatch.setattr(pipeline, "CLOSING", 0.1)
    before, said = threads(), []
    gate = gated(codec, 0)
    loader = ahead_cases.make(file)

    def consume() -> None:
        with pytest.raises(LoaderError, match="closed") as raised:
            next(iter(loader))
        said.append(raised)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert codec.begun(0).wait(TIMEOUT)
    with pytest.warns(UserWarning, match="still at work"):
        loader.close()
    consumer.join(TIMEOUT)
    assert said
    gate.set()
    assert settled(before)


def test_closing_ends_the_thread_though_the_rows_that_it_waits_for_do_not_come(file, codec, monkeypatch):
    monkeypatch.setattr(pipeline, "CLOSING", 0.2)
    waiting, over = threading.Event(), threading.Event()
    before = threads()
    with Beton(file) as beton:  # the caller's, which is not interrupted
        loader = ahead_cases.make(beton)
        monkeypatch.setattr(Beton, "jpeg", lambda beton, index: waiting.set() or over.wait(TIMEOUT))
        loader._ahead.start(loader._feed.jobs(0, 0))  # as for a consumer that is between two batches
        assert waiting.wait(TIMEOUT)
        with pytest.warns(UserWarning, match="still at work") as said:
            loader.close()
        assert len(said) == 1  # of those that read rows
        assert settled(before + 2)
        over.set()
        assert settled(before)
    assert codec.count == 0


def test_a_forgotten_loader_ends_its_threads(file, codec):
    before = threads()
    for number in range(5):
        loader = ahead_cases.make(file)
        batches = iter(loader)
        next(batches)
        if number % 2:
            assert decoded_ahead(loader)
        del loader, batches
        gc.collect()
    assert settled(before)


class Ended(BaseException):
    """From outside."""


def test_a_thread_that_was_ended_in_a_decode_is_an_error_and_replaced(file, orders, codec, check):
    before = threads()
    with ahead_cases.make(file) as loader:
        batches, gate = iter(loader), gated(codec, 1)
        next(batches)
        assert codec.begun(1).wait(TIMEOUT)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(codec.threads[-1]), ctypes.py_object(Ended))
        gate.set()
        with pytest.raises(LoaderError, match=r"a thread of the loader was ended by Ended; the next iteration starts another"):
            next(batches)
        check(list(loader), orders[1])
    assert settled(before)


def test_batches_are_the_same_however_the_threads_run(file, orders, codec, check):
    rng = np.random.default_rng(0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(10):
            with ahead_cases.make(file) as loader:
                for epoch in range(4):
                    found = []
                    for batch in loader:
                        time.sleep(float(rng.choice([0, 1e-4, 1e-3])))
                        found.append(batch)
                    check(found, orders[epoch])
    finally:
        sys.setswitchinterval(interval)
