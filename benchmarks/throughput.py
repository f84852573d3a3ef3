"""Images per second: fastretina beside its peers, interleaved in one run, every side in a process of its own.

    python benchmarks/throughput.py --data data/train.beton --json out.json --chart out.png

Each round lets every side run one epoch, in alternating order; an untimed epoch comes first. (On a GPU, --device cuda, sides run
one after the other, for want of memory; there is no busy neighbour there.) Rates are medians over the
rounds with an interval (see measure.summary), per second of wall time and per second of CPU time; ratios are taken within
rounds, so that a busy neighbour, who slows both, does not enter them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chart import draw_chart
from measure import FULL_TRAIN_SET, hardware, interleave, summary, versions
from side_process import SideProcess
from sides import IMPORTS, Task

from fastretina.beton import Beton
from fastretina.cli import run
from fastretina.errors import RunError, UsageError
from fastretina.precision import choose_device

OLD_EPOCH = 2088.0  # seconds that one epoch of it took with a Pillow __getitem__

Group = Literal["loader", "train", "pack", "resident", "compile"]


@dataclass(frozen=True)
class Comparison:
    """Sides that do the same work; ratios are those of the first side over the others."""

    name: str
    group: Group
    work: str
    resolution: int  # px
    sides: tuple[str, ...]
    batch_size: int = 64
    arch: str = "resnet18"


COMPARISONS = (
    Comparison(
        "decode", "loader", "decode", 512, ("fastretina", "fastretina_without_checksum", "ffcv", "dali", "torchvision", "pillow")
    ),
    Comparison("decode to half the size", "loader", "decode", 256, ("fastretina", "ffcv", "dali", "pillow")),
    Comparison(
        "decode + augment + normalise", "loader", "augment", 512,
        ("fastretina", "pillow", "torchvision", "webdataset", "dali", "ffcv", "ffcv_with_our_warp"),
    ),
    Comparison("resident epoch, augmented", "resident", "augment", 512, ("fastretina_resident", "fastretina")),
    Comparison("training ResNet18, float32", "train", "train", 128, ("train_fastretina", "train_synthetic"), batch_size=32),
)  # fmt: skip


# On a GPU: the loader alone, training in compiled bfloat16 at full size beside the model's own limit (synthetic input), and the
# modes of torch.compile. One side after the other, because several of them do not fit the memory together.
TRAINING = ("train_synthetic", "train_resident", "train_cpu_decode", "train_gpu_decode")
CUDA_COMPARISONS = (
    Comparison(
        "loader, augmented", "loader", "augment", 512,
        ("fastretina_cpu_decode", "fastretina_gpu_decode", "ffcv_on_device", "ffcv", "dali"), 256,
    ),
    Comparison("loader, resident", "resident", "augment", 512, ("fastretina_resident",), 256),
    Comparison("training ResNet18, bfloat16", "train", "train", 512, TRAINING, 128),
    Comparison("training ResNet50, bfloat16", "train", "train", 512, TRAINING, 64, "resnet50"),
    Comparison(
        "torch.compile, ResNet18", "compile", "train", 512,
        ("train_synthetic", "train_synthetic_eager", "train_synthetic_graphs", "train_synthetic_autotune"), 128,
    ),
    Comparison(
        "torch.compile, ResNet50", "compile", "train", 512,
        ("train_synthetic", "train_synthetic_eager", "train_synthetic_graphs"), 64, "resnet50",
    ),
)  # fmt: skip


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
    """Train this model only; default: all."""
    workers: int = 0
    """Threads or processes of every side; 0: one for each core."""
    cold_starts: int = 5
    """Fresh processes whose first batch is timed."""


def installed(side: str) -> bool:
    """Whether this side's package is there."""
    package = IMPORTS.get(side, "torch").split(".")[0]
    package = {"ffcv_with_our_warp": "ffcv", "dali": "nvidia.dali"}.get(side, package)
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def compare(
    comparison: Comparison, config: ThroughputBenchmark, workers: int, scratch: str, limit: float | None = None, alone: bool = False
) -> dict[str, Any]:
    """All rounds of one comparison; sides that are not installed are left out, sides that fail are reported as such.

    limit: TFLOP/s that the device reaches in a matrix product, if measured. alone: one side after the other.
    """
    task = Task(
        str(config.data), comparison.work, comparison.resolution, comparison.batch_size, workers, config.device, comparison.arch,
        scratch,
    )  # fmt: skip
    processes: dict[str, SideProcess] = {}
    failed: dict[str, str] = {}
    epochs: dict[str, list[dict[str, Any]]] = {}
    gaps: dict[str, float] = {}
    ready: dict[str, dict[str, Any]] = {}

    def epoch(side: str) -> float:
        epochs.setdefault(side, []).append(processes[side].ask("epoch"))
        return 0.0

    try:
        for side in filter(installed, comparison.sides):
            try:
                processes[side] = SideProcess(side, task)
                ready[side] = processes[side].ready
                if alone:
                    interleave({side: lambda side=side: epoch(side)}, config.rounds)  # type: ignore[misc]
            except RuntimeError as error:
                failed[side] = str(error)
            if side in processes and (alone or side in failed):
                processes.pop(side).close()
        interleave({side: lambda side=side: epoch(side) for side in processes}, config.rounds if processes else 0)  # type: ignore[misc]
        for side in processes:
            if comparison.work == "augment" and side in ("fastretina", "ffcv"):
                gaps[side] = processes[side].ask("gap")["gap"]
    finally:
        for process in processes.values():
            process.close()
    sides = {side: digest(rounds[1:], ready[side], gaps.get(side), limit) for side, rounds in epochs.items() if side not in failed}
    first = next((side for side in comparison.sides if side in sides), "")
    ratios = {
        f"{first} / {side}": {
            unit: summary([a / b for a, b in zip(sides[first][unit]["rounds"], sides[side][unit]["rounds"], strict=True)])
            for unit in ("per_second", "per_cpu_second")
        }
        for side in sides
        if side != first
    }
    result = {"name": comparison.name, "group": comparison.group, "resolution": comparison.resolution, "sides": sides}
    return result | {"ratios": ratios, "failed": failed, "batch_size": comparison.batch_size}


