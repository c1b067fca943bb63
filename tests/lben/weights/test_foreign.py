"""Weights that a stranger brings: each is proved as stored, or refused by one clear sentence."""

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lben import (
    CertificateError,
    Claim,
    DenseWeights,
    EquilibriumConv2d,
    EquilibriumLinear,
    PooledEquilibriumConv2d,
    certify,
    tighten_diagonal,
    tighten_pairs,
    tighten_scaled,
)
from lben.certificates import IntervalClaim, LinfClaim
from lben.tightening import tighten_linf
from lben.weights import convert

change = dataclasses.replace


def dense(gamma=2.0, **options):
    torch.manual_seed(0)
    layer = EquilibriumLinear(4, 6, 3, gamma=gamma, dtype=torch.float64, **options)
    return layer.weights().apply(torch.Tensor.detach)


def images():
    torch.manual_seed(0)
    layer = EquilibriumConv2d(2, 3, 2, image=(4, 4), dtype=torch.float64)
    return layer.weights().apply(torch.Tensor.detach)


def pooled():
    torch.manual_seed(0)
    layer = PooledEquilibriumConv2d(2, 3, 2, image=(4, 4), dtype=torch.float64)
    return layer.weights().apply(torch.Tensor.detach)


WHOLE = {
    "scaled": tighten_scaled, "diagonal": tighten_diagonal, "pairs": tighten_pairs,
    "largest": tighten_linf,
}  # fmt: skip

KINDS = {
    "dense": (dense, certify),
    "images": (images, lambda w: certify(w, image=(4, 4))),
    "pooled": (pooled, certify),
    "intervals": (dense, lambda w: certify(w, IntervalClaim())),
    "pairs": (dense, lambda w: certify(w, pair_claims(dense()))),
    "largest": (dense, lambda w: certify(w, largest_claims(dense()))),
}


def pair_claims(w):
    return {(i, j): Claim(4.0, 2 * w.Lambda.detach()) for i in range(3) for j in range(i + 1, 3)}


def largest_claims(w, tau=None, Lambda=None):
    Lambda = 4 * w.Lambda.detach().double().numpy() if Lambda is None else Lambda
    claim = LinfClaim(tau=np.full(4, 16.0) if tau is None else tau, Lambda=Lambda)
    return {(i, j): claim for i in range(3) for j in range(i + 1, 3)}


kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool,
     torch.complex64, torch.complex128],
    ids=str,
)  # fmt: skip
def test_proofs_are_of_float32_and_float64(kind, dtype):
    make, prove = KINDS[kind]
    weights = make()
    prove(weights)
    with pytest.raises(ValueError, match="proofs are of float32 and float64"):
        prove(weights.apply(lambda t: t.to(dtype)))


@kinds
def test_kinds_of_tensors_are_not_mixed(kind):
    make, prove = KINDS[kind]
    weights = make()
    mixed = change(weights, b_y=weights.b_y.float())
    with pytest.raises(ValueError, match="must share one dtype"):
        prove(mixed)
    with pytest.raises(ValueError, match="meta device"):
        prove(weights.apply(lambda t: t.to("meta")))


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_is_proposed_of_what_cannot_be_proved(name):
    weights = dense()
    WHOLE[name](weights)
    with pytest.raises(ValueError, match="proofs are of float32 and float64"):
        WHOLE[name](weights.apply(lambda t: t.to(torch.complex128)))
    for tensor in ("W", "U", "C"):
        bad = getattr(weights, tensor) * math.nan
        with pytest.raises(CertificateError, match=f"NaN or Inf, in {tensor}"):
            WHOLE[name](change(weights, **{tensor: bad}))


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(kind, bad):
    make, prove = KINDS[kind]
    weights = make()
    for name in ("C", "b_y"):
        tensor = getattr(weights, name).clone()
        tensor.view(-1)[0] = bad
        with pytest.raises(CertificateError, match=f"NaN or Inf, in .*{name}"):
            prove(change(weights, **{name: tensor}))


