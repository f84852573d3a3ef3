"""Stock FFCV as oracle: it reads what we write, pixel for pixel, and we read what it writes.

FFCV waits for ever where something goes wrong inside it, so all its code runs in one subprocess with a time limit.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from fastretina.beton.reader import Beton
from fastretina.beton.verify import verify_beton
from fastretina.packing.pack import write_beton

pytestmark = pytest.mark.ffcv
pytest.importorskip("ffcv", reason="FFCV is not installed (the ffcv extra)", exc_type=ImportError)

COUNT, SIZE = 40, 64
MODES = ("jpg", "raw", "proportion")

SCRIPT = """
import sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import numpy as np
from ffcv.fields import FloatField, IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

folder = Path(sys.argv[1])
pixels = np.load(folder / "pixels.npy")


class Data:
    def __init__(self, fields):
        self.fields = fields

    def __len__(self):
        return len(pixels)

    def __getitem__(self, i):
        return tuple({"image": pixels[i], "label": i % 5, "weight": i / 2, "other": -i}[name] for name in self.fields)


np.random.seed(0)
for mode in ("jpg", "raw", "proportion"):
    fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=95), "label": IntField()}
    DatasetWriter(str(folder / f"{mode}.beton"), fields, num_workers=2).from_indexed_dataset(Data(fields), chunksize=7)
fields = {"weight": FloatField(), "other": IntField(), "image": RGBImageField(write_mode="jpg"), "label": IntField()}
DatasetWriter(str(folder / "many.beton"), fields, num_workers=1).from_indexed_dataset(Data(fields))

found = {}
for cache in (True, False):
    loader = Loader(
        str(folder / "ours.beton"), batch_size=16, num_workers=2, os_cache=cache, order=OrderOption.SEQUENTIAL, drop_last=False,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "id": [IntDecoder()], "crc32": [IntDecoder()]},
    )
    batches = [[np.array(part) for part in batch] for batch in loader]
    for name, parts in zip(("image", "label", "id", "crc32"), zip(*batches)):
        found[f"{name}_{cache}"] = np.concatenate(parts)
np.savez(folder / "found.npz", **found)
"""


def picture(seed: int) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    waves = [x * 4, y * 3 + 20, 128 + 100 * np.sin((x + 2 * y) / 9 + seed)]
    return np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our file, FFCV's files, and what FFCV's Loader found in ours."""
    root = tmp_path_factory.mktemp("ffcv")
    (root / "data").mkdir()
    pixels = np.stack([picture(i) for i in range(COUNT)])
    np.save(root / "pixels.npy", pixels)
    for i, image in enumerate(pixels):
        out = io.BytesIO()
        # Both ways in: every third is re-encoded.
        Image.fromarray(image).save(out, "JPEG", quality=90, progressive=i % 3 == 0, subsampling=("4:2:0", "4:4:4", "4:2:2")[i % 3])
        (root / "data" / f"{i}_left.jpeg").write_bytes(out.getvalue())
    (root / "train_img.csv").write_text("".join(f"{i}_left\n" for i in range(COUNT)))
    (root / "train_label.csv").write_text("".join(f"{i % 5}\n" for i in range(COUNT)))
    write_beton(root / "ours.beton", root=root, split="train", size=SIZE, workers=2)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(root)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("cache", [True, False], ids=["os_cache", "process_cache"])
def test_ffcv_reads_our_file_pixel_for_pixel_and_in_order(folder: Path, cache: bool) -> None:
    with np.load(folder / "found.npz") as found, Beton(folder / "ours.beton") as beton:
        assert found[f"label_{cache}"].ravel().tolist() == [i % 5 for i in range(COUNT)]
        assert found[f"id_{cache}"].ravel().tolist() == list(range(COUNT))
        assert beton.crcs is not None
        assert found[f"crc32_{cache}"].ravel().tolist() == beton.crcs.tolist()
        images = found[f"image_{cache}"]
        assert images.shape == (COUNT, SIZE, SIZE, 3)
        for i in range(COUNT):
            # FFCV asks libjpeg-turbo for the fast DCT and ordinary upsampling (TJFLAG_FASTDCT in libffcv.cpp).
            np.testing.assert_array_equal(images[i], simplejpeg.decode_jpeg(beton.jpeg(i), fastdct=True, fastupsample=False))


@pytest.mark.parametrize("mode", MODES)
def test_we_read_what_ffcv_writes(folder: Path, mode: str) -> None:
    pixels = np.load(folder / "pixels.npy")
    with Beton(folder / f"{mode}.beton") as beton:
        assert len(beton) == COUNT
        assert beton.labels.tolist() == [i % 5 for i in range(COUNT)]
        assert beton.ids.tolist() == list(range(COUNT))
        assert beton.crcs is None
        assert beton.names[17] == "sample 17"
        assert set(beton.modes.tolist()) == {"jpg": {0}, "raw": {1}, "proportion": {0, 1}}[mode]
        for i in range(COUNT):
            beton.verify(i)
            if beton.modes[i]:
                np.testing.assert_array_equal(beton.pixels(i), pixels[i])
            else:
                decoded = simplejpeg.decode_jpeg(beton.jpeg(i)).astype(int)
                assert np.abs(decoded - pixels[i]).mean() < 4
    assert verify_beton(folder / f"{mode}.beton").bad == ()


def test_fields_are_found_by_name_among_others(folder: Path) -> None:
    with Beton(folder / "many.beton") as beton:
        assert beton.labels.tolist() == [i % 5 for i in range(COUNT)]
        assert set(beton.widths.tolist()) == {SIZE}
        assert simplejpeg.decode_jpeg(beton.jpeg(0)).shape == (SIZE, SIZE, 3)
