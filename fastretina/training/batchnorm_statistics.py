"""BatchNorm's mean and variance, estimated anew for the weights of now before they are evaluated.

In training each step moves the running averages by a tenth towards its own batch's, so that they lag behind the weights by some
ten steps: while those still move fast, the network is better than its averages let it look (Wu and Johnson, Rethinking "Batch" in
BatchNorm, 2021, section 3, "precise BN").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from fastretina.loading.batches import Batch
from fastretina.loading.loader import Loader
from fastretina.models.inference import no_cudnn_benchmark
from fastretina.models.precision import Precision

# Of one forward pass, over all ranks if they are synchronised: always as many, so that statistics do not depend on --batch-size.
BATCH = 32


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there is anything to estimate."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def batches_of(images: int, ranks: int) -> dict[str, Any]:
    """The loader's options for a training set of so many images, whose batches `ranks` ranks divide: each has one at least."""
    size = max(min(BATCH, images), ranks)
    # A last batch would count as a whole one, and be of a single image perhaps, on which BatchNorm cannot be trained.
    return {"batch_size": size, "drop_last": size <= images}


def estimate_statistics(
    model: nn.Module, loader: Loader, images: int, epoch: int, precision: Precision, stop: Callable[[], None] = lambda: None
) -> None:
    """Replace the mean and variance of every BatchNorm of the model by their average over the first batches of an epoch.

    Of weights, data and epoch alone. Under synchronised BatchNorm to be called by all ranks. `stop` is called between batches and
    may raise: the statistics are then of no use, and have to be estimated anew.

    Args:
        loader: of the training set, as training sees it: augmented, and sampled in the same way; see `batches_of`.
        images: of how many at least, in whole batches; of fewer where an epoch has not as many. epoch: from 0.
    """
    loader.set_epoch(epoch)

    def batches() -> Iterator[Batch]:
        for batch in islice(loader, -(-images // loader.batch_size)):
            yield batch
            stop()

    with precision.autocast(), no_cudnn_benchmark():
        update_bn(batches(), model)
