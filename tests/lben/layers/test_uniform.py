"""The bound around an input grows with what it is made of, and ends where it says nothing."""

import dataclasses
import math

import pytest
import torch

from lben import EquilibriumLinear
from lben.certificates import Sensitivity
from lben.layers.uniform import Running, uniform_error
from lben.weights import Rates

F64 = torch.float64
GAINS = Sensitivity(
    input_to_state=1.0, drive_to_state=2.0, drive_to_output=1.5, residual_to_state=1.0,
    residual_to_output=0.5, state_to_output=0.7,
)  # fmt: skip


def running(**changes):
    def number(value):
        return torch.tensor([value], dtype=F64)

    known = {
        "tol": 1e-3, "product": 1e-6, "sum": 1e-6, "state": number(3.0),
        "state_error": number(1e-4), "product_rounding": number(1e-6), "bias": number(2.0),
        "bias_rounding": number(1e-6), "output_rounding": number(1e-6), "size": number(4.0),
        "unit": 2.0**-24, "largest": 1e30,
        "rates": Rates(drive=1.0, drive_rounding=1e-6, readout=1e-6, through=1e-7),
    }  # fmt: skip
    return Running(**{**known, **changes})


def test_every_error_makes_it_larger():
    base = uniform_error(running(), GAINS)
    assert 0 < float(base.at(0.0)) < float(base.at(1.0)) < 0.1
    for name in (
        "tol", "product", "sum", "state", "state_error", "product_rounding", "bias",
        "bias_rounding", "output_rounding",
    ):  # fmt: skip
        more = uniform_error(running(**{name: 2 * getattr(running(), name)}), GAINS)
        assert float(more.at(1.0)) > float(base.at(1.0)), name
    for name in ("drive", "drive_rounding", "readout", "through"):
        rates = running().rates
        rates = dataclasses.replace(rates, **{name: 2 * getattr(rates, name)})
        more = uniform_error(running(rates=rates), GAINS)
        assert float(more.at(1.0)) > float(base.at(1.0)), name
    for gain in dataclasses.fields(GAINS):
        gains = dataclasses.replace(GAINS, **{gain.name: 2 * getattr(GAINS, gain.name)})
        assert float(uniform_error(running(), gains).at(1.0)) > float(base.at(1.0)), gain.name


def test_a_tolerance_that_is_too_loose_says_nothing():
    assert uniform_error(running(tol=0.49), GAINS).at(0.0).isfinite().all()
    for tol in (0.5, 0.9, math.nan):
        found = uniform_error(running(tol=tol), GAINS)
        assert found.at(0.0).isinf().all()
        assert found.slope == math.inf


def test_it_ends_where_a_number_may_overflow():
    base, tight = (uniform_error(running(largest=v), GAINS) for v in (1e30, 1e3))
    assert 0 < float(tight.limit) < float(base.limit)
    assert tight.at(float(tight.limit) * 1.01).isinf().all()
    assert float(uniform_error(running(largest=0.1), GAINS).limit) < 0


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_a_layer_stays_within_it(tol):
    torch.manual_seed(0)
    layer = EquilibriumLinear(4, 6, 3, tol=tol, dtype=F64).requires_grad_(False)
    exact = EquilibriumLinear(4, 6, 3, tol=1e-13, dtype=F64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(20, 4, dtype=F64)
    uniform = layer.forward_with_error(x, layer.certificate()).uniform
    moved = x + torch.randn_like(x)
    error = (layer(moved) - exact(moved)).norm(dim=1).detach()
    assert (error <= uniform.at((moved - x).norm(dim=1)) + 1e-11).all()
    assert float(uniform.at(1.0).max()) < 1e3 * tol
