"""A chain proves each module, adds up errors, nests, and takes modules of a user's own."""

import pytest
import torch
from torch import nn

from lben import (
    AOLConv2d,
    AOLLinear,
    AveragePooling,
    CertificateError,
    ChainCertificate,
    ChannelPadding,
    EquilibriumConv2d,
    EquilibriumLinear,
    Flatten,
    GroupSort,
    InvertibleDownsampling,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    NormPooling,
    OrthogonalConv2d,
    SLLConv2d,
    SLLLinear,
    compose,
)
from lben.parameterizations.feedforward import UNIT_BOUND
from lben.weights.growth import Growth, norms_up


def test_a_chain_proves_each_layer():
    chain = LipschitzSequential(
        ChannelPadding(4), SLLConv2d(4, 2), AOLConv2d(4, 6), GroupSort(), AveragePooling(4),
        Flatten(), SLLLinear(24, 8), EquilibriumLinear(24, 5, 3, gamma=0.5),
    ).double()  # fmt: skip
    proofs = chain.certificate((3, 8, 8))
    assert [p.bound for p in proofs.layers] == [
        1.0, UNIT_BOUND, UNIT_BOUND, 1.0, 1.0, 1.0, UNIT_BOUND, 0.5
    ]  # fmt: skip
    assert 0.5 <= proofs.bound <= 0.5 * UNIT_BOUND**3 * (1 + 1e-12)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    found = chain.forward_with_error(x, proofs)
    loose, error, steps = found.value, found.error, found.steps
    chain[-1].tol = 1e-13
    found = chain.forward_with_error(x, proofs)
    tight, small, more = found.value, found.error, found.steps
    assert ((loose - tight).norm(dim=1) <= error + small).all()
    assert float(small.max()) < 1e-9 < float(error.max())
    assert 0 < steps < more


def test_rounding_adds_up_along_a_chain():
    chain = LipschitzSequential(SLLConv2d(3, 4), GroupSort(3), Flatten(), SLLLinear(48, 30))
    x = torch.randn(20, 3, 4, 4)
    with torch.no_grad():
        found = chain.forward_with_error(x, chain.certificate((3, 4, 4)))
        y, bound = found.value, found.error
        exact = x.double()
        for layer in chain:
            tensors = getattr(layer, "parameterization", None)
            if tensors is None:
                exact = layer(exact)
            else:
                exact = layer.evaluate(
                    exact, torch.float64, tensors.compute_in_float64(torch.float32)
                )
    assert ((y.double() - exact).norm(dim=1) <= bound.double()).all()


def test_heads_are_links_of_a_chain():
    chain = LipschitzSequential(SLLLinear(6, 9), NormalizedLinear(6, 4))
    proofs, x = chain.certificate((6,)), torch.randn(5, 6)
    assert proofs.layers[1] == chain[1].certificate()
    assert proofs.pairs.bounds >= chain[1].pair_certificate().bounds
    with torch.no_grad():
        found = chain.forward_with_error(x, proofs)
        y, error, steps = found.value, found.error, found.steps
        wide = x.double()
        for w in (layer.weights() for layer in chain):
            z = torch.relu(wide @ w.U.T + w.b) @ w.C.T
            wide = z + wide @ w.D.T + w.b_y
    assert steps == 0
    assert ((y.double() - wide).norm(dim=1) <= error).all()
    other = LipschitzSequential(SLLLinear(6, 9), NormalizedLinear(6, 4))
    with pytest.raises(CertificateError, match="other weights"):
        other.forward_with_error(x, compose([other.certificate((6,)).layers[0], proofs.layers[1]]))


def test_chains_nest():
    inner = LipschitzSequential(GroupSort(), SLLLinear(12, 9), NormalizedLinear(12, 4))
    chain = LipschitzSequential(SLLConv2d(3, 2), AveragePooling(2), Flatten(), inner)
    flat = LipschitzSequential(*chain[:3], *inner)
    proofs, x = chain.certificate((3, 4, 4)), torch.randn(5, 3, 4, 4)
    proofs_of_flat = flat.certificate((3, 4, 4))
    assert proofs.leaves() == proofs_of_flat.leaves()
    assert isinstance(proofs.layers[3], ChainCertificate)
    assert proofs.layers[3] == inner.certificate((12,))
    assert proofs.bound == pytest.approx(proofs_of_flat.bound, rel=1e-12)
    found, expected = (
        c.forward_with_error(x, p) for c, p in ((chain, proofs), (flat, proofs_of_flat))
    )
    assert torch.equal(found.value, expected.value)
    torch.testing.assert_close(found.error, expected.error, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.uniform.at(0.5), expected.uniform.at(0.5), rtol=1e-9, atol=0)
    with pytest.raises(CertificateError, match="of 3 modules one after the other, there are 4"):
        chain.forward_with_error(x, compose(proofs.layers[:3]))
    inner.append(nn.Linear(4, 4))
    for call in (
        lambda: chain.certificate((3, 4, 4)),
        lambda: chain.forward_with_error(x, proofs),
    ):
        with pytest.raises(ValueError, match="Linear has no proved Lipschitz bound"):
            call()


