"""Selection against exhaustive search, budgets, limits, ties and zeros; and the cost of every form of a layer."""

import itertools

import numpy as np
import pytest
import torch

from pruning.costs import LayerShape, cheapest_cost, cheapest_ranks
from pruning.goals import Goal, part_of_the_way
from pruning.selection import Group, counts_kept, least_kept, select, step_of
from utils.errors import UserError


def linear_cost(flops: int, parameters: int):
    """Every direction saves the same."""
    return lambda *counts: (flops * sum(counts), parameters * sum(counts))


def group(saliencies, least: int = 1, flops: int = 1, parameters: int = 1, step: int = 1) -> Group:
    values = torch.as_tensor(saliencies)
    counts = tuple(np.append(np.arange(least, size, step), size) for size in values.shape)
    return Group(values, counts, linear_cost(flops, parameters))


def kept_counts(kept) -> dict[str, tuple[int, ...]]:
    return {name: tuple(len(side) for side in sides) for name, sides in kept.items()}


def dropped_sum(groups, kept) -> float:
    """What goes with the directions that are not kept; a pair goes once."""
    left = [g.saliencies[torch.meshgrid(*kept[name], indexing="ij")] for name, g in groups.items()]
    return sum((g.saliencies.sum() - own.sum()).item() for g, own in zip(groups.values(), left, strict=True))


def subsets(size: int, least: int):
    return [list(s) for n in range(least, size + 1) for s in itertools.combinations(range(size), n)]


def exhaustive(groups, count: int) -> float:
    """Least saliency that goes, over all ways to keep so many directions of one side each."""
    ways = [subsets(len(g.saliencies), int(g.counts[0][0])) for g in groups.values()]
    return min(
        dropped_sum(groups, {name: (torch.tensor(side),) for name, side in zip(groups, way, strict=True)})
        for way in itertools.product(*ways)
        if sum(len(side) for side in way) == count
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [0, 1, 3, 5, 6])
def test_the_share_that_goes_under_one_threshold_is_the_best_of_all(seed, count):
    generator = torch.Generator().manual_seed(seed)
    groups = {
        "a": group(torch.rand(3, generator=generator).double()),
        "b": group(torch.rand(3, generator=generator).double(), least=2),
        "c": group(torch.rand(4, generator=generator).double()),
    }
    kept = select(groups, Goal(prune_ratio=count / 10), (0, 0))
    best = exhaustive(groups, 10 - count)
    assert dropped_sum(groups, kept) == pytest.approx(best, abs=1e-9)


def test_both_sides_of_a_layer_compete_under_the_threshold():
    """Saliencies of the sides: 3, 30, 300 and 111, 222."""
    pairs = torch.tensor([[1.0, 2], [10, 20], [100, 200]])
    orders = [((0,), ()), ((0, 1), ()), ((0, 1), (0,))]
    for dropped, (rows, columns) in enumerate(orders, start=1):
        kept = select({"a": group(pairs)}, Goal(prune_ratio=dropped / 5), (0, 0))["a"]
        assert kept[0].tolist() == [i for i in range(3) if i not in rows]
        assert kept[1].tolist() == [i for i in range(2) if i not in columns]


def test_one_threshold_stops_at_the_first_direction_that_meets_the_budget():
    groups = {"a": group([0.1, 0.3, 0.6], flops=7), "b": group([0.2, 0.4, 0.5], flops=2)}
    for budget, expected in ((27, (3, 3)), (26, (2, 3)), (19, (2, 2)), (17, (1, 2)), (11, (1, 2)), (10, (1, 1))):
        assert kept_counts(select(groups, Goal(flops=budget), (0, 0))) == {"a": expected[:1], "b": expected[1:]}


@pytest.mark.parametrize("seed", range(6))
def test_of_all_counts_within_the_budgets_those_that_lose_least_are_kept(seed):
    """Few layers in large and uneven steps, for one budget and for two, against all combinations of counts."""
    generator = torch.Generator().manual_seed(seed)
    groups, ways = {}, []
    for name in "abc":
        sizes = torch.randint(2, 6, (2,), generator=generator).tolist()
        pairs = torch.rand(sizes, generator=generator).double() ** 2
        unit, extra = torch.randint(10, 100, (2,), generator=generator).tolist()

        def cost(c, r, unit=unit, sizes=sizes, whole=unit * sizes[0] * sizes[1] + extra):
            flops = np.where((np.asarray(c) < sizes[0]) | (np.asarray(r) < sizes[1]), unit * c * r, whole)
            return flops, 2 * flops + 100 * r

        groups[name] = Group(pairs, tuple(np.arange(1, size + 1) for size in sizes), cost)
        orders = [pairs.sum(1).argsort(descending=True), pairs.sum(0).argsort(descending=True)]
        ways.append(
            [
                (np.array(cost(c, r)), (pairs.sum() - pairs[orders[0][:c]][:, orders[1][:r]].sum()).item())
                for c in range(1, sizes[0] + 1)
                for r in range(1, sizes[1] + 1)
            ]
        )
    every = [(sum(w[0] for w in way), sum(w[1] for w in way)) for way in itertools.product(*ways)]
    whole = every[-1][0]
    for share in (0.3, 0.6, 0.9):
        for limits in ((share * whole[0], np.inf), (share * whole[0], 0.95 * share * whole[1])):
            within = [lost for costs, lost in every if (costs <= limits).all()]
            goal = Goal(flops=limits[0], parameters=limits[1] if np.isfinite(limits[1]) else None)
            if not within:
                with pytest.raises(UserError, match="raise the target"):
                    select(groups, goal, (0, 0), "flops")
                continue
            kept = select(groups, goal, (0, 0), "flops")
            used = sum(np.array(g.cost(*(len(side) for side in kept[name]))) for name, g in groups.items())
            assert (used <= limits).all()
            assert dropped_sum(groups, kept) == pytest.approx(min(within), rel=1e-4, abs=1e-12)


