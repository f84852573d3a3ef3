"""A set of shards that is replaced by another while things go wrong: the old one, the new one, or an error that names a shard."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_shards import SHARDS, other_images

from fastretina.beton.open import open_beton
from fastretina.errors import BetonError
from fastretina.packing.pack import write_beton
from tests.conftest import TinyBetons

# Packs, and ends at once at its n-th call of what gives a file its name, before or after that.
KILLED = """
import json, os, signal, sys
from fastretina.packing.pack import write_beton
from fastretina.system.files import AtomicFile
number, after, out, flags = json.loads(sys.argv[1])
publish, calls = AtomicFile.publish, 0
def killed(self, *given):
    global calls
    calls += 1
    if after:
        publish(self, *given)
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    if not after:
        publish(self, *given)
AtomicFile.publish = killed
write_beton(out, **flags)
"""


def flags(images: Path) -> dict[str, object]:
    return {"images": str(images), "labels": str(images / "labels.csv"), "size": 64, "workers": 1, "shards": SHARDS}


@pytest.mark.tries([(1, False), (4, True)], [(n, after) for n in range(1, SHARDS + 1) for after in (False, True)])
def test_a_killed_re_sharding_leaves_the_old_set_or_the_new_one_or_what_is_refused_by_name(
    tiny_betons: TinyBetons, tmp_path: Path, tries: list[tuple[int, bool]], tried
) -> None:
    old, new, struck = tmp_path / "old", tmp_path / "new", tmp_path / "struck"
    write_beton(old / "train.beton", **flags(tiny_betons.train_images))
    others = other_images(tiny_betons, tmp_path / "others")
    write_beton(new / "train.beton", **flags(others))
    digests = [open_beton(folder / "train-*.beton").digest for folder in (old, new)]
    assert digests[0] != digests[1]
    for number, after in tries:
        shutil.rmtree(struck, ignore_errors=True)
        shutil.copytree(old, struck)
        job = json.dumps([number, after, str(struck / "train.beton"), flags(others)])
        done = subprocess.run([sys.executable, "-c", KILLED, job], capture_output=True, timeout=60)
        assert done.returncode == -9, done.stderr
        replaced = number if after else number - 1
        if replaced in (0, SHARDS):
            assert open_beton(struck / "train-*.beton").digest == digests[replaced == SHARDS]
        else:
            with pytest.raises(
                BetonError, match=rf"train-{replaced:05d}-of-00007\.beton: shard {replaced} of 7, of another packing"
            ):
                open_beton(struck / "train-*.beton")
        tried("shards: a packing killed while it replaces an older one")
    write_beton(struck / "train.beton", **flags(others))  # takes over what is left
    assert open_beton(struck / "train-*.beton").digest == digests[1]
    assert {path.name for path in struck.iterdir()} == {path.name for path in new.iterdir()}


# Packs 40 shards and reads them where a process may have few files open.
LIMITED = """
import resource, sys
from fastretina.beton.open import open_beton
from fastretina.errors import FastretinaError
from fastretina.packing.pack import write_beton
images, out, pattern, soft, hard = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard)))
try:
    if out:
        write_beton(out, images=images, labels=f"{images}/labels.csv", size=64, workers=1, shards=40)
    with open_beton(pattern) as beton:
        print(len([beton.verify(index) for index in range(len(beton))]))
except FastretinaError as error:
    print(type(error).__name__, error)
"""


def limited(tiny_betons: TinyBetons, out: str, pattern: Path, soft: int, hard: int) -> str:
    given = [str(tiny_betons.train_images), out, str(pattern), str(soft), str(hard)]
    done = subprocess.run([sys.executable, "-c", LIMITED, *given], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_more_shards_than_files_may_be_open_raise_the_limit_or_are_refused_before_anything_is_written(
    tiny_betons: TinyBetons, tmp_path: Path, tried
) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    pattern, out = tmp_path / "train-*.beton", str(tmp_path / "train.beton")
    refused = "40 files to write, and this system allows 60 open ones (ulimit -n); ask for fewer shards"
    assert limited(tiny_betons, out, pattern, 60, 60) == f"UsageError {refused}"
    assert list(tmp_path.iterdir()) == []
    assert limited(tiny_betons, out, pattern, 40, min(most, 1000)) == "40"
    refused = f"{pattern}: 40 files to have open, and this system allows 60 (ulimit -n). Pack into fewer shards"
    assert limited(tiny_betons, "", pattern, 60, 60) == f"BetonError {refused}"
    assert limited(tiny_betons, "", pattern, 40, min(most, 1000)) == "40"
    tried("shards: few files may be open, packing and reading", 4)
