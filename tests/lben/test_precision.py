"""Products are full where it matters, and the settings come back."""

import contextlib

import pytest
import torch

from lben import (
    AOLLinear,
    CertificateError,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    NormPooling,
    OrthogonalLinear,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralLinear,
    compose,
    precision,
)
from solvers import ReLU
from solvers.precision import use_full_precision


@pytest.fixture
def reduced():
    matmul, conv = torch.backends.mkldnn.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision, conv.fp32_precision = "bf16", "tf32"
    yield
    matmul.fp32_precision, conv.fp32_precision = before


def test_reduced_products_are_seen_and_switched_off(reduced):
    with precision.use_float32_products(), precision.use_float32_products():
        assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
        assert torch.backends.cudnn.conv.fp32_precision in ("none", "ieee")
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_what_one_has_set_does_not_end_under_another(reduced):
    matmul = torch.backends.mkldnn.matmul
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(precision.use_float32_products())
    second.enter_context(use_full_precision(torch.ones(1)))  # finds full products, and not its own
    first.close()
    assert matmul.fp32_precision in ("none", "ieee")
    second.close()
    assert matmul.fp32_precision == "bf16"


def test_settings_come_back_after_an_error(reduced):
    with pytest.raises(ZeroDivisionError), precision.use_float32_products():
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


CLAIMS = {
    "weights": lambda layer, x: layer.weights(),
    "certificate": lambda layer, x: layer.certificate(),
    "certificate of rounded weights": lambda layer, x: layer.certificate(
        compute_dtype=torch.bfloat16
    ),
    "rounding": lambda layer, x: layer.rounding(x),
    "growth": lambda layer, x: layer.rounding_growth((6,), torch.float32),
    "chain": lambda layer, x: LipschitzSequential(layer).certificate((6,)),
    "chain's error": lambda layer, x: LipschitzSequential(layer).forward_with_error(
        x, compose([_outside(layer)])
    ),
}


def _outside(layer):
    with torch.autocast("cpu", enabled=False):
        return layer.certificate()


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("make", [
    lambda: SLLLinear(6, 4), lambda: AOLLinear(6, 4), lambda: SpectralLinear(6, 4),
    lambda: OrthogonalLinear(6, 4), lambda: SandwichLinear(6, 4),
])  # fmt: skip
def test_nothing_is_claimed_under_autocast(make, claim):
    layer, x = make(), torch.randn(3, 6)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="autocast is enabled"),
    ):
        CLAIMS[claim](layer, x)
    CLAIMS[claim](layer, x)


@pytest.mark.parametrize("call", [
    lambda x: NormalizedLinear(6, 4).weights(), lambda x: NormalizedLinear(6, 4).certificate(),
    lambda x: NormalizedLinear(6, 4).pair_certificate(),
    lambda x: NormalizedLinear(6, 4).rounding(x),
    lambda x: NormPooling(2).rounding(x[None]), lambda x: Normalize((0.5,), (1.0,)).rounding(
        x[None]
    ),
])  # fmt: skip
def test_neither_of_heads_and_companions(call):
    x = torch.randn(6, 6)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="autocast is enabled"),
    ):
        call(x)
    call(x[:, :6])


def test_chains_give_no_error_under_autocast_and_none_is_left_behind():
    chain = LipschitzSequential(SLLLinear(6, 4), NormalizedLinear(6, 3)).eval()
    proofs, x = chain.certificate((6,)), torch.randn(3, 6)
    with torch.no_grad():
        found = chain.forward_with_error(x, proofs)
        before, error = found.value, found.error
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(chain(x), before)
            with pytest.raises(ValueError, match="autocast is enabled"):
                chain.forward_with_error(x, proofs)
        found = chain.forward_with_error(x, proofs)
        after, again = found.value, found.error
    assert torch.equal(before, after)
    assert torch.equal(error, again)
    assert chain[0].weights().fingerprint == proofs.layers[0].fingerprint


def test_a_certificate_of_rounded_weights_does_not_serve_the_layer():
    layer, x = SLLLinear(6, 4), torch.randn(2, 6)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.bfloat16())  # the weights, and so their fingerprint, are the same
    proof = layer.certificate(compute_dtype=torch.bfloat16)
    assert proof.dtype == "bfloat16"
    assert proof.fingerprint == layer.certificate().fingerprint
    for call in (
        lambda: layer.check(proof, x),
        lambda: LipschitzSequential(layer).forward_with_error(x, compose([proof])),
    ):
        with pytest.raises(CertificateError, match="rounded to bfloat16"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [lambda: SLLLinear(6, 4), lambda: AOLLinear(6, 4)])
def test_inputs_under_autocast(make, dtype):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 6).to(dtype))
        assert y.dtype == (dtype if isinstance(layer, SLLLinear) else torch.bfloat16)
        for wrong in (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.cfloat)):
            with pytest.raises(ValueError, match="floating-point"):
                layer(wrong)


def test_reduced_precision_is_named(reduced):
    with pytest.raises(ValueError, match=r"mkldnn\.matmul"):
        precision.refuse_reduced("cpu", convolution=False)
    with pytest.raises(ValueError, match=r"cudnn\.conv"):
        precision.refuse_reduced("cuda", convolution=True)
    with precision.use_float32_products():
        precision.refuse_reduced("cpu", convolution=True)
