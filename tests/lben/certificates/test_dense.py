"""The proof of matrices: tied to them, in their precision, for the claim or their own γ."""

import dataclasses

import pytest
import torch

from lben import CertificateError, Claim, EquilibriumLinear
from lben.certificates.dense import METHOD, prove_dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_their_own_claim_is_proved_or_another(dtype):
    w = EquilibriumLinear(4, 6, 3, gamma=2.0, dtype=dtype).weights().apply(torch.Tensor.detach)
    own, other = prove_dense(w), prove_dense(w, Claim(3.0, w.Lambda))
    assert (own.bound, other.bound) == (2.0, 3.0)
    assert own.fingerprint == other.fingerprint == w.fingerprint
    assert own.dtype == str(dtype).removeprefix("torch.")
    assert own.method == METHOD
    assert own.image is None
    assert (own.m, own.L) == (other.m, other.L)  # of the weights' own Λ
    assert other.margin > own.margin > 0


def test_a_term_that_is_too_large_is_not():
    w = EquilibriumLinear(4, 6, 3, gamma=2.0, dtype=torch.float64).weights()
    w = w.apply(torch.Tensor.detach)
    for name in ("C", "U"):
        with pytest.raises(CertificateError, match="γ = 2 could not be proved"):
            prove_dense(w.with_tensors({name: 10 * w.tensors()[name]}))
    with pytest.raises(CertificateError, match="γ = 2 could not be proved"):
        prove_dense(dataclasses.replace(w, D=5 * torch.ones(3, 4, dtype=torch.float64)))
