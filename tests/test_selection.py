"""Selection against exhaustive search, budgets, limits, ties and zeros; and the cost of every form of a layer."""

import itertools
import math

import numpy as np
import pytest
import torch

from pruning import combinations
from pruning.combinations import Ways, least_regretted
from pruning.costs import LayerShape, cheapest_cost, cheapest_ranks
from pruning.selection import (
    Goal,
    Group,
    check_reachable,
    least_kept,
    part_of_the_way,
    select,
    smallest_cost,
    step_of,
)
from utils.errors import UserError


def linear_cost(flops: int, parameters: int):
    """Every direction saves the same."""
    return lambda *counts: (flops * sum(counts), parameters * sum(counts))


def group(*saliencies: list[float], least: int = 1, flops: int = 1, parameters: int = 1) -> Group:
    sides = tuple(torch.tensor(side) for side in saliencies)
    return Group(sides, (least,) * len(sides), linear_cost(flops, parameters))


def dropped_sum(groups, kept) -> float:
    return sum(
        (values.sum() - values[index].sum()).item()
        for name, g in groups.items()
        for values, index in zip(g.saliencies, kept[name], strict=True)
    )


def exhaustive(groups, fits) -> float:
    """Least sum of dropped saliencies over all ways to keep directions within the limits that ``fits`` accepts."""
    sides = [(name, values, g.least[i]) for name, g in groups.items() for i, values in enumerate(g.saliencies)]
    ways = [
        [mask for mask in itertools.product([False, True], repeat=len(values)) if sum(mask) >= least]
        for _, values, least in sides
    ]
    best = float("inf")
    for masks in itertools.product(*ways):
        if fits([sum(mask) for mask in masks]):
            lost = sum(
                v
                for (_, values, _), mask in zip(sides, masks, strict=True)
                for v, m in zip(values.tolist(), mask, strict=True)
                if not m
            )
            best = min(best, lost)
    return best


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [0, 1, 3, 5, 6])
def test_the_share_that_is_dropped_is_the_best_of_all(seed, count):
    generator = torch.Generator().manual_seed(seed)
    groups = {
        "a": Group(tuple(torch.rand(3, generator=generator) for _ in range(2)), (1, 2), linear_cost(1, 1)),
        "b": Group((torch.rand(4, generator=generator),), (1,), linear_cost(1, 1)),
    }
    kept = select(groups, Goal(prune_ratio=count / 10), (0, 0))
    best = exhaustive(groups, lambda counts: sum(counts) == 10 - count)
    assert dropped_sum(groups, kept) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [10, 20, 30])
