"""Products are full where it matters, and the settings come back."""

import pytest
import torch

from lben import SLLConv2d, precision
from solvers import ReLU


@pytest.fixture
def reduced():
    matmul, conv = torch.backends.mkldnn.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision, conv.fp32_precision = "bf16", "tf32"
    yield
    matmul.fp32_precision, conv.fp32_precision = before


def test_reduced_products_are_seen_and_switched_off(reduced):
    with precision.full(), precision.full():
        assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
        assert torch.backends.cudnn.conv.fp32_precision in ("none", "ieee")
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_settings_come_back_after_an_error(reduced):
    with pytest.raises(ZeroDivisionError), precision.full():
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_layers_run_within(reduced):
    seen = []

    class Spy(ReLU):
        def __call__(self, v):
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return torch.relu(v)

    layer = SLLConv2d(3, 2, activation=Spy())
    layer(torch.randn(1, 3, 5, 5))
    assert seen == ["ieee"]
