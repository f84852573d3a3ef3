"""Images per second: fastretina beside its peers, interleaved in one run, every side in a process of its own.

    python benchmarks/throughput.py --data data/train.beton --json out.json --chart out.png

Each round lets every side run two epochs, in alternating order, of which the second is timed (see side_process.measure_epoch); an
untimed round comes first. (On a GPU, --device cuda, sides run one after the other, for want of memory, and there is no busy
neighbour there; training is benchmarks/headline.py's.) Throughput is a median over the rounds with an interval (measure.summary),
per second of wall time and per second of CPU time; ratios are taken within rounds, so that a busy neighbour, who slows both, does
not enter them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import stages
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from measure import FULL_TRAIN_SET, brief, command, environment, hardware, interleave, save, summary
from side_process import SideProcess
from sides import IMPORTS, Task

from fastretina.beton.reader import Beton
from fastretina.cli import run
from fastretina.errors import RunError, UsageError
from fastretina.models.precision import choose_device

OURS, PEERS = "#0072b2", "#9a9a9a"  # blue and grey: told apart by everyone, and in print
OLD_EPOCH = 2088.0  # seconds that one epoch of it took with a Pillow __getitem__

Group = Literal["loader", "train", "pack", "resident"]


@dataclass(frozen=True)
class Comparison:
    """Sides that do the same work; ratios are those of the first side over the others."""

    name: str
    group: Group
    work: str
    resolution: int  # px
    sides: tuple[str, ...]
    batch_size: int = 64


COMPARISONS = (
    Comparison(
        "decode", "loader", "decode", 512,
        ("fastretina", "ffcv", "dali", "spdl", "torchvision_pool", "torchvision", "pillow"),
    ),
    Comparison(
        "decode to half the size", "loader", "decode", 256, ("fastretina", "ffcv", "dali", "spdl", "torchvision_pool", "pillow")
    ),
    Comparison("decode + flip + normalise", "loader", "flip", 512, ("fastretina", "ffcv", "dali", "spdl", "torchvision_pool")),
    Comparison(
        "decode + augment + normalise", "loader", "augment", 512,
        ("fastretina", "spdl", "torchvision_pool", "torchvision", "pillow", "dali", "ffcv", "ffcv_with_our_warp"),
    ),
    Comparison("cached", "resident", "decode", 512, ("fastretina_resident", "ffcv_raw")),
    Comparison("cached at half the size", "resident", "decode", 256, ("fastretina_resident", "ffcv_raw")),
    Comparison("cached, flip + normalise", "resident", "flip", 512, ("fastretina_resident", "ffcv_raw")),
    Comparison("cached, augment + normalise", "resident", "augment", 512, ("fastretina_resident", "fastretina", "ffcv_raw")),
    Comparison("training ResNet18, float32", "train", "train", 128, ("train_fastretina", "train_synthetic"), batch_size=32),
)  # fmt: skip


# On a GPU: the loader, one side after the other, because several of them do not fit the memory together. Training there is
# benchmarks/headline.py's.
CUDA_COMPARISONS = (
    Comparison(
        "loader, augmented", "loader", "augment", 512,
        ("fastretina_cpu_decode", "fastretina_gpu_decode", "ffcv", "dali"), 256,
    ),
    Comparison("loader, resident", "resident", "augment", 512, ("fastretina_resident",), 256),
)  # fmt: skip
HEADLINES = {"resnet18": 128, "resnet50": 64}  # batch sizes


@dataclass(frozen=True)
class ThroughputBenchmark:
    """Images per second of fastretina and its peers."""

    data: Path = Path("data/train.beton")
    """The .beton to read: 512 x 512 images."""
    json: Path | None = None
    """Where to write all results."""
    chart: Path | None = None
    """Where to draw them (PNG)."""
    only: Group | None = None
    """One group of comparisons; default: all."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where fastretina's batches end up."""
    rounds: int = 5
    """Timed rounds, after an untimed one."""
    arch: Literal["resnet18", "resnet50"] | None = None
    """Train this model only (on a CPU there is but resnet18); default: all."""
    workers: int = 0
    """Threads or processes of every side; 0: one for each core."""
    cold_starts: int = 5
    """Fresh processes whose first batch is timed."""
    patience: float = 300.0
    """Seconds that a side has for its first batch, and for the two epochs of a round; past them it is left out."""