def digest(rounds: list[dict[str, Any]], ready: dict[str, Any], gap: float | None, limit: float | None = None) -> dict[str, Any]:
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
        result["compile_s"] = rounds[0]["compile"]
        result["gflop_per_image"] = rounds[0]["flops"] / 1e9
        result["tflops"] = summary([rate * rounds[0]["flops"] / 1e12 for rate in wall])
        if limit is not None:
            result["share_of_matmul_roof"] = result["tflops"]["median"] / limit
    if "device_memory_gb" in rounds[0]:
        result["device_memory_gb"] = max(r["device_memory_gb"] for r in rounds)
        asked = [r["gpu_utilisation"] for r in rounds if r["gpu_utilisation"] is not None]
        result["gpu_utilisation"] = summary(asked) if asked else None
        result["gpu_utilisation_why"] = rounds[0]["gpu_utilisation_why"]
    return result


def matmul_roof() -> float:
    """TFLOP/s of a matrix product on the GPU, by benchmarks/device.py in a process that gives the memory back."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "roof.json"
        command = [sys.executable, str(Path(__file__).with_name("device.py")), "--only", "roof", "--json", str(out)]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RunError(f"benchmarks/device.py failed: {done.stderr[-1000:]}")
        return float(json.loads(out.read_text())["roof"]["matmul_tflops"]["median"])


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


def pack(rounds: int) -> dict[str, Any]:
    """benchmarks/pack.py's result; a process of its own, because FFCV's writer forks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pack.json"
        command = [sys.executable, str(Path(__file__).with_name("pack.py")), "--rounds", str(rounds), "--json", str(out)]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RunError(f"benchmarks/pack.py failed: {done.stderr[-1000:]}")
        result: dict[str, Any] = json.loads(out.read_text())
        return result


