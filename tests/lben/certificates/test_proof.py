"""What a proof reads is what is stored; what cannot be read or shown is refused."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lben import CertificateError, Claim, EquilibriumLinear
from lben.certificates.inequality import Inequality
from lben.certificates.proof import multiplier_of, numbers_of, prove, read_exactly, require
from tests.lben.weights.kinds import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_read_as_they_are_stored(kind):
    w = KINDS[kind]()
    w = w.apply(torch.Tensor.float)
    exact = read_exactly(w)
    for name, t in w.tensors().items():
        assert exact.tensors()[name].dtype == torch.float64
        assert torch.equal(exact.tensors()[name].float(), t)
    name = next(iter(w.tensors()))
    bad = w.with_tensors({name: torch.full_like(w.tensors()[name], math.nan)})
    with pytest.raises(CertificateError, match=f"NaN or Inf, in {name}"):
        read_exactly(bad)
    with pytest.raises(ValueError, match="proofs are of float32 and float64"):
        read_exactly(w.apply(torch.Tensor.half))
    with pytest.raises(ValueError, match="on the meta device"):
        read_exactly(w.apply(lambda t: t.to("meta")))


def test_weights_that_contradict_themselves_are_refused():
    w = KINDS["reads the state"]()
    read_exactly(w)
    with pytest.raises(ValueError, match="C is not I or b_y is not 0"):
        read_exactly(dataclasses.replace(w, C=2 * w.C))
    with pytest.raises(ValueError, match="C is not I or b_y is not 0"):
        read_exactly(dataclasses.replace(w, C=w.C.flip(0)))


def test_numbers_of_a_claim_are_real_and_of_one_size():
    assert numbers_of("τ", np.arange(3), 3).dtype == np.float64
    assert numbers_of("τ", torch.tensor([1e-40, 2.0], dtype=torch.float32), 2)[0] > 0
    for wrong, message in (
        (np.ones(2), "must have shape"), (torch.ones(3, 1), "must have shape"),
        (np.ones(3, dtype=complex), "real numbers"), (torch.ones(3, dtype=torch.bool), "real"),
        (["a", "b", "c"], "real numbers"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            numbers_of("τ", wrong, 3)
    w = KINDS["dense"]()
    with pytest.raises(CertificateError, match="Λ must be positive"):
        multiplier_of(w, Claim(1.0, torch.full_like(w.Lambda, 1e-320)))


def test_a_margin_that_is_none_is_told_with_causes():
    assert require(1e-9, lambda: 0.0, 1.0) == 1e-9
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(CertificateError, match=r"γ = 2 could not .*Causes:.*Try float64"):
            require(margin, lambda: -0.5, 2.0)
    with pytest.raises(CertificateError, match="well-posedness could not"):
        require(-1.0, lambda: -0.5, None)


def test_one_block_that_fails_fails_the_whole():
    w = KINDS["dense without D"]()
    good = Inequality.of(w, w.Lambda.numpy())
    broken = dataclasses.replace(w, W=w.W + 5 * torch.eye(6, dtype=torch.float64))
    bad = Inequality.of(broken, broken.Lambda.numpy())
    nan = Inequality.of(dataclasses.replace(w, W=w.W * math.nan), w.Lambda.numpy())
    proof = prove(w, 1.0, [good, good], [good], "twice")
    assert proof.margin > 0
    assert proof.fingerprint == w.fingerprint
    for other in (bad, nan):
        with pytest.raises((CertificateError, ValueError)):
            prove(w, 1.0, [good, other], [good], "once")


def test_constants_are_those_of_the_own_multiplier():
    layer = EquilibriumLinear(4, 6, 3, dtype=torch.float64)
    w = layer.weights().apply(torch.Tensor.detach)
    own = Inequality.of(w, w.Lambda.numpy())
    proof = prove(w, 1.0, [own], [own], "test")
    H = w.Lambda.sqrt()[:, None] * (torch.eye(6) - w.W) / w.Lambda.sqrt()
    assert proof.m <= float(torch.linalg.eigvalsh((H + H.T) / 2)[0])
    assert float(torch.linalg.matrix_norm(H, 2)) <= proof.L
