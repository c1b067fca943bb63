"""Proposals for dual bounds: back-substitution is CROWN, and ascent improves it."""

import pytest
import torch

from lben.certificates.relaxation import InputRegion, Intervals, dual_value, prove_lower_bounds
from lben.certificates.states import StateBound
from lben.tightening.relaxation import (
    Lines,
    Proposal,
    ascend,
    back_substitute,
    find_relaxed_states,
    propose_lines,
)
from lben.weights.activation import RELU
from lben.weights.affine_system import AffineSystem
from tests.lben.certificates.test_relaxation import BUMP, chain, intervals_of, sample
from tests.lben.weights.test_affine_system import TANH, equilibrium
from tests.lben.weights.test_network import residual


def crown(network, region, intervals, target):
    """Return the bound of CROWN for a chain of ReLUs, line by line."""
    A, value = target, 0.0
    for k in (2, 1):
        affine = network.blocks[k].affine if k < len(network.blocks) else network.output
        value = value + A @ torch.from_numpy(affine.bias)
        A = A @ torch.from_numpy(affine.matrices[k])
        lower, upper = intervals.lower[k][0], intervals.upper[k][0]
        line = (upper.clamp_min(0) - lower.clamp_min(0)) / (upper - lower)
        below = (upper > -lower).double()
        below = torch.where(lower >= 0, 1.0, torch.where(upper <= 0, 0.0, below))
        value = value + (A.clamp_max(0) * (lower.clamp_min(0) - line * lower)).sum(1)
        A = torch.where(A >= 0, A * below, A * line)
    affine = network.blocks[0].affine
    value = value + A @ torch.from_numpy(affine.bias)
    A = A @ torch.from_numpy(affine.matrices[0])
    return value + A @ region.center[0] - (A.abs() * region.reach()[0]).sum(1)


def test_back_substitution_is_crown():
    network = chain()
    system = AffineSystem.of_network(network)
    region = InputRegion.around(torch.rand(1, 4), 0.1, "linf", None)
    intervals = intervals_of(system, region)
    target = torch.randn(8, 3).double()
    many = torch.zeros(8, dtype=torch.int64)
    intervals, region = intervals.select(many), region.select(many)
    lines = propose_lines(system, 3, intervals)
    tau = back_substitute(system, 3, target, lines, Proposal.of(lines))
    bound = prove_lower_bounds(system, 3, target, tau, intervals, region)
    torch.testing.assert_close(bound, crown(network, region, intervals, target))


@pytest.mark.parametrize("activation", [RELU, TANH, BUMP], ids=lambda a: a.name)
def test_lines_are_slopes_of_the_graph(activation):
    lower = torch.linspace(-3, 2, 60).double()[None]
    lines = Lines.of(activation, lower, lower + 0.7)
    torch.testing.assert_close(
        lines.chord * 0.7, activation(lower + 0.7) - activation(lower), atol=1e-9, rtol=1e-9
    )
    assert (lines.least <= lines.most).all()
    assert (lines.least >= activation.low - 1e-9).all()
    assert (lines.most <= activation.high + 1e-9).all()


@pytest.mark.parametrize("activation", [RELU, TANH, BUMP], ids=lambda a: a.name)
def test_ascent_improves_every_bound_and_stays_below_all_values(activation):
    system = AffineSystem.of_network(chain(activation=activation), 0.1307, 0.3081)
    region = InputRegion.around(torch.rand(1, 4), 0.1, "l2", (0.0, 1.0))
    many, target = torch.zeros(10, dtype=torch.int64), torch.randn(10, 3).double()
    reached = (system.evaluate(sample(region))[-1] @ target.T).amin(0)
    intervals, region = intervals_of(system, region).select(many), region.select(many)
    lines = propose_lines(system, 3, intervals)
    first = Proposal.of(lines)

    def value(proposal: Proposal) -> torch.Tensor:
        tau = back_substitute(system, 3, target, lines, proposal)
        return dual_value(system, 3, target, tau, intervals, region)

    best, bound = ascend(system, 3, target, intervals, region, first, steps=60)
    torch.testing.assert_close(value(best), bound)
    assert (bound >= value(first)).all()
    assert (bound > value(first) + 1e-6).any()
    assert (bound <= reached + 1e-9).all()


