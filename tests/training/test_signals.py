"""Signals during training: the first makes a note, and the run ends with its state saved; also where its terminal is gone."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest
import rank_run
from test_train import config

from fastretina.errors import Terminated
from fastretina.train import main
from fastretina.training import build
from fastretina.training.distributed import World
from fastretina.training.signals import Signals, StopAsked
from fastretina.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_a_signal_that_comes_again_by_itself_never_stops_without_saving(number, capsys):
    with Signals() as signals:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        with pytest.raises(StopAsked):
            signals.stop_if_asked()
        assert isinstance(signals.exception(), Terminated)
        assert signals.exception().code == 128 + number
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.stop_if_asked()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("first", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_of_several_signals_the_first_says_how_the_command_ends(first, code):
    signals = Signals(World())
    signals._arrived = first
    for number in (signal.SIGHUP, signal.SIGXCPU):
        signals._note(number, None)
    end = signals.exception()
    assert (130 if isinstance(end, KeyboardInterrupt) else end.code) == code


def test_a_run_that_was_stopped_and_continued_saves_when_its_terminal_is_closed_and_goes_on(tiny_betons, tmp_path, monkeypatch):
    """SIGSTOP, SIGCONT, then SIGHUP from the kernel, with a progress bar that can no longer be written."""
    settings = config(tiny_betons, tmp_path / "run", epochs=4)
    flags = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in ("train", "test", "out", "epochs", "batch_size")]
    flags += [f"--{name}={getattr(settings, name)}" for name in ("arch", "resolution", "lr", "seed", "workers", "val_fraction")]
    ours, theirs = pty.openpty()
    steps = tmp_path / "steps"
    steps.mkdir()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTRETINA_STEPS": str(steps), "FASTRETINA_FAULT": "slow"}
    process = subprocess.Popen(
        [sys.executable, rank_run.__file__, *flags], stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal,
        env=environment,
    )  # fmt: skip
    os.close(theirs)
    log, until = steps / "0", time.monotonic() + 120
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    before = log.read_text().count("\n")
    time.sleep(0.5)
    assert log.read_text().count("\n") == before
    process.send_signal(signal.SIGCONT)
    while log.read_text().count("\n") == before and time.monotonic() < until:
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(30) == 129
    done = load_state(settings.out / "last.pt")["progress"]["step"]
    assert before < done < 20
    monkeypatch.setattr(build, "build_model", lambda arch, outputs, **_: rank_run.Tiny(outputs))
    main(settings)
    assert load_state(settings.out / "last.pt")["progress"]["step"] == 20