def test_limits_hold_even_where_the_goal_asks_for_more():
    groups = {"a": group([0.1, 0.2, 0.3, 0.4], least=3), "b": group([5.0, 6.0, 7.0])}
    for objective in ("saliency", "flops", "parameters"):
        kept = select(groups, Goal(prune_ratio=0.99), (0, 0), objective)
        assert kept["a"][0].tolist() == [1, 2, 3] and kept["b"][0].tolist() == [2]


def test_ties_go_in_order_and_zero_layers_go_first():
    groups = {"a": group([1.0, 1.0, 1.0, 1.0]), "zero": group([0.0, 0.0, 0.0])}
    kept = select(groups, Goal(prune_ratio=3 / 7), (0, 0))
    assert kept["zero"][0].tolist() == [2] and kept["a"][0].tolist() == [1, 2, 3]
    everything_zero = {"zero": group([0.0] * 6), "other": group([0.0] * 6)}
    for objective in ("saliency", "flops", "parameters"):
        kept = select(everything_zero, Goal(flops=6), (0, 0), objective)
        assert sum(len(sides[0]) for sides in kept.values()) <= 6


def test_a_share_is_of_what_the_objective_counts():
    """Directions of "a" cost 3 FLOPs and 1 parameter, those of "b" 1 FLOP and 3 parameters; half goes."""
    groups = {"a": group([1.0, 2, 3, 4], flops=3, parameters=1), "b": group([1.2, 2.1, 2.6, 4.5], parameters=3)}
    expected = {"saliency": (2, 2), "flops": (1, 4), "parameters": (4, 1)}
    for objective, counts in expected.items():
        kept = kept_counts(select(groups, Goal(prune_ratio=0.5), (0, 0), objective))
        assert (kept["a"][0], kept["b"][0]) == counts, objective


def test_nothing_to_prune_is_no_fault():
    for objective in ("saliency", "flops"):
        assert select({}, Goal(flops=10), (10, 5), objective) == {}
        with pytest.raises(UserError, match=r"asks for 9 FLOPs.*no fewer than 10"):
            select({}, Goal(flops=9), (10, 5), objective)


@pytest.mark.parametrize("objective", ["saliency", "flops", "parameters"])
def test_kept_directions_are_raised_to_multiples(objective):
    values = {name: torch.rand(70) for name in "abc"}
    groups = {name: group(own) for name, own in values.items()}
    in_steps = {name: group(own, least=8, step=8) for name, own in values.items()}
    free = select(groups, Goal(prune_ratio=0.5), (0, 0), objective)
    rounded = select(in_steps, Goal(prune_ratio=0.5), (0, 0), objective)
    assert all(len(sides[0]) % 8 == 0 or len(sides[0]) == 70 for sides in rounded.values())
    if objective == "saliency":
        for name in groups:
            assert set(free[name][0].tolist()) <= set(rounded[name][0].tolist())
    budget = select(in_steps, Goal(flops=100), (0, 0), objective)
    assert 92 < sum(len(sides[0]) for sides in budget.values()) <= 100


def test_an_unreachable_budget_is_refused_with_what_can_be_reached():
    groups = {"a": group([1.0, 2.0, 3.0], least=2, flops=10)}
    for objective in ("saliency", "flops"):
        with pytest.raises(UserError, match=r"target_flops asks for 15 FLOPs.*no fewer than 25: raise the target"):
            select(groups, Goal(flops=15), (5, 0), objective)
        with pytest.raises(UserError, match="target_parameters asks for 1 parameters"):
            select(groups, Goal(parameters=1), (5, 0), objective)


def test_counts_that_may_be_kept():
    assert counts_kept(64, 64, 0.9, 16).tolist() == [16, 32, 48, 64]
    assert counts_kept(40, 64, 0.5, 16).tolist() == [32, 40]
    assert counts_kept(20, 64, 0.5, 16).tolist() == [20]  # within the limit no more can go
    assert counts_kept(6, 6, 0.9, 16).tolist() == [2, 4, 6]
    assert counts_kept(5, 5, 0.0, 1).tolist() == [5]


def test_small_sides_are_rounded_in_smaller_steps():
    assert [step_of(channels, 8) for channels in (3, 4, 7, 8, 16, 24, 256)] == [1, 2, 2, 8, 8, 8, 8]
    assert step_of(256, 1) == 1


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
