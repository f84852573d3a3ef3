"""What torchrun starts in a test: `rank_split.py DATA DEVICE`. Ranks on devices with room for 60 % of the data set split it, and
each compares its batches with those of a loader that keeps nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from devices import DeviceLoader

from fastretina.beton.reader import Beton
from fastretina.loading import loader, resident
from fastretina.loading.resident import Store, plan_residence
from fastretina.training.distributed import joined


def main(path: Path, device: str) -> None:
    with Beton(path) as beton:
        side, count = int(beton.widths[0]), len(beton)
    resident.device_available_bytes = lambda device: int(0.6 * Store.nbytes(count, side, side))
    loader.plan_residence = lambda beton, config: plan_residence(beton, replace(config, device="cuda"))
    with joined(device) as world:
        settings = {"batch_size": 4, "resolution": side, "device": str(world.device), "decode": "cpu", "workers": 1, "seed": 3}
        settings |= {"rank": world.rank, "world_size": world.size}
        with DeviceLoader(path, resident="on", peers=world.peers, **settings) as split, DeviceLoader(path, **settings) as plain:
            for _ in range(2):
                for found, expected in zip(split, plain, strict=True):
                    assert torch.equal(found.ids, expected.ids)
                    assert torch.equal(found.images, expected.images)
            kept = world.gather((split.description, list(split._stage.owned)))
        if world.is_main:
            assert [number for _, owned in kept for number in owned] == list(range(count))
            print(kept[0][0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
