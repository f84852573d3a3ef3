"""How long training waits for data: by a simulated device's clock, by the host's, and on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES

from fastretina.system import cuda as streams
from fastretina.system.cuda import STEPS_AHEAD, Pace
from fastretina.training import loop
from fastretina.training.distributed import ALONE
from fastretina.training.loop import READ_EVERY, _timed
from fastretina.training.progress import Tally

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STEP = 1.0  # seconds that a training step takes on the device


class Machine:
    """A host and a device with clocks of their own, of which `now` is the host's; seconds. Takes torch.cuda's place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.waited = 0.0
        self.events: weakref.WeakSet[Event] = weakref.WeakSet()
        self.training = Stream(self)
        monkeypatch.setattr(torch.cuda, "Event", lambda **kinds: Event(self, **kinds))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.training)
        for module in (loop, streams):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Stream:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.free_at = machine, 0.0

    def work(self, seconds: float) -> None:
        self.free_at = max(self.free_at, self.machine.now) + seconds

    def wait_until(self, moment: float) -> None:
        self.free_at = max(self.free_at, moment)


class Event:
    def __init__(self, machine: Machine, blocking: bool, enable_timing: bool = False) -> None:
        assert blocking
        self.machine, self.timed = machine, enable_timing
        machine.events.add(self)

    def record(self, stream: Stream) -> None:
        self.moment = max(stream.free_at, self.machine.now)

    def query(self) -> bool:
        return self.moment <= self.machine.now

    def synchronize(self) -> None:
        self.machine.waited += max(0.0, self.moment - self.machine.now)
        self.machine.now = max(self.moment, self.machine.now)

    def elapsed_time(self, later: Event) -> float:
        assert self.timed
        assert later.timed
        assert self.query()
        assert later.query()
        return 1000 * (later.moment - self.moment)


class Batches:
    """A loader whose every batch keeps the host for some seconds, and is there some seconds after that of the batch before."""

    def __init__(self, machine: Machine, device: torch.device, count: int, host: float = 0.0, made: float = 0.0) -> None:
        self.machine, self.device, self.count, self.host, self.made = machine, device, count, host, made
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        making = Stream(self.machine)
        for number in range(self.done, self.count):
            making.work(self.made)
            self.machine.now += self.host
            self.machine.training.wait_until(making.free_at)
            self.done += 1
            yield number


def train(batches: Batches, tally: Tally, steps: int) -> None:
    machine, pace = batches.machine, Pace(batches.device)
    for _, batch in zip(range(steps), _timed(batches, tally), strict=False):
        if batches.device.type == "cpu":
            machine.now += STEP
        else:
            machine.training.work(STEP)
        pace.step()
        if (batch + 1) % READ_EVERY == 0:
            tally.read(0, late=True)


@pytest.mark.parametrize(
    ("device", "late", "seconds"),
    [
        (CUDA, {"host": 3.0}, 3.0 + 9 * 2.0),
        (CUDA, {"made": 3.0}, 3.0 + 9 * 2.0),
        (CUDA, {"host": 0.5}, 0.5),  # the host blocks for half of each step, and the device never stands still
        (CUDA, {"made": 0.5}, 0.5),
        (CUDA, {}, 0.0),
        (CPU, {"host": 3.0}, 10 * 3.0),
    ],
    ids=str,
)
def test_the_wait_is_the_time_in_which_training_had_no_batch_to_work_on(monkeypatch, device, late, seconds):
    tally = Tally()
    train(Batches(Machine(monkeypatch), device, 10, **late), tally, 10)
    tally.read(0)
    assert tally.wait_seconds == pytest.approx(seconds)


def test_training_time_is_the_hosts_whatever_the_device_waited(monkeypatch):
    tally = Tally()
    train(Batches(Machine(monkeypatch), CUDA, 10, host=0.5), tally, 10)
    assert tally.seconds == pytest.approx(10 * 0.5)


def test_a_late_read_waits_for_nothing_and_the_last_one_finds_the_rest(monkeypatch):
    machine, tally = Machine(monkeypatch), Tally()
    batches = Batches(machine, CUDA, 2, made=3.0)
    for _ in _timed(batches, tally):
        machine.training.work(STEP)
    tally.read(0, late=True)
    assert (machine.now, tally.wait_seconds) == (0.0, 0.0)
    machine.now = 3.5  # the first batch has come at 3 s, the second comes at 6 s
    tally.read(0, late=True)
    assert (machine.waited, tally.wait_seconds) == (0.0, 3.0)
    tally.read(0)
    assert (machine.now, tally.wait_seconds) == (6.0, 3.0 + 2.0)


def test_events_of_thousands_of_steps_are_let_go_as_they_are_read(monkeypatch):
    machine, tally, most = Machine(monkeypatch), Tally(), 0
    batches, pace = Batches(machine, CUDA, 3000, made=1.5), Pace(CUDA)
    for batch in _timed(batches, tally):
        machine.training.work(STEP)
        pace.step()
        if (batch + 1) % READ_EVERY == 0:
            tally.read(0, late=True)
        most = max(most, len(machine.events))
    assert most <= 2 * (READ_EVERY + STEPS_AHEAD + 1) + STEPS_AHEAD + 1
    tally.read(0)
    assert tally.wait_seconds == pytest.approx(1.5 + 2999 * 0.5)


def test_a_run_that_is_saved_and_resumed_in_mid_epoch_has_the_whole_epochs_wait(monkeypatch):
    machine, tally = Machine(monkeypatch), Tally()
    batches = Batches(machine, CUDA, 10, host=3.0)
    train(batches, tally, 4)
    tally.read(0)  # as before every save
    saved = tally.state_dict()
    assert saved["wait_seconds"] == pytest.approx(3.0 + 3 * 2.0)
    machine.now += 100.0  # until the run goes on
    resumed = Tally()
    resumed.load_state_dict(saved, ALONE)
    train(batches, resumed, 6)
    resumed.read(0)
    assert resumed.wait_seconds == pytest.approx(2 * 3.0 + 8 * 2.0)


class SleptBatches:
    """Two batches, each of which another stream of a GPU sleeps for; `seconds` says how long."""

    def __init__(self, cycles: int) -> None:
        self.device, self.cycles, self.making = CUDA, cycles, torch.cuda.Stream()
        self.pairs: list[list[torch.cuda.Event]] = []

    def __iter__(self) -> Iterator[None]:
        for _ in range(2):
            begun, made = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record(self.making)
            with torch.cuda.stream(self.making):
                torch.cuda._sleep(self.cycles)
            made.record(self.making)
            torch.cuda.current_stream().wait_event(made)
            self.pairs.append([begun, made])
            yield

    @property
    def seconds(self) -> list[float]:
        return [begun.elapsed_time(made) / 1000 for begun, made in self.pairs]


@pytest.mark.parametrize("device", [DEVICES[1]])
def test_a_gpu_finds_how_long_it_waited_for_another_stream(device):
    cycles = 100_000_000  # 50 ms of an H100
    for batch, step, awaited in ((1, 1, None), (cycles, 1, 2), (cycles, 4 * cycles, 1)):
        tally, batches = Tally(), SleptBatches(batch)
        torch.cuda.synchronize(device)
        for _ in _timed(batches, tally):
            torch.cuda._sleep(step)
        tally.read(0)
        if awaited is not None:  # the first round only loads what the others run
            # Behind a step that takes longer than making a batch does, the second batch is there in time.
            assert tally.wait_seconds == pytest.approx(sum(batches.seconds[:awaited]), rel=0.1)
