"""The table of torchvision's networks: what counts as within the budget and as exported."""

from benchmarks.torchvision_models import table


def row(name: str, left: int, **more):
    return {
        "network": name, "size": 64, "flops": 1000, "smaller_flops": left, "parameters": 200, "smaller_parameters": 50,
        "bytes": 30, "step_bytes": 20, "seconds": 1.4, **more,
    }  # fmt: skip


def test_table_counts_networks_within_two_percent_of_the_budget_and_exported_ones():
    rows = [row("low", 686, deviation=1e-6), row("lower", 685, not_exported="it has branches"), row("above", 715)]
    first, *_, lower, above, last = table(rows, 0.7).split("\n")
    assert first == "3 networks to 70% of their FLOPs: 1 within 2% of the budget, 1 exported."
    assert lower == "| lower | 64 | 0.000 | 68.5% | 25.0% | no | 1.5 | 1 |"
    assert above.startswith("| above | 64 | 0.000 | 71.5%") and last == ""
