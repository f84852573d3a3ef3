"""A trained network as one file that runs without fastretina: ONNX, or torch.export's .pt2, with what must be known of it inside.

Pixels go in and probabilities come out: normalisation, network, head and its decision are in the graph. What is done to a
photograph before it is a square of pixels is not; the metadata say it, under the key "fastretina", as JSON (docs/export.md).
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastretina.errors import RunError, UsageError
from fastretina.loading.augment import IMAGENET_MEAN, IMAGENET_STD
from fastretina.loading.augment.cpu import kernel_norm
from fastretina.models.grader import Grader
from fastretina.models.photographs import rules
from fastretina.version import __version__

KEY, PIXELS, PROBABILITIES = "fastretina", "pixels", "probabilities"
MOST_BYTES = 2**31 - 2**24  # of weights: a file of protocol buffers ends at 2 GiB, and the graph needs some of it
_ONLY_ERRORS = 3  # as onnxruntime numbers what it says

Pixels = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]
Run = Callable[[Pixels], Probabilities]  # (B, R, R, 3) RGB to (B, C)


class Exported(nn.Module):
    """(B, R, R, 3) uint8 RGB pixels to (B, C) float32 calibrated probabilities; of several members, the mean of theirs.

    The arithmetic is that of the loader's evaluation path: value * scale + bias in float32.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, grader: Grader) -> None:
        """grader: on the CPU. UsageError where its members do not see images of one resolution."""
        super().__init__()
        infos = [member.info for member in grader.members]
        resolutions = sorted({info.resolution for info in infos})
        if len(resolutions) > 1:
            several = " and ".join(f"{resolution} px" for resolution in resolutions)
            raise UsageError(
                f"--checkpoint: the members see images of {several}, and a graph has one input; export them one by one"
            )
        self.resolution = resolutions[0]
        self.networks = nn.ModuleList(member.model for member in grader.members)
        self._heads = [(info.grading, info.decision) for info in infos]
        scale, bias = torch.from_numpy(kernel_norm(IMAGENET_MEAN, IMAGENET_STD)[:, :3].copy())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() * self.scale + self.bias).permute(0, 3, 1, 2)
        pairs = zip(self.networks, self._heads, strict=True)
        found = [head.log_probabilities(network(images), decision).exp() for network, (head, decision) in pairs]
        return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)

    def trace(self) -> ExportedProgram:
        """The graph, for any number of images from 1 on."""
        side = self.resolution
        example = torch.zeros(2, side, side, 3, dtype=torch.uint8)  # torch takes a size of 1 for one that never changes
        program = torch.export.export(self.eval(), (example,), dynamic_shapes={PIXELS: _shapes()})
        # Where the code lies on this machine, line by line, is nobody's business where the file is going.
        for module in program.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    node.meta.pop("stack_trace", None)
        return program

    def run(self, pixels: Pixels) -> Probabilities:
        """torch's own answers, eagerly."""
        with torch.inference_mode():
            answers: Probabilities = self(torch.from_numpy(pixels)).numpy()
        return answers


def _shapes() -> dict[int, Any]:
    return {0: torch.export.Dim("batch", min=1)}


def about(grader: Grader) -> dict[str, Any]:
    """What must be known to use the graph of these members, fit for JSON; docs/export.md explains each key."""
    side, operating = grader.members[0].info.resolution, grader.operating
    return {
        "fastretina": __version__,
        "torch": str(torch.__version__),
        "input": {
            "name": PIXELS,
            "shape": ["batch", side, side, 3],
            "dtype": "uint8",
            "colours": "RGB",
            "normalisation": "inside the graph: give 0-255",
        },
        "output": {"name": PROBABILITIES, "shape": ["batch", len(grader.classes)], "dtype": "float32"},
        "classes": grader.classes.as_dict(),
        "resolution": side,
        "size": grader.size,
        "preparation": {**asdict(grader.preparation), "rules": rules(grader.preparation, grader.size, side)},
        "operating": None if operating is None else operating.as_dict(),
        "members": [
            {
                "arch": info.arch,
                "head": info.head,
                "decision": None if info.decision is None else asdict(info.decision),
                "epoch": info.epoch,
                "sha256": _sha256(path),
                "data": info.data,
            }
            for _, info, path, _ in grader.members
        ],
        "quantised": None,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_onnx() -> None:
    """UsageError where the packages of the extra `export` are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ONNX needs more packages ({error}); install them with: pip install 'fastretina[export]'; or export to a .pt2, which "
            "needs none"
        ) from None
    onnxruntime.set_default_logger_severity(_ONLY_ERRORS)
    onnxruntime.disable_telemetry_events()


def as_onnx(program: ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """The graph as an ONNX file, one file whatever its size. RunError where it would pass 2 GiB."""
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if size > MOST_BYTES:
        raise RunError(f"weights of {size / 1e9:.1f} GB: an ONNX file holds 2 GB; export to a .pt2, or fewer members")
    made = torch.onnx.export(
        program, dynamo=True, input_names=[PIXELS], output_names=[PROBABILITIES], dynamic_shapes=(_shapes(),), verbose=False
    )
    assert made is not None
    return with_metadata(made.model_proto, metadata)


def quantised(model: bytes) -> Any:
    """The graph of an ONNX file with weights in int8; activations are brought to 8 bits as they come: nothing is fitted."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    graph = onnx.load_from_string(model)
    add_pre_process_metadata(graph)  # torch's exporter has done it: BatchNorm is in the convolutions, shapes are known
    with tempfile.TemporaryDirectory(prefix="fastretina-export-") as folder:
        path = Path(folder) / "int8.onnx"
        # Unsigned: onnxruntime's CPU convolutions of integers take no signed weights.
        quantize_dynamic(graph, path, weight_type=QuantType.QUInt8)
        return onnx.load(path)


def with_metadata(graph: Any, metadata: Mapping[str, Any]) -> bytes:
    """An ONNX graph as a file, with these metadata and no others."""
    del graph.metadata_props[:]
    graph.metadata_props.add(key=KEY, value=json.dumps(metadata))
    data: bytes = graph.SerializeToString()
    return data


def onnx_run(model: bytes, threads: int) -> Run:
    """What answers with an ONNX file on the CPU, on so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between its calls the cores are another's
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(pixels: Pixels) -> Probabilities:
        answers: Probabilities = session.run([PROBABILITIES], {PIXELS: pixels})[0]
        return answers

    return run


def as_pt2(program: ExportedProgram, metadata: Mapping[str, Any]) -> bytes:
    """The graph as torch.export saves it."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Of weights in channels-last, all of which it then saves whole.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, file, extra_files={KEY: json.dumps(metadata)})
    return file.getvalue()


def pt2_run(model: bytes) -> Run:
    """What answers with such a file."""
    module = torch.export.load(io.BytesIO(model)).module()

    def run(pixels: Pixels) -> Probabilities:
        with torch.inference_mode():
            answers: Probabilities = module(torch.from_numpy(pixels)).numpy()
        return answers

    return run
