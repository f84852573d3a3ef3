"""The contestants of throughput.py: each yields the sizes of an epoch's batches, as its own users would write it.

Every side runs in a process of its own (see side_process.py). A side is a function Task -> callable that starts an epoch.
"""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from training_sides import train_fastretina, train_synthetic

Epoch = Callable[[], Iterator[int]]

MEAN_255 = [0.485 * 255, 0.456 * 255, 0.406 * 255]
STD_255 = [0.229 * 255, 0.224 * 255, 0.225 * 255]


@dataclass(frozen=True)
class Task:
    """What every side of a comparison does alike."""

    data: str  # the .beton
    work: str  # "decode" (uint8 pixels), "flip" (flips, normalised float32), "augment" (rotation too), or "train"
    resolution: int  # px
    batch_size: int
    workers: int
    device: str = "cpu"
    scratch: str = ""  # a folder for files that a side needs; the parent removes it


class Order:
    """Each iteration is an epoch: the indices of its batches, shuffled anew."""

    def __init__(self, samples: int, batch_size: int) -> None:
        self.samples, self.batch_size, self.rng = samples, batch_size, np.random.default_rng(0)

    def __iter__(self) -> Iterator[Any]:
        order = self.rng.permutation(self.samples)
        return (order[first : first + self.batch_size] for first in range(0, self.samples, self.batch_size))


def element_type(task: Task) -> Any:
    """torch.bfloat16 on a GPU, torch.float32 on a CPU."""
    import torch

    return torch.bfloat16 if task.device == "cuda" else torch.float32


def fastretina(task: Task, **changes: Any) -> Epoch:
    import torch

    from fastretina.loading.augment import Augment
    from fastretina.loading.loader import Loader

    settings: dict[str, Any] = {
        "batch_size": task.batch_size,
        "resolution": task.resolution,
        "workers": task.workers,
        "device": task.device,
        "dtype": torch.uint8 if task.work == "decode" else element_type(task),
        "augment": {"decode": Augment.none(), "flip": Augment(rotate=0.0), "augment": Augment.full()}[task.work],
    }
    loader = Loader(task.data, **(settings | changes))
    return lambda: (len(batch.ids) for batch in loader)


def ffcv(task: Task) -> Epoch:
    """Stock FFCV. It can flip horizontally, and neither vertically nor rotate: that is all that its augmented side does."""
    import torch
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    from fastretina.beton.reader import Beton

    beton = Beton(task.data)
    full_size = int(beton.widths[0]) == task.resolution
    image: list[Any] = [
        SimpleRGBImageDecoder() if full_size else CenterCropRGBImageDecoder((task.resolution, task.resolution), ratio=1)
    ]
    if task.work != "decode":
        image += [RandomHorizontalFlip(), NormalizeImage(np.array(MEAN_255), np.array(STD_255), np.float32)]
    to_device: list[Any] = [ToDevice(torch.device(task.device))] if task.device != "cpu" else []
    image += [ToTensor(), *to_device, ToTorchImage(convert_back_int16=False)]
    pipelines: dict[str, Any] = {"image": image, "label": [IntDecoder(), ToTensor(), *to_device, Squeeze()]}
    if beton.crcs is not None:  # a file of ours: fields that FFCV need not load
        pipelines |= {"id": None, "crc32": None}
    loader = Loader(
        task.data, batch_size=task.batch_size, num_workers=task.workers, order=OrderOption.RANDOM, os_cache=True,
        drop_last=False, pipelines=pipelines,
    )  # fmt: skip
    return lambda: (len(labels) for _, labels in loader)


def raw_copy(task: Task) -> str:
    """Where `write_raw` puts it."""
    return f"{task.scratch}/raw-{task.resolution}.beton"


def write_raw(task: Task) -> None:
    """The same images as raw pixels of the task's resolution, by FFCV's own writer: what its users cache."""
    import simplejpeg
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    from fastretina.beton.reader import Beton

    beton = Beton(task.data)

    class Images:
        def __len__(self) -> int:
            return len(beton)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return simplejpeg.decode_jpeg(beton.jpeg(index)), int(beton.labels[index])

    fields = {"image": RGBImageField(write_mode="raw", max_resolution=task.resolution), "label": IntField()}
    DatasetWriter(raw_copy(task), fields, num_workers=task.workers).from_indexed_dataset(Images())


