"""benchmarks/headline.py on a CPU and tiny: what it measured survives whatever ends it. Its numbers mean nothing here."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from devices import write_blocks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASE = "batch 2, off, channels_last"
ALL = ("clone", "resident", "cpu-decode", "gpu-decode")
TINY = ("--device", "cpu", "--batch-size", 2, "--resolution", 16, "--steps", 1, "--modes", "off", "--decoder", "nvimgcodec")
# Makes one side fail as it is opened, and another hang in its first step.
DRIVER = """
import itertools, threading
import headline, training_step

opened = headline.open_loader

def open_loader(side, *settings):
    if side == "resident":
        raise ValueError("no such luck")
    source = opened(side, *settings)
    if side != "gpu-decode":
        return source
    return training_step.Source(map(lambda _: threading.Event().wait(), itertools.count()), "waits for ever", source.close)

headline.open_loader = open_loader
headline.run(headline.Headline, headline.main)
"""


def started(script: Path, *flags: object) -> subprocess.Popen[str]:
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (BENCHMARKS, BENCHMARKS.parent)))}
    environment = os.environ | paths | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, TINY), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def check_line(line: str, result: dict) -> None:
    """What a line says is in the JSON."""
    if found := re.search(r"(batch .*): round (\d), ([\w-]+): ([\d.,]+) images/s", line):
        record = result["cases"][found[1]]["sides"][found[3]][int(found[2]) - 1]
        assert f"{record['per_second']:,.1f}" == found[4]
    elif found := re.search(r"eager: .* ([\d.,]+) images/s", line):
        assert f"{result['eager']['per_second']:,.1f}" == found[1]
    elif found := re.search(r"(batch .*): ([\w-]+) ready in [\d.]+ s: (.*)\n", line):
        assert result["cases"][found[1]]["opened"][found[2]]["source"] == found[3]
    elif found := re.search(r"ended: (.*)\n", line):
        assert result["ended"] == found[1]
    else:
        assert re.match(r"roof|gflop_per_image|resnet18 on .*, process", line), line


def test_every_line_is_in_the_json_before_it_is_said_and_a_killed_run_goes_on_without_repeating_what_it_has(tmp_path):
    out, flags = tmp_path / "h.json", ("--data", write_blocks(tmp_path / "blocks.beton", 5, 16), "--rounds", 2)
    with started(BENCHMARKS / "headline.py", "--json", out, *flags) as process:
        for line in process.stdout:
            check_line(line, json.loads(out.read_text()))
            if "round 1, resident" in line:
                process.kill()
                break
    killed = json.loads(out.read_text())["cases"][CASE]["sides"]
    assert {"clone", "resident"} <= killed.keys()

    lines = []
    with started(BENCHMARKS / "headline.py", "--json", out, *flags) as process:
        for line in process.stdout:
            check_line(line, json.loads(out.read_text()))
            lines.append(line)
    assert process.returncode == 0
    result = json.loads(out.read_text())
    case = result["cases"][CASE]
    assert result["ended"] == "complete"
    assert case["failed"] == {}
    for side in ALL:
        assert [record["round"] for record in case["sides"][side]] == [1, 2]
        assert case["sides"][side][: len(killed.get(side, []))] == killed.get(side, [])
    said = [(int(round_), side) for round_, side in re.findall(r"round (\d), ([\w-]+):", "".join(lines))]
    assert len(said) == 8 - sum(map(len, killed.values()))
    assert not any(line.startswith("eager") for line in lines)
    # Rounds that two processes share tell nothing of data: the two may have chosen other kernels.
    second = {side: case["sides"][side][1]["per_second"] for side in ALL}
    assert case["ratios"]["gpu-decode / clone"]["n"] == 1
    assert case["ratios"]["gpu-decode / clone"]["median"] == second["gpu-decode"] / second["clone"]
    assert case["share_of_matmul_roof"]["clone"] == pytest.approx(
        case["per_second"]["clone"]["median"] * result["gflop_per_image"] / 1000 / result["roof"]["matmul_tflops"]["median"]
    )


def test_a_side_that_raises_is_dropped_and_one_that_hangs_is_named_and_ends_the_process_and_the_next_goes_on(tmp_path):
    driver, out, data = tmp_path / "driver.py", tmp_path / "h.json", write_blocks(tmp_path / "blocks.beton", 5, 16)
    driver.write_text(DRIVER)
    flags = ("--json", out, "--data", data, "--rounds", 1, "--deadline", 6, "--grace", 1)
    process = started(driver, *flags)
    said, _ = process.communicate()
    assert process.returncode == 4
    failed = {"resident": "ValueError: no such luck", "gpu-decode": "hung: not over after 7 s"}
    assert json.loads(out.read_text())["cases"][CASE]["failed"] == failed
    assert said.endswith("gpu-decode: left out: hung: not over after 7 s\n")

    process = started(driver, *flags, "--budget", 1000)  # what time there is is no other setting
    process.communicate()
    result = json.loads(out.read_text())
    assert process.returncode == 0
    assert result["ended"] == "complete"
    assert result["cases"][CASE]["failed"] == failed
    assert list(result["cases"][CASE]["sides"]) == ["clone", "cpu-decode"]


def measurement(tmp_path: Path, **changes: object):
    """On random images, because there is no file."""
    from headline import Headline, Measurement

    settings = {"json": tmp_path / "h.json", "data": tmp_path / "absent", "wait_for_data": 0, "device": "cpu", "modes": ("off",)}
    sizes = {"batch_size": (2,), "resolution": 16, "steps": 1, "sides": ("clone",), "budget": 1e6}
    return Measurement(Headline(**(settings | sizes | changes)))


def slow_round(*_: object) -> dict[str, float]:
    return {"per_second": 2.0, "steps": 1, "seconds": 1.0, "took_s": 300.0}


def test_no_round_begins_that_the_budget_does_not_hold(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("headline.one_round", slow_round)
    measured = measurement(tmp_path, deadline=1000)
    measured.journal._budget = measured.journal.age + 200
    assert measured.all() == 0
    result = json.loads((tmp_path / "h.json").read_text())
    assert result["ended"] == "budget"
    assert len(result["cases"][CASE]["sides"]["clone"]) == 1  # after which it is known how long one takes
    assert "random images" in result["cases"][CASE]["opened"]["clone"]["source"]
    assert capsys.readouterr().out.endswith("ended: budget\n")


def test_where_compiling_fails_the_rounds_run_eagerly(tmp_path, monkeypatch):
    def compile_model(*_: object, **options: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("headline.one_round", slow_round)
    monkeypatch.setattr(torch, "compile", compile_model)
    assert measurement(tmp_path, modes=("default", "off"), rounds=1).all() == 0
    cases = json.loads((tmp_path / "h.json").read_text())["cases"]
    assert cases["batch 2, default, channels_last"]["failed"] == {"compile": "RuntimeError: no compiler"}
    assert len(cases[CASE]["sides"]["clone"]) == 1


def test_batch_sizes_modes_and_formats_vary_one_at_a_time(tmp_path):
    modes = ("default", "max-autotune-no-cudagraphs", "off")
    changes = {"batch_size": (64, 128), "modes": modes, "memory_format": ("channels_last", "contiguous")}
    assert list(measurement(tmp_path, **changes).combinations()) == [
        (64, "default", "channels_last"),
        (64, "off", "channels_last"),
        (128, "default", "channels_last"),
        (64, "default", "contiguous"),
        (64, "max-autotune-no-cudagraphs", "channels_last"),
    ]


def test_the_model_comes_before_what_is_resident(tmp_path, monkeypatch):
    """A step that finds no memory beside the resident data set runs again without it."""
    from training_step import Source

    closed: list[str] = []

    def open_loader(side: str, *_: object) -> Source:
        batch = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
        return Source(itertools.repeat(batch), side, lambda: closed.append(side))

    def one_round(*_: object) -> dict[str, float]:
        if "resident" not in closed:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return slow_round()

    monkeypatch.setattr("headline.open_loader", open_loader)
    monkeypatch.setattr("headline.one_round", one_round)
    measured = measurement(tmp_path, sides=("clone", "resident", "cpu-decode"), rounds=2)
    measured.result["eager"] = {"per_second": 1.0}
    assert measured.all() == 0
    case = json.loads((tmp_path / "h.json").read_text())["cases"][CASE]
    assert case["failed"] == {"resident": "clone: OutOfMemoryError: CUDA out of memory."}
    assert {side: len(records) for side, records in case["sides"].items()} == {"clone": 2, "cpu-decode": 2}


def test_what_two_processes_died_in_is_not_tried_again(tmp_path):
    from measure import Journal

    failed: dict[str, str] = {}
    for expected in (3, 3, None):  # each a process of its own, the first two of which die without a word
        journal = Journal(tmp_path / "j.json", "test", {}, budget=100, grace=10)
        if expected is None:
            assert journal.attempt(failed, "here", "part", 10, lambda: 3) is None
        else:
            died = journal.attempt(failed, "here", "part", 10, lambda: (tmp_path / "j.json").read_text())
            (tmp_path / "j.json").write_text(died)
    assert failed == {"part": "two processes ended in it"}


def test_a_result_of_other_settings_is_not_gone_on_with(tmp_path):
    from measure import Journal

    for settings, processes in (({"a": 1}, 1), ({"a": 1}, 2), ({"a": 2}, 1)):
        journal = Journal(tmp_path / "j.json", "test", settings, budget=100, grace=10)
        journal.report("")
        assert journal.result["processes"] == processes


@pytest.mark.parametrize(("seconds", "steps"), [(100, 31), (30, None)])
def test_a_round_that_its_deadline_ends_counts_where_it_has_enough_steps(monkeypatch, seconds, steps):
    """The clock is looked at three times in a step."""
    import training_step

    clock = itertools.count()
    monkeypatch.setattr(training_step, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    source = training_step.Source(itertools.repeat((torch.zeros(1), torch.zeros(4))), "")
    taken: list[None] = []

    class Step:
        device = torch.device("cpu")

        def __call__(self, images, labels) -> torch.Tensor:
            taken.append(None)
            return torch.zeros(())

    if steps is None:
        with pytest.raises(RuntimeError, match="timed steps in"):
            training_step.one_round(Step(), source, 2, 50, seconds)
        return
    record = training_step.one_round(Step(), source, 2, 50, seconds)
    assert record["steps"] == len(taken) - 2 == steps
    assert record["partial"] is True
    assert record["per_second"] == 4 * steps / record["seconds"]
