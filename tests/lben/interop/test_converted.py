"""Converted networks are modules with a bound and a bounded rounding."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lben import (
    CertificateError,
    ConvertedNetwork,
    LipschitzSequential,
    Normalize,
    SLLLinear,
    certify,
)
from lben.certificates import product_bound
from lben.interop import from_torch
from lben.layers import BoundedModule
from lben.tightening.recursion import propose_network_claim
from tests.lben.interop.test_rounding import exactly


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(12, 8),
        nn.Tanh(), nn.Linear(8, 3),
    ).eval()  # fmt: skip


def rectified():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


SHAPE = (1, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_computes_what_the_module_computes(dtype):
    model = convolutional().to(dtype)
    layer = ConvertedNetwork(from_torch(model, SHAPE))
    x = torch.randn(2, 5, *SHAPE, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.flatten(0, 1), model(x.flatten(0, 1)), atol=1e-5, rtol=1e-5)
    assert layer(x[0, 0]).shape == (3,)
    assert isinstance(layer, BoundedModule)


def test_its_gradient_is_that_of_the_module():
    model = convolutional().double()
    layer = ConvertedNetwork(from_torch(model, SHAPE))
    x = torch.randn(3, *SHAPE, dtype=torch.float64, requires_grad=True)
    (own,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(own, expected)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_its_error_in_exact_arithmetic_stays_below_the_bound(dtype, scale):
    layer = ConvertedNetwork(from_torch(rectified(), SHAPE))
    certificate = layer.certificate()
    x = (scale * torch.randn(2, *SHAPE)).to(dtype)
    found = layer.forward_with_error(x, certificate)
    r = 0.5
    around = found.uniform.at(r)
    for k, sample in enumerate(x):
        step = torch.randn_like(sample)
        near = sample + 0.9 * r * step / step.norm()
        moved = layer(near[None])[0]
        for y, at, bound in ((found.value[k], sample, found.error[k]), (moved, near, around[k])):
            exact = exactly(layer.network, at.double().numpy())
            pairs = zip(y.tolist(), exact, strict=True)
            error = sum((Fraction(value) - true) ** 2 for value, true in pairs)
            assert error <= Fraction(float(bound)) ** 2
    assert bool((found.error <= around).all())
    assert float(around.max()) < 1e-4 * max(scale, 1)


def test_errors_of_the_input_are_passed_on():
    layer = ConvertedNetwork(from_torch(convolutional(), SHAPE))
    certificate, x = layer.certificate(), torch.randn(2, *SHAPE)
    found = layer.forward_with_error(x, certificate, 0.5)
    assert bool((found.error >= 0.5 * certificate.bound).all())


def test_what_leaves_the_range_has_no_bound():
    layer = ConvertedNetwork(from_torch(rectified(), SHAPE))
    found = layer.forward_with_error(torch.full((1, *SHAPE), 1e38), layer.certificate())
    assert float(found.uniform.at(1e38)) == float("inf")


def test_it_takes_part_in_chains():
    network = from_torch(convolutional(), SHAPE)
    layer = ConvertedNetwork(network)
    chain = LipschitzSequential(Normalize((0.5,), (0.25,)), layer, SLLLinear(3, 4))
    certificate = chain.certificate(SHAPE)
    own = layer.certificate().bound
    assert certificate.bound == pytest.approx(4 * own, rel=1e-4)
    assert own < product_bound(network)
    found = chain.forward_with_error(torch.rand(2, *SHAPE), certificate)
    assert bool((found.error < 1e-3).all())


def test_its_bound_is_found_once_and_is_below_the_product_of_norms():
    network = from_torch(rectified(), SHAPE)
    layer = ConvertedNetwork(network)
    assert layer.certificate() is layer.certificate(SHAPE)
    assert layer.certificate().bound < product_bound(network)


def test_certificates_of_other_networks_and_shapes_are_refused():
    layer, other = (ConvertedNetwork(from_torch(convolutional(), SHAPE)) for _ in range(2))
    x = torch.rand(1, *SHAPE)
    with pytest.raises(CertificateError, match="for other weights"):
        layer.forward_with_error(x, other.certificate())
    with pytest.raises(ValueError, match="samples of shape"):
        layer.certificate((5, 5))
    assert layer.certificate((4, 4)) == layer.certificate(SHAPE)
    with pytest.raises(ValueError, match="expected"):
        layer(torch.rand(1, 1, 5, 5))
    with pytest.raises(ValueError, match="float32 or float64"):
        layer(x.half())
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        layer([1.0])
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(CertificateError, match="hook"):
        layer.forward_with_error(x, layer.certificate())


def test_claims_take_the_place_of_the_route():
    network = from_torch(convolutional(), SHAPE)
    claim = propose_network_claim(network)
    rows = np.eye(3)
    pairs = {
        (i, j): propose_network_claim(network, rows[[i]] - rows[[j]])
        for i in range(3)
        for j in range(i + 1, 3)
    }
    plain, layer = ConvertedNetwork(network), ConvertedNetwork(network, claim, pairs)
    assert layer.certificate().bound == certify(network, claim).bound > plain.certificate().bound
    assert layer.pair_certificate().largest < plain.pair_certificate().largest
    x = torch.rand(2, *SHAPE)
    found = layer.forward_with_error(x, layer.certificate())
    assert torch.equal(found.error, plain.forward_with_error(x, plain.certificate()).error)


def test_chains_know_the_pairs_of_their_last_network():
    layer = ConvertedNetwork(from_torch(convolutional(), SHAPE))
    chain = LipschitzSequential(Normalize((0.5,), (0.25,)), layer)
    pairs = chain.certificate(SHAPE).pairs
    assert pairs is not None
    assert pairs[0][1] == pytest.approx(4 * layer.pair_certificate()[0][1])


def test_copies_and_conversions_change_nothing():
    layer = ConvertedNetwork(from_torch(convolutional(), SHAPE))
    x = torch.rand(2, *SHAPE)
    y, certificate = layer(x), layer.certificate()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double().float()):
        assert torch.equal(other(x), y)
        assert other.certificate() == certificate
    assert not layer.state_dict()


@pytest.mark.gpu
def test_it_runs_where_its_input_lies():
    layer = ConvertedNetwork(from_torch(convolutional(), SHAPE))
    x = torch.rand(2, *SHAPE)
    found = layer.forward_with_error(x.cuda(), layer.certificate())
    assert found.value.is_cuda
    assert found.error.is_cuda
    torch.testing.assert_close(found.value.cpu(), layer(x))
