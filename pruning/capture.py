"""One pass over images that shows every layer's input and the gradient at its output, image by image."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import ResNet, all_on
from utils import parallel
from utils.modes import evaluation_mode

FISHER_TYPES = ("true", "empirical")

Visit = Callable[[str, nn.Module, Tensor, Tensor], None]


def visit_gradients(
    network: ResNet,
    layers: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    fisher_type: str,
    draws: torch.Generator,
    visit: Visit,
    fisher_draws: int = 1,
) -> int:
    """Call ``visit(name, layer, a, g)`` for every layer, batch and draw of labels.

    ``a`` [N, in, H, W] is the layer's input; ``g`` [N, out, H', W'] the gradient of each image's own loss at the
    layer's output: losses are summed over the batch, so there is no 1/N to undo.  The network runs in evaluation mode
    (batch norms do not mix images), in its own precision, with every switch on: static pruning judges every block by
    what it does when it runs.

    Where several processes share the batches (``utils.parallel``), each visits the images of its part.

    Args:
        fisher_type: "true" draws each label from the network's own prediction, "empirical" takes it from the data.
        draws: generator of the labels, on the network's device.
        fisher_draws: labels drawn for each image; the batch then runs forward once and backward so many times.  The
            empirical Fisher has one label an image.

    Returns:
        the number of images seen, by all processes together, each counted once a draw.
    """
    handles = [layer.register_forward_hook(_show(name, visit)) for name, layer in layers.items()]
    trainable = [p for p in network.parameters() if p.requires_grad]
    repeats = fisher_draws if fisher_type == "true" else 1
    images = 0
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)  # weight gradients are not needed: a third of the pass is saved
        with evaluation_mode(network):
            for x, given in batches:
                x = x.detach().requires_grad_()
                logits = network(x, decide=all_on, skip=False).logits
                if fisher_type == "true":
                    labels = parallel.local_part(_drawn_labels(logits.detach(), len(given), repeats, draws))
                else:
                    labels = parallel.local_part(given)[:, None]
                images += len(given) * repeats
                if len(x) == 0:  # the last batch may be too small for all processes
                    continue
                for draw in range(repeats):
                    loss = F.cross_entropy(logits, labels[:, draw], reduction="sum")
                    torch.autograd.grad(loss, x, retain_graph=draw < repeats - 1)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return images


def _drawn_labels(logits: Tensor, images: int, repeats: int, draws: torch.Generator) -> Tensor:
    """Labels [images, repeats] of a whole batch, of which only those of this process's part mean anything.

    So a process's labels are those that one process alone would draw for these images.
    """
    p = logits.new_ones(images, logits.shape[1])
    parallel.local_part(p).copy_(logits.softmax(dim=1))
    return torch.multinomial(p, repeats, replacement=True, generator=draws)


def _show(name: str, visit: Visit):
    def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        a = inputs[0].detach()
        output.register_hook(lambda g: visit(name, layer, a, g))

    return hook


def first_images(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from the first on, until they hold so many labels, those of all processes."""
    seen = 0
    for x, labels in batches:
        if seen >= count:
            return
        seen += len(labels)
        yield x, labels
