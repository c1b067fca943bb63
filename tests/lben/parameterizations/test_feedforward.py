"""What runs is rounded before its multiplier is computed; what is out of range is refused."""

import math

import pytest
import torch

from lben.parameterizations import (
    ContractionParameterization,
    FeedforwardParameterization,
    ResidualParameterization,
    SandwichParameterization,
    Spectral,
)
from lben.parameterizations.feedforward import PROOF_SLACK, UNIT_BOUND

MAKERS = [
    lambda **k: ResidualParameterization((5, 4), Spectral(), **k),
    lambda **k: ContractionParameterization((5, 4), Spectral(), **k),
    lambda **k: SandwichParameterization((5, 2 + 3), 2, Spectral(), **k),
]


@pytest.mark.parametrize("make", MAKERS)
def test_allocated_tensors_have_the_shapes_and_dtypes_of_those_that_run(make):
    free = make(dtype=torch.float32)
    made = list(free(torch.float32))
    for allocated, tensor in zip(free.allocate(made[0]), made, strict=True):
        assert (allocated.shape, allocated.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("make", MAKERS)
def test_a_lower_compute_dtype_rounds_the_weight(make):
    free = make(dtype=torch.float32)
    full, rounded = free(torch.float32)[0], free(torch.bfloat16)[0]
    assert rounded.dtype == torch.float32
    assert not torch.equal(full, rounded)
    assert torch.equal(full.to(torch.bfloat16).to(torch.float32), rounded)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(make, bad):
    free = make(dtype=torch.float32)
    with torch.no_grad():
        next(free.parameters()).view(-1)[0] = bad
    with pytest.raises(ValueError, match="contain NaN or Inf"):
        free(torch.float32)


def test_scales_out_of_range_become_nan_on_a_device_that_cannot_be_looked_at():
    scales = [torch.tensor([1.0, 0.0], device="meta")]
    assert FeedforwardParameterization.check_scales(scales, [])[0].is_meta
    with pytest.raises(ValueError, match="leaves the range"):
        FeedforwardParameterization.check_scales([torch.tensor([1.0, 1e-45])], [])


def test_the_slack_is_larger_than_what_float32_rounds():
    assert 1 < UNIT_BOUND < 1 + 2e-6
    assert 8 * torch.finfo(torch.float32).eps < PROOF_SLACK
