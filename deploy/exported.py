"""The graph of a checkpoint: a switched network, a network of the user's own, or a cascade."""

from collections.abc import Callable

import onnx

from deploy.aligned import aligned, vector_channels
from deploy.cascades import cascade_model
from deploy.folding import folded, without_switches
from deploy.general import general_model
from deploy.graphs import onnx_model
from models import Cascade, OwnNetwork, ResNet
from utils.data.augment import Normalisation
from utils.sizes import Size, height_width

Finish = Callable[[onnx.ModelProto], onnx.ModelProto]


def exported_model(
    network: ResNet | OwnNetwork | Cascade,
    normalisation: Normalisation,
    image_size: Size,
    switches: bool = True,
    finish: Finish | None = None,
) -> onnx.ModelProto:
    """Uint8 images [N, 3, H, W] to logits [N, classes] and what was decided.

    Args:
        normalisation: that the network expects; the members of a cascade have their own.
        switches: false runs every block.
        finish: applied to the graph, or to that of each member: for example ``deploy.int8.quantised``.
    """
    if isinstance(network, Cascade):
        members = network.architecture["members"]
        expected = [Normalisation(tuple(member["mean"]), tuple(member["std"])) for member in members]
        graphs = [
            exported_model(member, own, image_size, switches, finish)
            for member, own in zip(network.members, expected, strict=True)
        ]
        return cascade_model(graphs, network.thresholds, network.answer)
    if isinstance(network, OwnNetwork):
        model, _ = general_model(network.network, normalisation, *height_width(image_size))
        return model if finish is None else finish(model)
    plain = aligned(folded(network), vector_channels())
    model = onnx_model(plain if switches else without_switches(plain), normalisation, image_size)
    return model if finish is None else finish(model)
