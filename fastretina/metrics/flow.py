"""How many images a data set began with, and how many are left at each step to the evaluation: what STARD's flow diagram shows.

Cohen et al. (2016), STARD 2015 guidelines for reporting diagnostic accuracy studies, BMJ Open 6:e012799, items 19 to 22.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from fastretina.beton.joined import SOURCE_BIT, JoinedBeton
from fastretina.beton.reader import Beton
from fastretina.beton.shards import ShardedBeton


@dataclass(frozen=True)
class Flow:
    """Counts of images, from the label table to the evaluation.

    Attributes:
        rows: images that the label table named; None where unknown, as of files that were packed before it was noted.
        left_out: how many of these were not packed, by reason as the packer classifies them; None where `rows` is.
        packed: images in the files. rows less all that were left out, where known.
        evaluated: those of them in this data set, which may be a selection.
        by_source: the same for each of several packings, by its path; empty where there is one.
    """

    rows: int | None
    left_out: Mapping[str, int] | None
    packed: int
    evaluated: int
    by_source: Mapping[str, Flow]

    @classmethod
    def of(cls, beton: Beton) -> Self:
        """Of an open data set: a file, its shards, several packings, or a selection of these. Raises BetonError."""
        if not isinstance(beton, JoinedBeton):
            return cls._one(beton, len(beton))
        taken = np.bincount(beton.ids >> SOURCE_BIT, minlength=len(beton.parts)).tolist()
        parts = {str(part.path): cls._one(part, count) for part, count in zip(beton.parts, taken, strict=True)}
        return cls._summed(beton.shards, beton, len(beton), parts)

    @classmethod
    def _one(cls, beton: Beton, evaluated: int) -> Self:
        return cls._summed(beton.shards if isinstance(beton, ShardedBeton) else [beton], beton, evaluated, {})

    @classmethod
    def _summed(cls, files: Sequence[Beton], beton: Beton, evaluated: int, by_source: Mapping[str, Flow]) -> Self:
        noted = [_noted(file.provenance) for file in files]
        known = [found for found in noted if found is not None]
        if len(known) < len(files):
            return cls(None, None, beton.stored, evaluated, by_source)
        left_out = sum((Counter(reasons) for _, reasons in known), Counter[str]())
        return cls(sum(rows for rows, _ in known), dict(left_out.most_common()), beton.stored, evaluated, by_source)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and None, fit for JSON."""
        return asdict(self)


def _noted(provenance: Mapping[str, Any]) -> tuple[int, dict[str, int]] | None:
    """Rows and reasons of one file, as the packer noted them; None where it did not."""
    match provenance:
        case {"rows": int(rows), "left_out": dict(reasons)} if all(isinstance(count, int) for count in reasons.values()):
            return rows, reasons
    return None
