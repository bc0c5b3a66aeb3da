"""Passes over images that record every layer's input and the gradient at its output, image by image."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import LowRankLinear, kind_of
from utils import parallel
from utils.errors import UserError
from utils.modes import evaluation_mode, frozen, hooked, layer_input

FISHER_TYPES = ("true", "empirical")

Batches = Callable[[], Iterable[tuple[Tensor, Any]]]  # makes a new pass over images with their labels
Forward = Callable[[nn.Module, Tensor], Any]
LossFn = Callable[[Any, Any], Tensor]
Visit = Callable[[str, nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True)
class Passes:
    """The measurements of pruning: images, the forward pass, and the loss.

    Where several processes share the images (``utils.parallel``), a batch holds this process's part of the inputs and
    the labels of all.
    """

    batches: Batches
    draws: torch.Generator | None = None  # of the random signs of the "true" Fisher, on the network's device
    fisher_type: str = "true"  # of the network's own prediction (``score_directions``), or "empirical": of the labels
    forward: Forward = nn.Module.__call__  # from network and inputs to logits [N, classes], or to what loss_fn takes
    loss_fn: LossFn | None = None  # from outputs and labels to each image's loss [N]; None: classification
    say: Callable[[str], None] = lambda line: None  # called with the seconds of each phase
    most: int | None = None  # images of a pass, counted over all processes, see ``some_images``; None: all

    def some(self, count: int) -> "Passes":
        """The same over ``count`` images only, if there are more."""
        return replace(self, most=count if self.most is None else min(count, self.most))

    def on(self, network: nn.Module) -> Iterator[tuple[Tensor, Any]]:
        """One pass, on the network's device.

        Raises:
            UserError: if there are no batches, or others than of inputs and labels.
        """
        device, batch = next(network.parameters()).device, None
        for batch in self.batches() if self.most is None else some_images(self.batches(), self.most):
            x, labels = _pair(batch)
            if self.loss_fn is None and not (isinstance(labels, Tensor) and labels.dim() == 1):
                raise UserError("the labels of a batch are not a tensor [N] of classes: give loss_fn= for another task")
            yield x.detach().to(device), labels.to(device) if isinstance(labels, Tensor) else labels
        if batch is None:
            raise UserError("batches() yields nothing: each call has to start a new pass over a few thousand images")

    def probe(self, x: Tensor, given: Any) -> tuple[Tensor, Forward, Forward | None]:
        """Inputs and a forward pass to see how the network is used: two images, or the batch where a loss is given.

        The loss may leave out some outputs, such as that of an auxiliary head.  The third is the pass without the loss.
        """
        if self.loss_fn is None:
            two = x[:2] if len(x) else x.new_zeros(2, *x.shape[1:])
            return two, lambda net, inputs: _no_probabilities(class_scores(self.forward(net, inputs))), None
        of_images = lambda net, inputs: _losses(self.loss_fn, self.forward(net, inputs), given, len(x))  # noqa: E731
        return x, of_images, self.forward

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Log how long a phase takes."""
        start = time.perf_counter()
        yield
        self.say(f"{name}: {time.perf_counter() - start:.1f} s")


def visit_gradients(network: nn.Module, layers: Mapping[str, nn.Module], passes: Passes, visit: Visit) -> int:
    """Call ``visit(name, layer, a, g)`` for every layer and batch.

    ``a`` [N, in, H, W] is the layer's input; ``g`` [N, out, H', W'] the gradient of each image's own loss at the
    layer's output: losses are summed over the batch, so there is no 1/N to undo.  Of a linear layer the tokens of an
    image are its positions, [N, in, tokens, 1].  The network runs in evaluation mode (batch norms do not mix images),
    in its own precision.

    Where several processes share the batches (``utils.parallel``), each visits the images of its part.

    Returns:
        the number of images seen by all processes together.
    """
    seen = [0]  # images of the batch that is running
    images, ran = 0, set()
    shown = (layer.register_forward_hook(_show(n, visit, seen, ran), with_kwargs=True) for n, layer in layers.items())
    with hooked(shown), differentiable(network, layers.values()) as starts:
        for x, given in passes.on(network):
            seen[0] = len(x)
            starts.clear()
            ran.clear()
            # A copy, so that a network may change its input in place.
            outputs = passes.forward(network, x.clone())
            check_ran(layers, ran)
            loss = _loss(outputs, given, passes, len(x))
            images += images_of(x, given)
            if len(x) > 0:  # the last batch may be too small for all processes
                gradients(loss, starts)
    return images


