"""Equations of networks and equilibria: values, products, refusals."""

import dataclasses

import numpy as np
import pytest
import torch

from lben.weights import DenseWeights
from lben.weights.activation import IDENTITY, RELU, Activation
from lben.weights.affine_system import AffineSystem, slope_at
from tests.lben.weights.test_network import residual

TANH = Activation(
    name="Tanh", low=0.0, high=1.0, curvature=0.77, function=torch.tanh, relative_error=2.0**-50,
    absolute_error=2.0**-60,
)  # fmt: skip


def equilibrium(n: int = 6, p: int = 3, q: int = 2, seed: int = 0) -> DenseWeights:
    """Return weights with I − W monotone in a metric that is not the identity."""
    numbers = torch.Generator().manual_seed(seed)
    A, W, U, b, C = (
        torch.randn(*shape, generator=numbers).double()
        for shape in ((n, n), (n, n), (n, p), (n,), (q, n))
    )
    Lambda = 0.5 + torch.rand(n, generator=numbers).double()
    W = (1 - 0.3) * torch.eye(n) - (A.T @ A / n + W - W.T) / Lambda[:, None]
    return DenseWeights(
        W=W, U=U, b=b, C=C, D=None, b_y=torch.zeros(q).double(), Lambda=Lambda, gamma=None
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_values_are_those_of_the_network(sparse):
    network = residual(sparse)
    system = AffineSystem.of_network(network, 0.5, 0.25)
    x = torch.rand(7, 3).double()
    values, y = network.pre_activations(((x - 0.5) / 0.25).numpy())
    for found, expected in zip(system.evaluate(x), [*values, y], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("activation", [RELU, TANH, IDENTITY])
def test_the_state_of_an_equilibrium_solves_its_equation(activation):
    weights = equilibrium()
    system = AffineSystem.of_weights(weights, activation, 0.1, 2.0)
    x = 3 * torch.randn(9, 3).double()
    v, y = system.evaluate(x)
    z, inputs = activation(v), (x - 0.1) / 2.0
    torch.testing.assert_close(v, z @ weights.W.T + weights.drive(inputs))
    torch.testing.assert_close(y, weights.readout(inputs, z))


@pytest.mark.parametrize("sparse", [False, True])
def test_pull_is_the_adjoint_of_push(sparse):
    system = AffineSystem.of_network(residual(sparse))
    states = {j: torch.randn(4, n).double() for j, n in enumerate((3, 4, 5))}
    lam = {k: torch.randn(4, system.units(k)).double() for k in (1, 2, 3)}
    pushed = sum((lam[k] * (system.push(k, states) - system.biases[k - 1])).sum(1) for k in lam)
    pulled = sum((states[j] * system.pull(j, lam)).sum(1) for j in states)
    torch.testing.assert_close(pushed, pulled)


def test_slopes_are_derivatives():
    v = torch.tensor([-1.0, 2.0]).double()
    assert slope_at(RELU, v).tolist() == [0.0, 1.0]
    torch.testing.assert_close(slope_at(TANH, v), 1 - v.tanh() ** 2)


def test_weights_that_are_not_finite_are_refused():
    weights = equilibrium()
    weights.W[0, 0] = torch.nan
    with pytest.raises(ValueError, match="level 1 contain NaN"):
        AffineSystem.of_weights(weights, RELU)


def test_a_normalisation_that_does_not_fit_is_refused():
    network = residual()
    with pytest.raises(ValueError, match="must broadcast"):
        AffineSystem.of_network(network, torch.zeros(2))
    with pytest.raises(ValueError, match="std must be positive"):
        AffineSystem.of_network(network, 0.0, 0.0)
    with pytest.raises(ValueError, match="mean must be finite"):
        AffineSystem.of_network(network, float("nan"))


def test_the_system_in_float32_says_the_same():
    system = AffineSystem.of_weights(equilibrium(), RELU)
    x = torch.randn(3, 3).double()
    single = system.single
    assert single.dtype == torch.float32
    assert dataclasses.replace(system).recurrent
    torch.testing.assert_close(
        single.evaluate(x.float())[1].double(), system.evaluate(x)[1], rtol=1e-3, atol=1e-3
    )
