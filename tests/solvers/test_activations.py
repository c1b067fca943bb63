"""The published laws for all activations alike, and more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solvers import LeakyReLU, LinearSlope, Masked, ReLU, Sigmoid, Softplus, Tanh
from solvers.testing import ActivationLaws

ACTIVATIONS = [
    ReLU(),
    LeakyReLU(),
    LeakyReLU(0.3),
    LeakyReLU(0.0),
    LeakyReLU(1.0),
    Tanh(),
    Sigmoid(),
    Softplus(),
    LinearSlope(torch.tensor([0.0, 0.25, 1.0, 0.5, 1e-8], dtype=torch.float64)),
    Masked(Tanh(), torch.tensor([True, False, True, True, False])),
]
DROPPED = ACTIVATIONS[-2]
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)


def points() -> torch.Tensor:
    return torch.randn(200, 5, dtype=torch.float64) * torch.tensor([1e-3, 0.1, 1, 10, 100.0])


@each_activation
class TestLaws(ActivationLaws):
    @pytest.fixture(autouse=True)
    def _given(self, activation):
        self._activation = activation

    def make_activation(self):
        return self._activation


@pytest.mark.parametrize("activation", [LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus()], ids=repr)
def test_activation_is_not_its_own_prox_at_other_steps(activation):
    x = points()
    assert (activation.prox(x, 0.25) - activation(x)).abs().max() > 1e-2


@given(x=st.floats(-1e30, 1e30), step=st.floats(1e-4, 1e4))
def test_smooth_prox_stays_between_its_bounds_for_any_point(x, step):
    value = Tanh().prox(torch.tensor([x], dtype=torch.float64), step)
    assert torch.isfinite(value).all()
    assert value.abs() <= 1


def test_dropped_units_stay_exactly_zero():
    assert (DROPPED.prox(points(), 1e-6)[:, 0] == 0).all()


def test_leaky_relu_refuses_a_slope_outside_the_unit_interval():
    with pytest.raises(ValueError, match=r"negative_slope must lie in \[0, 1\], got 1.5"):
        LeakyReLU(1.5)


@each_activation
def test_chords_bound_every_slope_within_reach(activation):
    """Slopes between points around an uncertain v, and approached where σ has a kink."""
    v, p = points().clamp(-20, 20), torch.rand(200, 5, dtype=torch.float64)
    reach, error = 3 * torch.rand_like(v) * v.abs(), 0.1 * torch.rand_like(v) * v.abs()
    low, high = activation.slope_bounds(v, reach, error)
    assert bool(((low >= 0) & (low <= high) & (high <= 1)).all())
    for t in (-reach, reach, (2 * p - 1) * reach):
        start = v + (2 * torch.rand_like(v) - 1) * error
        slope = (activation(start + t) - activation(start)) / t
        assert bool(((slope >= low - 1e-9) & (slope <= high + 1e-9)).all())
    if activation == ReLU():
        nearest = v - v.sign() * error  # the worst start
        slope = (activation(nearest - v.sign() * reach) - activation(nearest)) / (-v.sign() * reach)
        torch.testing.assert_close(slope, torch.where(v > 0, low, high), rtol=1e-9, atol=1e-12)


def test_chords_of_units_that_stay_are_exact():
    v = torch.tensor([2.0, -2.0], dtype=torch.float64)
    low, high = ReLU().slope_bounds(v, torch.ones_like(v), 0.5 * torch.ones_like(v))
    assert low.tolist() == high.tolist() == [1.0, 0.0]
    low, high = ReLU().slope_bounds(v, 4 * torch.ones_like(v), torch.zeros_like(v))
    assert low.tolist() == pytest.approx([0.5, 0.0])
    assert high.tolist() == pytest.approx([1.0, 0.5])
