"""Parameters and buffers outlive the inference mode that they were made in."""

import pytest
import torch

from lben import EquilibriumLinear, Householder, Normalize, NormalizedLinear, SLLLinear

MODULES = [
    lambda: SLLLinear(4, 3), lambda: NormalizedLinear(4, 3), lambda: Householder(4),
    lambda: EquilibriumLinear(4, 3, 2), lambda: Normalize((0.5,), (0.5,)),
]  # fmt: skip


def tensors(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("make", MODULES)
def test_tensors_are_ordinary_ones_wherever_they_come_from(make):
    with torch.inference_mode():
        module = make()
        assert not any(t.is_inference() for t in tensors(module))
        module.double()
        assert not any(t.is_inference() for t in tensors(module))
        module.load_state_dict({k: v.clone() for k, v in make().double().state_dict().items()})
        assigned = {k: v.clone() for k, v in module.state_dict().items()}
        assert all(t.is_inference() for t in assigned.values())
        module.load_state_dict(assigned, assign=True)
    assert not any(t.is_inference() for t in tensors(module))
    assert tensors(module)


def test_a_model_built_for_validation_is_differentiated_afterwards():
    with torch.inference_mode():
        layer = SLLLinear(4, 3)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any()
    assert all(p.grad is not None for p in layer.parameters())
