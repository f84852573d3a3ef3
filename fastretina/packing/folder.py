"""The photographs in a folder and all below it, told by what they are; and what else lay there, counted by kind."""

from __future__ import annotations

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fastretina.packing.kinds import EXTENSIONS, HEAD, kind_of
from fastretina.system.files import open_regular
from fastretina.system.interrupts import HeldSignals

HIDDEN = "hidden"
LINKED = "linked folder (--follow-links)"
AGAIN = "link to a folder that was searched already"


@dataclass
class Folder:
    """What `walk` found.

    Attributes:
        images: paths, in the order of their parts: by name within a folder. Some may turn out to be unreadable: reading tells.
        links: those of `images` that are links to files, which may lead anywhere.
        left_out: how many files and folders of each kind are no images: ".db", "no extension", HIDDEN, LINKED, ...
        unlisted: (path, reason) of each folder that could not be listed.
    """

    images: list[str] = field(default_factory=list)  # no Path for each of 35,000 entries: it would take twice as long
    links: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    unlisted: list[tuple[Path, str]] = field(default_factory=list)


def walk(folder: Path, follow_links: bool = False) -> Folder:
    """Search `folder`, which may itself be a link, and all below it. No error: `unlisted` names what could not be searched.

    An image is a file with one of EXTENSIONS, or with the first bytes of a picture. Hidden files and folders are left out, as are
    links to folders without `follow_links`. With it a folder is searched once, by its own name where it lies in `folder`, so that
    links may go in circles.
    """
    found, seen = Folder(), set[tuple[int, int]]()
    own, linked = [folder], list[Path]()
    while own or linked:
        place = own.pop() if own else linked.pop(0)
        try:
            status = place.stat()
            if (key := (status.st_dev, status.st_ino)) in seen:
                found.left_out[AGAIN] += 1
                continue
            seen.add(key)
            with os.scandir(place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    _sort(entry, found, own, linked if follow_links else None)
        except OSError as error:
            found.unlisted.append((place, error.strerror or "cannot be listed"))
    found.images.sort(key=lambda path: path.split("/"))
    return found


def _sort(entry: os.DirEntry[str], found: Folder, own: list[Path], linked: list[Path] | None) -> None:
    """Put one entry where it belongs. linked: where links to folders go; None: they are left out."""
    name, path = entry.name, entry.path
    if name.startswith("."):
        found.left_out[HIDDEN] += 1
    elif entry.is_dir(follow_symlinks=False):
        own.append(Path(path))
    elif entry.is_dir():
        if linked is None:
            found.left_out[LINKED] += 1
        else:
            linked.append(Path(path))
    elif _is_image(name, path):
        found.images.append(path)
        if entry.is_symlink():
            found.links.add(path)
    else:
        found.left_out["DICOMDIR" if _is_index(name) else Path(name).suffix.lower() or "no extension"] += 1


def _is_image(name: str, path: str) -> bool:
    if name.lower().endswith(EXTENSIONS):
        return True
    if _is_index(name):
        return False
    with HeldSignals():  # the descriptor belongs to nobody
        try:
            descriptor, _ = open_regular(path)
        except OSError as error:
            # Perhaps: whoever reads it says that it cannot be read. Or no file, but a pipe, a socket or a link to nothing.
            return error.errno not in (errno.EINVAL, errno.ENXIO, errno.ENOENT, errno.ELOOP)
        try:
            kind = kind_of(os.read(descriptor, HEAD))
        finally:
            os.close(descriptor)
    return kind is not None and kind.picture


def _is_index(name: str) -> bool:
    """The table of contents that lies on every disc of DICOM files: it is DICOM, and no picture."""
    return name.upper() == "DICOMDIR"


def in_words(left_out: Counter[str]) -> str:
    """ "2 .db, 1 hidden, 1 linked folder (--follow-links)"; empty where nothing was left out."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(left_out.items()))
