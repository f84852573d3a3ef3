"""A folder that holds one folder of images for each class, named like it; folders within those are sites, patients, visits."""

from __future__ import annotations

from dataclasses import dataclass

from fastretina.packing.config import PackConfig
from fastretina.packing.labels.classes import Labels
from fastretina.packing.labels.images import ImageIndex, image_stem
from fastretina.packing.labels.listing import Listing, build
from fastretina.packing.labels.table import LabelTable, Layout, fail


def _read(config: PackConfig, missing_ok: bool) -> LabelTable:
    folder = config.class_folders
    assert folder is not None
    index = ImageIndex(folder, config.follow_links)
    images = [_Image(*index.relative(path).partition("/")[::2]) for path in index.images]
    inside = [image for image in images if image.name]
    if not inside:
        what = f"{len(images):,} images, none of them in a folder of its class" if images else "no image"
        fail(folder, 0, f"{what}; a folder of images for each class is expected, like 0/1_left.jpeg. {_linked(index)}".rstrip())
    notes = (
        [f"images beside the folders of the classes, left out: {len(images) - len(inside):,}"] if len(images) > len(inside) else []
    )
    listing = Listing(
        source=folder,
        layout=LAYOUT.name,
        digests={},
        lines=[0] * len(inside),
        names=[f"{image.folder}/{image.name}" for image in inside],
        labels=Labels(folder, [0] * len(inside), [image.folder for image in inside], folders=True),
        notes=tuple(notes),
    )
    # Two classes may both have a patient 10, who is one person; what says the class is no part of a name.
    return build(listing, index, config, missing_ok, [image_stem(image.name) for image in inside])


@dataclass(frozen=True, slots=True)
class _Image:
    """folder: of the class. name: the image's path within it; "" where it lies beside the folders."""

    folder: str
    name: str


def _linked(index: ImageIndex) -> str:
    return "Links to folders are entered with --follow-links" if any("--follow-links" in kind for kind in index.left_out) else ""


LAYOUT = Layout(name="class folders", usage="--class-folders DIR", field="class_folders", needs=(), read=_read)
