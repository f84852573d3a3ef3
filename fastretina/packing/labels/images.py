"""The images in a folder, found by the names that a label file gives them, none of which may lead out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fastretina.errors import LabelError
from fastretina.packing.kinds import EXTENSIONS

MAX_NAME = 255  # bytes; what file systems allow for one component


class ImageIndex:
    """The image files in a folder and below, by relative path and by name, from one walk (no stat for each image).

    Hidden folders and links to folders are not entered, except a `data` folder directly below, which may be a link to
    another disk. A link to a file must lead to a file inside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files: dict[str, list[str]] = {}  # relative path, name, and both without extension -> paths
        self._links: set[str] = set()
        self._roots = [os.path.realpath(self.folder)]
        data = self.folder / "data"
        if data.is_symlink():
            self._roots.append(os.path.realpath(data))
        stack = [(os.fspath(self.folder), "")]
        try:
            while stack:
                self._scan(*stack.pop(), stack)
        except OSError as error:
            raise LabelError(f"{error.filename}: cannot list the image folder: {error.strerror}") from None

    def _scan(self, folder: str, prefix: str, stack: list[tuple[str, str]]) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                stem, extension = os.path.splitext(name)  # noqa: PTH122  # no Path for each of 35,000 entries
                if extension.lower() in EXTENSIONS:
                    if entry.is_symlink():
                        self._links.add(entry.path)
                    elif not entry.is_file():
                        continue
                    for key in {name, stem, prefix + name, prefix + stem}:
                        self._files.setdefault(key, []).append(entry.path)
                elif entry.is_dir(follow_symlinks=prefix == "" and name == "data") and not name.startswith("."):
                    stack.append((entry.path, f"{prefix}{name}/"))

    def find(self, name: str) -> str:
        """The path of the image called `name` (with or without extension).

        Raises:
            FileNotFoundError: there is none. LabelError: the name or a link leaves the folder, or it may be two files.
            Neither names the CSV's file and line: the caller knows them.
        """
        _check_name(name)
        paths = self._files.get(name)
        if not paths:
            raise FileNotFoundError(f"no image {name!r} in {self.folder} (looked for {', '.join(EXTENSIONS)})")
        if len(paths) > 1:
            raise LabelError(f"{name!r} may be {paths[0]} or {paths[1]}; name the folder with --images")
        if paths[0] in self._links:
            self._check_link(name, paths[0])
        return paths[0]

    def _check_link(self, name: str, path: str) -> None:
        target = os.path.realpath(path)
        if not any(target.startswith(root.rstrip("/") + "/") for root in self._roots):
            raise LabelError(f"{name!r} is a link that leaves the image folder (to {target})")
        try:
            regular = stat.S_ISREG(Path(target).stat().st_mode)
        except OSError as error:
            raise FileNotFoundError(f"{name!r} is a link to nothing: {error.strerror}") from None
        if not regular:
            raise LabelError(f"{name!r} is a link to something that is not a file")


def _check_name(name: str) -> None:
    """Refuse names that could leave the image folder, before any path is made of them. LabelError without file and line."""
    if not name:
        raise LabelError("empty image name")
    if len(os.fsencode(name)) > 4 * MAX_NAME or any(len(os.fsencode(part)) > MAX_NAME for part in name.split("/")):
        raise LabelError(f"image name of {len(name)} characters, {name[:40]!r}...; file systems allow {MAX_NAME} bytes")
    if any(ord(character) < 32 or character == "\x7f" for character in name):
        raise LabelError(f"image name {name!r} holds control characters")
    parts = name.replace("\\", "/").split("/")
    if parts[0] in ("", "~") or name.startswith("~") or ".." in parts or "." in parts or ":" in parts[0] or "\\" in name:
        raise LabelError(f"image name {name!r} leaves the image folder; give names relative to it")


def image_stem(name: str) -> str:
    """An image's name without its extension, if it has one of EXTENSIONS."""
    stem, extension = os.path.splitext(name)  # noqa: PTH122
    return stem if extension.lower() in EXTENSIONS else name
