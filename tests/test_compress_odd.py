"""``compress`` on networks and batches that are unusual, yet occur: each answer is right, or one sentence."""

import copy
import threading

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

from models import low_rank
from pruning import compress, edits_of
from pruning.capture import Passes
from pruning.refit import refit
from pruning.survey import survey, unsuited
from utils import parallel
from utils.errors import UserError
from utils.flops import cost_on
from utils.modes import copied

CLASSES = 4


def small(classes: int = CLASSES) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    ).eval()  # fmt: skip


def images(shape=(3, 8, 8), count=4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, *shape, generator=generator), torch.arange(8) % CLASSES) for _ in range(count)]


class Around(nn.Module):
    """A network around another one."""

    def __init__(self, inner: nn.Module | None = None):
        super().__init__()
        self.inner = small() if inner is None else inner

    def forward(self, x):
        return self.inner(x)


class WithoutGradients(Around):
    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


class InPlace(Around):
    def forward(self, x):
        x -= 0.5
        x /= 0.25
        return self.inner(x)


class Keeps(Around):
    """Keeps a feature, as for Grad-CAM."""

    def forward(self, x):
        self.last = self.inner[:5](x)
        self.all = {"last": [self.last]}
        return self.inner[5:](self.last)


class Autocast(Around):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


class Remembered(Around):
    """Reads a feature that a hook keeps in the network that it was made for."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.inner[3].register_forward_hook(lambda module, args, output: self.kept.update(now=output))

    def forward(self, x):
        scores = self.inner(x)
        return scores + self.kept["now"].mean(dim=(1, 2, 3))[:, None]


class Tied(nn.Module):
    """A language model whose last layer has the weights of the first."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(200, 32), nn.Linear(32, 200, bias=False)
        self.inner = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.inner(self.words(x)).mean(dim=1))


class Sequences(nn.Module):
    """Works on sequences [N, T, 16], inside with the tokens first or with the images first."""

    def __init__(self, tokens_first: bool):
        super().__init__()
        torch.manual_seed(0)
        self.tokens_first = tokens_first
        self.up, self.down, self.head = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = x.transpose(0, 1) if self.tokens_first else x
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x.mean(dim=0 if self.tokens_first else 1))


class Routed(Around):
    """One layer runs on some of the images: on the first two, and not on all of the others."""

    def __init__(self):
        super().__init__()
        self.some = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.inner[:3](x)
        rows = torch.arange(min(len(x), 5))
        return self.inner[3:](x.index_add(0, rows, self.some(x[rows])))


def report_of(network: nn.Module, batches, **settings) -> str:
    return str(compress(network, batches, flops=0.5, **settings).report).replace("inner.", "")


def test_kept_features_and_images_with_gradients_change_nothing():
    assert report_of(Keeps(), images()) == report_of(Around(), images())
    assert report_of(Around(), [(x.requires_grad_(), y) for x, y in images()]) == report_of(Around(), images())


def test_features_that_a_network_has_kept_are_copied_without_their_graph():
    network, x = Keeps(), images()[0][0]
    network(x)
    smaller = copied(network)
    assert smaller.last is smaller.all["last"][0] and smaller.last is not network.last
    assert torch.equal(smaller.last, network.last) and smaller.last.grad_fn is None and network.last.grad_fn is not None


def test_autocast_inside_of_a_network():
    assert compress(Autocast(), images(), flops=0.5).report.flops[1] > 0