def test_chains_of_nothing_and_of_one_layer_twice():
    empty, x = LipschitzSequential(), torch.randn(2, 3)
    found = empty.forward_with_error(x, empty.certificate((3,)))
    y, error, steps = found.value, found.error, found.steps
    assert torch.equal(y, x)
    assert error.tolist() == [0.0, 0.0]
    assert steps == 0
    layer = SLLLinear(3, 4)
    twice = LipschitzSequential(layer, layer)
    proofs = twice.certificate((3,))
    assert proofs.layers[0] == proofs.layers[1]
    torch.testing.assert_close(twice.forward_with_error(x, proofs).value, layer(layer(x)))
    with pytest.raises(CertificateError, match="of 1 modules one after the other, there are 2"):
        twice.forward_with_error(x, compose(proofs.layers[:1]))


@pytest.mark.parametrize("make", [
    lambda: SLLLinear(6, 4), lambda: AOLLinear(6, 4), lambda: NormalizedLinear(6, 4),
    lambda: SLLConv2d(6, 4), lambda: AOLConv2d(6, 4, circular=True), lambda: ChannelPadding(9),
    lambda: AOLConv2d(6, 4, stride=2), lambda: OrthogonalConv2d(6, 6, image=(4, 4)),
    lambda: InvertibleDownsampling(2), lambda: AveragePooling(2), lambda: NormPooling(2),
    lambda: LipschitzSequential(SLLConv2d(6, 4), GroupSort(), AveragePooling(2)),
    lambda: LipschitzSequential(SLLLinear(6, 4), GroupSort(), NormalizedLinear(6, 4)),
])  # fmt: skip
@torch.no_grad()
def test_any_number_of_batch_dimensions(make):
    layer = make().eval()
    sample = (6,) if "Linear" in repr(layer) or "Dense" in repr(layer) else (6, 4, 4)
    x = torch.randn(2, 3, *sample)
    if isinstance(layer, LipschitzSequential):
        certificate = layer.certificate(sample)

        def rounding(x):
            return layer.forward_with_error(x, certificate).error

    else:
        rounding = layer.rounding
    y, bound = layer(x), rounding(x)
    assert bound.shape == (2, 3)
    assert rounding(x[0, 0]).shape == ()
    for i in range(2):
        torch.testing.assert_close(y[i], layer(x[i]))
        torch.testing.assert_close(bound[i], rounding(x[i]), rtol=1e-9, atol=0)
        for j in range(3):
            torch.testing.assert_close(y[i, j], layer(x[i, j]))
    if isinstance(layer, LipschitzSequential):
        proofs = layer.certificate(sample)
        found = layer.forward_with_error(x, proofs)
        whole, error = found.value, found.error
        torch.testing.assert_close(whole, y)
        assert error.shape == (2, 3)
        assert layer.forward_with_error(x[0, 0], proofs).error.shape == ()


def test_growth_is_affine_and_uniform_over_a_ball():
    layer = LipschitzSequential(SLLLinear(6, 9), GroupSort(), NormalizedLinear(6, 4))
    certificate, x = layer.certificate((6,)), torch.randn(50, 6)
    norm = norms_up(x, 1)
    for part in layer:
        growth = part.rounding_growth((6,), torch.float32)
        assert isinstance(growth, Growth)
        assert (growth.at(norm) >= growth.constant + growth.slope * norm).all()
        torch.testing.assert_close(part.rounding(x), growth.at(norm))
    here = layer.forward_with_error(x, certificate)
    origin = layer.forward_with_error(torch.zeros(1, 6), certificate)
    around = origin.uniform.at(norm)
    assert (here.error <= around).all()
    assert (around <= 20 * here.error).all()


def test_the_shape_of_a_sample_is_that_of_the_first_module_that_knows_one():
    images = LipschitzSequential(GroupSort(2), SLLConv2d(4, 2), Flatten())
    features = LipschitzSequential(SLLLinear(6, 4))
    assert features.certificate() == features.certificate((6,))
    with pytest.raises(ValueError, match="proved for a shape of samples"):
        images.certificate()
    assert images.certificate((4, 5)) == images.certificate((4, 4, 5))
    with pytest.raises(ValueError, match="proved for a shape of samples"):
        LipschitzSequential(AveragePooling(2), SLLConv2d(4, 2)).certificate((4, 4))
    known = LipschitzSequential(EquilibriumConv2d(2, 3, 2, image=(4, 5)), Flatten())
    assert known.certificate() == known.certificate((2, 4, 5)) == known.certificate((4, 5))


def test_a_chain_takes_a_chain_certificate_of_its_own():
    chain, x = LipschitzSequential(SLLLinear(6, 4), SLLLinear(6, 5)), torch.randn(2, 6)
    proof = chain.certificate()
    with pytest.raises(CertificateError, match="a chain needs its ChainCertificate"):
        chain.forward_with_error(x, proof.layers[0])
    with pytest.raises(CertificateError, match="for other weights"):
        chain.forward_with_error(x, compose(proof.layers[::-1]))


def test_a_chain_without_parameters_is_proved_where_its_buffers_are():
    chain = LipschitzSequential(Normalize((0.5,), (0.5,)), Flatten())
    expected = chain.certificate((1, 2, 2))
    with torch.device("meta"):
        assert chain.certificate((1, 2, 2)) == expected
    assert chain.double().certificate((1, 2, 2)).bound == expected.bound
