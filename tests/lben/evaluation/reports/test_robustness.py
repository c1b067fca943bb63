"""The table says how the bound was found, and what each kind of proof certifies."""

from dataclasses import replace

from lben.evaluation import Robustness, RobustnessConfig
from lben.evaluation.reports import robustness_table
from lben.tightening.routes import Route

ROUTE = Route(name="recursion", bound=5.0, seconds=2.0, passed_over=("primal-dual would take",))
REPORT = Robustness(
    model="Network", data="digits", samples=40, available=360, clean_accuracy=0.9, bound=5.0,
    method="recursion: storages", route=ROUTE, bound_seconds=2.5, radii=(0.1, 8 / 255),
    certified_globally=(0.5, 0.25), certified=(0.75, 0.5), largest=(0.1,), local=True,
    seconds_per_sample=0.2, seconds=8.0, config=RobustnessConfig(radii=(0.1, 8 / 255)),
    environment={},
)  # fmt: skip


def test_the_table_has_the_route_and_both_kinds_of_proofs():
    lines = robustness_table(REPORT).splitlines()
    assert lines[0] == "Network on digits, first 40 of 360 inputs, clean accuracy 90.00 %"
    assert lines[1] == "global l2 bound 5 by recursion, in 2 seconds; primal-dual would take"
    assert lines[2] == "certified % of the exact network at l2 radius r"
    assert lines[4].split() == ["global", "bound", "50.00", "25.00", "0.000"]
    assert lines[5].split() == ["around", "each", "input", "75.00", "50.00", "0.200"]
    assert len({len(line) for line in lines[3:6]}) == 1


def test_the_table_names_the_box_and_a_model_without_local_proofs():
    config = RobustnessConfig(radii=(0.1, 0.2), norm="linf", box=(0, 1))
    text = robustness_table(replace(REPORT, config=config, local=False, route=None))
    assert "at linf radius r, among inputs in [0, 1]" in text
    assert "this model has no proofs around single inputs" in text
    assert "global l2 bound 5, in 2.5 seconds" in text
    silent = replace(config, local=False)
    assert "no proofs" not in robustness_table(replace(REPORT, config=silent, local=False))
