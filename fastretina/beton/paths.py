"""What a data set may be called: a file, a pattern for its shards, a URL of either; and the names of shards."""

from __future__ import annotations

import glob
import itertools
import os
import re
from pathlib import Path, PosixPath

from fastretina.errors import UsageError

MAX_SHARDS = 99_999  # five digits in the name
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")
_GLOB = re.compile(r"[*?\[]")


def shard_path(out: str | os.PathLike[str], number: int | str, of: int) -> Path:
    """`train.beton` -> `train-00003-of-00064.beton`; with number "*" the pattern of all."""
    out = Path(out)
    return out.with_name(f"{out.stem}-{number if isinstance(number, str) else f'{number:05d}'}-of-{of:05d}{out.suffix}")


def shard_rows(rows: int, number: int, of: int) -> range:
    """The rows of a table of `rows` that belong to shard `number` (0 to of - 1): runs whose lengths differ by at most one."""
    return range(number * rows // of, (number + 1) * rows // of)


def as_url(source: str | os.PathLike[str]) -> str | None:
    """The URL that this is, None for a path. `Path` folds the two slashes of a URL into one; here they come back."""
    text = os.fspath(source)
    match = _URL.match(text)
    if match is None or "://" in text:
        return text if match else None
    return f"{match[1]}:{'///' if match[1] in ('file', 'local') else '//'}{match[2]}"


class UrlPath(PosixPath):
    """A URL where a path is expected; it prints as the URL."""

    def __str__(self) -> str:
        text = super().__str__()
        return as_url(text) or text


def as_path(source: str | os.PathLike[str]) -> Path:
    """A path that prints as a person would write it, also where it is a URL."""
    return Path(source) if as_url(source) is None else UrlPath(source)


def parts_of(path: str | os.PathLike[str]) -> list[Path]:
    """The packings that are given together, commas between; a file whose name holds commas is one."""
    text = os.fspath(path)
    if "," not in text or as_url(text) is not None or Path(text).exists():
        return [as_path(path)]
    return [as_path(part.strip()) for part in text.split(",")]


def files_of(path: Path) -> list[Path]:
    """The file at this path, or all that match the pattern, sorted; symbolic links resolved; none where there is nothing. A URL is
    taken to be one file that is there. Of several packings, of which none may be missing, all."""
    if len(parts := parts_of(path)) > 1:
        each = [files_of(part) for part in parts]
        return list(itertools.chain.from_iterable(each)) if all(each) else []
    if as_url(path) is not None:
        return [path]
    found = glob.glob(os.fspath(path)) if is_pattern(path) else [path] * path.exists()  # noqa: PTH207  # Path's is relative only
    return sorted(Path(os.path.realpath(name)) for name in found)  # unlike resolve() no error of a link to itself


def is_pattern(path: Path) -> bool:
    """Whether a path stands for several files; one that exists under this very name does not."""
    return _GLOB.search(os.fspath(path)) is not None and not path.exists()


def parse_shard(text: str) -> tuple[int, int]:
    """(K, N) of "K/N", as --shard takes it. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"--shard {text}: K/N with K from 0 to N - 1, like 3/64")
    return int(match[1]), int(match[2])


def whole_path(path: Path) -> Path:
    """`train-00003-of-00064.beton` -> `train.beton`."""
    return path.with_name(re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) + path.suffix)