def table(comparison: dict[str, Any]) -> str:
    """A comparison as text, one line a side."""
    px, batch = comparison["resolution"], comparison["batch_size"]
    head = f"{comparison['name']} ({px} px, batch {batch})"
    lines = [f"\n{head:<42}{'img/s':>8}  {'interval':>15}{'img/CPU-s':>11}{'28,100 in':>11}{'memory':>10}{'ratio':>8}"]
    for side, result in comparison["sides"].items():
        rate, cpu = result["per_second"], result["per_cpu_second"]
        ratio = next((r["per_second"]["median"] for key, r in comparison["ratios"].items() if key.endswith(f"/ {side}")), None)
        lines.append(
            f"  {side:<40}{rate['median']:8,.0f}  {rate['low']:7,.0f}-{rate['high']:7,.0f}{cpu['median']:11,.0f}"
            f"{result['full_epoch_s']:9,.1f} s{result['private_mb']:7,.0f} MB" + (f"{ratio:7.2f}x" if ratio else "")
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
        if "share_of_matmul_roof" in result:
            details.append(f"{result['tflops']['median']:.1f} TFLOP/s, {result['share_of_matmul_roof']:.1%} of a matrix product's")
            details.append(f"compiled in {result['compile_s']:.0f} s")
        lines.append(f"  {'':<4}{', '.join(details)}")
    return "\n".join([*lines, *(f"  {side:<40}failed: {reason.splitlines()[-1]}" for side, reason in comparison["failed"].items())])


def main(config: ThroughputBenchmark) -> None:
    """Images per second of fastretina and its peers, interleaved in one run."""
    choose_device(config.device)  # UsageError where there is no such device
    if config.only != "pack" and not config.data.exists():
        raise UsageError(f"{config.data}: not there. Make it with: make data, or name another with --data")
    hard = hardware()
    workers = config.workers or int(str(hard["cores"]))
    print(f"{hard['cpu']}, {hard['cores']} cores; {workers} workers a side; {config.rounds} rounds")
    result: dict[str, Any] = {"benchmark": "throughput", "command": " ".join(["python", *sys.argv]), "comparisons": []}
    if config.only != "pack":
        beton = Beton(config.data)
        sizes = [len(beton.jpeg(i)) for i in range(len(beton))]
        result["data"] = {"samples": len(beton), "mean_kb": round(sum(sizes) / len(sizes) / 1e3, 1)}
        print(f"{config.data}: {len(beton):,} images, {result['data']['mean_kb']} KB each")
    limit = matmul_roof() if config.device == "cuda" and config.only in (None, "train", "compile") else None
    for comparison in CUDA_COMPARISONS if config.device == "cuda" else COMPARISONS:
        if config.only in (None, comparison.group) and (comparison.work != "train" or config.arch in (None, comparison.arch)):
            with tempfile.TemporaryDirectory(prefix="fastretina-bench-") as scratch:
                result["comparisons"].append(compare(comparison, config, workers, scratch, limit, config.device == "cuda"))
            print(table(result["comparisons"][-1]), flush=True)
    if config.only in (None, "loader") and config.device == "cpu":
        result["cold_first_batch_s"] = cold_starts(config, workers)
        augmented = next(
            c for c in result["comparisons"] if c["group"] == "loader" and c["sides"]["fastretina"]["epoch_gap_s"] is not None
        )
        first, gap = result["cold_first_batch_s"]["median"], augmented["sides"]["fastretina"]["epoch_gap_s"]
        print(f"\nfirst batch from a cold process: {first:.2f} s; between two epochs: {gap * 1e3:.1f} ms")
        epoch = augmented["sides"]["fastretina"]["full_epoch_s"]
        print(
            f"an epoch of {FULL_TRAIN_SET:,} images: {epoch:.1f} s of loading, where the whole epoch once took {OLD_EPOCH:,.0f} s"
        )
    if config.only in (None, "pack") and config.device == "cpu":
        result["pack"] = pack(config.rounds)
        for side in ("fastretina", "ffcv"):
            print(f"packing, {side}: {result['pack'][side]['median']:,.0f} img/s")
    result |= {"matmul_tflops": limit, "versions": versions(), "hardware": hard, "workers": workers}
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    if config.chart is not None and result["comparisons"]:
        draw_chart(result, config.chart)


if __name__ == "__main__":
    run(ThroughputBenchmark, main)