def test_a_budget_per_saving_is_near_the_best_of_all(seed, budget):
    """Directions of unequal cost are a knapsack: greedy by ratio with giving back stays within one direction of it.

    The best is that of all combinations that use the budget up, where there are any.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = {
        "dear": Group((torch.rand(4, generator=generator),), (1,), linear_cost(7, 1)),
        "cheap": Group((torch.rand(5, generator=generator),), (1,), linear_cost(2, 1)),
    }
    goal = Goal(flops=budget)
    kept = select(groups, goal, (0, 0), objective="flops")
    assert 7 * len(kept["dear"][0]) + 2 * len(kept["cheap"][0]) <= budget
    used_up = exhaustive(groups, lambda counts: 0.98 * budget <= 7 * counts[0] + 2 * counts[1] <= budget)
    under = exhaustive(groups, lambda counts: 7 * counts[0] + 2 * counts[1] <= budget)
    best = under if math.isinf(used_up) else used_up
    largest = max(g.saliencies[0].max().item() for g in groups.values())
    assert dropped_sum(groups, kept) <= best + largest
    plain = select(groups, goal, (0, 0), objective="saliency")
    assert 7 * len(plain["dear"][0]) + 2 * len(plain["cheap"][0]) <= budget


def test_what_goes_with_one_side_is_not_counted_on_the_other():
    """Two sides of a 5 x 5 layer that costs c * r, against the best of all ways to keep half of the cost."""
    lost = {True: 0.0, False: 0.0, "best": 0.0}
    for seed in range(20):
        pairs = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed)).double() ** 3
        sides = (pairs.sum(1), pairs.sum(0))

        def loss(rows, columns, pairs=pairs) -> float:
            return (pairs.sum() - pairs[rows][:, columns].sum()).item()

        for counted_once in (True, False):
            whole = Group(sides, (1, 1), lambda c, r: (c * r, c * r), pairs if counted_once else None)
            rows, columns = select({"a": whole}, Goal(flops=12), (0, 0), "flops")["a"]
            assert len(rows) * len(columns) <= 12
            lost[counted_once] += loss(rows, columns)
        subsets = [list(s) for n in range(1, 6) for s in itertools.combinations(range(5), n)]
        lost["best"] += min(loss(a, b) for a in subsets for b in subsets if len(a) * len(b) <= 12)
    assert lost["best"] <= lost[True] <= min(lost[False], 1.15 * lost["best"])


def test_limits_hold_even_where_the_goal_asks_for_more():
    groups = {"a": group([0.1, 0.2, 0.3, 0.4], least=3), "b": group([5.0, 6.0, 7.0], [8.0, 9.0], least=1)}
    kept = select(groups, Goal(prune_ratio=0.99), (0, 0))
    assert [len(side) for sides in kept.values() for side in sides] == [3, 1, 1]
    assert kept["a"][0].tolist() == [1, 2, 3] and kept["b"][0].tolist() == [2]


def test_ties_go_in_order_and_zero_layers_go_first():
    groups = {"a": group([1.0, 1.0, 1.0, 1.0]), "zero": group([0.0, 0.0, 0.0])}
    kept = select(groups, Goal(prune_ratio=3 / 7), (0, 0))
    assert kept["zero"][0].tolist() == [2] and kept["a"][0].tolist() == [1, 2, 3]
    again = select(groups, Goal(prune_ratio=3 / 7), (0, 0))
    assert all(torch.equal(kept[n][0], again[n][0]) for n in groups)
    everything_zero = {"zero": group([0.0] * 6), "other": group([0.0] * 6)}
    for objective in ("saliency", "flops", "parameters"):
        kept = select(everything_zero, Goal(flops=6), (0, 0), objective)
        assert sum(len(sides[0]) for sides in kept.values()) == 6


@pytest.mark.parametrize("objective", ["saliency", "flops", "parameters"])
@pytest.mark.parametrize("seed", range(8))
def test_a_budget_is_used_up_wherever_a_combination_does_so(objective, seed):
    """Few layers in large and uneven steps, against all combinations of ranks."""
    generator = torch.Generator().manual_seed(seed)
    groups, ways = {}, []
    for name in "abc":
        sizes = torch.randint(2, 6, (2,), generator=generator).tolist()
        pairs = torch.rand(sizes, generator=generator).double() ** 2
        unit, extra = torch.randint(10, 100, (2,), generator=generator).tolist()

        def cost(c, r, unit=unit, sizes=sizes, whole=unit * sizes[0] * sizes[1] + extra):
            flops = np.where((np.asarray(c) < sizes[0]) | (np.asarray(r) < sizes[1]), unit * c * r, whole)
            return flops, 2 * flops + 1

        groups[name] = Group((pairs.sum(1), pairs.sum(0)), (1, 1), cost, pairs)
        ways.append([tuple(map(int, cost(c, r))) for c in range(1, sizes[0] + 1) for r in range(1, sizes[1] + 1)])
    everything = {tuple(map(sum, zip(*choice, strict=True))) for choice in itertools.product(*ways)}
    whole = max(everything)
    for share in (0.3, 0.5, 0.7, 0.85, 0.95):
        for goal in (Goal(flops=share * whole[0]), Goal(flops=share * whole[0], parameters=1.05 * share * whole[1])):
            limits = [math.inf if limit is None else limit for limit in (goal.flops, goal.parameters)]
            within = [sums for sums in everything if all(s <= limit for s, limit in zip(sums, limits, strict=True))]
            if not within:
                continue
            kept = select(groups, goal, (0, 0), objective)
            costs = [g.cost(*(len(side) for side in kept[name])) for name, g in groups.items()]
            found = tuple(int(sum(values)) for values in zip(*costs, strict=True))
            assert found in within
            if any(s >= 0.98 * limit for sums in within for s, limit in zip(sums, limits, strict=True)):
                assert any(s >= 0.98 * limit for s, limit in zip(found, limits, strict=True)), (found, limits)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limits", [(4096, 256), (40, 8)])
def test_combinations_are_the_least_regretted_within_the_window(seed, limits, monkeypatch):
    """With few states neighbours stand for each other: what is found is still within the window."""
    monkeypatch.setattr(combinations, "STATES", limits[0])
    monkeypatch.setattr(combinations, "WAYS", limits[1])
    generator = np.random.default_rng(seed)
    layers = [Ways(generator.integers(1, 60, (n, 2)).astype(float), generator.random(n)) for n in (4, 9, 7, 5)]
    every = [
        (sum(layer.costs[i] for layer, i in zip(layers, way, strict=True)), way)
        for way in itertools.product(*(range(len(layer.regrets)) for layer in layers))
    ]
    high = np.array([110.0, 120.0])
    within = [way for sums, way in every if (sums <= high).all() and (sums >= 0.95 * high).any()]
    found = least_regretted(layers, 0.95 * high, high)
    if limits[0] > 40:
        best = min(within, key=lambda way: sum(layer.regrets[i] for layer, i in zip(layers, way, strict=True)))
        assert found == list(best)
    else:
        assert found is None or tuple(found) in within


def test_nothing_to_prune_is_no_fault():
    assert select({}, Goal(flops=10), (10, 5), "flops") == {}
    for objective in ("saliency", "flops"):
        with pytest.raises(UserError, match=r"asks for 9 FLOPs.*at least 10"):
            select({}, Goal(flops=9), (10, 5), objective)


@pytest.mark.parametrize("objective", ["saliency", "flops", "parameters"])
def test_kept_directions_are_raised_to_multiples(objective):
    torch.manual_seed(0)
    groups = {name: Group((torch.rand(70),), (1,), linear_cost(1, 1)) for name in "abc"}
    free = select(groups, Goal(prune_ratio=0.5), (0, 0), objective)
    rounded = select(groups, Goal(prune_ratio=0.5), (0, 0), objective, round_to=8)
    assert all(len(sides[0]) % 8 == 0 or len(sides[0]) == 70 for sides in rounded.values())
    if objective == "saliency":
        for name in groups:
            assert set(free[name][0].tolist()) <= set(rounded[name][0].tolist())
    budget = select(groups, Goal(flops=100), (0, 0), objective, round_to=8)
    assert 92 < sum(len(sides[0]) for sides in budget.values()) <= 100


def test_small_sides_are_rounded_in_smaller_steps():
    assert [step_of(channels, 8) for channels in (3, 8, 16, 24, 32, 64, 256)] == [1, 2, 4, 4, 8, 8, 8]
    assert step_of(256, 1) == 1


def test_an_unreachable_budget_is_refused_with_what_can_be_reached():
    groups = {"a": group([1.0, 2.0, 3.0], least=2, flops=10)}
    with pytest.raises(UserError, match=r"asks for 15 FLOPs.*at least 25"):
        select(groups, Goal(flops=15), (5, 0))
    assert smallest_cost(groups, (5, 0), 1) == (25, 2)
    with pytest.raises(UserError, match="target_parameters asks for 1 parameters"):
        check_reachable(Goal(parameters=1), (25, 2))
    check_reachable(Goal(flops=25, parameters=2), (25, 2))


def test_least_kept_holds_the_limit_and_keeps_one():
    assert [least_kept(64, limit) for limit in (0.0, 0.5, 0.9, 0.99)] == [64, 32, 7, 1]


def test_iterations_go_geometric_parts_of_the_way_and_the_last_one_arrives():
    now, path = 1000.0, []
    for left in (3, 2, 1):
        now = part_of_the_way(now, 125.0, left)
        path.append(now)
    assert path == pytest.approx([500.0, 250.0, 125.0], rel=1e-12)
    assert part_of_the_way(100.0, 125.0, 2) == 125.0 and part_of_the_way(100.0, None, 2) is None


SHAPES = [
    LayerShape((64, 64), (64, 64), (False, False), 9, (1024, 1024)),
    LayerShape((64, 128), (64, 128), (False, False), 9, (1024, 256)),
    LayerShape((64, 64), (40, 64), (True, False), 9, (256, 256)),
    LayerShape((64, 128), (33, 21), (True, True), 9, (1024, 256)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cheapest_form_is_the_cheapest_of_all_and_monotone(shape):
    whole = shape.cost(*shape.ranks)
    for c, r in itertools.product(range(1, shape.ranks[0] + 1, 3), range(1, shape.ranks[1] + 1, 5)):
        forms = [shape.cost(x, y) for x in (c, shape.ranks[0]) for y in (r, shape.ranks[1])]
        best = min([form for form in forms if form[1] <= whole[1]], default=whole)
        flops, parameters = cheapest_cost(shape, c, r)
        assert flops == min(best[0], whole[0]) and parameters <= whole[1]
    flops, _ = cheapest_cost(shape, np.arange(1, shape.ranks[0] + 1), shape.ranks[1] // 2)
    assert (np.diff(flops) >= 0).all()


def test_a_side_whose_rotation_does_not_pay_is_left_whole():
    shape = SHAPES[0]
    assert tuple(map(int, cheapest_ranks(shape, 60, 64))) == (64, 64)  # 64 * 60 more, 9 * 64 * 4 less
    assert tuple(map(int, cheapest_ranks(shape, 40, 63))) == (40, 64)
    assert tuple(map(int, cheapest_ranks(shape, 40, 40))) == (40, 40)
