"""docs/grading.ipynb runs from its first cell to its last, and shows what Grader says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from fastretina import Grader
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.models.checkpoint import CheckpointInfo, save_checkpoint
from fastretina.models.resnet import build_model

NOTEBOOK = Path(__file__).parent.parent / "docs" / "grading.ipynb"


@pytest.mark.usefixtures("one_thread")
def test_the_notebook_shows_the_grades_and_a_picture(tiny_betons, tmp_path, monkeypatch):
    place = tmp_path / "best.safetensors"
    torch.manual_seed(0)
    about = CheckpointInfo("resnet18", 5, 32, IMAGENET_MEAN, IMAGENET_STD, 1, "float32", "qwk", "test")
    save_checkpoint(place, build_model("resnet18"), about)
    notebook = nbformat.read(NOTEBOOK, 4)
    settings, graded, in_memory, picture = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert [line.partition(" = ")[0] for line in settings.source.splitlines()] == ["CHECKPOINT", "PHOTOGRAPHS"]
    assert not any(cell.get("outputs") for cell in notebook.cells)
    settings.source = f"CHECKPOINT = {str(place)!r}\nPHOTOGRAPHS = {str(tiny_betons.test_images)!r}"
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = NotebookClient(notebook, timeout=240, startup_timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    asyncio.run(client.async_execute())
    expected = Grader.load(place, device="cpu").grade(tiny_betons.test_images)
    assert graded.outputs[0].data["text/html"] == expected.head(10)._repr_html_()
    assert f"<td>{expected['p0'][0]:.6f}</td>" in in_memory.outputs[0].data["text/html"]
    assert picture.outputs[-1].data["image/png"]
