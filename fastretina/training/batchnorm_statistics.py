"""BatchNorm's mean and variance, estimated anew for the weights of now before they are evaluated.

In training each step moves the running averages by a tenth towards its own batch's, so that they lag behind the weights by some
ten steps: while those still move fast, the network is better than its averages let it look (Wu and Johnson, Rethinking "Batch" in
BatchNorm, 2021, section 3, "precise BN").
"""

from __future__ import annotations

from itertools import islice

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from fastretina.loading.loader import Loader
from fastretina.models.precision import Precision

# Of one forward pass, over all ranks if they are synchronised: always as many, so that statistics do not depend on --batch-size.
BATCH = 32


def has_batchnorm(model: nn.Module) -> bool:
    """Whether there is anything to estimate."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def estimate_statistics(model: nn.Module, loader: Loader, images: int, epoch: int, precision: Precision) -> None:
    """Replace the mean and variance of every BatchNorm of the model by their average over the first batches of an epoch.

    A pure function of weights, data and epoch. Under synchronised BatchNorm to be called by all ranks.

    Args:
        loader: of the training set, as training sees it: augmented, and sampled in the same way; with no batch of a single image.
        images: of how many; all where the training set has no more. epoch: from 0.
    """
    loader.set_epoch(epoch)
    batches = -(-images // loader.batch_size)
    with precision.autocast():
        update_bn(islice(loader, batches), model)
