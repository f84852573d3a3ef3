"""The same faults in stock FFCV, beside ours: each in a process of its own with a time limit, for FFCV hangs where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_pack import SIZE, folder, jpeg, picture

from fastretina.beton.reader import Beton
from fastretina.errors import BetonError, SampleError
from fastretina.loading.loader import Loader
from fastretina.packing.pack import write_beton

pytestmark = pytest.mark.ffcv
pytest.importorskip("ffcv", reason="FFCV is not installed (the ffcv extra)", exc_type=ImportError)

# Batches of one: what a sample that cannot be decoded leaves in the buffer is what the sample before it put there.
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption

pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "id": None, "crc32": None}
loader = Loader(
    sys.argv[1], batch_size=1, num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL, drop_last=False, batches_ahead=1,
    pipelines=pipelines,
)
print("opened", loader.reader.num_samples, flush=True)
found = [(np.array(image), np.array(label)) for image, label in loader]
np.savez(sys.argv[2], images=np.concatenate([image for image, _ in found]), labels=np.concatenate([label for _, label in found]))
print("done", flush=True)
"""


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Eight images, so unlike each other that none is taken for another."""
    images = {f"{i}_left.jpeg": jpeg(picture().point(lambda value, i=i: 20 + 30 * i + value // 16)) for i in range(8)}
    write_beton(tmp_path / "a.beton", root=folder(tmp_path / "in", images), split="train", size=SIZE, workers=1)
    return tmp_path / "a.beton"


def stock(path: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT, str(path), str(out)], capture_output=True, text=True, timeout=120)


def test_ffcv_gives_another_images_pixels_for_a_corrupt_one_and_we_name_it(packed: Path, tmp_path: Path, tried) -> None:
    done = stock(packed, tmp_path / "good.npz")
    assert done.returncode == 0, done.stderr[-2000:]
    data = bytearray(packed.read_bytes())
    with Beton(packed) as beton:
        start = int(beton._pointers[5])
    data[start : start + 2] = b"\0\0"  # no longer a JPEG at all
    packed.write_bytes(data)
    done = stock(packed, tmp_path / "bad.npz")
    assert done.stdout.split()[-1] == "done", done.stderr[-2000:]  # no error
    with np.load(tmp_path / "good.npz") as before, np.load(tmp_path / "bad.npz") as after:
        good, got = before["images"], after["images"]
        assert after["labels"].ravel().tolist() == [i % 5 for i in range(8)]
    assert not np.array_equal(got[5], good[5])
    neighbours = [i for i in range(8) if i != 5 and np.array_equal(got[5], good[i])]
    assert neighbours, "not the pixels of another sample this time"
    with Loader(packed, batch_size=1, resolution=SIZE, workers=1, train=False) as loader, pytest.raises(SampleError) as caught:
        list(loader)
    assert (caught.value.index, caught.value.name) == (5, "5_left")
    tried("beside FFCV: corrupt JPEG (FFCV: another sample's pixels, no error; ours: an error that names it)")


@pytest.mark.slow_faults
def test_ffcv_opens_a_cut_file_and_we_refuse_it(packed: Path, tmp_path: Path, tried) -> None:
    os.truncate(packed, packed.stat().st_size - 2 * 24)
    done = stock(packed, tmp_path / "cut.npz")
    assert done.stdout.split()[:2] == ["opened", "8"], done.stderr[-2000:]
    with pytest.raises(BetonError, match="truncated"):
        Beton(packed)
    tried("beside FFCV: file cut at its end (FFCV: opens it; ours: refused)")
