"""Several processes that train one model: PyTorch's own engine, as torchrun starts it.

A rank is one of them. Rank 0 is the main one: it alone prints, writes and decides; the others train and evaluate their parts.
What is said between ranks besides gradients travels between CPUs (gloo), so that nothing here waits for a GPU.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.rendezvous import rendezvous

from fastretina.errors import FastretinaError, RunError, UsageError, printable
from fastretina.loading.shared_memory import Peers
from fastretina.models.precision import choose_device

T = TypeVar("T")
CPU = torch.device("cpu")

# No rank waits longer than this for a sign of life of another: one that hangs then ends the run on all the others. A rank that does
# not wait for a GPU learns of a death at once, from its closed connection.
PATIENCE = timedelta(seconds=50)
BEAT = 5.0  # seconds between two signs of life of rank 0, while it does alone what may take longer than that: to save, to draw
STORE_ANSWERS = 5.0  # seconds, within which torchrun's store answers, or never will
# Except while torch.compile works, which takes minutes, and not the same on each rank.
PATIENCE_COMPILING = timedelta(minutes=20)


@dataclass(frozen=True)
class World:
    """All ranks, seen from one of them. Its methods must be called by all ranks alike; with a single one they cost nothing.

    Attributes:
        rank: 0 to size - 1. local_size: ranks on this machine. device: this rank's. peers: the ranks of this machine, where there
        are several. beats: the process group that rank 0's signs of life take.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: torch.device = CPU
    peers: Peers | None = None
    beats: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, writes and decides."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to sum a tensor over all ranks, in place; what is returned waits for the sum."""
        if self.size == 1:
            return lambda: tensor
        work = dist.all_reduce(tensor, async_op=True)

        def wait() -> Tensor:
            assert work is not None
            work.wait()
            return tensor

        return wait

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def decided(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, or does alone; the others take it over. They wait for as long as rank 0's process lives and can be
        heard, however long that takes."""
        if self.size == 1:
            return decide()
        box: list[T | None] = [None]
        if self.is_main:
            with self._beating():
                box = [decide()]
        else:
            while not self._beat(over=False):
                pass
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]  # rank 0 put a T there

    def _beat(self, over: bool) -> bool:
        """A sign of rank 0's life, with which all ranks meet: whether it is the last, which rank 0 says."""
        word = torch.tensor(over)
        dist.broadcast(word, src=0, group=self.beats)
        return bool(word)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        over, missed = threading.Event(), list[RuntimeError]()

        def beat() -> None:
            try:
                while not over.wait(BEAT):
                    self._beat(over=False)
            except RuntimeError as error:  # of a rank that is gone or hangs
                missed.append(error)

        thread = threading.Thread(target=beat, name="fastretina-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if missed:
            raise missed[0]
        self._beat(over=True)

    def gather(self, part: T) -> list[T]:
        """All ranks' parts on rank 0, in their order; nothing on the others."""
        if self.size == 1:
            return [part]
        parts: list[Any] = [None] * self.size
        dist.gather_object(part, parts if self.is_main else None)
        return parts if self.is_main else []

    def share(self, module: nn.Module) -> None:
        """Give the module rank 0's weights and buffers."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: its gradients become the mean over the ranks.

        Buffers (BatchNorm's statistics) are rank 0's at the beginning of each step: so they are the same after a resume.
        """
        return model if self.size == 1 else nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


ALONE = World()


@dataclass(frozen=True)
class MachinePeers:
    """The ranks of one machine: see `fastretina.loading.shared_memory.Peers`."""

    rank: int
    size: int
    group: Any

    def gather(self, part: T) -> list[T]:
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part, group=self.group)
        return parts

    @classmethod
    def find(cls, timeout: timedelta) -> MachinePeers | None:
        """Those that torchrun started with this one; None where each rank has a machine of its own. To be called by all ranks."""
        mine = int(os.environ.get("GROUP_RANK", -1 - dist.get_rank()))  # torchrun's number of the machine
        machines: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(machines, mine)
        ranks = [[rank for rank, machine in enumerate(machines) if machine == one] for one in sorted(set(machines))]
        if len(ranks) == len(machines):
            return None
        group, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout, backend="gloo")
        together = next(one for one in ranks if dist.get_rank() in one)
        return cls(together.index(dist.get_rank()), len(together), group) if len(together) > 1 else None


def without_sum(forward: Any) -> AbstractContextManager[None]:
    """While entered, gradients stay on their rank and add up there: for all micro-batches of a step but the last."""
    context: AbstractContextManager[None] = getattr(forward, "no_sync", nullcontext)()
    return context


@contextmanager
def joined(device_name: str, compiling: bool = False) -> Iterator[World]:
    """The world that torchrun made, until the block ends; without torchrun, or with one rank, a single rank on the device.

    device_name: see `choose_device`; of several CUDA devices each rank takes its own. compiling: wait longer for each other.

    An error of a rank ends its process with the error's exit code. The first to fail says why, with its number, and torchrun's
    report repeats it; what follows from that on the others (closed connections, mostly) ends them without a word.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(key, default))
        for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if size == 1:
        yield World(device=choose_device(device_name))
        return
    errors = get_error_handler()
    errors.initialize()
    store, _, _ = next(iter(rendezvous("env://")))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the store over its restarts, and with it the addresses of dead ranks, to which gloo would try to connect.
        # Agents on several machines may count differently: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each start its own store.
        store = PrefixStore(f"fastretina/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        device = choose_device(device_name)
        if device.type == "cuda":
            if torch.cuda.device_count() < local_size:
                raise UsageError(f"{local_size} ranks on a machine with {torch.cuda.device_count()} GPUs: give each rank one")
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        timeout = PATIENCE_COMPILING if compiling else PATIENCE
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
        beats = dist.new_group(backend="gloo", timeout=timeout)
        yield World(rank, size, local_size, device, MachinePeers.find(timeout), beats)
    except Exception as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all when one has failed; this one ends with its own exit code
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            error = RunError(f"another rank is gone, or has not answered: {error}")
        if _is_first_to_fail(store):
            errors.record_exception(error)
            if not isinstance(error, FastretinaError):
                traceback.print_exception(error)
            print(printable(f"error: rank {rank}: {error}"), file=sys.stderr, flush=True)
        sys.exit(error.exit_code if isinstance(error, FastretinaError) else FastretinaError.exit_code)
    dist.destroy_process_group()


def _is_first_to_fail(store: Store) -> bool:
    """Whether no other rank has failed before; also where the store does not answer: that of a rank which hangs never would."""
    found: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the store went down with its machine
            found.append(int(store.add("fastretina/failed", 1)))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(STORE_ANSWERS)
    return found in ([], [1])
