"""Bounds that grow with a radius add up and compose."""

import math

import pytest
import torch

from lben.radii.error_bounds import Affine, Certified, Stage

F64 = torch.float64


def test_affine_bounds_compose():
    inner = Affine(torch.tensor([1.0, 2.0], dtype=F64), 3.0)
    outer = Affine(torch.tensor([5.0, 7.0], dtype=F64), 11.0)
    for radius in (0.0, 0.5, 10.0):
        truth = outer.constant + outer.slope * (inner.constant + inner.slope * radius)
        found = outer.after(inner).at(radius)
        assert bool((found >= truth).all() and (found <= truth * (1 + 1e-9)).all())
    assert torch.isinf(Affine(torch.tensor([0.0], dtype=F64), math.inf).at(0.0)).all()
    assert torch.isinf((inner * math.inf).constant).all()
    assert math.isinf((Affine(0 * inner.constant, 0.0) * math.inf).slope)


def test_a_chain_adds_up_errors_and_what_moves():
    """Two layers x ↦ 2x that err by 0.1 and 0.2 + 0.5ρ."""
    nothing = torch.zeros(1, dtype=F64)

    def layer(error, constant, slope):
        return Certified(
            value=nothing, error=nothing + error, uniform=Affine(nothing + constant, slope)
        )

    stage = Stage.start(nothing[None]).then(layer(0.1, 0.1, 0.0), 2.0)
    stage = stage.then(layer(0.2, 0.2, 0.5), 2.0)
    assert stage.gain == pytest.approx(4.0)
    assert float(stage.error) == pytest.approx(0.4)
    # 2 · 0.1 + 0.2 + 0.5 (0.1 + 0.1 + 2r)
    assert float(stage.uniform.constant) == pytest.approx(0.5)
    assert stage.uniform.slope == pytest.approx(1.0)
