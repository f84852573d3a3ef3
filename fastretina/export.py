"""Write a trained network to one file that answers without fastretina, checked against torch.

    fastretina export --checkpoint runs/x/best.safetensors --out model.onnx --data data/test.beton

The suffix says the format: .onnx for onnxruntime and others, .pt2 for torch alone. Pixels go in, probabilities come out; how
photographs become such pixels, the classes and the frozen thresholds are in the file's metadata. See docs/export.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fastretina import cli
from fastretina.beton.paths import parts_of
from fastretina.errors import RunError, UsageError

if TYPE_CHECKING:
    from fastretina.beton.reader import Beton
    from fastretina.models.exported import Pixels
    from fastretina.models.grader import Grader

LIMIT = 1e-4  # of the difference between a probability and torch's
PHOTOGRAPHS = 64  # that it is looked for on


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained network to one file, ONNX or torch.export's .pt2, and check its answers against torch's."""

    checkpoint: Path  # a run's best.safetensors, or a folder with one; several with commas between: one graph of their mean
    out: Path  # model.onnx or model.pt2
    data: Path | None = None  # .beton file to take the 64 photographs of the check from; none: painted ones
    quantise: bool = False  # weights in int8: a quarter of the size; what that costs is measured on --data
    time: bool = True  # images/s of torch and onnxruntime on this CPU, for an .onnx


def main(config: ExportConfig) -> int:
    # What imports torch comes now: --help is there before it.
    import torch

    from fastretina.models import export_checks, exported
    from fastretina.models.grader import Grader
    from fastretina.system.files import write_atomically

    onnx = config.out.suffix == ".onnx"
    if config.out.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"--out {config.out}: the suffix says the format: .onnx or .pt2")
    if config.quantise and not onnx:
        raise UsageError("--quantise: is for an .onnx")
    if config.quantise and config.data is None:
        raise UsageError("--quantise: needs --data FILE, graded photographs to measure its loss on")
    if onnx:
        exported.require_onnx()
    grader = Grader.load(parts_of(config.checkpoint), device="cpu", amp="off")
    network, threads = exported.Exported(grader), torch.get_num_threads()

    def make() -> bytes:
        """The whole file, once it has passed its check."""
        beton = None if config.data is None else _opened(config, grader)
        program, metadata = network.trace(), exported.about(grader)
        model = exported.as_onnx(program, metadata) if onnx else exported.as_pt2(program, metadata)
        run = exported.onnx_run(model, threads) if onnx else exported.pt2_run(model)
        pixels = _painted(grader) if beton is None else export_checks.some_pixels(beton, network.resolution, PHOTOGRAPHS)
        what = f"{len(pixels)} {'painted photographs' if beton is None else f'photographs of {config.data}'}"
        difference = export_checks.difference(run, grader, pixels)
        if not difference <= LIMIT:
            raise RunError(
                f"{config.out}: not written: its probabilities differ from torch's by {difference:.1e} on {what}; the limit is "
                f"{LIMIT:.0e}"
            )
        print(f"probabilities differ from torch's by at most {difference:.1e} on {what} (limit: {LIMIT:.0e})")
        sides = {"torch": network.run, "onnxruntime": run}
        if config.quantise:
            assert beton is not None
            graph = exported.quantised(model)
            sides["int8"] = exported.onnx_run(exported.with_metadata(graph, metadata), threads)
            loss = export_checks.Loss.of(beton, grader, run, sides["int8"])
            whole, model = model, exported.with_metadata(graph, metadata | {"quantised": loss.as_dict()})
            print(f"int8: {len(model) / 1e6:.1f} MB, {len(whole) / 1e6:.1f} MB before; {loss} of {config.data}")
        if onnx and config.time:
            print("\n".join(export_checks.timed(sides, pixels, threads)))
        return model

    write_atomically(config.out, lambda file: file.write(make()))
    print(f"written to {config.out}: {config.out.stat().st_size / 1e6:.1f} MB")
    return 0


def _opened(config: ExportConfig, grader: Grader) -> Beton:
    """The data set of --data. UsageError, RunError where it does not go with the checkpoint."""
    from fastretina.beton.open import open_beton
    from fastretina.beton.reader import UNLABELLED
    from fastretina.packing.preprocessing import preparation_of

    assert config.data is not None
    beton = open_beton(config.data)
    if not len(beton):
        raise RunError(f"{config.data}: holds no photograph to check with")
    if (found := preparation_of(beton)) != grader.preparation:
        raise UsageError(
            f"{config.data} was packed with {found.flags}, {config.checkpoint} learned from images packed with "
            f"{grader.preparation.flags}"
        )
    if config.quantise and (beton.classes != grader.classes or int(beton.labels.min()) == UNLABELLED):
        raise UsageError(
            f"{config.data}: --quantise measures its loss on photographs that all have a {grader.classes.noun} of {grader.classes}"
        )
    return beton


def _painted(grader: Grader) -> Pixels:
    """(64, R, R, 3) uint8 of photographs that fastretina.sample paints, the same each time, prepared as the grader's."""
    import numpy as np

    from fastretina.packing.reencode import square
    from fastretina.sample.camera import Eye, photograph
    from fastretina.sample.dataset import EASY

    eyes = [Eye(0, number // 2, ("left", "right")[number % 2], number % 5) for number in range(PHOTOGRAPHS)]
    side = grader.members[0].info.resolution
    painted = (photograph(eye, EASY.lesions, EASY.camera) for eye in eyes)
    return np.stack([np.asarray(square(jpeg, side, grader.preparation).image) for jpeg in painted])


run_command = partial(cli.run, ExportConfig, main)

if __name__ == "__main__":
    run_command()
