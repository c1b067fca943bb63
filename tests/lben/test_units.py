"""γ is a choice of units: every layer starts, solves, is proved and trains at any γ as at 1."""

import pytest
import torch

from lben import EquilibriumConv2d, EquilibriumLinear, PooledEquilibriumConv2d, certify
from lben.layers import EquilibriumLayer
from lben.parameterizations import CompleteParameterization, DirectParameterization
from lben.weights import DenseWeights

GAMMAS = [1e-8, 1e-4, 3.0, 1e5, 1e12]


def dense(gamma, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return EquilibriumLinear(7, 12, 3, gamma=gamma, dtype=dtype, tol=1e-4, **options)


def images(gamma, dtype=torch.float64, channels=3, **options):
    torch.manual_seed(0)
    return EquilibriumConv2d(3, 4, channels, image=(5, 5), gamma=gamma, dtype=dtype, **options)


def pooled(gamma, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return PooledEquilibriumConv2d(2, 4, 3, image=(4, 4), gamma=gamma, dtype=dtype, **options)


def complete(gamma, dtype=torch.float64):
    weights = dense(gamma, torch.float64, feedthrough=True).weights()
    layer = EquilibriumLayer(CompleteParameterization(weights.apply(torch.Tensor.detach)))
    return layer.to(dtype)


LAYERS = {
    "plain": dense,
    "direct term": lambda g, d: dense(g, d, feedthrough=True),
    "fixed metric": lambda g, d: dense(g, d, feedthrough=True, learn_metric=False),
    "complete": complete,
    "images": images,
    "images, skip": lambda g, d: images(g, d, skip=0.3 * g),
    "images, residual": lambda g, d: images(g, d, skip=g),
    "images, state": lambda g, d: images(g, d, channels=None),
    "images, fixed metric": lambda g, d: images(g, d, learn_metric=False),
    "pooled": pooled,
}


def inputs(layer, dtype):
    count = 16 if len(layer.sample_shape) == 1 else 4
    return torch.randn(count, *layer.sample_shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_that_of_one_in_other_units(name, gamma, dtype):
    layer, one = LAYERS[name](gamma, dtype), LAYERS[name](1.0, dtype)
    torch.manual_seed(1)
    x = inputs(layer, dtype)
    with torch.no_grad():
        assert layer.equilibrium(x).stats.max_steps <= one.equilibrium(x).stats.max_steps + 2
        y, reference = layer(x), one(x)
        torch.testing.assert_close(y / gamma, reference, rtol=1e-3, atol=1e-3)
    proof, proof_of_one = layer.certificate(), one.certificate()
    assert proof.bound == gamma
    assert abs(proof.m / proof_of_one.m - 1) < 1e-2
    found = layer.forward_with_error(x, proof)
    error = found.error
    found = one.forward_with_error(x, proof_of_one)
    error_of_one = found.error
    assert bool((error <= 3 * gamma * error_of_one.amax()).all())


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", ["plain", "direct term", "images, skip", "pooled", "complete"])
def test_training_is_that_of_one(name, gamma):
    """The losses of both, up to the size of y, and the proof afterwards."""
    losses = []
    for value in (gamma, 1.0):
        layer = LAYERS[name](value, torch.float64)
        torch.manual_seed(1)
        x = inputs(layer, torch.float64)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(8):
            optimizer.zero_grad()
            loss = (layer(x) / value).sub(1).square().mean()
            loss.backward()
            optimizer.step()
        layer.certificate()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_right_inverse_at_any_gamma(gamma):
    for options in ({}, {"feedthrough": True}, {"learn_metric": False}):
        source = dense(gamma, **options).parameterization
        target = DirectParameterization(7, 12, 3, dtype=torch.float64, gamma=gamma, **options)
        weights = source().apply(torch.Tensor.detach)
        target.right_inverse(weights)
        for name, found in target().tensors().items():
            expected = weights.tensors()[name]
            torch.testing.assert_close(
                found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max())
            )


@pytest.mark.parametrize("factor", [2.0**-300, 2.0**-40, 2.0**40, 2.0**300])
@pytest.mark.parametrize("feedthrough", [False, True])
def test_a_proof_does_not_depend_on_units(feedthrough, factor):
    """y in other units, x in other units, and every unit of z in its own: powers of two."""
    w = dense(1.0, feedthrough=feedthrough).weights().apply(torch.Tensor.detach)
    margin = certify(w).margin
    assert certify(w.scale(factor)).margin == pytest.approx(margin, rel=1e-9)
    g = torch.Generator().manual_seed(0)
    s = torch.exp2(torch.randint(-200, 200, (12,), generator=g).double())
    stretched = DenseWeights(
        W=s[:, None] * w.W / s, U=s[:, None] * w.U, b=s * w.b, C=w.C / s, D=w.D, b_y=w.b_y,
        Lambda=w.Lambda / s / s, gamma=1.0,
    )  # fmt: skip
    assert certify(stretched).margin == pytest.approx(margin, rel=1e-9)
