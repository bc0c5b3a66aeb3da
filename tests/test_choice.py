"""The choice among forms against every combination and, for deep networks, against the bound of a linear program."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array

from pruning.choice import choose
from pruning.combinations import Ways, least_regretted, undominated
from pruning.forms import TUCKER, Form, form_costs
from pruning.goals import Goal, as_target, least_of
from utils.errors import UserError


def made_up(seed: int) -> tuple[dict[str, list[Form]], dict[str, list[float]]]:
    """Layers with forms of random costs; what they save costs more and more."""
    generator = np.random.default_rng(seed)
    forms, rises = {}, {}
    for name in "abcd":
        shares = np.concatenate([[1.0], np.sort(generator.uniform(0.05, 0.9, 7))[::-1]])
        flops = (generator.integers(200, 2000) * shares).astype(int)
        factors = np.concatenate([[1.0], generator.uniform(0.5, 1, 7)])  # a layer as it is has most parameters
        parameters = (generator.integers(200, 2000) * shares * factors).astype(int)
        rows = zip(shares, flops.tolist(), parameters.tolist(), strict=True)
        forms[name] = [Form(TUCKER, (int(20 * s), int(30 * s)), f, p) for s, f, p in rows]
        rises[name] = (generator.uniform(0.5, 2) * (1 / shares - 1) * generator.uniform(0.8, 1.2, len(shares))).tolist()
    return forms, rises


def choose_forms(forms, rises, goal, fixed, objective) -> dict[str, int]:
    costs = [form_costs(own) for own in forms.values()]
    chosen = choose(costs, [np.asarray(rises[name]) for name in forms], goal, fixed, objective)
    return dict(zip(forms, chosen, strict=True))


def used(forms, chosen, fixed=(0, 0)):
    picked = [forms[name][i] for name, i in chosen.items()]
    return fixed[0] + sum(form.flops for form in picked), fixed[1] + sum(form.parameters for form in picked)


def lost(rises, chosen) -> float:
    return sum(rises[name][i] for name, i in chosen.items())


def least_rise(forms, rises, goal, fixed) -> float:
    """Over all combinations within the budgets."""
    flops, parameters = (np.inf if limit is None else limit for limit in (goal.flops, goal.parameters))
    best = np.inf
    for way in itertools.product(*(range(len(own)) for own in forms.values())):
        chosen = dict(zip(forms, way, strict=True))
        now = used(forms, chosen, fixed)
        if now[0] <= flops and now[1] <= parameters:
            best = min(best, lost(rises, chosen))
    return best


@pytest.mark.parametrize("objective", ["flops", "parameters", "saliency"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.85, 0.6, 0.35])
def test_no_combination_within_the_budgets_loses_less(seed, share, objective):
    """Whatever the objective: a target is a target."""
    forms, rises = made_up(seed)
    fixed = (100, 50)
    whole = used(forms, dict.fromkeys(forms, 0), fixed)
    limits = share * whole[0], 0.9 * share * whole[1]
    for goal in (Goal(flops=limits[0]), Goal(parameters=limits[1]), Goal(flops=limits[0], parameters=limits[1])):
        chosen = choose_forms(forms, rises, goal, fixed, objective)
        flops, parameters = used(forms, chosen, fixed)
        assert goal.flops is None or flops <= goal.flops
        assert goal.parameters is None or parameters <= goal.parameters
        assert lost(rises, chosen) == pytest.approx(least_rise(forms, rises, goal, fixed), rel=1e-4)


def test_a_budget_is_not_used_up_for_its_own_sake():
    """One layer: 97 FLOPs would use the budget, but lose more than 50 do."""
    forms = {"a": [Form(TUCKER, (1, 1), flops, 1) for flops in (100, 50, 97)]}
    assert choose_forms(forms, {"a": [0, 0.01, 0.5]}, Goal(flops=98), (0, 0), "flops") == {"a": 1}


def deep(seed: int, layers: int, count: int) -> list[Ways]:
    """Layers of unequal size with rises over six orders of magnitude."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        shares = np.concatenate([[1.0], generator.uniform(0.03, 0.9, count - 1)])
        whole = 10 ** generator.uniform(5, 7, 2)
        costs = np.round(whole * shares[:, None] * generator.uniform(0.8, 1, (count, 2)))
        scale = 10 ** generator.uniform(-6, 0)
        found.append(Ways(costs, scale * (1 / shares - 1) * generator.uniform(0.8, 1.2, count)))
    return found


@pytest.mark.parametrize("kinds", [[0], [1], [0, 1]])
@pytest.mark.parametrize(("layers", "count"), [(22, 60), (56, 30)])
def test_the_choice_of_a_deep_network_is_near_the_bound_of_the_linear_program(layers, count, kinds):
    """The relaxed program loses less than any choice; it splits one layer for each budget, so the bound is tight."""
    every = [Ways(ways.costs[:, kinds], ways.regrets) for ways in deep(0, layers, count)]
    budgets = 0.3 * sum(ways.costs[0] for ways in every)
    chosen = least_regretted(every, budgets)
    assert (sum(ways.costs[i] for ways, i in zip(every, chosen, strict=True)) <= budgets).all()
    layer = np.repeat(np.arange(layers), count)
    ones = csr_array((np.ones(len(layer)), (layer, np.arange(len(layer)))))
    bound = linprog(
        np.concatenate([ways.regrets for ways in every]),
        A_ub=np.concatenate([ways.costs for ways in every]).T / budgets[:, None],
        b_ub=np.ones(len(kinds)),
        A_eq=ones,
        b_eq=np.ones(layers),
    ).fun
    found = sum(ways.regrets[i] for ways, i in zip(every, chosen, strict=True))
    assert bound * (1 - 1e-6) <= found <= 1.02 * bound


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_is_predicted_to_lose_anything_no_more_is_saved_than_asked(seed):
    """As in a network that is certain of all images."""
    forms, rises = made_up(seed)
    none = {name: [0.0] * len(own) for name, own in rises.items()}
    whole = used(forms, dict.fromkeys(forms, 0))[0]
    goal = Goal(flops=int(0.7 * whole))
    combinations = itertools.product(*(range(len(own)) for own in forms.values()))
    costs = (used(forms, dict(zip(forms, way, strict=True)))[0] for way in combinations)
    most = max(cost for cost in costs if cost <= goal.flops)
    found = used(forms, choose_forms(forms, none, goal, (0, 0), "flops"))[0]
    assert 0.9995 * most <= found <= most