def check_ran(layers: Iterable[str], ran: Collection[str]) -> None:
    """Refuse layers that run in some passes only, as those that are skipped at random.

    Raises:
        UserError: names them.
    """
    if left_out := [name for name in layers if name not in ran]:
        raise UserError(
            f"layer {', '.join(left_out)} is left out in some passes: leave it as it is with ignored_layers={left_out}"
        )


def gradients(loss: Tensor, inputs: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a sum; None where it does not depend on an input.

    Raises:
        UserError: if the network cannot be differentiated.
    """
    try:
        return torch.autograd.grad(loss, list(inputs), allow_unused=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the network cannot be differentiated in evaluation mode ({reason}): correct that in its forward pass"
        ) from error


@contextmanager
def differentiable(network: nn.Module, layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Evaluation mode, with gradients of features only: those of the weights would add half to the time of a pass.

    Features have gradients from the first of ``layers`` on, whatever they were made from: images, indices of words, or
    layers without gradients.

    Yields:
        the list of these starts, to which every forward pass adds its own.
    """
    starts: list[Tensor] = []

    def start(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = layer_input(args, kwargs)
        if given.requires_grad and starts:
            return None
        starts.append(given.detach().requires_grad_())
        return ((starts[-1], *args[1:]), kwargs) if args else (args, {**kwargs, "input": starts[-1]})

    started = (layer.register_forward_pre_hook(start, with_kwargs=True, prepend=True) for layer in layers)
    with frozen(network), hooked(started), evaluation_mode(network), torch.enable_grad():
        yield starts


def _pair(batch: Any) -> tuple[Tensor, Any]:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor)):
        raise UserError(
            f"batches() yields a {type(batch).__name__}, but (inputs, labels) is needed, with all inputs in one "
            "tensor: pack them together, or wrap the network in a module that unpacks them"
        )
    return batch


def images_of(x: Tensor, labels: Any) -> int:
    """The images in a batch, over all processes: of several, each holds its part of the inputs and all labels."""
    return len(labels) if parallel.world_size() > 1 and isinstance(labels, Tensor) else len(x)


def _loss(outputs: Any, given: Any, passes: Passes, images: int) -> Tensor:
    """This process's sum to differentiate."""
    if passes.loss_fn is not None:
        own = parallel.local_part(given) if isinstance(given, Tensor) else given
        return _losses(passes.loss_fn, outputs, own, images).sum()
    logits = class_scores(outputs)
    if passes.fisher_type == "true":
        signs = _signs((len(given), logits.shape[1]), logits, passes.draws)
        return (logits * score_directions(logits.detach(), parallel.local_part(signs))).sum()
    labels = parallel.local_part(given).long()
    try:
        return F.cross_entropy(logits, labels, reduction="sum")
    except IndexError as error:
        raise UserError(
            f"the labels are no classes from 0 to {logits.shape[1] - 1} ({error}): give such labels"
        ) from error


def _losses(loss_fn: LossFn, outputs: Any, given: Any, images: int) -> Tensor:
    losses = loss_fn(outputs, given)
    if isinstance(losses, Tensor) and losses.shape == (images,):
        return losses
    raise UserError(
        f"loss_fn returned {kind_of(losses)} for a batch of {images}: it has to return a loss for each image, a tensor "
        f"[{images}], such as the mean over its positions"
    )


