"""Several processes that train one network together, as ``torchrun`` starts them.

Every process holds the whole network and takes its part of every batch.  What one process would sum over a batch is
summed over the processes, and random numbers are drawn for whole batches by each of them, so that N processes do what
one does, up to rounding.  A single process has rank 0 of 1, and every function below leaves its argument as it is.

Tensors on GPUs travel through NCCL, those on the CPU through gloo.  Where a process dies, torchrun ends the others.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from utils.errors import UserError

# How long processes wait for one that is busy: for example with reading images, or with measuring networks.
PATIENCE = timedelta(hours=2)

T = TypeVar("T")

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Meanwhile the processes of a group that the user has made count as single ones."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _joined() -> bool:
    return dist.is_initialized() and not _alone.get()


def world_size() -> int:
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and logs."""
    return rank() == 0


def hide_progress_bar() -> bool | None:
    """``disable`` of tqdm: one process shows a bar, where standard error is a terminal."""
    return None if is_main_process() else True


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if _joined() else 1


def distributed(main: Callable[[], None]) -> Callable[[], None]:
    """``main`` as one of the processes that torchrun started, or alone where it did not."""

    def run() -> None:
        if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
            main()
            return
        _join()
        main()
        dist.destroy_process_group()

    return run


def _join() -> None:
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but LOCAL_RANK is not set: start the processes with torchrun"
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise UserError(f"there is no GPU for process {local + 1} of this machine, which has {gpus}: start fewer")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)


@contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    """A collective fails where another process has ended: that is said in a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another process of this run has ended, so process {rank()} of {world_size()} ends too; what was saved is "
            f"kept: the same command with --resume continues from there"
        ) from error


def local_part(values: Tensor) -> Tensor:
    """This process's part of what belongs to the images of a whole batch, along the first axis."""
    return values.tensor_split(world_size())[rank()]


def local_slice(images: int) -> slice:
    """``local_part`` of so many images as a slice."""
    own = local_part(torch.arange(images))
    return slice(own[0].item(), own[-1].item() + 1) if len(own) else slice(0, 0)


def all_reduced(values: Tensor) -> Tensor:
    """The sum over all processes; no gradient flows through it."""
    if world_size() == 1:
        return values
    total = values.detach().clone(memory_format=torch.contiguous_format)
    with _lost_if_it_fails():
        dist.all_reduce(total)
    return total


class Summed(Function):
    """``all_reduced``, through which a gradient flows: the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return all_reduced(values)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return all_reduced(g)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, each of its own part of the batch's mean loss.

    A parameter that was not used, in a block that every image skipped, gets a gradient of zero: momentum and weight
    decay move it as they do on a GPU, where every block is computed and multiplied.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world_size() == 1:
        return
    total = all_reduced(torch.cat([p.grad.flatten() for p in parameters]))
    for p, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(gradient.view_as(p))  # in its own layout, that of the weight


def broadcast_weights(network: nn.Module) -> None:
    """Give every process the parameters and buffers of the first, whatever rounding has made of its own."""
    if world_size() == 1:
        return
    with torch.no_grad(), _lost_if_it_fails():
        for tensor in network.state_dict().values():
            sent = tensor.contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)


def broadcast_object(value: Any) -> Any:
    """The writer's value in every process, its tensors on the CPU.

    Plainly pickled, those of a GPU would be unpacked on the writer's GPU by all.
    """
    if world_size() == 1:
        return value
    packed = io.BytesIO()
    if is_main_process():
        torch.save(value, packed)
    sent = [packed.getvalue()]
    with _lost_if_it_fails():
        dist.broadcast_object_list(sent, 0)
    return torch.load(io.BytesIO(sent[0]), map_location="cpu", weights_only=False)  # from this program's own process


def from_main_process(find: Callable[[], T]) -> T:
    """What ``find`` returns in the first process, in all of them: others may see other files.  All raise its error."""
    found, error = None, None
    if is_main_process():
        try:
            found = find()
        except UserError as refused:
            error = refused
    found, error = broadcast_object((found, error))
    if error is not None:
        raise error
    return found


def barrier() -> None:
    """Until every process has come here."""
    all_reduced(torch.zeros(1))


@contextmanager
def main_process_first() -> Iterator[None]:
    """The writer goes first and the others follow when it is done: with a file that it leaves for them, say."""
    if not is_main_process():
        barrier()
    yield
    if is_main_process():
        barrier()