def test_ascent_ends_at_its_goal():
    system = AffineSystem.of_network(residual())
    region = InputRegion.around(torch.rand(1, 3), 0.1, "linf", None)
    intervals = intervals_of(system, region)
    target = torch.ones(1, 2).double()
    first = Proposal.of(propose_lines(system, 3, intervals))
    best, _ = ascend(system, 3, target, intervals, region, first, steps=50, goal=-1e9)
    for j, t in best.tangents.items():
        assert torch.equal(t, first.tangents[j])


def test_the_adjoint_of_an_equilibrium_is_solved():
    system = AffineSystem.of_weights(equilibrium(), RELU)
    region = InputRegion.around(torch.rand(1, 3), 0.05, "l2", None)
    intervals = StateBound(system).prove(region, system.evaluate(region.center)[0])
    for level, q in ((1, 6), (2, 2)):
        target = torch.randn(1, q).double()
        lines = propose_lines(system, level, intervals)
        tau = back_substitute(system, level, target, lines, Proposal.of(lines))
        lam = {1: tau[1] + target} if level == 1 else {1: tau[1], 2: target}
        g = system.pull(1, lam)
        slopes = lines[1].slopes(g, lines[1].tangent)
        torch.testing.assert_close(tau[1], slopes * g)
        bound = prove_lower_bounds(system, level, target, tau, intervals, region)
        assert bound <= (system.evaluate(sample(region))[level - 1] @ target[0]).min()


def test_where_no_unit_can_switch_the_bound_is_exact():
    """The network is affine on the set, and back-substitution is its gradient."""
    system = AffineSystem.of_weights(equilibrium(), RELU)
    region = InputRegion.around(torch.rand(1, 3), 1e-7, "linf", None)
    v, y = system.evaluate(region.center)
    intervals = Intervals(lower={1: v - 1e-5}, upper={1: v + 1e-5})
    target = torch.tensor([[1.0, -1.0]]).double()
    lines = propose_lines(system, 2, intervals)
    tau = back_substitute(system, 2, target, lines, Proposal.of(lines))
    bound = prove_lower_bounds(system, 2, target, tau, intervals, region)
    reached = (system.evaluate(sample(region))[1] @ target[0]).min()
    torch.testing.assert_close(
        (y[0] @ target[0] - bound)[0], y[0] @ target[0] - reached, rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("kind", ["chain", "equilibrium"])
def test_relaxed_states_satisfy_the_relaxation(kind):
    """Where no unit can switch they are those of the network at the worst input."""
    system = {
        "chain": lambda: AffineSystem.of_network(chain()),
        "equilibrium": lambda: AffineSystem.of_weights(equilibrium(), RELU),
    }[kind]()
    x = torch.rand(1, system.inputs)
    for radius in (1e-6, 0.2):
        region = InputRegion.around(x, radius, "linf", None)
        values = system.evaluate(region.center)
        reach = 1e3 * radius
        intervals = Intervals(
            lower={j: v - reach for j, v in enumerate(values[:-1], 1)},
            upper={j: v + reach for j, v in enumerate(values[:-1], 1)},
        )
        target = torch.randn(1, system.units(system.output)).double()
        lines = propose_lines(system, system.output, intervals)
        blocks = find_relaxed_states(
            system, system.output, target, lines, Proposal.of(lines), intervals, region
        )
        for j, block in blocks.items():
            assert (block.z >= RELU(block.v) - 1e-9).all()
            assert (block.v >= intervals.lower[j]).all()
            assert (block.v <= intervals.upper[j]).all()
            if radius == 1e-6:
                torch.testing.assert_close(block.z, RELU(block.v))
                torch.testing.assert_close(block.v, values[j - 1], atol=1e-4, rtol=0)


def test_pace_shrinks_near_the_best_bound():
    system = AffineSystem.of_network(chain())
    region = InputRegion.around(torch.rand(1, 4), 0.3, "l2", None)
    intervals, target = intervals_of(system, region), torch.tensor([[1.0, -1.0, 0.0]]).double()
    first = Proposal.of(propose_lines(system, 3, intervals))
    last, _ = ascend(system, 3, target, intervals, region, first, steps=300)
    assert last.pace < 0.1
