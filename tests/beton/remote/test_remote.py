"""Shards from servers: every sample right and in order whatever the server does, within the cache's limit, and no half file."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from remote_cases import PATTERN, SAMPLES, SHARDS, SIDE, asked_for_samples, complete, same_epochs, settings
from safetensors.torch import load_file

from fastretina import train
from fastretina.beton.cache import CacheFolder
from fastretina.beton.open import open_beton
from fastretina.beton.paths import shard_path
from fastretina.beton.reader import Beton
from fastretina.beton.remote import Cache, RemoteBeton
from fastretina.beton.shards import WINDOW
from fastretina.beton.writer import BetonWriter
from fastretina.errors import BetonError, RemoteError, UsageError
from fastretina.loading.loader import Loader
from fastretina.training.config import TrainConfig
from tests.http_faults import Fault


@pytest.mark.parametrize("sampling", ["shuffle", "sequential", "shards"])
def test_batches_are_those_of_local_files(folder, serve, cache, sampling):
    url = f"{serve().url}/{PATTERN}"
    with Loader(url, cache=cache, **settings(sampling=sampling)) as remote:
        assert isinstance(remote.dataset, RemoteBeton)
        assert list(remote.dataset.names[:3]) == ["0_left", "1_left", "2_left"]
        with Loader(folder / PATTERN, **settings(sampling=sampling)) as local:
            same_epochs(remote, local, epochs=2)
    assert len(complete(cache)) == SHARDS


def test_with_every_twentieth_read_failing_every_sample_is_right_and_in_order(folder, serve, cache):
    kinds: tuple[Fault, ...] = ("unavailable", "cut", "wrong", "slow")
    draw = random.Random(1)
    server = serve(lambda number, name: draw.choice(kinds) if draw.random() < 0.05 else None)
    with Loader(f"{server.url}/{PATTERN}", cache=cache, **settings()) as remote, Loader(folder / PATTERN, **settings()) as local:
        same_epochs(remote, local)
    assert set(kinds) <= set(server.faulty), server.faulty
    for path in Path(cache.folder).glob("*.beton"):
        original = (folder / path.name.partition("-")[2]).read_bytes()
        assert path.read_bytes() == original  # padding is zeros on both sides


@pytest.mark.usefixtures("undrawn")
def test_training_reads_urls_and_names_them_as_they_were_given(folder, serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTRETINA_CACHE", str(tmp_path / "cache"))
    url = f"{serve().url}/{PATTERN}"
    whole = TrainConfig(train=folder / PATTERN, test=folder / PATTERN, out=tmp_path / "local", arch="resnet10", epochs=1,
                        batch_size=8, resolution=32, workers=1)  # fmt: skip
    train.main(whole)
    remote = replace(whole, train=Path(url), test=Path(url), out=tmp_path / "remote")  # as the command line makes them
    train.main(replace(remote, stop_after_steps=2))
    train.main(remote)
    assert f"{url}: {SAMPLES} images" in capsys.readouterr().out
    assert json.loads((remote.out / "config.json").read_text())["train"] == url
    states = [load_file(run.out / "best.safetensors") for run in (whole, remote)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_path_of_remote_data_prints_as_their_url(serve, cache):
    url = f"{serve().url}/{PATTERN}"
    with open_beton(url, cache) as beton:
        assert str(beton.path) == str(pickle.loads(pickle.dumps(beton.path))) == url


def test_what_is_cached_is_not_asked_for_again(serve, cache):
    server = serve()
    for _ in range(2):
        with Loader(f"{server.url}/{PATTERN}", cache=cache, **settings()) as loader:
            assert sum(len(batch.ids) for batch in loader) == SAMPLES
    assert set(asked_for_samples(server).values()) == {1}


def test_an_epoch_by_shards_in_a_small_cache_fetches_each_once_and_stays_within_the_limit(serve, tmp_path, shard_bytes):
    server = serve()
    limit = (WINDOW + 2) * (shard_bytes + (64 << 10))
    cache = Cache(tmp_path / "cache", limit=limit)
    with Loader(f"{server.url}/{PATTERN}", cache=cache, **settings(sampling="shards", batch_size=4, workers=1)) as loader:
        ids: list[int] = []
        for batch in loader:
            ids += batch.ids.tolist()
            assert CacheFolder(Path(cache.folder), limit).used() <= limit
        assert sorted(ids) == list(range(SAMPLES))
    # The next epoch has begun by then, so that some may have come a second time.
    assert len(asked_for_samples(server)) == SHARDS
    assert sum(asked_for_samples(server).values()) <= SHARDS + 4


def test_an_order_that_the_cache_cannot_hold_is_refused(serve, tmp_path, shard_bytes):
    url = f"{serve().url}/{PATTERN}"
    with pytest.raises(UsageError, match=r"sampling='shuffle' needs .* GB at a time, .*--sampling shards"):
        Loader(url, cache=Cache(tmp_path / "cache", limit=10 * shard_bytes), **settings())
    with pytest.raises(UsageError, match="sampling='shards' needs"):
        Loader(url, cache=Cache(tmp_path / "cache", limit=4 * shard_bytes), **settings(sampling="shards"))


def test_wrong_bytes_that_stay_wrong_are_an_error_that_names_url_and_sample(folder, serve, tmp_path, cache):
    served = Path(shutil.copytree(folder, tmp_path / "corrupt"))
    path = shard_path(served / "train.beton", 3, SHARDS)
    data = bytearray(path.read_bytes())
    data[(1 << 21) + 10] ^= 1
    path.write_bytes(data)
    cache = Cache(cache.folder, cache.limit, attempts=3)
    url = f"{serve(at=served).url}/{PATTERN}"
    with Loader(url, cache=cache, **settings(sampling="sequential")) as loader:
        message = rf"{path.name}: .*sample 0 \(90_left\) does not match.*gave up after 3 attempts"
        with pytest.raises(RemoteError, match=message) as caught:
            list(loader)
    assert caught.value.url == url.replace("*", "00003")
    assert path.name not in complete(cache)


def test_wrong_tables_that_stay_wrong_are_an_error(folder, serve, tmp_path, cache):
    served = Path(shutil.copytree(folder, tmp_path / "corrupt"))
    path = shard_path(served / "train.beton", 3, SHARDS)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(RemoteError, match=rf"{path.name}: .*tables are corrupt"):
        open_beton(f"{serve(at=served).url}/{PATTERN}", Cache(cache.folder, cache.limit, attempts=2))
    assert complete(cache) == []


def test_a_server_that_does_not_answer_is_an_error_after_bounded_attempts(serve, cache):
    server = serve(lambda number, name: "silent" if name == "train-00002-of-00012.beton" and number > 60 else None)
    impatient = Cache(cache.folder, cache.limit, attempts=2, timeout=0.5)
    with (
        Loader(f"{server.url}/{PATTERN}", cache=impatient, **settings(sampling="sequential")) as loader,
        pytest.raises(RemoteError, match=r"00002-of-00012.beton: TimeoutError: no answer within 0.5 s; gave up after 2 attempts"),
    ):
        list(loader)


def test_a_server_that_is_gone_is_an_error(cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/{PATTERN}"
        with pytest.raises(RemoteError, match=re.escape(url.replace("*", "0000")[:-20])):
            open_beton(url, Cache(cache.folder, cache.limit, attempts=2))


def test_a_shard_that_is_not_there_is_named_at_once(folder, serve, tmp_path, cache):
    served = Path(shutil.copytree(folder, tmp_path / "fewer"))
    shard_path(served / "train.beton", 7, SHARDS).unlink()
    with pytest.raises(RemoteError, match=r"train-00007-of-00012\.beton: cannot be read \(FileNotFoundError"):
        open_beton(f"{serve(at=served).url}/{PATTERN}", cache)


def test_a_server_without_ranges_is_told_of_and_not_asked_for_whole_files_again(serve, cache):
    server = serve(lambda number, name: "whole")
    with pytest.raises(RemoteError, match="ignores ranges"):
        open_beton(f"{server.url}/{PATTERN}", cache)
    assert set(Counter(name for name, *_ in server.requests).values()) == {1}


def test_a_shard_in_the_place_of_another_is_named(folder, serve, tmp_path, cache):
    served = Path(shutil.copytree(folder, tmp_path / "mixed"))
    shutil.copy(shard_path(served / "train.beton", 1, SHARDS), shard_path(served / "train.beton", 2, SHARDS))
    with pytest.raises(BetonError, match="shard 1 of 12 is in the set twice"):
        open_beton(f"{serve(at=served).url}/{PATTERN}", cache)


def test_an_interrupted_fetch_goes_on_where_it_was(serve, cache):
    down = threading.Event()
    server = serve(lambda number, name: "unavailable" if down.is_set() or (number > 30 and number % 5 == 0) else None)
    url = f"{server.url}/train-00000-of-00012.beton"
    with open_beton(url, Cache(cache.folder, cache.limit, attempts=1)) as beton:
        down_at = len(server.requests) + 6
        server.faults = lambda number, name: "unavailable" if number >= down_at else None
        with pytest.raises(RemoteError, match="503"):
            beton.jpeg(0)
        assert complete(cache) == []
        server.faults, before = (lambda number, name: None), len(server.requests)
        beton.jpeg(0)
        assert beton.jpeg(29)
    again = {first for _, first, _ in server.requests[before:]}
    assert 1 << 21 not in again  # what came the first time was kept
    assert len(again) == len(server.requests) - before


FETCH = """
import sys, numpy, fastretina.beton.fetch
from fastretina.beton.remote import Cache
from fastretina.beton.open import open_beton
fastretina.beton.fetch.SPAN = 4 << 10
with open_beton(sys.argv[1], Cache(sys.argv[2], limit=1 << 30)) as beton:
    beton.expect(numpy.arange(len(beton)))
    for i in range(len(beton)):
        beton.verify(i)
    print(sum(beton.ids.tolist()), flush=True)
