"""The contestants of throughput.py: each yields the sizes of an epoch's batches, as its own users would write it.

Every side runs in a process of its own (see side_process.py). A side is a function Task -> callable that starts an epoch.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from training_step import TrainingStep

Epoch = Callable[[], Iterator[int]]

MEAN_255 = [0.485 * 255, 0.456 * 255, 0.406 * 255]
STD_255 = [0.229 * 255, 0.224 * 255, 0.225 * 255]


@dataclass(frozen=True)
class Task:
    """What every side of a comparison does alike."""

    data: str  # the .beton
    work: str  # "decode" (uint8 pixels) or "augment" (rotation, flips, ..., normalised float32)
    resolution: int  # px
    batch_size: int
    workers: int
    device: str = "cpu"
    scratch: str = ""  # a folder for files that a side needs; the parent removes it


def element_type(task: Task) -> Any:
    """torch.bfloat16 on a GPU, torch.float32 on a CPU."""
    import torch

    return torch.bfloat16 if task.device == "cuda" else torch.float32


def fastretina(task: Task, **changes: Any) -> Epoch:
    import torch

    from fastretina.loading.augment import Augment
    from fastretina.loading.loader import Loader

    decode_only = task.work == "decode"
    settings: dict[str, Any] = {
        "batch_size": task.batch_size,
        "resolution": task.resolution,
        "workers": task.workers,
        "device": task.device,
        "dtype": torch.uint8 if decode_only else element_type(task),
        "augment": Augment.none() if decode_only else Augment.full(),
    }
    loader = Loader(task.data, **(settings | changes))
    return lambda: (len(batch.ids) for batch in loader)


def ffcv(task: Task) -> Epoch:
    """Stock FFCV. It has no rotation: its augmented side is decode, flip and normalise only."""
    import torch
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    from fastretina.beton.reader import Beton

    full_size = int(Beton(task.data).widths[0]) == task.resolution
    image: list[Any] = [
        SimpleRGBImageDecoder() if full_size else CenterCropRGBImageDecoder((task.resolution, task.resolution), ratio=1)
    ]
    if task.work == "augment":
        image += [RandomHorizontalFlip(), NormalizeImage(np.array(MEAN_255), np.array(STD_255), np.float32)]
    to_device: list[Any] = [ToDevice(torch.device(task.device))] if task.device != "cpu" else []
    image += [ToTensor(), *to_device, ToTorchImage(convert_back_int16=False)]
    pipelines = {"image": image, "label": [IntDecoder(), ToTensor(), *to_device, Squeeze()], "id": None, "crc32": None}
    loader = Loader(
        task.data, batch_size=task.batch_size, num_workers=task.workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=False, pipelines=pipelines,
    )  # fmt: skip
    return lambda: (len(labels) for _, labels in loader)


def ffcv_with_our_warp(task: Task) -> Epoch:
    """FFCV's Loader and decoder with fastretina.loading.ffcv behind them."""
    from ffcv.loader import Loader, OrderOption

    from fastretina.loading.augment import Augment
    from fastretina.loading.ffcv import pipelines

    pipes, _ = pipelines(task.data, task.resolution, augment=Augment.full())
    loader = Loader(
        task.data, batch_size=task.batch_size, num_workers=task.workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=False, pipelines=pipes,
    )  # fmt: skip
    return lambda: (len(labels) for _, labels in loader)


def _dataset(task: Task, decode: Callable[[bytes], Any], transform: Callable[[Any], Any]) -> Epoch:
    """A torch DataLoader over single samples, the way of course work; bytes come from page cache either way."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from fastretina.beton.reader import Beton

    class Samples(Dataset[Any]):
        def __init__(self) -> None:
            self.beton = Beton(task.data)

        def __len__(self) -> int:
            return len(self.beton)

        def __getitem__(self, index: int) -> Any:
            return transform(decode(bytes(self.beton.jpeg(index)))), int(self.beton.labels[index])

    torch.set_num_threads(1)
    loader = DataLoader(Samples(), batch_size=task.batch_size, shuffle=True, num_workers=task.workers, persistent_workers=True)
    return lambda: (len(labels) for _, labels in loader)


def _transform(task: Task, on_tensor: bool) -> Callable[[Any], Any]:
    import torch
    from torchvision.transforms import InterpolationMode, v2

    steps: list[Any] = [] if on_tensor else [v2.PILToTensor()]
    if task.work == "augment":
        geometry = [v2.RandomRotation(180, InterpolationMode.BILINEAR), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
        normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
        steps = [*geometry, *steps, *normalise]
    if task.resolution != 512:
        steps = [v2.Resize(task.resolution), *steps]
    composed: Callable[[Any], Any] = v2.Compose(steps) if steps else v2.Identity()
    return composed


def pillow(task: Task) -> Epoch:
    """The old way ("B0"): Pillow in __getitem__, torchvision's transforms, a DataLoader."""
    from PIL import Image

    return _dataset(task, lambda data: Image.open(io.BytesIO(data)).convert("RGB"), _transform(task, on_tensor=False))