def test_the_users_images_and_random_numbers_stay_as_they_are():
    given, expected, network = images(), images(), InPlace()
    state = torch.get_rng_state()
    compress(network, given, flops=0.5)
    assert all(torch.equal(x, other) for (x, _), (other, _) in zip(given, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_shared_with_an_embedding_stay_shared():
    torch.manual_seed(0)
    network = Tied()
    words = [(torch.randint(0, 200, (8, 6)), torch.randint(0, 200, (8,))) for _ in range(4)]
    smaller = compress(network, words, parameters=0.9, round_to=1)
    assert smaller.report.left_alone == {"head": "weights are shared"}
    assert smaller.head.weight is smaller.words.weight
    assert smaller.report.parameters[1] <= 0.9 * sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("tokens", [5, 6])
def test_layers_whose_first_axis_is_not_that_of_the_images(tokens: int):
    x = torch.randn(2, tokens, 16)
    found = survey(Sequences(tokens_first=True), x, nn.Module.__call__)
    assert found.left_alone == {"up": "mixes images", "down": "mixes images"} and found.names == ["head"]
    assert survey(Sequences(tokens_first=False), x, nn.Module.__call__).names == ["up", "down", "head"]


def test_batches_of_several_sizes():
    batches = [batch for size in (8, 10, 12, 8) for batch in images((3, size, size), count=2)]
    smaller = compress(small(), batches, flops=0.5)
    assert smaller.report.flops[1] <= 0.5 * cost_on(small(), batches[0][0][:1]).flops


def test_labels_need_not_be_one_for_each_image():
    """As boxes of objects: the images are those of the inputs."""
    loss_fn = lambda outputs, labels: F.cross_entropy(outputs, torch.zeros(len(outputs)).long(), reduction="none")  # noqa: E731
    found = [
        report_of(small(), [(x, torch.zeros(count, 6)) for x, _ in images()], loss_fn=loss_fn) for count in (8, 80)
    ]
    assert found[0] == found[1]


def test_the_products_of_an_lstm_are_counted():
    inputs, hidden, steps = 16, 32, 5
    lstm = nn.LSTM(inputs, hidden, batch_first=True)
    assert cost_on(lstm, torch.zeros(1, steps, inputs)).flops == 2 * steps * 4 * hidden * (inputs + hidden)


def test_what_was_frozen_is_frozen():
    network = small()
    network[3].weight.requires_grad_(False)
    smaller = compress(network, images(), flops=0.5)
    assert {edit["name"] for edit in edits_of(smaller)} >= {"3"}
    parameters = dict(smaller[3].named_parameters())
    trainable = {name for name, p in parameters.items() if p.requires_grad}
    assert trainable == {name for name in parameters if name.endswith("bias")} != set()


class SkippedAtRandom(Around):
    """A layer that runs in two of three passes only, in evaluation mode too."""

    def forward(self, x):
        return self.inner[5:](self.inner[:3](x) if torch.rand(()) < 1 / 3 else self.inner[:5](x))


def test_a_layer_that_is_skipped_at_random_can_be_ignored():
    smaller = compress(SkippedAtRandom(), images(), flops=0.7, ignored_layers=["inner.3"], round_to=1)
    assert {edit["name"] for edit in edits_of(smaller)} == {"inner.0", "inner.7"}


def named(module: nn.Module, **attributes) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("make", "batches", "settings", "message"),
    [
        (lambda: small(1), images, {}, "returns one score for each image, of which a softmax is always 1: give loss_"),
        (small, images, {"loss_fn": lambda outputs, labels: 0.5}, "loss_fn returned a float for a batch of 8: it has"),
        (lambda: nn.Sequential(small(), nn.Softmax(1)), images, {}, "the network returns probabilities"),
        (small, lambda: [(x, y - 1) for x, y in images()], {"fisher_type": "empirical"},
         "the labels are no classes from 0 to 3"),
        (WithoutGradients, images, {}, r"take @torch.no_grad\(\) away"),
        (Routed, images, {}, r"layer some ran on 5 inputs for 8 images.* ignored_layers=\['some'\]"),
        (small, lambda: [(x / 0, y) for x, y in images()], {}, "the Fisher of layer .* is not finite: look for NaN"),
        (small, images, {"decomposition": "bst"},
         "decomposition is 'bst', but takes one of best, tucker, depthwise, truncate"),
        (small, images, {"round_to": 0}, "round_to is 0, out of range"),
        (small, images, {"criterion": "c_obs"},
         "criterion c_obs removes channels inside the blocks of this program's ResNet"),
        (small, images, {"ignored_layers": ["hea"]},
         "ignored_layers names hea, which is neither a layer .* the network has 0, 3, 7, "),
        (small, images, {"ignored_layers": ["head"], "decomposition": "truncate"},
         "ignored_layers needs forms of layers that compete"),
        (small, images, {"loss_fn": F.cross_entropy}, r"loss_fn returned a tensor of shape \[\]"),
        (small, images, {"flop": 0.5}, "unknown key 'flop'"),
        (small, images, {"flops": 50}, "flops is 50: give a share above 0 and up to 1, such as 0.5"),
        (small, images, {"prune_ratio": 1, "flops": None}, "prune_ratio is 1: give a share from 0 on and below 1"),
        (small, images, {"prune_ratio": 0.3}, "prune_ratio stands instead of a target, but flops"),
        (small, lambda: [{"pixels": torch.zeros(2, 3, 8, 8)}], {},
         r"batches\(\) yields a dict, but \(inputs, labels\) is"),
        (small, [(torch.zeros(3, 8, 8), 4)], {}, r"the labels of a batch are not a tensor \[N\] of classes"),
        (small, iter(images()), {}, r"batches\(\) yields nothing: each call has to start a new pass"),
        (lambda: torch.compile(small()), images, {}, r"compiled by torch\.compile: give the original network"),
        (nn.Flatten, images, {}, "the network has no parameters"),
        (lambda: nn.Linear(8, CLASSES), images, {}, r"a single layer.*give nn\.Sequential\(layer\)"),
        (lambda: Around(torch.jit.script(small())), images, {}, "or a part of it, was compiled by TorchScript"),
        (small, images, {"flops": None, "parameters": -1}, "parameters is -1: give a share above 0"),
        (lambda: named(small(), lock=threading.Lock()), images, {},
         "a copy of the network cannot be made or run .*cannot pickle '_thread.lock'"),
        (SkippedAtRandom, images, {}, r"layer inner\.3 is left out in some passes.* ignored_layers=\['inner\.3'\]"),
        (lambda: named(small(), report=nn.ReLU()), images, {}, "the network has an attribute report"),
        (Remembered, images, {}, "a copy of the network does not compute the same: leave out what prevents this"),
        (lambda: torch.relu, images, {}, "the network is a builtin_function_or_method: give a torch.nn.Module"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(make, batches, settings, message):
    with pytest.raises(UserError, match=message):
        compress(make(), batches, **{"flops": 0.5, **settings})


class Checkpointed(Around):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = self.inner[:3](x)
        x = torch.utils.checkpoint.checkpoint(self.inner[3:5], x, use_reentrant=self.reentrant)
        return self.inner[5:](x)


def test_networks_that_run_again_for_gradients():
    """Reentrant checkpoints, those of the old kind, do not allow gradients of features."""
    assert report_of(Checkpointed(False), images()) == report_of(Around(), images())
    with pytest.raises(UserError, match="cannot be differentiated in evaluation mode"):
        compress(Checkpointed(True), images(), flops=0.5)


class Mirrored(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed, or which looks at that weight's type only."""

    def __init__(self, tied: bool):
        super().__init__()
        self.tied, self.encode, self.decode = tied, nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x):
        codes = F.relu(self.encode(x.to(self.encode.weight.dtype)))
        return F.linear(codes, self.encode.weight.t()) if self.tied else self.decode(codes)


@pytest.mark.parametrize("tied", [True, False])
def test_a_layer_whose_weight_is_read_elsewhere_is_left_alone(tied: bool):
    given = [(torch.randn(16, 64), None)] * 2
    smaller = compress(Mirrored(tied), given, flops=0.6, round_to=4, loss_fn=lambda out, _: out.square().mean(dim=1))
    assert (smaller.report.left_alone.get("encode") == "weights are read") == tied
    assert smaller.report.flops[1] <= smaller.report.flops[0]
    if not tied:  # exporters read the type, too
        exported = torch.export.export(smaller, (given[0][0],)).module()
        torch.testing.assert_close(exported(given[0][0]), smaller(given[0][0]))


def test_penalties_on_weights_in_the_loss_are_no_reading():
    network = small()

    def decayed(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction="none") + 1e-4 * network[3].weight.square().sum()

    assert "weights are read" not in report_of(network, images(), round_to=4, loss_fn=decayed)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Standardised(16, 16, 3, padding=1), "its own forward"),
        (named(nn.Conv2d(16, 16, 3), forward=torch.relu), "its own forward"),
        (named(nn.Conv2d(16, 16, 3), act=nn.ReLU()), "has further parts"),
        (named(nn.Conv2d(16, 16, 3), scale=nn.Parameter(torch.ones(1))), "has further parts"),
        (nn.Linear(16, 16, dtype=torch.complex64), "weights not real"),
        (nn.ConvTranspose2d(16, 16, 3), "transposed"),
    ],
)
def test_layers_that_compute_something_else_are_left_alone(layer: nn.Module, reason: str):
    assert unsuited(layer) == reason


def test_attributes_that_the_user_has_set_stay():
    network = small()
    network[3].gain, network[3]._gain = 0.5, 2.0
    smaller = compress(network, images(), flops=0.6, round_to=4)
    assert (smaller[3].gain, smaller[3]._gain) == (0.5, 2.0) and type(smaller[3]) is not nn.Conv2d


class Listed(Around):
    """Holds its layers in a list, too, or in a function."""

    def __init__(self, function: bool):
        super().__init__()
        self.run = (lambda x: inner(x)) if function else None
        inner, self.parts = self.inner, [*self.inner]

    def forward(self, x):
        if self.run is not None:
            return self.run(x)
        for part in self.parts:
            x = part(x)
        return x


def test_layers_that_are_held_in_a_list_too_are_replaced_there():
    smaller = compress(Listed(function=False), images(), flops=0.6, round_to=4)
    assert smaller.report.flops[1] <= 0.6 * smaller.report.flops[0]
    assert all(part is own for part, own in zip(smaller.parts, smaller.inner, strict=True))
    with pytest.raises(UserError, match=r"does not call layer inner.0, inner.3 after .*=\['inner.0', 'inner.3'\]"):
        compress(Listed(function=True), images(), flops=0.6, round_to=4)


def test_the_norm_behind_a_layer_has_its_outputs_as_channels():
    """Not where a linear layer works along the last axis of maps and the norm along the second."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 4))
    assert survey(network, images()[0][0], nn.Module.__call__).norms == {"0": None, "1": None, "4": None}


def test_two_targets_that_cannot_be_met_together_are_met_as_far_as_possible():
    network = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    alone = compress(network, images(), flops=0.01).report
    assert compress(network, images(), flops=0.01, parameters=0.01).report.flops == alone.flops


def test_a_process_group_of_the_user_is_not_ours(monkeypatch):
    """As in a training script with ``DistributedDataParallel``, where one process or each compresses by itself."""
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 1)
    assert compress(small(), images(), flops=0.6, round_to=4).report.flops[1] > 0
    assert parallel.world_size() == 2


def test_the_refit_is_exact_although_features_have_a_large_mean():
    """In float32, where sums of squares of 1,000 leave nothing of deviations of 1."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(512, 64) @ torch.randn(64, 64) / 8 + 1000
    for _ in range(100):
        network(x)
    network.eval()
    kernel = nn.Conv2d(64, 64, 1, bias=False)
    kernel.weight.data = network[0].weight.data[:, :, None, None]
    errors = []
    for dtype in (torch.float32, torch.float64):
        wide = nn.Sequential(copy.deepcopy(kernel), nn.BatchNorm2d(64)).to(dtype).eval()
        wide[1].load_state_dict(network[1].state_dict())
        smaller = copy.deepcopy(wide)
        smaller[0] = low_rank(wide[0], (None, 32), depthwise=False, bias=False)
        maps = x[:, :, None, None].to(dtype)
        batches = [(maps, torch.zeros(512).long()), (maps[:0], torch.zeros(0).long())]
        refit(wide, smaller, {"0": "1"}, {}, Passes(lambda batches=batches: batches))
        errors.append(((smaller(maps) - wide(maps)).square().mean() / wide(maps).var()).item())
    assert errors[0] == pytest.approx(errors[1], rel=0.05) and 0 < errors[1] < 0.2


def test_of_linear_layers_only_the_mean_is_refitted():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    given = [(torch.randn(64, 64), torch.arange(64) % 4)] * 4
    fitted, plain = (compress(network, given, flops=0.5, round_to=4, refit=refit) for refit in (True, False))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, fitted.state_dict()[name]) == (name != "0.rotate_out.bias"), name
    wanted, found = network[0](given[0][0]), fitted[0](given[0][0])
    torch.testing.assert_close(found.mean(dim=0), wanted.mean(dim=0))


def test_layers_are_not_ruined_for_next_to_nothing():
    """Where nearly all FLOPs are in layers that are left alone."""
    network = small()
    with pytest.raises(UserError, match=r"flops=0.5 of the network is out of reach: .* 99\.\d+%; raise it.*2 ignored"):
        compress(network, images(), flops=0.5, round_to=1, ignored_layers=["0", "3"])


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.mul_(0), lambda w: nn.init.normal_(w), lambda w: w.copy_(w + 1),
        lambda w: setattr(w, "data", w),
        lambda w: torch.add(w, 1, out=w), lambda w: w.__setitem__(0, 0),
    ],
)  # fmt: skip
def test_the_weight_of_a_rebuilt_layer_is_not_written_to(write):
    layer = low_rank(nn.Linear(6, 4), (None, 2), depthwise=False, bias=True)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="has no weight to write to: change its core and rotate_out"),
    ):
        write(layer.weight)
    torch.empty(4, 6).copy_(layer.weight)  # reading is allowed