def test_small_rises_count_beside_forms_that_ruin_the_network():
    """The solver's tolerance is absolute: without a second look 1e-9 and 1e-10 were the same beside 1e3."""
    own = Ways(np.array([[10.0], [5], [5], [1]]), np.array([0, 3e-9, 1e-10, 1e3]))
    assert least_regretted([own] * 3, np.array([16.0])) == [2, 2, 2]
    assert least_regretted([own] * 3, np.array([30.0])) == [0, 0, 0]
    assert least_regretted([own] * 3, np.array([3.0])) == [3, 3, 3]
    assert least_regretted([own] * 3, np.array([2.0])) is None
    assert least_regretted([], np.array([0.0])) == [] and least_regretted([], np.array([-1.0])) is None


@pytest.mark.parametrize("kinds", [1, 2])
def test_undominated_ways_are_those_that_no_other_beats(kinds):
    generator = np.random.default_rng(0)
    ways = Ways(generator.integers(1, 12, (80, kinds)).astype(float), generator.integers(0, 12, 80).astype(float))
    rows = np.column_stack([ways.costs, ways.regrets])
    expected = {tuple(row) for row in rows if not any((o <= row).all() and (o < row).any() for o in rows)}
    found = [tuple(row) for row in rows[undominated(ways)]]
    assert set(found) == expected and len(found) == len(expected)


def test_a_share_goes_of_what_the_objective_counts_and_no_more_than_there_is():
    forms, rises = made_up(0)
    fixed, goal = (100, 50), Goal(prune_ratio=0.4)
    now, least = (
        used(forms, dict.fromkeys(forms, 0), fixed),
        least_of([form_costs(own) for own in forms.values()], fixed),
    )
    assert as_target(goal, now, least, "flops") == Goal(flops=0.6 * now[0])
    assert as_target(goal, now, least, "parameters") == Goal(parameters=0.6 * now[1])
    assert as_target(Goal(prune_ratio=0.99), now, least, "flops") == Goal(flops=least[0])
    assert as_target(Goal(flops=7.0), now, least, "flops") == Goal(flops=7.0)
    chosen = choose_forms(forms, rises, goal, fixed, "parameters")
    assert used(forms, chosen, fixed)[1] <= 0.6 * now[1]
    least_lost = least_rise(forms, rises, Goal(parameters=0.6 * now[1]), fixed)
    assert lost(rises, chosen) == pytest.approx(least_lost, rel=1e-4)
    chosen = choose_forms(forms, rises, Goal(prune_ratio=0.99), fixed, "flops")
    assert used(forms, chosen, fixed)[0] == least[0]


def test_nothing_is_given_away_where_the_network_is_within_the_budget():
    forms, rises = made_up(0)
    assert choose_forms(forms, rises, Goal(flops=1e9), (0, 0), "flops") == dict.fromkeys(forms, 0)


def test_a_budget_out_of_reach_is_refused():
    forms, rises = made_up(0)
    least = least_of([form_costs(own) for own in forms.values()], (7, 9))
    assert least == tuple(
        outside + sum(min(getattr(form, kind) for form in own) for own in forms.values())
        for outside, kind in ((7, "flops"), (9, "parameters"))
    )
    with pytest.raises(UserError, match=f"target_flops asks for .* no fewer than {least[0]:,}: raise the target"):
        choose_forms(forms, rises, Goal(flops=least[0] - 1), (7, 9), "flops")
    with pytest.raises(UserError, match=f"target_parameters asks for .* no fewer than {least[1]:,}: raise the target"):
        choose_forms(forms, rises, Goal(parameters=least[1] - 1), (7, 9), "flops")


def test_budgets_that_exclude_each_other_are_refused_as_a_pair():
    """Each form is the smallest in one kind: 5 FLOPs leave 50 parameters."""
    forms = {name: [Form(TUCKER, (1, 1), *costs) for costs in ((50, 50), (5, 50), (50, 5))] for name in "ab"}
    rises = {name: [0.0, 1.0, 1.0] for name in "ab"}
    assert set(choose_forms(forms, rises, Goal(flops=60, parameters=60), (0, 0), "flops").values()) == {1, 2}
    with pytest.raises(UserError) as refused:
        choose_forms(forms, rises, Goal(flops=20, parameters=20), (0, 0), "flops")
    assert str(refused.value) == (
        "target_flops (20) and target_parameters (20) can be met one by one, but not together: with so few FLOPs the "
        "layers can leave no fewer than 100 parameters: raise the target"
    )