def ffcv_raw(task: Task) -> Epoch:
    """Stock FFCV on raw pixels, which come from the page cache: nothing is decoded."""
    return ffcv(replace(task, data=raw_copy(task)))


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


def _transform(task: Task, on_tensor: bool, normalised: bool = True) -> Callable[[Any], Any]:
    import torch
    from torchvision.transforms import InterpolationMode, v2

    steps: list[Any] = [] if on_tensor else [v2.PILToTensor()]
    if task.work != "decode":
        rotation = [v2.RandomRotation(180, InterpolationMode.BILINEAR)] if task.work == "augment" else []
        normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
        steps = [*rotation, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), *steps, *(normalise if normalised else [])]
    if task.resolution != 512:
        steps = [v2.Resize(task.resolution), *steps]
    composed: Callable[[Any], Any] = v2.Compose(steps) if steps else v2.Identity()
    return composed


def _normalisation(task: Task) -> Callable[[Any, Any], Any]:
    """(R, R, 3) uint8 -> the same normalised in float32, into a tensor. By whole rows: torch takes several times as long where the
    innermost dimension has but three elements."""
    import torch

    side = task.resolution
    scale = 1 / torch.tensor(STD_255).repeat(side)
    bias = -torch.tensor(MEAN_255).repeat(side) * scale
    return lambda pixels, out: torch.addcmul(bias, pixels.reshape(side, -1), scale, out=out.view(side, -1))


def pillow(task: Task) -> Epoch:
    """The old way ("B0"): Pillow in __getitem__, torchvision's transforms, a DataLoader."""
    from PIL import Image

    return _dataset(task, lambda data: Image.open(io.BytesIO(data)).convert("RGB"), _transform(task, on_tensor=False))


def _tensor(data: bytes) -> Any:
    """A JPEG as torchvision decodes it: (3, H, W) uint8, channels-last in memory."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def torchvision(task: Task) -> Epoch:
    """torchvision's own decoder and its transforms on tensors, in a DataLoader."""
    return _dataset(task, _tensor, _transform(task, on_tensor=True))


