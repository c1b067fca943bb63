"""Branch and bound proves what one bound does not, and nothing that is false."""

import pytest
import torch

from lben.certificates.relaxation import InputRegion
from lben.radii import branching
from lben.radii.branching import prove_positive
from lben.radii.ranges import prove_bounds, prove_ranges
from lben.tightening.descent import find_smallest
from tests.lben.certificates.test_relaxation import sample
from tests.lben.radii.test_ranges import system_of

KINDS = ("chain", "residual", "sparse", "leaky", "tanh", "bump", "equilibrium")


def problem(name: str, radius: float):
    """Return a system, a set of inputs, ranges, and a direction of the outputs."""
    system = system_of(name)
    region = InputRegion.around(torch.rand(1, system.inputs), radius, "l2", (0.0, 1.0))
    target = torch.zeros(1, system.units(system.output)).double()
    target[0, :2] = torch.tensor([1.0, -1.0])
    return system, region, prove_ranges(system, region, steps=10), target


def smallest(system, region, target) -> torch.Tensor:
    """Return the least output that is known."""
    reached = (system.evaluate(sample(region, 20000))[-1] @ target[0]).min()
    return torch.minimum(reached, find_smallest(system, target, region)[0])


def shifted(system, target, amount):
    """Return the target and a copy of the system whose output is less by some amount."""
    biases = list(system.biases)
    own = biases[-1].clone()
    own[0] -= amount
    biases[-1] = own
    system.__dict__.pop("single", None)
    object.__setattr__(system, "biases", tuple(biases))
    return system


@pytest.mark.parametrize("name", KINDS)
def test_what_ascent_cannot_prove_is_proved_in_parts(name):
    system, region, ranges, target = problem(name, 0.4)
    least = smallest(system, region, target)
    bound = prove_bounds(system, system.output, target, ranges, region, steps=60).value[0]
    assert bound < least
    shifted(system, target, float(bound + 0.7 * (least - bound)))
    assert prove_bounds(system, system.output, target, ranges, region, steps=60).value < 0
    verdict = prove_positive(system, target, ranges, region, seconds=20.0)
    assert verdict.margin > 0
    assert verdict.parts > 1
    reached = (system.evaluate(sample(region))[-1] @ target[0]).min()
    assert verdict.margin <= reached


@pytest.mark.parametrize("name", KINDS)
def test_what_is_false_is_never_proved(name):
    system, region, ranges, target = problem(name, 0.4)
    least = smallest(system, region, target)
    shifted(system, target, float(least + 1e-6))
    assert prove_positive(system, target, ranges, region, seconds=1.0).margin == -torch.inf


def test_several_outputs_are_proved_together():
    system, region, ranges, target = problem("chain", 0.4)
    targets = torch.cat([target, -target, target])
    least = find_smallest(system, targets, region.select(torch.zeros(3, dtype=torch.int64)))
    shifted(system, target, float(least[0] - 0.05))
    assert prove_positive(system, targets[[0, 2]], ranges, region, seconds=10.0).margin > 0
    assert prove_positive(system, targets, ranges, region, seconds=0.5).margin == -torch.inf


def test_a_part_that_is_left_out_is_found(monkeypatch):
    """Planted fault: the upper parts are thrown away."""
    system, region, ranges, target = problem("chain", 0.4)
    shifted(system, target, float(find_smallest(system, target, region)[0] + 0.02))
    right = branching._split

    def wrong(*arguments):
        parts = right(*arguments)
        return parts.select(torch.arange(len(parts) // 2))

    assert prove_positive(system, target, ranges, region, seconds=1.0).margin == -torch.inf
    monkeypatch.setattr(branching, "_split", wrong)
    assert prove_positive(system, target, ranges, region, seconds=1.0).margin > 0


def test_the_parts_of_a_split_cover_the_whole():
    system, region, ranges, target = problem("residual", 0.4)
    values = system.evaluate(sample(region))
    lines = branching.propose_lines(system.single, system.output, ranges.to(torch.float32))
    parts = branching.Parts(
        target=torch.tensor([0]), intervals=ranges, proposal=branching.Proposal.of(lines)
    )
    for _ in range(6):
        parts = branching._split(system, target, parts, region)
    inside = torch.zeros(len(values[0]), dtype=torch.bool)
    for i in range(len(parts)):
        here = torch.ones_like(inside)
        for j in (1, 2):
            low, high = parts.intervals.lower[j][i], parts.intervals.upper[j][i]
            here &= ((values[j - 1] >= low) & (values[j - 1] <= high)).all(1)
        inside |= here
    assert len(parts) == 64
    assert inside.all()
