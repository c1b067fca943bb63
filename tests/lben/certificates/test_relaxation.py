"""The dual bound holds: in exact arithmetic, at attacked inputs, and not with planted faults."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lben.certificates import relaxation
from lben.certificates.relaxation import (
    InputRegion,
    Intervals,
    bound_outputs,
    multipliers_of,
    prove_by_intervals,
    prove_lower_bounds,
    unit_minimum,
)
from lben.weights.activation import RELU, Activation
from lben.weights.affine_system import AffineSystem
from lben.weights.network import AffineMap, Block, Network
from tests.lben.weights.test_affine_system import TANH, equilibrium
from tests.lben.weights.test_network import residual

BUMP = Activation(
    name="bump", low=-0.5, high=1.2, curvature=2.0, function=lambda v: v * torch.sigmoid(2 * v),
    relative_error=2.0**-48, absolute_error=2.0**-60,
)  # fmt: skip
LEAKY = Activation(
    name="leaky", low=0.125, high=1.0, knots=(0.0,), function=lambda v: torch.maximum(v, v / 8)
)
SETS = [("linf", None), ("linf", (0.0, 1.0)), ("l2", None), ("l2", (0.0, 1.0))]


def chain(scales: tuple[float, ...] = (1.0, 1.0, 1.0), activation=RELU, seed: int = 0) -> Network:
    """Return 4 inputs, 5 and 6 units, 3 outputs; `scales` of the weights, by level."""
    numbers = np.random.default_rng(seed)
    maps = [
        AffineMap.of(
            {j: s * numbers.standard_normal((rows, columns))},
            np.prod(scales[: j + 1]) * numbers.standard_normal(rows),
        )
        for j, (s, rows, columns) in enumerate(zip(scales, (5, 6, 3), (4, 5, 6), strict=True))
    ]
    return Network(
        input_shape=(4,),
        blocks=tuple(Block(affine=affine, activation=activation) for affine in maps[:-1]),
        output=maps[-1],
    )


def sample(region: InputRegion, count: int = 2000) -> torch.Tensor:
    """Return inputs of the first set: random ones and corners, within radius and box."""
    shape = (count, region.center.shape[1])
    move = torch.where(torch.rand(count, 1) < 0.5, torch.randn(shape), torch.randn(shape).sign())
    move = move.double() * region.reach()[0]
    if region.radius[0].isfinite():
        move *= region.radius[0] / move.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return region.center[0] + move.clamp(region.lower[0], region.upper[0]) * (1 - 1e-12)


def intervals_of(system: AffineSystem, region: InputRegion) -> Intervals:
    intervals = Intervals(lower={}, upper={})
    for level in range(1, system.output):
        intervals = intervals.with_block(
            level, *prove_by_intervals(system, level, intervals, region)
        )
    return intervals


def random_proposal(system: AffineSystem, level: int, batch: int, size: float = 1.0):
    return {j: size * torch.randn(batch, system.units(j)).double() for j in system.blocks(level)}


def exactly(tensor: torch.Tensor) -> list:
    if tensor.ndim == 0:
        return Fraction(tensor.item())
    return [exactly(t) for t in tensor]


def root_up(value: Fraction) -> Fraction:
    """Return an upper bound of √value, to a relative 10⁻⁴⁰ or so."""
    scale = 10**60 * (1 + int(1 / value) if 0 < value < 1 else 1)
    return Fraction(math.isqrt(int(value * scale * scale)) + 1, scale)


def exact_value(system, level, target, tau, intervals, region) -> list[Fraction]:
    """Return the right side of Note [Dual bound] in rational arithmetic, for ReLU."""
    lam = multipliers_of(system, level, target, tau)
    w = region.split(system.pull(0, lam) / system.std)
    values = []
    for i in range(len(target)):
        exact = {j: exactly(t[i]) for j, t in tau.items()}
        own = exactly(target[i])
        if level in exact:
            full = {**exact, level: [a + b for a, b in zip(exact[level], own, strict=True)]}
        else:
            full = {**exact, level: own}

        def pull(block: int, full=full) -> list[Fraction]:
            width = system.inputs if block == 0 else system.units(block)
            total = [Fraction(0)] * width
            for k, rows in full.items():
                if block in system.reads(k):
                    for row, weight in zip(exactly(system.rows(k, block)), rows, strict=True):
                        total = [t + weight * entry for t, entry in zip(total, row, strict=True)]
            return total

        value = sum(
            (weight * bias for k in full
             for weight, bias in zip(full[k], exactly(system.biases[k - 1]), strict=True)),
            Fraction(0),
        )  # fmt: skip
        a = [g / s for g, s in zip(pull(0), exactly(system.std), strict=True)]
        squares = Fraction(0)
        rows = zip(
            a, exactly(w[i]), exactly(region.center[i]), exactly(system.mean),
            exactly(region.lower[i]), exactly(region.upper[i]), strict=True,
        )  # fmt: skip
        for entry, ball, center, mean, lower, upper in rows:
            rest = entry - ball
            value += entry * (center - mean) + rest * (lower if rest > 0 else upper)
            squares += ball * ball
        if region.radius[i].isfinite() and squares:
            value -= Fraction(region.radius[i].item()) * root_up(squares)
        for j, slopes in exact.items():
            ends = zip(exactly(intervals.lower[j][i]), exactly(intervals.upper[j][i]), strict=True)
            for g, t, (lower, upper) in zip(pull(j), slopes, ends, strict=True):
                points = [lower, upper, min(max(Fraction(0), lower), upper)]
                value += min(g * max(v, Fraction(0)) - t * v for v in points)
        values.append(value)
    return values


@pytest.mark.parametrize(("norm", "box"), SETS)
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1e8, 1e-8, 1.0), (1e-8, 1e-8, 1e8)])
def test_bounds_are_at_most_the_exact_values(norm, box, scales):
    system = AffineSystem.of_network(chain(scales), 0.1307, 0.3081)
    region = InputRegion.around(torch.rand(3, 4), 0.3, norm, box)
    intervals = intervals_of(system, region)
    for level in (1, 2, 3):
        target = torch.randn(3, system.units(level)).double()
        tau = random_proposal(system, level, 3)
        exact = exact_value(system, level, target, tau, intervals, region)
        found = prove_lower_bounds(system, level, target, tau, intervals, region)
        for bound, value in zip(found.tolist(), exact, strict=True):
            assert Fraction(bound) <= value
            assert bound == pytest.approx(float(value), rel=1e-6, abs=1e-6 * max(scales))


@pytest.mark.parametrize(("norm", "box"), SETS)
def test_bounds_of_an_equilibrium_are_at_most_the_exact_values(norm, box):
    system = AffineSystem.of_weights(equilibrium(), RELU, 0.1307, 0.3081)
    region = InputRegion.around(torch.rand(2, 3), 0.3, norm, box)
    intervals = Intervals(
        lower={1: -torch.rand(2, 6).double()}, upper={1: torch.rand(2, 6).double()}
    )
    for level in (1, 2):
        target = torch.randn(2, system.units(level)).double()
        tau = random_proposal(system, level, 2)
        exact = exact_value(system, level, target, tau, intervals, region)
        found = prove_lower_bounds(system, level, target, tau, intervals, region)
        for bound, value in zip(found.tolist(), exact, strict=True):
            assert Fraction(bound) <= value
            assert bound == pytest.approx(float(value), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("norm", "box"), SETS)
@pytest.mark.parametrize("activation", [RELU, LEAKY, TANH, BUMP], ids=lambda a: a.name)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_no_input_goes_below_a_bound(norm, box, activation, scale):
    system = AffineSystem.of_network(chain((scale, 1.0, 1.0), activation), 0.1307, 0.3081)
    region = InputRegion.around(torch.rand(1, 4), 0.2, norm, box)
    intervals = intervals_of(system, region)
    values = system.evaluate(sample(region))
    for j in (1, 2):
        assert (values[j - 1] >= intervals.lower[j]).all()
        assert (values[j - 1] <= intervals.upper[j]).all()
    for level in (1, 2, 3):
        for size in (0.0, 0.3):
            target = torch.randn(1, system.units(level)).double()
            tau = random_proposal(system, level, 1, size)
            bound = prove_lower_bounds(system, level, target, tau, intervals, region)
            reached = (values[level - 1] @ target[0]).min()
            assert bound <= reached + 1e-12 * values[level - 1].abs().max()


def test_a_residual_network_is_bounded():
    system = AffineSystem.of_network(residual())
    region = InputRegion.around(torch.rand(1, 3), 0.1, "l2", None)
    intervals = intervals_of(system, region)
    target = torch.tensor([[1.0, -1.0]]).double()
    reached = (system.evaluate(sample(region))[-1] @ target[0]).min()
    for size in (0.0, 0.1):
        tau = random_proposal(system, 3, 1, size)
        assert prove_lower_bounds(system, 3, target, tau, intervals, region) <= reached


@pytest.mark.parametrize("activation", [RELU, LEAKY, TANH, BUMP], ids=lambda a: a.name)
def test_the_least_value_of_a_unit_is_below_all_values(activation):
    g, tau = torch.randn(2, 500, 1).double()
    lower = 3 * torch.randn(500, 1).double()
    upper = lower + 2 * torch.rand(500, 1).double()
    v = lower + (upper - lower) * torch.linspace(0, 1, 1001).double()
    least = unit_minimum(activation, g, tau, lower, upper)
    reached = (g * activation(v) - tau * v).amin(1, keepdim=True)
    assert (least <= reached + 1e-12).all()
    assert (least >= reached - 0.02 * (1 + g.abs())).all()
    assert (bound_outputs(activation, lower, upper) >= activation(v).abs().amax(1, True)).all()


def test_the_least_value_over_a_ball_within_a_box_is_the_best_there_is():
    region = InputRegion.around(torch.rand(20, 6), 0.7, "l2", (0.0, 1.0))
    a = torch.randn(20, 6).double() * torch.logspace(-3, 3, 6).double()
    bound = region.minimum(a)
    # Bisection for s in Δ = clip(−a/s, lower, upper), ‖Δ‖₂ = radius.
    low, high = torch.full((20, 1), -40.0).double(), torch.full((20, 1), 40.0).double()
    for _ in range(200):
        s = (low + high) / 2
        move = (-a / s.exp()).clamp(region.lower, region.upper)
        outside = move.norm(dim=1, keepdim=True) > region.radius[:, None]
        low, high = torch.where(outside, s, low), torch.where(outside, high, s)
    torch.testing.assert_close(bound, (a * move).sum(1), rtol=1e-2, atol=1e-12)
    assert (bound <= (a * move).sum(1) + 1e-9).all()


class TestPlantedFaults:
    """Faults in the proof are found by the checks above."""

    @staticmethod
    def violations(trials: int = 40, network: Network | None = None, scale: float = 1.0) -> int:
        """Return how many bounds lie above the exact values."""
        found = 0
        system = AffineSystem.of_network(network or chain(), 0.1307, 0.3081)
        region = InputRegion.around(torch.rand(trials, 4), 1e-3, "l2", (0.0, 1.0))
        intervals = intervals_of(system, region)
        target = torch.randn(trials, 3).double()
        tau = random_proposal(system, 3, trials, scale)
        exact = exact_value(system, 3, target, tau, intervals, region)
        bounds = prove_lower_bounds(system, 3, target, tau, intervals, region)
        for bound, value in zip(bounds.tolist(), exact, strict=True):
            found += Fraction(bound) > value
        return found

    @staticmethod
    def cancelling() -> Network:
        """Return a chain in which g is a small difference of large numbers."""
        numbers = np.random.default_rng(0)
        base = chain()
        maps = [b.affine for b in base.blocks] + [base.output]
        large = 1e9 * numbers.standard_normal((6, 5))
        maps[1] = AffineMap.of({1: large - large.mean(0)}, np.zeros(6))
        return Network(
            input_shape=(4,),
            blocks=tuple(Block(affine=a, activation=RELU) for a in maps[:2]),
            output=AffineMap.of({2: np.zeros((3, 6))}, np.zeros(3)),
        )

    def test_there_is_none(self):
        assert self.violations() == 0

    def test_rounding_of_sums_left_out(self, monkeypatch):
        monkeypatch.setattr(relaxation, "gamma_k", lambda k: 0.0)
        monkeypatch.setattr(relaxation, "_pull_error", lambda system, block, norms: 0.0)
        monkeypatch.setattr(AffineSystem, "rate", lambda self, level: 0.0)
        assert self.violations()

    def test_rounding_of_g_left_out(self, monkeypatch):
        system = AffineSystem.of_network(self.cancelling())
        region = InputRegion.around(torch.rand(50, 4), 1.0, "linf", None)
        box = torch.ones(50, 6).double() * 1e3
        intervals = Intervals(
            lower={1: -box[:, :5], 2: -1e-9 * box}, upper={1: box[:, :5], 2: 1e-9 * box}
        )
        tau = {
            1: torch.zeros(50, 5).double(),
            2: 1 + 1e-9 * torch.randn(50, 6).double(),
        }
        target = torch.zeros(50, 3).double()

        def count() -> int:
            exact = exact_value(system, 3, target, tau, intervals, region)
            bounds = prove_lower_bounds(system, 3, target, tau, intervals, region).tolist()
            return sum(Fraction(b) > v for b, v in zip(bounds, exact, strict=True))

        assert count() == 0
        monkeypatch.setattr(relaxation, "_pull_error", lambda system, block, norms: 0.0)
        assert count()

    def test_a_wrong_box(self):
        """Without the centre, a box of pixels is one of increments."""
        network, right = chain(), InputRegion.around(torch.full((1, 4), 0.9), 0.5, "linf", None)
        wrong = dataclasses.replace(right, lower=0 * right.lower)
        system = AffineSystem.of_network(network)
        intervals, target = intervals_of(system, right), torch.randn(20, 5).double()
        values = system.evaluate(sample(right))[0]
        for region, sound in ((right, True), (wrong, False)):
            several = region.select(torch.zeros(20, dtype=torch.int64))
            bound = prove_lower_bounds(system, 1, target, {}, intervals, several)
            assert bool((bound <= (values @ target.T).amin(0)).all()) == sound

    @pytest.mark.parametrize("fault", ["sign", "half"])
    def test_wrong_ends_and_ranges(self, fault):
        system = AffineSystem.of_network(chain())
        region = InputRegion.around(torch.rand(1, 4), 0.5, "linf", None)
        right = intervals_of(system, region)
        wrong = {
            "sign": Intervals(
                lower={j: -t for j, t in right.upper.items()},
                upper={j: -t for j, t in right.lower.items()},
            ),
            "half": Intervals(
                lower={j: t / 4 for j, t in right.lower.items()},
                upper={j: t / 4 for j, t in right.upper.items()},
            ),
        }[fault]
        y = system.evaluate(sample(region))[-1]
        sound = {"right": True, "wrong": True}
        for _ in range(50):
            target, tau = torch.randn(1, 3).double(), random_proposal(system, 3, 1, 0.1)
            for name, intervals in (("right", right), ("wrong", wrong)):
                bound = prove_lower_bounds(system, 3, target, tau, intervals, region)
                sound[name] &= bool(bound <= (y @ target[0]).min())
        assert sound == {"right": True, "wrong": False}

    def test_a_wrong_curvature(self):
        g, tau = torch.full((1, 1), -1.0).double(), torch.zeros(1, 1).double()
        lower, upper = torch.full((1, 1), -2.0).double(), torch.full((1, 1), 2.3).double()
        hill = Activation(
            name="hill", low=-0.9, high=0.9, curvature=2.0, function=lambda v: torch.exp(-(v**2))
        )
        flat = dataclasses.replace(hill, curvature=1e-9)
        assert unit_minimum(hill, g, tau, lower, upper) <= -1
        assert unit_minimum(flat, g, tau, lower, upper) > -1


def test_infinite_ranges_prove_nothing():
    system = AffineSystem.of_network(chain())
    region = InputRegion.around(torch.rand(1, 4), 0.1, "l2", None)
    intervals = intervals_of(system, region)
    wide = intervals.with_block(1, -math.inf * torch.ones(1, 5).double(), intervals.upper[1])
    tau, target = random_proposal(system, 3, 1), torch.ones(1, 3).double()
    assert prove_lower_bounds(system, 3, target, tau, wide, region).item() == -math.inf


def test_proposals_that_are_not_finite_prove_nothing():
    system = AffineSystem.of_network(chain())
    region = InputRegion.around(torch.rand(1, 4), 0.1, "l2", None)
    intervals, target = intervals_of(system, region), torch.ones(1, 3).double()
    for bad in (math.nan, math.inf, 1e300):
        tau = random_proposal(system, 3, 1)
        tau[2][0, 0] = bad
        assert prove_lower_bounds(system, 3, target, tau, intervals, region).item() == -math.inf


def test_a_proof_in_float32_is_refused():
    system = AffineSystem.of_network(chain())
    region = InputRegion.around(torch.rand(1, 4), 0.1, "l2", None)
    with pytest.raises(ValueError, match="float64"):
        prove_lower_bounds(
            system.single, 1, torch.ones(1, 5), {}, intervals_of(system, region), region
        )


@pytest.mark.parametrize(
    ("x", "radius", "norm", "box", "message"),
    [
        (0.5, -0.1, "l2", None, "at least 0"),
        (0.5, math.nan, "l2", None, "at least 0"),
        (0.5, math.inf, "l2", None, "below 2"),
        (0.5, torch.ones(3), "l2", None, "one number or 1"),
        (math.nan, 0.1, "l2", None, "NaN"),
        (1.5, 0.1, "linf", (0.0, 1.0), "box"),
        (0.5, 0.1, "linf", (1.0, 0.0), "box"),
        (0.5, 0.1, "l1", None, "norm"),
    ],
)
def test_regions_that_make_no_sense_are_refused(x, radius, norm, box, message):
    with pytest.raises(ValueError, match=message):
        InputRegion.around(torch.full((1, 2), x), radius, norm, box)


def test_an_empty_interval_is_seen():
    one = torch.ones(2, 3).double()
    lower = -one
    lower[1, 2] = 2.0
    assert Intervals(lower={1: lower}, upper={1: one}).empty().tolist() == [False, True]


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_bounds_hold_for_all_numbers_that_rounded_products_stand_for(direction):
    """The exact numbers may be anywhere in the enclosure: here at an end of it."""
    exact = chain()

    def change(affine: AffineMap, factor: float, operations: int | None = None) -> AffineMap:
        maps = {j: factor * matrix for j, matrix in affine.matrices.items()}
        moved = AffineMap.of(maps, factor * affine.bias)
        if operations is None:
            return moved
        return dataclasses.replace(moved, operations=operations, exact=False)

    def build(factor: float, operations: int | None = None) -> AffineSystem:
        blocks = tuple(
            Block(affine=change(b.affine, factor, operations), activation=RELU)
            for b in exact.blocks
        )
        output = change(exact.output, factor, operations)
        return AffineSystem.of_network(Network(input_shape=(4,), blocks=blocks, output=output))

    stored = build(1.0, operations=10**9)
    other = build(1.0 + direction * 0.99e9 * 2.0**-52)
    region = InputRegion.around(torch.rand(1, 4), 1e-12, "linf", None)
    intervals, target = intervals_of(stored, region), torch.eye(3).double()
    values = other.evaluate(region.center)
    for j in (1, 2):
        assert (values[j - 1] >= intervals.lower[j]).all()
        assert (values[j - 1] <= intervals.upper[j]).all()
    for sign in (1.0, -1.0):
        for t in target:
            row = sign * t[None]
            slopes = {j: (values[j - 1] > 0).double() for j in (1, 2)}
            tau, lam = {}, {3: row}
            for j in (2, 1):
                tau[j] = slopes[j] * stored.pull(j, lam)
                lam[j] = tau[j]
            bound = prove_lower_bounds(stored, 3, row, tau, intervals, region)
            here = (values[2] @ row[0]).item()
            assert bound <= here
            assert bound >= here - 1e-4 * (1 + abs(here))
