"""The objective "latency": what is timed is what is built, and times are measured once."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pruning_case import METHOD, SIZE, counted, labelled_images, made_up_seconds, pruned_by, switched_network
from torch import nn
from torch.nn import functional as F

from deploy import layer_times, timing
from deploy.layer_times import LayerTimes, chain_model
from deploy.session import open_session
from models import all_on
from pruning.costs import Convolution
from pruning.selection import Goal


def chains_of(network) -> list:
    """Every layer that can be pruned, as a forward pass meets it: its chain and the size of its input."""
    chains = []

    def note(module, inputs):
        convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        chain = (
            Convolution(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.groups) for m in convolutions
        )
        chains.append((tuple(chain), inputs[0].shape[-1]))

    layers = [network.stem[0], *(layer for block in network.blocks for layer in (block.conv1, block.conv2))]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.no_grad():
        network(torch.zeros(1, 3, SIZE, SIZE), decide=all_on)
    for handle in handles:
        handle.remove()
    return chains


def seconds_of(network) -> float:
    return sum(made_up_seconds(*chain) for chain in chains_of(network))


@pytest.mark.parametrize("decomposition", ["tucker", "depthwise"])
def test_what_is_timed_is_what_is_built(decomposition):
    network, images = switched_network(), labelled_images()
    timed = {}

    def seconds(chain, size):
        return timed.setdefault((chain, size), made_up_seconds(chain, size))

    method = replace(METHOD, objective="latency", decomposition=decomposition, seconds=seconds)
    smaller = pruned_by(network, images, Goal(flops=0.5 * counted(network)[0]), method).network
    assert set(chains_of(smaller)) <= set(timed)
    # The form of each layer is faster than the one it replaces, on this machine.
    assert seconds_of(smaller) < seconds_of(network)


def test_the_objective_finds_a_faster_network_of_as_many_flops():
    network, images = switched_network(), labelled_images()
    seconds = {}
    for objective in ("flops", "latency"):
        times = made_up_seconds if objective == "latency" else None
        method = replace(METHOD, objective=objective, seconds=times)
        pruned = pruned_by(network, images, Goal(flops=0.5 * counted(network)[0]), method)
        assert 0.49 * counted(network)[0] <= counted(pruned.network)[0] <= 0.5 * counted(network)[0]
        seconds[objective] = seconds_of(pruned.network)
    assert seconds["latency"] < 0.98 * seconds["flops"]


def test_chain_is_the_convolutions_in_a_row():
    chain = (Convolution(6, 4), Convolution(4, 4, 3, 2, 4), Convolution(4, 5))
    model = chain_model(chain, 9)
    x = np.random.default_rng(1).standard_normal((1, 6, 9, 9), dtype=np.float32)
    (y,) = open_session(model, threads=1).run(None, {"x": x})
    weights = {w.name: torch.from_numpy(layer_times.numpy_helper.to_array(w).copy()) for w in model.graph.initializer}
    expected = torch.from_numpy(x)
    for i, c in enumerate(chain):
        expected = F.conv2d(expected, weights[f"w{i}"], weights[f"b{i}"], c.stride, c.kernel // 2, groups=c.groups)
    torch.testing.assert_close(torch.from_numpy(y), F.relu(expected), rtol=1e-4, atol=1e-5)


def test_a_chain_is_measured_once_and_kept(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(layer_times, "_measured", lambda chain, size: measured.append((chain, size)) or 0.5)
    path, chain = tmp_path / "layer_times.json", (Convolution(3, 4, 3),)
    times = LayerTimes(path)
    assert times.seconds(chain, 8) == times.seconds(chain, 8) == 0.5
    assert len(measured) == 1
    times.save()
    assert LayerTimes(path).seconds(chain, 8) == 0.5 and len(measured) == 1
    assert LayerTimes(path).seconds(chain, 16) == 0.5 and len(measured) == 2
    assert list(json.loads(path.read_text()).values()) == [0.5]


def test_of_several_processes_one_measures(monkeypatch):
    """Times that differ would let each process choose another network."""
    sent = iter([{}, 0.25])
    monkeypatch.setattr(layer_times.parallel, "is_main_process", lambda: False)
    monkeypatch.setattr(layer_times.parallel, "broadcast_object", lambda value: next(sent))
    monkeypatch.delattr(layer_times, "_measured")
    times = LayerTimes()
    assert times.seconds((Convolution(3, 4, 3),), 8) == times.seconds((Convolution(3, 4, 3),), 8) == 0.25


def test_a_time_is_that_of_the_fastest_run(monkeypatch):
    """By a clock that the runs move themselves: the first one, which allocates, does not count."""
    taken, clock, runs = [0.5, 0.004, 0.002, 0.003, 0.006, 0.001], [0.0], []

    def run(outputs, inputs):
        clock[0] += taken[len(runs)]
        runs.append(inputs["x"].shape)

    monkeypatch.setattr(layer_times, "open_session", lambda model, threads: SimpleNamespace(run=run))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert LayerTimes().seconds((Convolution(3, 4, 3),), 16) == pytest.approx(0.002, rel=1e-9)
    assert runs == [(1, 3, 16, 16)] * 5, "until 10 ms are spent"
