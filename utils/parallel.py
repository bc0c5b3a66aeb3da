"""Several processes that train one network together, as ``torchrun`` starts them.

Every process holds the whole network and takes its part of every batch.  What one process would sum over a batch is
summed over the processes, and random numbers are drawn for whole batches by each of them, so that N processes do what
one does.  Here a single process has rank 0 of 1 and every function below leaves its argument as it is.

Tensors on GPUs travel through NCCL, those on the CPU through gloo.
"""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import accumulate
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError, report_error
from utils.heartbeats import heartbeats

# A process that dies is noticed at once by its closed connections or by torchrun, else by ``utils.heartbeats``.  This
# bounds how long processes wait for one that is there but busy: with reading images, say, or with measuring networks.
PATIENCE = timedelta(hours=2)
LAST_WORDS = 10.0  # seconds that a process that is told to end may take for it; torchrun kills it after 30
ANSWER = 5.0  # seconds that the first process to fail is asked for


class ProcessLostError(UserError):
    """A process has ended, and the others cannot continue without it."""

    def __init__(self, what: str = "a process of this run has ended"):
        super().__init__(
            f"{what}, so process {rank()} of {world_size()} ends too; what was saved is kept: the same command with "
            f"--resume continues from there"
        )


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def hide_progress_bar() -> bool | None:
    """``disable`` of tqdm: one process shows a bar, where standard error is a terminal."""
    return None if is_main_process() else True


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if dist.is_initialized() else 1


def distributed(main: Callable[[], None]) -> Callable[[], None]:
    """``main`` as one of the processes that torchrun started, or alone where it did not.

    The first process that fails prints why; the others, which fail because of it, end silently.
    """

    def run() -> None:
        if os.environ.get("WORLD_SIZE", "").strip() in ("", "1"):
            main()
            return
        _join()
        with heartbeats(rank(), world_size(), lambda lost: _end(ProcessLostError(lost))):
            try:
                main()
            except (UserError, KeyboardInterrupt) as error:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends anyway
                _end(error)
        dist.destroy_process_group()

    return run


def _join() -> None:
    if "LOCAL_RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but LOCAL_RANK is not set: use torchrun")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise UserError(f"there is no GPU for process {local + 1} of this machine, which has {gpus}: start fewer")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot reach each other ({error}): start them with torchrun") from error
    signal.signal(signal.SIGTERM, _told_to_end)  # which torchrun sends to the others when one has died
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of several processes one tells
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)
    threading.Thread(target=_end_after, args=(reading,), daemon=True).start()


def _told_to_end(*_: Any) -> None:
    raise ProcessLostError


def _end_after(signals: int) -> None:
    """End the process some time after a signal: code that waits for a GPU or a process does not handle signals.

    Args:
        signals: file that each signal's number is written to.
    """
    while os.read(signals, 1)[0] != signal.SIGTERM:
        pass
    time.sleep(LAST_WORDS)
    _end(ProcessLostError())


def _end(error: BaseException) -> NoReturn:
    """At once: PyTorch's own way out may wait for processes that are gone."""
    code = report_error(error) if _first_to_fail() else 1
    sys.stdout.flush()
    os._exit(code)


def _first_to_fail() -> bool:
    """Whether no other process has failed before this one; true if torchrun is gone, which knows it."""
    answers: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(dist.distributed_c10d._get_default_store().add("failed", 1))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER)
    return answers in ([], [1])


@contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError from error


def local_part(values: Tensor) -> Tensor:
    """This process's part of what belongs to the images of a whole batch, along the first axis."""
    return values.tensor_split(world_size())[rank()]


def local_slice(images: int) -> slice:
    """``part`` of so many images as a slice."""
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


def all_gathered(values: Tensor) -> Tensor:
    """The values [n] of each process on a GPU, [processes, n]."""
    if world_size() == 1:
        return values[None]
    every = values.new_empty(world_size(), len(values))
    with _lost_if_it_fails():
        dist.all_gather_into_tensor(every, values)
    return every


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, each of its own part of the batch's mean loss.

    An unused parameter, in a block that every image skipped, gets a gradient of zero, so that momentum and weight decay
    act on it as on a GPU, where every block is computed and multiplied by its decisions.
    """
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world_size() == 1:
        return
    flat = parameters[0].new_empty(sum(p.numel() for p in parameters))
    torch._foreach_copy_(_pieces(flat, parameters), [p.grad for p in parameters])
    for p, gradient in zip(parameters, _pieces(all_reduced(flat), parameters), strict=True):
        p.grad = gradient


def _pieces(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """One vector as tensors of the parameters' shapes and layouts: what is copied there takes one launch in all."""
    offsets = accumulate((p.numel() for p in parameters), initial=0)
    return [flat.as_strided(p.shape, p.stride(), offset) for p, offset in zip(parameters, offsets, strict=False)]


def broadcast_weights(network: nn.Module) -> None:
    """Give every process the parameters and buffers of the first, so that rounding cannot make them differ."""
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
