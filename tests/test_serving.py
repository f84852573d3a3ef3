"""The server of docs/serving.md: it says what Grader.grade says, refuses what it must, and keeps nothing."""

from __future__ import annotations

import asyncio
import io
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from fastretina import Grader
from fastretina.grading import RETINOPATHY
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.models.checkpoint import CheckpointInfo, save_checkpoint
from fastretina.models.resnet import build_model

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text()
JPEG = {"content-type": "image/jpeg"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> dict[str, Any]:
    """What the code of the page defines, with a network that was never trained."""
    place = tmp_path_factory.mktemp("model") / "best.safetensors"
    torch.manual_seed(0)
    about = CheckpointInfo("resnet18", 5, 64, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "test")
    save_checkpoint(place, build_model("resnet18"), about)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert code.count('"runs/first"') == 1
    defined: dict[str, Any] = {}
    exec(compile(code.replace('"runs/first"', repr(str(place))), "serving.py", "exec"), defined)
    defined["place"] = place
    return defined


@pytest.fixture
def client(server) -> Iterator[TestClient]:
    with TestClient(server["app"]) as client:
        yield client


@pytest.fixture
def photograph(tiny_betons) -> bytes:
    return sorted(tiny_betons.test_images.glob("*.jpeg"))[0].read_bytes()


def test_a_photograph_gets_the_answer_of_the_grader_to_the_bit(server, client, photograph):
    png = io.BytesIO()
    Image.open(io.BytesIO(photograph)).resize((90, 70)).save(png, "PNG")
    for body in (photograph, png.getvalue()):
        (expected,) = Grader.load(server["place"]).grade(body).to_dict("records")
        answer = client.post("/grade", content=body, headers=JPEG)
        assert answer.status_code == 200
        found = answer.json()
        assert {name: found[name] for name in ("p0", "p1", "p2", "p3", "p4")} == {
            name: expected[name] for name in found if name[0] == "p"
        }
        assert (found["grade"], found["referable"], found["done"]) == (expected["grade"], expected["referable"], expected["done"])
        assert found["class"] == RETINOPATHY[found["grade"]]
        assert sum(found[f"p{grade}"] for grade in range(5)) == pytest.approx(1)


@pytest.mark.parametrize(("length", "most"), [(b"1000000", 0), (None, 4)], ids=["by its length", "as it comes"])
def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, monkeypatch, length, most):
    """TestClient would read it all first: the server's side alone."""
    monkeypatch.setitem(server, "LARGEST", 3_000)
    taken, sent = [], []

    async def receive() -> dict[str, Any]:
        taken.append(1_000)
        return {"type": "http.request", "body": bytes(1_000), "more_body": len(taken) < 1_000}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"image/jpeg"), *([(b"content-length", length)] if length else [])]
    scope = {"type": "http", "method": "POST", "path": "/grade", "raw_path": b"/grade", "query_string": b"", "headers": headers}
    asyncio.run(server["app"](scope, receive, send))
    assert sent[0]["status"] == 413
    assert b"a photograph has at most 3,000 bytes" in sent[1]["body"]
    assert len(taken) == most


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"not an image at all", "not an image of a known kind"),
        (b"", "empty file"),
        (b"%PDF-1.7\n" + bytes(300), "PDF files are not read; export the photograph as JPEG"),
    ],
    ids=["garbage", "empty", "PDF"],
)
def test_what_is_no_photograph_is_refused_with_the_reason_of_the_grader(server, client, body, said):
    answer = client.post("/grade", content=body, headers=JPEG)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    assert answer.json()["detail"] == Grader.load(server["place"]).grade(body)["error"][0]


def test_a_truncated_photograph_is_refused(client, photograph):
    answer = client.post("/grade", content=photograph[: len(photograph) // 2], headers=JPEG)
    assert (answer.status_code, "truncated" in answer.json()["detail"]) == (422, True)


def test_a_form_is_refused_with_what_to_send(client, photograph):
    answer = client.post("/grade", files={"photo": ("eye.jpg", photograph)})
    assert answer.status_code == 415
    assert "alone as the body" in answer.json()["detail"]


def test_one_that_takes_too_long_times_out_and_the_next_is_graded(server, client, monkeypatch, photograph):
    go_on, graded = threading.Event(), []

    def slow(body: bytes) -> pd.DataFrame:
        go_on.wait(60)
        graded.append(body)
        return Grader.grade(server["grader"], body)

    with monkeypatch.context() as patch:
        patch.setattr(server["grader"], "grade", slow)
        patch.setitem(server, "SECONDS", 0.2)
        assert [client.post("/grade", content=photograph, headers=JPEG).status_code for _ in range(2)] == [504, 504]
        go_on.set()
    assert client.post("/grade", content=photograph, headers=JPEG).status_code == 200
    assert len(graded) == 1  # the other was still waiting when its time was over


_WRITING: list[str] | None = None  # what is written to while a test listens; a hook can never be taken away


def _note_writing(event: str, arguments: tuple[Any, ...]) -> None:
    if _WRITING is not None and event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _WRITING.append(str(arguments[0]))


def test_nothing_of_a_photograph_is_written(client, monkeypatch):
    tiff = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tiff, "TIFF")  # larger than what a form would keep in memory
    sys.addaudithook(_note_writing)
    assert client.post("/grade", content=tiff.getvalue(), headers=JPEG).status_code == 200  # and what is compiled is cached
    written: list[str] = []
    monkeypatch.setattr(sys.modules[__name__], "_WRITING", written)
    with tempfile.TemporaryFile():
        assert written  # it hears
    written.clear()
    for body in (tiff.getvalue(), b"garbage"):
        client.post("/grade", content=body, headers=JPEG)
    assert not written
