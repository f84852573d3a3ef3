"""DICOM files made of photographs, as cameras and archives write them."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGBaseline8Bit

PHOTOGRAPHY = "1.2.840.10008.5.1.4.1.1.77.1.5.1"  # Ophthalmic Photography 8 Bit Image


def dicom_of(
    image: Image.Image | npt.NDArray[np.generic],
    encoded: bytes | None = None,
    syntax: UID | None = None,
    **attributes: object,
) -> bytes:
    """A file that holds the pixels, L or RGB; or `encoded`, what they were encoded to. attributes: set after all others."""
    pixels = np.asarray(image)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax or (ExplicitVRLittleEndian if encoded is None else JPEGBaseline8Bit)
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = PHOTOGRAPHY
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = "1.2.3.4"
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    header.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB" if encoded is None else "YBR_FULL_422"
    if pixels.ndim == 3:
        header.PlanarConfiguration = 0
    header.BitsAllocated = header.BitsStored = 8 * pixels.dtype.itemsize
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, 0
    header.PixelData = pixels.tobytes() if encoded is None else encapsulate([encoded])
    header["PixelData"].VR = "OW" if header.BitsAllocated > 8 else "OB"
    for name, value in attributes.items():
        setattr(header, name, value)
    out = io.BytesIO()
    header.save_as(out, enforce_file_format=True)
    return out.getvalue()
