"""Shards behind servers that other people wrote: an S3-compatible one and nginx."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from remote_cases import PATTERN, same_epochs, settings

from fastretina.beton.open import open_beton
from fastretina.errors import RemoteError
from fastretina.loading.loader import Loader


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in a bucket of an S3-compatible server on 127.0.0.1."""
    pytest.importorskip("s3fs", reason="needs the remote extra")
    server_module = pytest.importorskip("moto.server", reason="needs the dev extra")
    import fsspec

    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(key, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("retina")
    for path in folder.iterdir():
        fs.pipe_file(f"retina/sets/{path.name}", path.read_bytes())
    yield "s3://retina/sets"
    server.stop()


def test_shards_in_a_bucket(bucket, folder, cache):
    for pattern in (PATTERN, "train-*.beton"):
        with Loader(f"{bucket}/{pattern}", cache=cache, **settings()) as remote, Loader(folder / PATTERN, **settings()) as local:
            same_epochs(remote, local)
    with pytest.raises(RemoteError, match=r"s3://retina/sets/test-00000-of-00002.beton: cannot be read"):
        open_beton(f"{bucket}/test-*-of-00002.beton", cache)


@pytest.fixture
def nginx(folder: Path, tmp_path: Path) -> Iterator[str]:
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        pytest.skip("nginx is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; pid {tmp_path}/pid; error_log stderr; {user} events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {tmp_path}; proxy_temp_path {tmp_path}; fastcgi_temp_path {tmp_path};"
        f" uwsgi_temp_path {tmp_path}; scgi_temp_path {tmp_path};"
        f" server {{ listen 127.0.0.1:{port}; location / {{ root {folder}; autoindex on; }} }} }}"
    )
    process = subprocess.Popen([program, "-p", tmp_path, "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(10)


def test_shards_behind_nginx(nginx, folder, cache):
    for pattern in (PATTERN, "train-*.beton"):  # the second from its listing
        with Loader(f"{nginx}/{pattern}", cache=cache, **settings()) as remote, Loader(folder / PATTERN, **settings()) as local:
            same_epochs(remote, local)