def installed(side: str) -> bool:
    """Whether this side's package is there."""
    package = IMPORTS.get(side, "torch").split(".")[0]
    package = {"ffcv_with_our_warp": "ffcv", "dali": "nvidia.dali"}.get(side, package)
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def compare(
    comparison: Comparison,
    config: ThroughputBenchmark,
    workers: int,
    scratch: str,
    alone: bool = False,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """All rounds of one comparison; sides that are not installed are left out, sides that fail are reported as such.

    alone: one side after the other. keep: is given what there is after every epoch.
    """
    task = Task(
        str(config.data), comparison.work, comparison.resolution, comparison.batch_size, workers, config.device, scratch
    )  # fmt: skip
    processes: dict[str, SideProcess] = {}
    failed: dict[str, str] = {}
    epochs: dict[str, list[dict[str, Any]]] = {}
    gaps: dict[str, float] = {}
    ready: dict[str, dict[str, Any]] = {}

    def ask(side: str, question: str) -> dict[str, Any]:
        """Its answer; {} where it has failed, now or before."""
        if side in failed:
            return {}
        try:
            return processes[side].ask(question)
        except RuntimeError as error:
            failed[side] = str(error)
            processes.pop(side).close()
            return {}

    def epoch(side: str) -> float:
        if answer := ask(side, "epoch"):
            epochs.setdefault(side, []).append(answer)
        keep(found())
        return 0.0

    def found() -> dict[str, Any]:
        sides = {
            side: digest(rounds[1:], ready[side], gaps.get(side))
            for side, rounds in epochs.items()
            if side not in failed and len(rounds) > 1
        }
        first = next((side for side in comparison.sides if side in sides), "")
        ratios = {
            f"{first} / {side}": {
                unit: summary([a / b for a, b in zip(sides[first][unit]["rounds"], sides[side][unit]["rounds"], strict=False)])
                for unit in ("per_second", "per_cpu_second")
            }
            for side in sides
            if side != first
        }
        result = {"name": comparison.name, "group": comparison.group, "work": comparison.work, "sides": sides}
        settings = {"resolution": comparison.resolution, "batch_size": comparison.batch_size}
        return result | settings | {"ratios": ratios, "failed": failed}

    try:
        for side in filter(installed, comparison.sides):
            try:
                processes[side] = SideProcess(side, task, config.patience)
            except RuntimeError as error:
                failed[side] = str(error)
                continue
            ready[side] = processes[side].ready
            if alone:
                interleave({side: lambda side=side: epoch(side)}, config.rounds)  # type: ignore[misc]
                if side in processes:
                    processes.pop(side).close()
        interleave({side: lambda side=side: epoch(side) for side in processes}, config.rounds if processes else 0)  # type: ignore[misc]
        for side in list(processes):
            if comparison.work == "augment" and side in ("fastretina", "ffcv") and (answer := ask(side, "gap")):
                gaps[side] = answer["gap"]
    finally:
        for process in processes.values():
            process.close()
    return found()


def digest(rounds: list[dict[str, Any]], ready: dict[str, Any], gap: float | None) -> dict[str, Any]:
    """One side's rounds as medians with intervals."""
    wall = [r["images"] / r["wall"] for r in rounds]
    cpu = [r["images"] / max(r["cpu"], 1e-3) for r in rounds]  # where the device works, the CPU's clock may not have ticked
    result: dict[str, Any] = {
        "per_second": summary(wall) | {"rounds": wall},
        "per_cpu_second": summary(cpu) | {"rounds": cpu},
        "cpu_cores": summary([r["cpu"] / r["wall"] for r in rounds]),
        "private_mb": max(r["private_mb"] for r in rounds),
        "first_batch_after_import_s": ready["cold_first_batch"],
        "epoch_gap_s": gap,
    }
    result["full_epoch_s"] = FULL_TRAIN_SET / result["per_second"]["median"]
    if "wait" in rounds[0]:
        result["wait_share"] = summary([r["wait"] / r["wall"] for r in rounds])
        result["gflop_per_image"] = rounds[0]["flops"] / 1e9
        result["tflops"] = summary([per_second * rounds[0]["flops"] / 1e12 for per_second in wall])
    if "device_memory_gb" in rounds[0]:
        result["device_memory_gb"] = max(r["device_memory_gb"] for r in rounds)
        asked = [r["gpu_utilisation"] for r in rounds if r["gpu_utilisation"] is not None]
        result["gpu_utilisation"] = summary(asked) if asked else None
        result["gpu_utilisation_why"] = rounds[0]["gpu_utilisation_why"]
    return result


def cold_starts(config: ThroughputBenchmark, workers: int) -> dict[str, float]:
    """Seconds from Loader() to its first batch in fresh processes, imports aside: 64 augmented images at 512 px."""
    task = Task(str(config.data), "augment", 512, 64, workers)
    times = []
    for _ in range(config.cold_starts):
        process = SideProcess("fastretina", task)
        times.append(process.ready["cold_first_batch"])
        process.close()
        time.sleep(0.3)
    return summary(times)


def script(name: str, *flags: object) -> dict[str, Any]:
    """The result of another benchmark of this folder, run as a process of its own. RunError where it leaves none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, flags), "--json", str(out)]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
        if not out.exists():
            raise RunError(f"benchmarks/{name} failed: {done.stderr[-1000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def headline(config: ThroughputBenchmark, arch: str, *flags: object) -> dict[str, Any]:
    """benchmarks/headline.py's result."""
    return script(
        "headline.py", "--arch", arch, "--data", config.data, "--device", config.device, "--batch-size", HEADLINES[arch], *flags
    )


def label(side: str, work: str) -> str:
    """What a side is called, with what it cannot do of the work."""
    lacks = {"flip": " (horizontally only)", "augment": " (no rotation)"}.get(work, "") if side in ("ffcv", "ffcv_raw") else ""
    return side.replace("_", " ") + lacks


def table(comparison: dict[str, Any]) -> str:
    """A comparison as text, one line a side."""
    px, batch = comparison["resolution"], comparison["batch_size"]
    head = f"{comparison['name']} ({px} px, batch {batch})"
    lines = [f"\n{head:<42}{'img/s':>8}  {'interval':>15}{'img/CPU-s':>11}{'28,100 in':>11}{'memory':>10}{'ratio':>8}"]
    for side, result in comparison["sides"].items():
        wall, cpu = result["per_second"], result["per_cpu_second"]
        ratio = next((r["per_second"]["median"] for key, r in comparison["ratios"].items() if key.endswith(f"/ {side}")), None)
        lines.append(
            f"  {label(side, comparison['work']):<40}{wall['median']:8,.0f}  {wall['low']:7,.0f}-{wall['high']:7,.0f}"
            f"{cpu['median']:11,.0f}{result['full_epoch_s']:9,.1f} s{result['private_mb']:7,.0f} MB"
            + (f"{ratio:7.2f}x" if ratio else "")
        )
        details = [f"{result['cpu_cores']['median']:.1f} CPU cores"]
        if "wait_share" in result:
            details.append(f"waits for data {result['wait_share']['median']:.2%} of the time")
        if "device_memory_gb" in result:
            details.append(f"{result['device_memory_gb']:.1f} GB on the device")
            busy = result["gpu_utilisation"]
            details.append(
                f"GPU {busy['median']:.0f} % busy" if busy else f"GPU utilisation unknown ({result['gpu_utilisation_why']})"
            )
        if "tflops" in result:
            details.append(f"{result['tflops']['median']:.2f} TFLOP/s")
        lines.append(f"  {'':<4}{', '.join(details)}")
    return "\n".join([*lines, *(f"  {side:<40}failed: {reason.splitlines()[-1]}" for side, reason in comparison["failed"].items())])


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """One panel for each comparison, one bar for each side: images per second, median and interval. Writes a PNG."""
    comparisons = result["comparisons"]
    bars = [len(c["sides"]) for c in comparisons]
    figure = Figure(figsize=(9, 0.9 * len(bars) + 0.42 * sum(bars) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(bars), 1, squeeze=False, height_ratios=[n + 0.6 for n in bars])[:, 0]
    for axis, comparison in zip(axes, comparisons, strict=True):
        sides = sorted(comparison["sides"].items(), key=lambda item: item[1]["per_second"]["median"])
        names = [label(side, comparison["work"]) for side, _ in sides]
        found = [side["per_second"] for _, side in sides]
        medians = [each["median"] for each in found]
        spread = [[each["median"] - each["low"] for each in found], [each["high"] - each["median"] for each in found]]
        colours = [OURS if "fastretina" in name else PEERS for name in names]
        axis.barh(names, medians, xerr=spread, color=colours, error_kw={"capsize": 3, "lw": 1})
        for row, each in enumerate(found):
            axis.text(each["high"], row, f"  {each['median']:,.0f}", va="center", fontsize=9)
        axis.set_title(f"{comparison['name']} ({comparison['resolution']} px)", loc="left", fontsize=10)
        axis.set_xlim(0, max(each["high"] for each in found) * 1.14)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes[-1].set_xlabel("images per second (median and interval; more is better)")
    hard = result["hardware"]
    figure.suptitle(f"{hard['cpu']}, {hard['cores']} cores, {result['workers']} workers a side", fontsize=10)
    figure.savefig(path, dpi=120)


def main(config: ThroughputBenchmark) -> None:
    """Images per second of fastretina and its peers, interleaved in one run."""
    choose_device(config.device)  # UsageError where there is no such device
    if config.only != "pack" and not config.data.exists():
        raise UsageError(f"{config.data}: not there. Make it with: make data, or name another with --data")
    hard = hardware()
    workers, cuda = config.workers or int(str(hard["cores"])), config.device == "cuda"
    print(f"{hard['cpu']}, {hard['cores']} cores; {workers} workers a side; {config.rounds} rounds")
    result: dict[str, Any] = {"benchmark": "throughput", "command": command(), "workers": workers}
    result["comparisons"] = []
    if config.only != "pack":
        beton = Beton(config.data)
        sizes = [len(beton.jpeg(i)) for i in range(len(beton))]
        result["data"] = {"samples": len(beton), "mean_kb": round(sum(sizes) / len(sizes) / 1e3, 1)}
        print(f"{config.data}: {len(beton):,} images, {result['data']['mean_kb']} KB each")
    if config.only in (None, "loader") and not cuda:
        result["stages"] = stages.measure(config.data, workers, config.rounds)
        print(stages.table(result["stages"]), flush=True)
    for comparison in CUDA_COMPARISONS if cuda else COMPARISONS:
        if config.only in (None, comparison.group) and (comparison.group != "train" or config.arch in (None, "resnet18")):

            def keep(found: dict[str, Any], before: tuple[Any, ...] = tuple(result["comparisons"])) -> None:
                result["comparisons"] = [*before, found]
                save(config.json, result)

            with tempfile.TemporaryDirectory(prefix="fastretina-bench-") as scratch:
                keep(compare(comparison, config, workers, scratch, cuda, keep))
            print(table(result["comparisons"][-1]), flush=True)
    if config.only in (None, "train") and cuda:
        for arch in [config.arch] if config.arch else HEADLINES:
            result.setdefault("headline", {})[arch] = found = headline(config, arch)
            save(config.json, result)
            medians = {name: brief(case["per_second"]) for name, case in found["cases"].items() if case["sides"]}
            print(f"\ntraining {arch}, images/s: {json.dumps(medians, indent=2)}", flush=True)
    if config.only in (None, "loader") and not cuda:
        result["cold_first_batch_s"] = cold_starts(config, workers)
        save(config.json, result)
        augmented = next(
            c for c in result["comparisons"] if c["group"] == "loader" and c["sides"]["fastretina"]["epoch_gap_s"] is not None
        )
        first, gap = result["cold_first_batch_s"]["median"], augmented["sides"]["fastretina"]["epoch_gap_s"]
        print(f"\nfirst batch from a cold process: {first:.2f} s; between two epochs: {gap * 1e3:.1f} ms")
        epoch = augmented["sides"]["fastretina"]["full_epoch_s"]
        print(
            f"an epoch of {FULL_TRAIN_SET:,} images: {epoch:.1f} s of loading, where the whole epoch once took {OLD_EPOCH:,.0f} s"
        )
    if config.only in (None, "pack") and not cuda:
        result["pack"] = script("pack.py", "--rounds", config.rounds)
        for side in ("fastretina", "ffcv"):
            print(f"packing, {side}: {result['pack'][side]['median']:,.0f} img/s")
    save(config.json, result)
    if config.chart is not None and result["comparisons"]:
        draw_chart(result | {"hardware": hard}, config.chart)


if __name__ == "__main__":
    run(ThroughputBenchmark, main)