def test_sparse_weights_and_transforms_are_refused():
    weights = dense()
    with pytest.raises(ValueError, match="dense tensors, and C is"):
        certify(change(weights, C=weights.C.to_sparse()))

    def inside(U):
        certify(change(weights, U=U))
        return U.sum()

    with pytest.raises(ValueError, match="transform of torch"):
        torch.func.grad(inside)(weights.U)
    with pytest.raises(ValueError, match="transform of torch"):
        torch.func.vmap(inside)(weights.U[None])


def test_arrays_and_wrong_ranks_are_named():
    weights = dense()
    with pytest.raises(ValueError, match=r"W must be a torch\.Tensor, got ndarray"):
        change(weights, W=weights.W.numpy())
    with pytest.raises(ValueError, match="U must have 2 dimensions"):
        change(weights, U=weights.U[0])
    with pytest.raises(ValueError, match="C must have 2 dimensions"):
        change(weights, C=weights.C[0])
    with pytest.raises(ValueError, match="D must be a torch"):
        DenseWeights.affine(np.eye(2), weights.b_y, 1.0)
    kernels = images()
    with pytest.raises(ValueError, match="U must have 4 dimensions"):
        change(kernels, U=kernels.U[0])
    with pytest.raises(ValueError, match=r"b must be a torch\.Tensor"):
        change(kernels, b=[0.0])
    with pytest.raises(ValueError, match=r"A must be a torch\.Tensor"):
        change(pooled(), A=None.__class__)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-320])
def test_multipliers_are_positive_normal_numbers(bad):
    weights = dense()
    Lambda = weights.Lambda.clone()
    Lambda[2] = bad
    array = 4 * weights.Lambda.numpy()
    array[2] = bad
    claims = pair_claims(weights)
    claims[0, 2] = Claim(4.0, Lambda)
    for attempt in (
        lambda: certify(weights, Claim(2.0, Lambda)),
        lambda: certify(weights, claims),
        lambda: certify(weights, largest_claims(weights, Lambda=array)),
    ):
        with pytest.raises(CertificateError, match="Λ must be positive"):
            attempt()
    with pytest.raises(CertificateError, match=r"NaN or Inf|Λ must be positive"):
        certify(change(weights, Lambda=Lambda))
    tau = np.array([bad, 16.0, 16.0, 16.0])
    with pytest.raises(CertificateError, match="τ must be positive"):
        certify(weights, largest_claims(weights, tau=tau))


@pytest.mark.parametrize(
    "number",
    [2, 2.0, np.float64(2), np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2.0),
     torch.tensor(2), Fraction(2)],
    ids=lambda n: type(n).__name__,
)  # fmt: skip
def test_gamma_is_a_float_whatever_it_came_as(number):
    expected = dense()
    weights = change(expected, gamma=number)
    assert type(weights.gamma) is float
    assert weights.fingerprint == expected.fingerprint
    assert json.loads(certify(weights).to_json())["bound"] == 2.0
    assert certify(expected, Claim(number, expected.Lambda)).bound == 2.0
    layer = EquilibriumLinear(4, 6, 3, gamma=number, epsilon=number)
    assert type(layer.gamma) is float
    assert layer.certificate().bound == 2.0
    assert type(change(images(), gamma=number).gamma) is float
    assert type(change(pooled(), gamma=number).gamma) is float
    assert EquilibriumConv2d(2, 3, 2, image=(4, 4), gamma=number, epsilon=number).gamma == 2.0
    assert PooledEquilibriumConv2d(2, 3, 2, image=(4, 4), gamma=number, epsilon=number).gamma == 2.0


@pytest.mark.parametrize(
    "bad",
    [True, np.bool_(True), torch.tensor(True), "1", 1j, torch.tensor(1j), torch.ones(2), [1.0],
     10**400, math.nan, math.inf, 0, -1],
    ids=str,
)  # fmt: skip
def test_what_is_no_bound_is_refused(bad):
    weights = dense()
    for attempt in (
        lambda: change(weights, gamma=bad),
        lambda: change(images(), gamma=bad),
        lambda: change(pooled(), gamma=bad),
        lambda: certify(weights, Claim(bad, weights.Lambda)),
        lambda: EquilibriumLinear(4, 6, 3, gamma=bad),
        lambda: EquilibriumConv2d(2, 3, 2, image=(4, 4), gamma=bad),
    ):
        with pytest.raises(ValueError, match="gamma must be a positive, finite"):
            attempt()
    with pytest.raises(ValueError, match="epsilon must be positive"):
        EquilibriumLinear(4, 6, 3, epsilon=bad)


