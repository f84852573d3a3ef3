"""The images in a folder, found by the names that a label file gives them, none of which may lead out of it."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastretina.errors import LabelError
from fastretina.packing.folder import LINKED, walk
from fastretina.packing.kinds import EXTENSIONS

__all__ = ["EXTENSIONS", "MAX_NAME", "Found", "ImageIndex", "image_stem"]

MAX_NAME = 255  # bytes; what file systems allow for one component
_EXTENSIONS = frozenset(EXTENSIONS)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_ABSOLUTE = re.compile(r"[\\/]|[A-Za-z]:[\\/]")


@dataclass(frozen=True, slots=True)
class Found:
    """path: of the image. name: what it is called in the file to be packed, see `ImageIndex.called`.
    renamed: its extension is not the one that was asked for."""

    path: str
    name: str
    renamed: bool = False


class ImageIndex:
    """The images in a folder and below, by relative path and by name, from one walk (no stat for each image).

    Hidden folders and, without `follow_links`, links to folders are not entered, except a `data` folder directly below, which may
    be a link to another disk. A link to a file must then lead to a file inside the folder.

    Attributes:
        images: paths, in the order of names within a folder. left_out: how many files of which kind are no images.

    LabelError where a folder cannot be listed.
    """

    def __init__(self, folder: str | os.PathLike[str], follow_links: bool = False) -> None:
        self.folder = Path(folder)
        self._roots = [os.path.realpath(self.folder)]
        self._follow = follow_links
        found = walk(self.folder, follow_links)
        self.images, links, self.left_out = found.images, found.links, found.left_out
        data = self.folder / "data"
        if not follow_links and data.is_symlink() and data.is_dir():
            self._roots.append(os.path.realpath(data))
            more = walk(data)
            self.images = sorted([*self.images, *more.images], key=lambda path: path.split("/"))
            links |= more.links
            self.left_out = self.left_out + more.left_out - Counter([LINKED])
            found.unlisted += more.unlisted
        for place, reason in found.unlisted:
            raise LabelError(f"{place}: cannot list the image folder: {reason}")
        self._links = links
        self._start = 0 if self.folder == Path() else len(os.fspath(self.folder).rstrip("/")) + 1
        self._files: dict[str, list[str]] = {}  # relative path, name, and both without extension, composed -> paths
        self._stems: Counter[str] = Counter()  # relative paths without extension
        for path in self.images:
            relative = path[self._start :]
            stem = image_stem(relative)
            self._stems[stem] += 1
            keys = {relative, stem}
            if "/" in relative:
                keys |= {relative.rpartition("/")[2], stem.rpartition("/")[2]}
            for key in keys:
                self._files.setdefault(_composed(key), []).append(path)
        self._twins = any(count > 1 for count in self._stems.values())

    def relative(self, path: str) -> str:
        """A path of `images`, from the folder on."""
        return path[self._start :]

    def called(self, path: str, name: str) -> str:
        """What an image that a table names `name` is called: without its extension, unless another image differs in that alone."""
        stem = image_stem(name)
        if not self._twins:
            return stem
        relative = self.relative(path)
        return stem + relative[len(image_stem(relative)) :] if self._stems[image_stem(relative)] > 1 else stem

    def find(self, name: str) -> Found:
        """The image called `name`, with or without its folder and its extension, or with the extension of another copy.

        Raises:
            FileNotFoundError: there is none. LabelError: the name or a link leaves the folder, or it may be two files.
            Neither names the table's file and line: the caller knows them.
        """
        _check_text(name)
        plain, renamed = name, False
        paths = self._files.get(_composed(name))
        if not paths:
            plain = self._relative_name(name)
            paths = self._files.get(_composed(plain))
        if not paths and (stem := image_stem(plain)) != plain:
            renamed = True
            paths = self._files.get(_composed(stem))
        if not paths:
            raise FileNotFoundError(f"no image {name!r} in {self.folder}{self._hint(plain)}")
        if len(paths) > 1:
            raise LabelError(f"{name!r} may be {paths[0]} or {paths[1]}; give its extension, or name the folder with --images")
        self.check_link(paths[0])
        return Found(paths[0], self.called(paths[0], plain), renamed)

    def _relative_name(self, name: str) -> str:
        """A name with plain slashes. LabelError where it is not relative to the folder."""
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if _ADDRESS.match(name):
            raise LabelError(f"image name {name!r} is an address; images are files of the folder")
        if _ABSOLUTE.match(name):
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            known = next((end for end in ends if _composed(end) in self._files), None)
            inside = f"; {self.folder} holds {known!r}: cut what stands before it" if known else ""
            raise LabelError(
                f"image name {name!r} is absolute, and leaves the image folder{inside}; names are relative to --images"
            )
        if ".." in parts:
            raise LabelError(f"image name {name!r} leaves the image folder by '..'; names are relative to --images")
        if not parts:
            raise LabelError(f"image name {name!r} leaves the image folder unsaid: it names no file")
        return "/".join(parts)

    def _hint(self, plain: str) -> str:
        folder, _, name = plain.rpartition("/")
        paths = self._files.get(_composed(name)) or self._files.get(_composed(image_stem(name)))
        if folder and paths:
            return f"; there is {self.relative(paths[0])!r}: give the --images that {folder.partition('/')[0]!r} lies in"
        linked = "; linked folders are entered with --follow-links" if self.left_out[LINKED] else ""
        return f" (looked for {', '.join(EXTENSIONS)}){linked}"

    def check_link(self, path: str) -> None:
        """LabelError where a path of `images` is a link that leads out of the folder; FileNotFoundError where to nothing."""
        if path not in self._links:
            return
        target, name = os.path.realpath(path), self.relative(path)
        if not self._follow and not any(target.startswith(root.rstrip("/") + "/") for root in self._roots):
            raise LabelError(
                f"{name!r} is a link that leaves the image folder (to {target}); follow such links with --follow-links"
            )
        try:
            regular = stat.S_ISREG(Path(target).stat().st_mode)
        except OSError as error:
            raise FileNotFoundError(f"{name!r} is a link to nothing: {error.strerror}") from None
        if not regular:
            raise LabelError(f"{name!r} is a link to something that is not a file")


def _check_text(name: str) -> None:
    """Refuse what can be no name. LabelError without file and line."""
    if not name:
        raise LabelError("empty image name")
    if len(name) > MAX_NAME // 4:
        parts = name.replace("\\", "/").split("/")
        if len(os.fsencode(name)) > 4 * MAX_NAME or any(len(os.fsencode(part)) > MAX_NAME for part in parts):
            raise LabelError(f"image name of {len(name)} characters, {name[:40]!r}...; file systems allow {MAX_NAME} bytes")
    if _CONTROL.search(name):
        raise LabelError(f"image name {name!r} holds control characters")


def _composed(name: str) -> str:
    """Unicode's form C: macOS writes é as two characters, and tables as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def image_stem(name: str) -> str:
    """An image's name without its extension, if it has one of EXTENSIONS."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot + extension.lower() in _EXTENSIONS and stem and stem[-1] != "/" else name