def class_scores(outputs: Any) -> Tensor:
    """The outputs of a classifier, checked.

    Raises:
        UserError: unless the outputs are [N, classes], of two classes or more.
    """
    if isinstance(outputs, Tensor) and outputs.dim() == 2:
        if outputs.shape[1] < 2:
            raise UserError(
                "the network returns one score for each image, of which a softmax is always 1: give loss_fn=, for "
                "example binary_cross_entropy_with_logits(scores.squeeze(1), labels.float(), reduction='none')"
            )
        return outputs
    raise UserError(
        f"the network returns {kind_of(outputs)}, but classification needs scores [N, classes]: pick them with "
        "logits=, or give loss_fn= for another task"
    )


def _no_probabilities(scores: Tensor) -> Tensor:
    """The scores, checked; a GPU would wait for this, so it is done once."""
    if (scores >= 0).all() and torch.allclose(scores.sum(dim=1), scores.new_ones(()), atol=1e-3):
        raise UserError(
            "the network returns probabilities, but classification needs the scores before the softmax: leave the "
            "softmax out, or give logits=lambda p: p.log()"
        )
    return scores


def score_directions(logits: Tensor, signs: Tensor) -> Tensor:
    """Random gradients at the scores whose second moment is the Fisher's there, diag(p) - p p^T.

    They are v = sqrt(p) s - p (sqrt(p) . s) for independent random signs s.  A label drawn from p gives the gradient
    p - e_label, of the same second moment; but of a network that is sure of nearly every image, nearly every gradient
    is then close to zero and a few large ones decide, so that thousands of images are needed for what a hundred show
    here.  Sources: the factor of the Gauss-Newton matrix in Dangel et al., arXiv:1912.10985, section 2; random signs
    for its trace, Hutchinson 1990.

    Args:
        logits: [N, classes].
        signs: [N, classes], -1 and 1.

    Returns:
        [N, classes].
    """
    p = logits.softmax(dim=1)
    scaled = p.sqrt() * signs
    return scaled - p * scaled.sum(dim=1, keepdim=True)


def _signs(shape: tuple[int, int], like: Tensor, draws: torch.Generator | None) -> Tensor:
    """Random signs for a whole batch: a process thus draws for its images what a single process would draw for them."""
    return 2 * torch.randint(0, 2, shape, generator=draws, device=like.device).to(like) - 1


def _show(name: str, visit: Visit, seen: list[int], ran: set[str]):
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        ran.add(name)
        images, given = seen[0], layer_input(args, kwargs).detach()
        if len(given) % max(1, images) if is_linear(layer) else len(given) != images:
            raise UserError(
                f"layer {name} ran on {len(given)} inputs for {images} images, so some images do not reach it: leave "
                f"it as it is with ignored_layers=[{name!r}]"
            )
        precision = next(layer.parameters()).dtype  # within autocast, features have another one
        a = as_images(layer, given.to(precision), images)

        output.register_hook(lambda g: visit(name, layer, a, as_images(layer, g.to(precision), images)))

    return hook


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear or has replaced a linear one, rather than a convolution."""
    return isinstance(layer, nn.Linear | LowRankLinear)


def as_images(layer: nn.Module, t: Tensor, images: int) -> Tensor:
    """A linear layer's inputs or outputs [N, ..., channels] as [N, channels, positions, 1]; a convolution's as is."""
    if not is_linear(layer):
        return t
    positions = t[..., 0].numel() // max(1, images)
    return t.reshape(images, positions, t.shape[-1]).transpose(1, 2).unsqueeze(3)


def some_images(batches: Iterable[tuple[Tensor, Any]], count: int) -> Iterator[tuple[Tensor, Any]]:
    """Batches until they hold ``count`` images, counted over all processes.

    They are spaced evenly where their number is known, as that of a data loader: its images may be sorted by class.
    """
    seen, needed = 0, 0
    for i, batch in enumerate(batches):
        x, labels = _pair(batch)
        if needed == 0:
            needed = math.ceil(count / max(1, images_of(x, labels)))
            total = max(needed, length_hint(batches, needed))
        if seen >= count:
            return
        if i == 0 or i * needed // total > (i - 1) * needed // total:
            seen += images_of(x, labels)
            yield x, labels
