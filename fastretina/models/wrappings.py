"""Weights as others save them: what they are wrapped in is undone where its name is known, and what was done is told.

A training program puts its network's tensors into a container, beside the epoch and the optimizer, and before their names stands
what the network stood in: `module.` of DataParallel, `_orig_mod.` of torch.compile, the name that a larger network has for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastretina.errors import CheckpointError
from fastretina.models.heads import head_layer

CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "weights")
# Averages of the weights: taken only where the weights themselves are not there.
AVERAGES = ("state_dict_ema", "model_ema")
PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder", "net")
_DEEPEST = 4  # containers within each other; a file may hold itself
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Stored:
    """What a file holds. tensors: by name, out of the containers. containers: that were undone, from the outside. left_out: the
    averages beside them."""

    tensors: dict[str, Tensor]
    containers: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: object, source: Path) -> Stored:
        """Undo the containers. CheckpointError, naming the file, where no tensors are found or more than one container could be
        meant."""
        containers: list[str] = []
        left_out: list[str] = []
        outermost = found
        for _ in range(_DEEPEST):
            if not isinstance(found, dict):
                break
            inner = [name for name in CONTAINERS if _holds_tensors(found.get(name))]
            averages = [name for name in AVERAGES if _holds_tensors(found.get(name))]
            could_be = inner or averages
            if len(could_be) > 1:
                raise CheckpointError(
                    f"{source}: holds weights more than once: {', '.join(could_be)}. Save those that you mean by themselves: "
                    f"torch.save(torch.load({source.name!r}, weights_only=True)[{could_be[0]!r}], FILE)"
                )
            if not could_be:
                tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
                if tensors:
                    return cls(tensors, tuple(containers), tuple(left_out))
                break
            containers += could_be
            left_out += averages if inner else []
            found = found[could_be[0]]
        holds = f"the keys {_some(list(outermost))}" if isinstance(outermost, dict) else f"a {type(outermost).__name__}"
        raise CheckpointError(
            f"{source}: holds no tensors by name, but {holds}. A dictionary of them is needed, such as model.state_dict(), as it "
            f"is or under one of {', '.join((*CONTAINERS, *AVERAGES))}"
        )

    def behind(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with this, by the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def __str__(self) -> str:
        undone = f", out of {' and '.join(self.containers)}" if self.containers else ""
        return f"{len(self.tensors)} tensors, the first {_some(list(self.tensors))}{undone}"


def prefixes_of(model: nn.Module, stored: Stored) -> list[str]:
    """What stands before the names of the model's backbone, "" for nothing, wherever the whole of it is found.

    Beside it may stand what belongs to no part of the backbone, such as another head, but not more of the same: a ResNet34 holds
    all names of a ResNet18.
    """
    own = backbone_names(model)
    parts = {name.split(".")[0] for name in own}
    allowed = set(model.state_dict())
    found = []
    for prefix in sorted({name.removesuffix(own[0]) for name in stored.tensors if name.endswith(own[0])}):
        names = stored.behind(prefix).keys()
        more = (name for name in names if name not in allowed and name.split(".")[0] in parts)
        if (prefix == "" or prefix.endswith(".")) and names >= set(own) and not any(more):
            found.append(prefix)
    return found


def is_known(prefix: str) -> bool:
    """Whether it is made of PREFIXES alone: then the network behind it is the one that is meant."""
    return set(prefix.split(".")[:-1]) <= set(PREFIXES)


def backbone_names(model: nn.Module) -> list[str]:
    """The names of all but the head, without the counters that old files lack; only a BatchNorm without momentum reads them."""
    head = f"{head_layer(model)[0]}."
    return [name for name in model.state_dict() if not name.startswith(head) and not name.endswith("num_batches_tracked")]


def differing(model: nn.Module, tensors: dict[str, Tensor]) -> str | None:
    """The first tensor that cannot take its place in the model's backbone, and why; None where all can."""
    own = model.state_dict()
    for name in backbone_names(model):
        theirs = tensors[name]
        if theirs.shape != own[name].shape:
            return f"{name} has shape {tuple(theirs.shape)}, the model needs {tuple(own[name].shape)}"
        if not _fits(theirs, own[name]):
            return f"{name} is {theirs.dtype}, {theirs.layout}, on {theirs.device}; the model needs plain {own[name].dtype}"
    return None


def load_behind(model: nn.Module, stored: Stored, prefix: str) -> str:
    """Copy the backbone behind this prefix into the model, and the head if it is one of the same size. Returns what was done
    beyond copying tensors of these names, in words; "" for nothing."""
    own, tensors = model.state_dict(), stored.behind(prefix)
    head_name, head = head_layer(model)
    ours = {name for name in own if name.startswith(f"{head_name}.")}
    notes = []
    if unwrapped := [*stored.containers, *([prefix] if prefix else [])]:
        notes.append(f"unwrapped {', '.join(unwrapped)}")
    theirs = tensors.get(f"{head_name}.weight")
    taken = {name: tensors[name] for name in own if name in tensors and _fits(tensors[name], own[name])}
    if not ours <= taken.keys():
        taken = {name: value for name, value in taken.items() if name not in ours}
        if theirs is None or theirs.ndim != 2:
            notes.append("no head")
        else:
            outputs = len(theirs)
            notes.append(f"its head of {outputs} outputs left out" if outputs != head.out_features else "its head left out")
        tensors = {name: value for name, value in tensors.items() if name not in ours}
    strangers = [prefix + name.split(".")[0] for name in tensors if name not in own]
    strangers += [name.split(".")[0] for name in stored.tensors if not name.startswith(prefix)]
    if left_out := [*stored.left_out, *dict.fromkeys(strangers)]:
        notes.append(f"left out: {_some(left_out)}")
    model.load_state_dict(own | taken)
    return "; ".join(notes)


def _fits(value: Tensor, own: Tensor) -> bool:
    """Whether `value` can be copied to `own` and means the same there."""
    plain = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
    return plain and value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def _holds_tensors(value: Any, depth: int = _DEEPEST) -> bool:
    if not isinstance(value, dict) or depth == 0:
        return False
    return any(isinstance(one, Tensor) or _holds_tensors(one, depth - 1) for one in value.values())


def _some(names: list[Any]) -> str:
    shown = ", ".join(str(name)[:80] for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