def torchvision(task: Task) -> Epoch:
    """torchvision's own decoder and its transforms on tensors, in a DataLoader."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> Any:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)

    return _dataset(task, decode, _transform(task, on_tensor=True))


def webdataset(task: Task) -> Epoch:
    """webdataset over a tar of the same files, Pillow and torchvision's transforms behind it."""
    import tarfile
    from pathlib import Path

    import webdataset as wds

    from fastretina.beton.reader import Beton

    beton = Beton(task.data)
    # Two shards a worker: webdataset hands out whole shards.
    folder = Path(task.scratch)
    shards = [str(folder / f"{number}.tar") for number in range(2 * task.workers)]
    for number, shard in enumerate(shards):
        with tarfile.open(shard, "w") as tar:
            for index in range(number, len(beton), len(shards)):
                for suffix, data in (("jpg", bytes(beton.jpeg(index))), ("cls", str(int(beton.labels[index])).encode())):
                    entry = tarfile.TarInfo(f"{index:08d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(500).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(_transform(task, on_tensor=False), lambda grade: grade).batched(task.batch_size)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=task.workers, persistent_workers=True)
    return lambda: (len(labels) for _, labels in loader)


def dali(task: Task) -> Epoch:
    """NVIDIA DALI: decode, and for the augmented side rotate (bilinear), flip and normalise. On a GPU, decoding too is there."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    from fastretina.beton.reader import Beton

    beton = Beton(task.data)
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(beton))

    def sample(info: Any) -> tuple[Any, Any]:
        if info.idx_in_epoch >= len(beton):
            raise StopIteration
        index = int(shuffled[info.idx_in_epoch])
        return np.frombuffer(beton.jpeg(index), np.uint8), np.array([beton.labels[index]])

    cuda = task.device == "cuda"

    @pipeline_def(batch_size=task.batch_size, num_threads=task.workers, device_id=0 if cuda else None)  # type: ignore[untyped-decorator]
    def pipeline() -> Any:
        jpegs, labels = fn.external_source(source=sample, num_outputs=2, batch=False, dtype=[types.UINT8, types.INT64])
        images = fn.decoders.image(jpegs, device="mixed" if cuda else "cpu", output_type=types.RGB)
        if task.resolution != 512:
            images = fn.resize(images, size=task.resolution)
        if task.work == "augment":
            angle = fn.random.uniform(range=(-180.0, 180.0))
            images = fn.rotate(images, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
            images = fn.flip(images, horizontal=fn.random.coin_flip(), vertical=fn.random.coin_flip())
            images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="HWC", mean=MEAN_255, std=STD_255)
        return images, labels

    built = pipeline()
    built.build()
    iterator = DALIGenericIterator([built], ["images", "labels"], last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True)
    return lambda: (len(batch[0]["labels"]) for batch in iterator)


class Training:
    """Training steps on one loader, on a CPU: on a GPU they are headline.py's.

    `extra` holds the step's FLOPs for an image, and the seconds that all epochs so far have waited for data.
    """

    steps = 16  # of an epoch

    def __init__(self, task: Task, batches: Callable[[TrainingStep], Iterator[tuple[Any, Any]]]) -> None:
        """batches: without end, for this step."""
        import torch
        from training_step import TrainingStep

        self.step = TrainingStep("resnet18", task.batch_size, task.resolution, torch.device(task.device), None)
        self.extra = {"flops": float(self.step.flops()), "wait": 0.0}
        self.step.warm_up()
        self.batches = batches(self.step)

    def __call__(self) -> Iterator[int]:
        for _ in range(self.steps):
            asked = time.perf_counter()
            images, labels = next(self.batches)
            self.extra["wait"] += time.perf_counter() - asked
            self.step(images, labels)
            yield len(labels)


def train_fastretina(task: Task) -> Epoch:
    """Training from the streaming loader, rotation and flips on."""
    from fastretina.loading.loader import Loader

    loader = Loader(task.data, task.batch_size, resolution=task.resolution, workers=task.workers)
    return Training(task, lambda step: ((batch.images, batch.labels) for _ in itertools.count() for batch in loader))


def train_synthetic(task: Task) -> Epoch:
    """The same steps on one batch that is there already: the model's own limit."""
    return Training(task, lambda step: itertools.repeat(step.random_batch()))


SIDES: dict[str, Callable[[Task], Epoch]] = {
    "fastretina_resident": partial(fastretina, resident="on"),
    "fastretina_cpu_decode": partial(fastretina, decode="cpu"),
    "fastretina_gpu_decode": partial(fastretina, decode="gpu"),
} | {
    side.__name__: side
    for side in (
        fastretina, ffcv, ffcv_with_our_warp, pillow, torchvision, webdataset, dali, train_fastretina, train_synthetic,
    )
}  # fmt: skip

# What a side's user imports before the clock starts; where it is not installed the side is left out.
IMPORTS = {
    "ffcv": "ffcv.loader",
    "ffcv_with_our_warp": "fastretina.loading.ffcv",
    "pillow": "torchvision.transforms.v2",
    "torchvision": "torchvision.transforms.v2",
    "webdataset": "webdataset",
    "dali": "nvidia.dali.plugin.pytorch",
}
