"""Ranges of pre-activations are proved, and hold at every input of the set."""

import pytest
import torch

from lben.certificates.relaxation import InputRegion
from lben.certificates.states import StateBound
from lben.radii.ranges import prove_bounds, prove_ranges
from lben.weights.activation import RELU
from lben.weights.affine_system import AffineSystem
from tests.lben.certificates.test_relaxation import (
    BUMP,
    LEAKY,
    SETS,
    chain,
    intervals_of,
    sample,
)
from tests.lben.weights.test_affine_system import TANH, equilibrium
from tests.lben.weights.test_network import residual


def system_of(name: str) -> AffineSystem:
    networks = {
        "chain": lambda: chain(), "residual": residual, "sparse": lambda: residual(sparse=True),
        "leaky": lambda: chain(activation=LEAKY), "tanh": lambda: chain(activation=TANH),
        "bump": lambda: chain(activation=BUMP), "large": lambda: chain((1e8, 1.0, 1e-8)),
    }  # fmt: skip
    if name in networks:
        return AffineSystem.of_network(networks[name](), 0.1307, 0.3081)
    activation = {"equilibrium": RELU, "equilibrium of tanh": TANH}[name]
    return AffineSystem.of_weights(equilibrium(), activation, 0.1307, 0.3081)


NAMES = (
    "chain", "residual", "sparse", "leaky", "tanh", "bump", "large", "equilibrium",
    "equilibrium of tanh",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("norm", "box"), SETS)
@pytest.mark.parametrize("steps", [0, 5])
def test_no_input_leaves_a_range(name, norm, box, steps):
    system = system_of(name)
    region = InputRegion.around(torch.rand(1, system.inputs), 0.1, norm, box)
    ranges = prove_ranges(system, region, steps=steps)
    values = system.evaluate(sample(region))
    for j in ranges.lower:
        slack = 1e-13 * values[j - 1].abs().max()
        assert (values[j - 1] >= ranges.lower[j] - slack).all()
        assert (values[j - 1] <= ranges.upper[j] + slack).all()


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_ranges_are_narrower_than_by_intervals_and_narrower_after_ascent(name):
    system = system_of(name)
    region = InputRegion.around(torch.rand(1, system.inputs), 0.6, "l2", None)

    def width(ranges) -> float:
        return float((ranges.upper[2] - ranges.lower[2]).sum())

    plain, none, some = (
        width(intervals_of(system, region)),
        width(prove_ranges(system, region)),
        width(prove_ranges(system, region, steps=20)),
    )
    assert some < none < plain


def test_ranges_of_an_equilibrium_shrink():
    system = system_of("equilibrium")
    region = InputRegion.around(torch.rand(2, 3), 0.02, "l2", None)
    first = StateBound(system).prove(region, system.evaluate(region.center)[0])
    last = prove_ranges(system, region)
    assert (last.lower[1] >= first.lower[1]).all()
    assert (last.upper[1] <= first.upper[1]).all()
    assert (last.upper[1] - last.lower[1]).sum() < 0.5 * (first.upper[1] - first.lower[1]).sum()


def test_images_of_a_batch_do_not_mix():
    system = system_of("chain")
    region = InputRegion.around(torch.rand(3, 4), torch.tensor([0.1, 0.2, 0.3]), "l2", (0.0, 1.0))
    together = prove_ranges(system, region)
    for i in range(3):
        alone = prove_ranges(system, region.select(torch.tensor([i])))
        for j in (1, 2):
            torch.testing.assert_close(together.lower[j][[i]], alone.lower[j])
            torch.testing.assert_close(together.upper[j][[i]], alone.upper[j])


def test_bounds_start_where_they_are_told():
    system = system_of("chain")
    region = InputRegion.around(torch.rand(1, 4), 0.3, "l2", None)
    ranges, target = prove_ranges(system, region), torch.tensor([[1.0, -1.0, 0.0]]).double()
    first = prove_bounds(system, 3, target, ranges, region, steps=40)
    again = prove_bounds(system, 3, target, ranges, region, steps=0, start=first.proposal)
    torch.testing.assert_close(first.value, again.value)
    assert first.value >= prove_bounds(system, 3, target, ranges, region, steps=0).value
