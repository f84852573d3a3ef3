"""Sample data sets, and runs of `fastretina train` on them: what the experiments of quality.py and search.py share."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import environment

from fastretina import train
from fastretina.system.files import write_json
from fastretina.training.config import TrainConfig, as_settings

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)

# Arguments of tools/make_sample.py by name of the sample.
SAMPLES: dict[str, list[str]] = {
    "easy": [],
    "few": ["--train", "300"],
    "hard": ["--hard"],
    "large": ["--train", "1600"],
    "painted": ["--train", "10000", "--seed", "10"],  # other eyes than the others'
    "small": ["--train", "600", "--test", "100"],
}


def make_data(out: Path, kind: str, contrast: str = "none") -> None:
    """The sample data set of a kind and its two .beton files, where they are not there yet: easy-train.beton, or with its local
    contrast easy-local-train.beton, and so on."""
    out.mkdir(parents=True, exist_ok=True)
    tool(["make_sample.py", "--out", str(out / kind), *SAMPLES[kind]])
    for split in ("train", "test"):
        target = out / packed(kind, split, contrast)
        if not target.exists():
            tool(["write_beton.py", "--root", str(out / kind), "--split", split, "--contrast", contrast, "--out", str(target)])


def packed(kind: str, split: str, contrast: str = "none") -> Path:
    """The name of the file that `make_data` makes of a split."""
    return Path(f"{kind}-{split}.beton" if contrast == "none" else f"{kind}-{contrast}-{split}.beton")


def tool(arguments: list[str]) -> None:
    """One of tools/, as a user calls it."""
    subprocess.run([sys.executable, str(ROOT / "tools" / arguments[0]), *arguments[1:]], check=True, stdout=subprocess.DEVNULL)


def placed(out: Path, name: str, config: TrainConfig) -> TrainConfig:
    """The settings with the paths of data and run folder within `out`."""
    return replace(config, train=out / config.train, test=out / str(config.test), out=out / name.replace(" ", "-"))


def trained(out: Path, name: str, config: TrainConfig) -> Path:
    """Train where that is not done yet; the run folder."""
    settings = placed(out, name, config)
    print(f"\n{name}", flush=True)
    train.main(settings)
    return settings.folder


def trained_side_by_side(out: Path, runs: Mapping[str, TrainConfig], prefix: str = "") -> dict[str, Path]:
    """The run folders by name. As many processes at a time as there are cores, each with one thread: more images a second than one
    run after the other. prefix: of the folders' names."""

    def train_one(name: str) -> Path:
        settings = placed(out, prefix + name, replace(runs[name], workers=1))
        file, log = (out / f"{settings.folder.name}.{suffix}" for suffix in ("json", "log"))
        write_json(file, as_settings(settings))
        command = [sys.executable, "-m", "fastretina.train", "--config", str(file)]
        with log.open("w") as lines:
            subprocess.run(command, check=True, stdout=lines, stderr=lines, env=environment(OMP_NUM_THREADS="1"))
        found = metrics(settings.folder)
        print(f"{name}: QWK {found['test_qwk']:.3f}, balanced accuracy {found['test_balanced_accuracy']:.3f}", flush=True)
        return settings.folder

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(runs, pool.map(train_one, runs), strict=True))


def metrics(folder: Path) -> dict[str, Any]:
    """What a finished run's folder says of its test set, at the best epoch, at the last and on the way, and of its cost."""
    found = json.loads((folder / "metrics.json").read_text())
    with (folder / "results.csv").open() as table:
        names, *rows = [line.rstrip("\n").split(",") for line in table]
    kappas = [float(row[names.index("test_qwk")]) for row in rows]
    return {
        **outcome(found["best"]),
        "test_intervals": {name: found["best"]["intervals"][name] for name in ("qwk", "balanced_accuracy")},
        "best_epoch": found["best_epoch"],
        "last_epoch": outcome(found["last"]),
        "test_qwk_by_epoch": kappas,
        "seconds": sum(found["epoch_seconds"]),
        "images_per_second": statistics.median(found["images_per_second"]),
    }


def outcome(epoch: dict[str, Any]) -> dict[str, Any]:
    """An epoch's metrics of the test set, as metrics.json has them."""
    return {
        "test_qwk": epoch["qwk"],
        "test_accuracy": epoch["accuracy"],
        "test_balanced_accuracy": epoch["balanced_accuracy"],
        "test_recalls": epoch["per_class_recall"],
        "answers_by_grade": [sum(column) for column in zip(*epoch["confusion"], strict=True)],
    }
