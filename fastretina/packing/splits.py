"""A table divided into sets that share no patient: a pure function of names, classes and a seed."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastretina.beton.reader import UNLABELLED
from fastretina.errors import UsageError
from fastretina.grading import all_known
from fastretina.packing.labels.table import LabelTable
from fastretina.system.csv_text import write_csv


def divided(splits: str, seed: int, table: LabelTable) -> tuple[dict[str, LabelTable], str]:
    """The tables of each set that --splits names, and a line that says how it was done. UsageError."""
    shares, by = parse_shares(splits), divided_by(table)
    patients = (by == "patient" and table.patients) or [None] * len(table)
    # Of a row that is left out nobody need know the patient.
    sets = divide([patient or name for patient, name in zip(patients, table.names, strict=True)], table.grades, shares, seed)
    if empty := [name for name, rows in sets.items() if not len(rows)]:
        raise UsageError(f"--splits {splits}: leaves no image of {len(table)} for {' and '.join(empty)}")
    told = "by patient" if by == "patient" else "by image, since patients are unknown: a person's two eyes may be in two sets"
    return {name: table.select(rows.tolist()) for name, rows in sets.items()}, f"divided {told}, seed {seed}"


def divided_by(table: LabelTable) -> Literal["patient", "image"]:
    """What is kept together in a division of this table: patients, where all are known."""
    return "image" if all_known(table.packed_patients) is None else "patient"


def named(out: Path, split: str) -> Path:
    """The file of one set: `data/{split}.beton` -> `data/train.beton`. UsageError where --out has no room for the name."""
    if "{split}" not in out.name:
        raise UsageError(f"--splits needs a file for each set: --out {out.with_name('{split}' + out.suffix)}")
    return out.with_name(out.name.replace("{split}", split))


def write_divided(out: Path, parts: Mapping[str, LabelTable]) -> None:
    """Beside the files, `splits.csv`: line of the table, image, patient, class, set."""
    rows = [
        (int(table.lines[row]), table.names[row], (table.patients or {row: None})[row] or "", _class(table, row), split)
        for split, table in parts.items()
        for row in range(len(table))
        if row not in table.left_out
    ]
    write_csv(named(out, "splits").with_suffix(".csv"), ("row", "image", "patient", "class", "split"), sorted(rows))


def _class(table: LabelTable, row: int) -> str:
    return "" if table.grades[row] == UNLABELLED else table.classes[int(table.grades[row])]


def parse_shares(text: str) -> dict[str, float]:
    """Shares by name of "train=0.7,val=0.1,test=0.2", in this order. UsageError."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([\w-]+)\s*=\s*(\d*\.?\d+)\s*", part)
        if match is None or match[1] in found or not 0 < float(match[2]) < 1:
            raise UsageError(f"--splits {text}: different names with shares between 0 and 1, like train=0.7,val=0.1,test=0.2")
        found[match[1]] = float(match[2])
    if len(found) < 2 or abs(sum(found.values()) - 1) > 1e-6:
        raise UsageError(f"--splits {text}: two or more shares that add up to 1, these make {sum(found.values()):g}")
    return found


def divide(
    groups: Sequence[str], labels: NDArray[np.int64], shares: Mapping[str, float], seed: int = 0
) -> dict[str, NDArray[np.int64]]:
    """Indices, ascending, of the images in each set.

    The same for every order of the images, so that runs can be compared and a patient never changes sides. Groups are stratified by
    the highest class among their images, and within each stratum dealt out in the order of the SHA-256 of their names: each set
    gets its share of the stratum, rounded, so that rare classes come everywhere.

    Args:
        groups: of each of N images: its patient, or the image's own name; kept together. labels: (N,) class numbers.
        shares: by name of the set, adding up to 1. seed: another one is another division.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    strata: dict[int, list[str]] = defaultdict(list)
    for group, indices in members.items():
        strata[int(labels[indices].max())].append(group)
    found: dict[str, list[int]] = {name: [] for name in shares}
    salt = f"{seed}:" if seed else ""
    for stratum in strata.values():
        ranked = sorted(stratum, key=lambda group: hashlib.sha256(f"{salt}{group}".encode("utf-8", "surrogateescape")).digest())
        ends = [round(share * len(ranked)) for share in itertools.accumulate(shares.values())]
        for name, begin, end in zip(shares, [0, *ends], ends, strict=False):
            for group in ranked[begin:end]:
                found[name] += members[group]
    return {name: np.array(sorted(indices), dtype=np.int64) for name, indices in found.items()}