def torchvision_pool(task: Task) -> Epoch:
    """The same on threads, which share one process: decoder and transforms leave the interpreter to others while they work. Each
    image goes into its batch on its thread; three batches are made ahead, over the end of an epoch too."""
    from concurrent.futures import Future, ThreadPoolExecutor

    import torch

    from fastretina.beton.reader import Beton

    torch.set_num_threads(1)
    beton, pool, side = Beton(task.data), ThreadPoolExecutor(task.workers), task.resolution
    order = Order(len(beton), task.batch_size)
    transform, normalise = _transform(task, on_tensor=True, normalised=False), _normalisation(task)
    decode_only = task.work == "decode"

    def fill(row: torch.Tensor, index: int) -> None:
        pixels = transform(_tensor(bytes(beton.jpeg(index)))).permute(1, 2, 0)
        if decode_only:
            row.copy_(pixels)
        else:
            normalise(pixels, row)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, list[Future[None]]]]:
        while True:
            for indices in order:
                images = torch.empty((len(indices), side, side, 3), dtype=torch.uint8 if decode_only else torch.float32)
                filled = [pool.submit(fill, row, index) for row, index in zip(images, indices.tolist(), strict=True)]
                yield images, torch.from_numpy(beton.labels[indices]), filled

    source = batches()
    ahead = deque(itertools.islice(source, 3))

    def epoch() -> Iterator[int]:
        for _ in range(-(-len(beton) // task.batch_size)):
            _, labels, filled = ahead.popleft()
            ahead.append(next(source))
            for future in filled:
                future.result()
            yield len(labels)

    return epoch


def spdl(task: Task) -> Epoch:
    """SPDL: each thread makes whole batches, as spdl.io.load_image_batch does; FFmpeg decodes, resizes, rotates (bilinear) and
    flips. One Pipeline over a source that goes on from epoch to epoch."""
    import torch
    from spdl import io as media
    from spdl.pipeline import PipelineBuilder

    from fastretina.beton.reader import Beton

    torch.set_num_threads(1)
    beton, rng, side, normalise = Beton(task.data), np.random.default_rng(0), task.resolution, _normalisation(task)
    resize = {} if int(beton.widths[0]) == side else {"scale_width": side, "scale_height": side, "scale_algo": "area"}

    def filters() -> Any:
        """FFmpeg's, drawn for one image."""
        steps = [f"rotate={rng.uniform(-np.pi, np.pi)}"] if task.work == "augment" else []
        steps += [flip for flip in ("hflip", "vflip") if task.work != "decode" and rng.random() < 0.5]
        return media.get_video_filter_desc(**resize, filter_desc=",".join(steps) or None)

    def load(indices: Any) -> tuple[Any, Any]:
        files, labels = [bytes(beton.jpeg(index)) for index in indices], torch.from_numpy(beton.labels[indices])
        if task.work == "decode":
            return media.to_torch(media.load_image_batch(files, width=None, height=None, filter_desc=filters())), labels
        images = torch.empty((len(files), side, side, 3))
        for row, file in zip(images, files, strict=True):
            normalise(media.to_torch(media.load_image(file, filter_desc=filters())), row)
        return images, labels

    builder = PipelineBuilder().add_source(Order(len(beton), task.batch_size), continuous=True)
    pipeline = builder.pipe(load, concurrency=task.workers).add_sink(2).build(num_threads=task.workers, max_failures=0)
    pipeline.start()
    return lambda: (len(labels) for _, labels in pipeline.get_iterator())


def dali(task: Task) -> Epoch:
    """NVIDIA DALI: decode, and where asked rotate (bilinear), flip and normalise. On a GPU, decoding too is there."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    from fastretina.beton.reader import Beton

    beton = Beton(task.data)
    rng = np.random.default_rng(0)
    shuffled = np.resize(rng.permutation(len(beton)), -(-len(beton) // task.batch_size) * task.batch_size)

    def sample(info: Any) -> tuple[Any, Any]:
        # Without end: the iterator knows the size, and removes what fills the last batch. At a StopIteration DALI would drop that.
        index = int(shuffled[info.idx_in_epoch % len(shuffled)])
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
        if task.work != "decode":
            images = fn.flip(images, horizontal=fn.random.coin_flip(), vertical=fn.random.coin_flip())
            images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="HWC", mean=MEAN_255, std=STD_255)
        return images, labels

    built = pipeline()
    built.build()
    iterator = DALIGenericIterator(
        [built], ["images", "labels"], len(beton), last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True
    )
    return lambda: (len(batch[0]["labels"]) for batch in iterator)


SIDES: dict[str, Callable[[Task], Epoch]] = {
    "fastretina_resident": partial(fastretina, resident="on"),
    "fastretina_cpu_decode": partial(fastretina, decode="cpu"),
    "fastretina_gpu_decode": partial(fastretina, decode="gpu"),
} | {
    side.__name__: side
    for side in (
        fastretina, ffcv, ffcv_raw, ffcv_with_our_warp, pillow, torchvision, torchvision_pool, spdl, dali, train_fastretina,
        train_synthetic,
    )
}  # fmt: skip

# What a side's user imports before the clock starts; where it is not installed the side is left out.
IMPORTS = {
    "ffcv": "ffcv.loader",
    "ffcv_raw": "ffcv.loader",
    "ffcv_with_our_warp": "fastretina.loading.ffcv",
    "pillow": "torchvision.transforms.v2",
    "torchvision": "torchvision.transforms.v2",
    "torchvision_pool": "torchvision.transforms.v2",
    "spdl": "spdl.pipeline",
    "dali": "nvidia.dali.plugin.pytorch",
}

# Files of its own that a side reads, made before the clock starts, as the others' .beton is.
FILES: dict[str, Callable[[Task], None]] = {"ffcv_raw": write_raw}