def test_a_fingerprint_is_of_bits_and_of_nothing_else():
    weights = dense()
    turned = change(weights, W=weights.W.T.contiguous().T, U=torch.nn.Parameter(weights.U))
    assert turned.fingerprint == weights.fingerprint
    zero = change(weights, b=0.0 * weights.b)
    assert zero.fingerprint != change(zero, b=-zero.b).fingerprint  # −0.0 is another number
    assert weights.apply(torch.Tensor.bfloat16).fingerprint != weights.fingerprint
    kernels = images()
    one = change(kernels, D=1)
    assert one.fingerprint == change(kernels, D=1.0).fingerprint
    assert one.fingerprint != kernels.fingerprint
    assert one.fingerprint != change(kernels, D=2).fingerprint
    claims = change(weights, gamma=7.0, Lambda=3 * weights.Lambda)
    assert claims.function_fingerprint == weights.function_fingerprint
    assert change(weights, b=weights.b + 1).function_fingerprint != weights.function_fingerprint


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_low_precision_is_converted_exactly(dtype, flush):
    """Denormal numbers too, where the processor reads them as zero."""
    bits = torch.arange(2**16, dtype=torch.int32)
    bits = bits * 65521 if dtype == torch.float32 else bits.to(torch.int16)
    numbers = bits.view(dtype)
    numbers = numbers[torch.isfinite(numbers)]
    expected = numbers.double()
    torch.set_flush_denormal(flush)
    try:
        found = convert(numbers, torch.float64)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))


@pytest.mark.parametrize("flush", [False, True])
def test_no_false_bound_where_numbers_underflow(flush):
    """CᵀC, ΛUUᵀΛ or Λ itself vanish: y(1) − y(0) is 1e-4."""
    t = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    refused = 0
    for u, c, lam in (
        (150, -154, -307.5),
        (-150, 146, 0),
        (0, -4, 300),
        (300, -304, 0),
        (-4, 0, 0),
    ):
        weights = DenseWeights(
            W=t([[0.0]]), U=t([[10.0**u]]), b=t([0.0]), C=t([[10.0**c]]), D=None, b_y=t([0.0]),
            Lambda=t([10.0**lam]), gamma=0.9e-4,
        )  # fmt: skip
        torch.set_flush_denormal(flush)
        try:
            with pytest.raises(CertificateError, match="could not be proved"):
                certify(weights)
            refused += 1
        finally:
            torch.set_flush_denormal(False)
    assert refused == 5


def test_float32_weights_are_proved_as_stored():
    """A bound between those of the stored and of the rounded numbers."""
    third = torch.tensor([[1 / 3]])  # above 1/3 in float32
    weights = DenseWeights.affine(third, torch.zeros(1), float(third) * (1 + 1e-12))
    assert certify(weights).bound > 1 / 3
    with pytest.raises(CertificateError, match="could not be proved"):
        certify(change(weights, gamma=1 / 3 * (1 + 1e-12)))


def test_claims_are_numbers_of_any_real_kind():
    weights = dense()
    half = (weights.Lambda * 1.0).float()
    assert certify(weights, Claim(2.0, half.double())).bound == 2.0
    assert certify(weights, Claim(3.0, 1.5 * weights.Lambda.numpy())).bound == 3.0
    tau = np.full(4, 200)
    big = largest_claims(weights, tau=tau, Lambda=14 * weights.Lambda.numpy())
    assert certify(weights, big)[0][1] < 30
    for bad in (weights.Lambda.to(torch.complex128), weights.Lambda > 0):
        with pytest.raises(ValueError, match="must hold real numbers"):
            certify(weights, Claim(2.0, bad))
    for bad in (np.full(4, 16 + 0j), np.full(4, True), np.full(4, "16")):
        with pytest.raises(ValueError, match="must hold real numbers"):
            certify(weights, largest_claims(weights, tau=bad))
