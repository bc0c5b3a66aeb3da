"""The choice among forms against exhaustive search."""

import itertools

import numpy as np
import pytest

from pruning.choice import budget_of, choose_forms, smallest
from pruning.forms import TUCKER, Form
from pruning.selection import Goal
from utils.errors import UserError


def made_up(seed: int) -> tuple[dict[str, list[Form]], dict[str, list[float]]]:
    """Three layers with forms of random costs; what they save costs more and more."""
    generator = np.random.default_rng(seed)
    forms, rises = {}, {}
    for name in "abc":
        shares = np.concatenate([[1.0], np.sort(generator.uniform(0.05, 0.9, 7))[::-1]])
        flops = (generator.integers(200, 2000) * shares).astype(int)
        parameters = (generator.integers(200, 2000) * shares).astype(int)
        seconds = 1e-6 * shares * generator.uniform(0.9, 1.1, len(shares))
        rows = zip(shares, flops.tolist(), parameters.tolist(), seconds.tolist(), strict=True)
        forms[name] = [Form(TUCKER, (int(20 * s), int(30 * s)), f, p, t) for s, f, p, t in rows]
        rises[name] = (generator.uniform(0.5, 2) * (1 / shares - 1) * generator.uniform(0.8, 1.2, len(shares))).tolist()
    return forms, rises


def every_choice(forms):
    for way in itertools.product(*(range(len(own)) for own in forms.values())):
        yield dict(zip(forms, way, strict=True))


def used(forms, chosen, fixed=(0, 0)):
    picked = [forms[name][i] for name, i in chosen.items()]
    return fixed[0] + sum(form.flops for form in picked), fixed[1] + sum(form.parameters for form in picked)


def lost(rises, chosen) -> float:
    return sum(rises[name][i] for name, i in chosen.items())


@pytest.mark.parametrize("objective", ["flops", "parameters", "latency", "saliency"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.85, 0.6, 0.35])
def test_a_budget_is_met_and_used_up_where_a_combination_does_so(seed, share, objective):
    forms, rises = made_up(seed)
    fixed = (100, 50)
    whole = used(forms, dict.fromkeys(forms, 0), fixed)
    for goal in (Goal(flops=share * whole[0]), Goal(parameters=share * whole[1])):
        kind, limit = (0, goal.flops) if goal.flops else (1, goal.parameters)
        chosen = choose_forms(forms, rises, goal, fixed, objective)
        assert used(forms, chosen, fixed)[kind] <= limit
        window = [c for c in every_choice(forms) if 0.98 * limit <= used(forms, c, fixed)[kind] <= limit]
        if window:
            assert used(forms, chosen, fixed)[kind] >= 0.98 * limit


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.85, 0.6, 0.35])
def test_no_choice_as_cheap_loses_less(seed, share):
    """What a price chooses is the best of all at its own cost (Everett 1963); within the slack it is near that."""
    forms, rises = made_up(seed)
    goal = Goal(flops=share * used(forms, dict.fromkeys(forms, 0))[0])
    chosen = choose_forms(forms, rises, goal, (0, 0), "flops")
    spent = used(forms, chosen)[0]
    window = [c for c in every_choice(forms) if 0.98 * goal.flops <= used(forms, c)[0] <= goal.flops]
    cheaper = [c for c in every_choice(forms) if used(forms, c)[0] <= spent]
    best = min(lost(rises, c) for c in cheaper)
    least = min((lost(rises, c) for c in window), default=float("inf"))
    found = lost(rises, chosen)
    assert found == pytest.approx(best, rel=1e-12) or found == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize(("kind", "other"), [("flops", "parameters"), ("parameters", "flops")])
def test_the_objective_saliency_weighs_what_the_budget_is_given_in(kind, other):
    for seed in range(4):
        forms, rises = made_up(seed)
        index = ("flops", "parameters").index(kind)
        goal = Goal(**{kind: 0.5 * used(forms, dict.fromkeys(forms, 0))[index]})
        chosen = choose_forms(forms, rises, goal, (0, 0), "saliency")
        assert chosen == choose_forms(forms, rises, goal, (0, 0), kind)
        assert lost(rises, chosen) <= lost(rises, choose_forms(forms, rises, goal, (0, 0), other)) + 1e-12


def test_a_share_goes_of_what_the_objective_counts_and_no_more_than_there_is():
    forms, _ = made_up(0)
    fixed, goal = (100, 50), Goal(prune_ratio=0.4)
    now, least = used(forms, dict.fromkeys(forms, 0), fixed), smallest(forms, fixed)
    assert budget_of(goal, now, forms, fixed, "flops") == Goal(flops=0.6 * now[0])
    assert budget_of(goal, now, forms, fixed, "latency") == Goal(flops=0.6 * now[0])
    assert budget_of(goal, now, forms, fixed, "parameters") == Goal(parameters=0.6 * now[1])
    assert budget_of(Goal(prune_ratio=0.99), now, forms, fixed, "flops") == Goal(flops=least[0])
    assert budget_of(Goal(flops=7.0), now, forms, fixed, "flops") == Goal(flops=7.0)


def test_nothing_is_given_away_where_the_network_is_within_the_budget():
    forms, rises = made_up(0)
    assert choose_forms(forms, rises, Goal(flops=1e9), (0, 0), "flops") == dict.fromkeys(forms, 0)


def test_a_budget_out_of_reach_is_refused():
    forms, rises = made_up(0)
    least = smallest(forms, (7, 9))
    assert least == used(forms, {name: len(own) - 1 for name, own in forms.items()}, (7, 9))
    with pytest.raises(UserError, match=f"target_flops asks for .* leaves at least {least[0]:,}"):
        choose_forms(forms, rises, Goal(flops=least[0] - 1), (7, 9), "flops")
    with pytest.raises(UserError, match=f"target_parameters asks for .* leaves at least {least[1]:,}"):
        choose_forms(forms, rises, Goal(parameters=least[1] - 1), (7, 9), "flops")
