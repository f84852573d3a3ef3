"""The images of a .beton under other names, labels and classes, for tests of what these mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastretina.beton.reader import EYE, PATIENT, Beton
from fastretina.beton.writer import BetonWriter
from fastretina.grading import RETINOPATHY, Classes, eye_of


def write_labelled(
    path: Path,
    images: Beton,
    *,
    labels: Sequence[int] | None = None,
    classes: Classes = RETINOPATHY,
    names: Sequence[str] | None = None,
    patients: Sequence[str] | None = None,
) -> Path:
    """Write images of 64 x 64 px anew, and return `path`. None: labels and names as they are, patients by names; "" is an
    unknown one."""
    labels = images.labels.tolist() if labels is None else labels
    names = list(images.names) if names is None else names
    eyes = [eye_of(name) or ("", "") for name in names]
    patients = [patient for patient, _ in eyes] if patients is None else patients
    assert images.crcs is not None
    with BetonWriter(path, len(images), columns=[PATIENT, EYE]) as writer:
        for index, (name, label) in enumerate(zip(names, labels, strict=True)):
            text = (patients[index], eyes[index][1])
            crc, number = int(images.crcs[index]), int(images.ids[index])
            writer.add(bytes(images.jpeg(index)), crc, name=name, label=label, id=number, width=64, height=64, text=text)
        writer.finish({"classes": classes.as_dict()})
    return path