"""


def fetch_elsewhere(url: str, cache: Cache) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url, str(cache.folder)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_a_file(folder, serve, cache):
    server = serve(lambda number, name: "slow" if number > 80 else None)
    process = fetch_elsewhere(f"{server.url}/{PATTERN}", cache)
    while len(server.requests) < 90:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(Path(cache.folder).glob("*.partial"))
    server.faults = lambda number, name: None
    with Loader(f"{server.url}/{PATTERN}", cache=cache, **settings()) as remote, Loader(folder / PATTERN, **settings()) as local:
        same_epochs(remote, local)
    assert not list(Path(cache.folder).glob("*.partial"))
    assert len(complete(cache)) == SHARDS


def test_processes_that_share_a_cache_fetch_each_shard_once(serve, cache):
    server = serve()
    processes = [fetch_elsewhere(f"{server.url}/{PATTERN}", cache) for _ in range(2)]
    try:
        sums = [int(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert sums == [sum(range(SAMPLES))] * 2
    assert set(asked_for_samples(server).values()) == {1}


def test_a_file_that_is_replaced_on_the_server_is_fetched_anew(folder, serve, tmp_path, cache):
    served = tmp_path / "changing"
    served.mkdir()
    first, second = (shard_path(folder / "train.beton", number, SHARDS) for number in (0, 1))
    server = serve(at=served)
    for source, name in ((first, "0_left"), (second, "30_left")):
        shutil.copy(source, served / "some.beton")
        with open_beton(f"{server.url}/some.beton", cache) as beton:
            assert beton.names[0] == name
            assert int(simplejpeg.decode_jpeg_header(beton.jpeg(0))[0]) == SIDE
            beton.verify(29)


def test_a_file_that_is_replaced_while_the_set_is_open_is_an_error(folder, serve, tmp_path, cache):
    served = tmp_path / "changing"
    served.mkdir()
    first, second = (shard_path(folder / "train.beton", number, SHARDS) for number in (0, 1))
    shutil.copy(first, served / "some.beton")
    server = serve(at=served)
    url, impatient = f"{server.url}/some.beton", Cache(cache.folder, cache.limit, attempts=2)
    with open_beton(url, impatient) as beton:
        shutil.copy(second, served / "some.beton")
        with pytest.raises(RemoteError, match="was replaced on the server; open the set again"):
            beton.jpeg(0)
    assert complete(cache) == []


@pytest.mark.parametrize("change", ["labels", "names", "classes", "columns"])
def test_a_file_replaced_by_one_of_the_same_photographs_and_another_table_is_an_error(folder, serve, tmp_path, cache, change):
    """All checksums are the same."""
    (served := tmp_path / "changing").mkdir()
    original = shard_path(folder / "train.beton", 0, SHARDS)

    def pack(changed: str) -> None:
        classes = {"names": ["a", "b", "c", "d", "e"], "referable": [3 if changed == "classes" else 2], "ordinal": True}
        with Beton(original) as old, BetonWriter(served / "some.beton", len(old), page=1 << 21, columns=["patient"]) as writer:
            for i in range(len(old)):
                writer.add(
                    bytes(old.jpeg(i)), int(old.crcs[i]), id=int(old.ids[i]), width=SIDE, height=SIDE,
                    name=old.names[i][:: -1 if changed == "names" else 1], label=0 if changed == "labels" else int(old.labels[i]),
                    text=["q" if changed == "columns" else "p"],
                )  # fmt: skip
            writer.finish({"classes": classes})

    pack("nothing")
    with open_beton(f"{serve(at=served).url}/some.beton", cache) as beton:
        pack(change)
        for tables in Path(cache.folder).glob("*.tables"):
            tables.unlink()  # evicted meanwhile
        with pytest.raises(RemoteError, match="was replaced on the server"):
            beton.jpeg(0)
    assert complete(cache) == []


def test_a_forgotten_set_ends_its_threads(serve, cache):
    server = serve()
    beton = open_beton(f"{server.url}/{PATTERN}", cache)
    beton.jpeg(0)
    beton.expect(np.arange(SAMPLES))
    del beton
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("fastretina-fetch"):
            thread.join(10)
            assert not thread.is_alive()


def test_it_pickles_as_its_url_and_selects_like_any_other(serve, cache, folder):
    url = Path(f"{serve().url}/{PATTERN}")  # a Path folds the slashes
    with open_beton(url, cache) as beton, open_beton(folder / PATTERN) as local:
        chosen = pickle.loads(pickle.dumps(beton.select(np.array([200, 3, 100]))))
        assert [bytes(chosen.jpeg(i)) for i in range(3)] == [bytes(local.jpeg(i)) for i in (200, 3, 100)]
        chosen.close()
    with pytest.raises(BetonError, match="closed"):
        beton.jpeg(0)


def test_files_elsewhere_on_this_machine_are_cached_too(folder, cache):
    url = Path(f"file://{folder}/train-*.beton")
    with Loader(url, cache=cache, **settings()) as remote, Loader(folder / PATTERN, **settings()) as local:
        same_epochs(remote, local)
    assert len(complete(cache)) == SHARDS
