"""From explicit layers to an equilibrium layer: same function, same bound, and trainable."""

import pytest
import torch

from lben import (
    AOLLinear,
    CPLLinear,
    DenseWeights,
    EquilibriumLinear,
    SandwichLinear,
    SLLLinear,
    certify,
    feedback,
    stack,
)
from lben.parameterizations import CompleteParameterization
from lben.parameterizations.feedforward import UNIT_BOUND


def perturb(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.5)
    return layer


STACKS = {
    "SLL": lambda: [SLLLinear(6, 4)],
    "CPL": lambda: [CPLLinear(6, 9)],
    "sandwich": lambda: [SandwichLinear(6, 3)],
    "three SLL": lambda: [SLLLinear(6, 4), SLLLinear(6, 9), SLLLinear(6, 3)],
    "mixed": lambda: [SLLLinear(6, 4), AOLLinear(6, 5), SandwichLinear(5, 4), SLLLinear(4, 3)],
    "with an equilibrium": lambda: [
        SLLLinear(6, 4),
        EquilibriumLinear(6, 5, 3, feedthrough=True, tol=1e-13),
    ],
}


def made(name, dtype=torch.float64):
    layers = [perturb(layer.to(dtype)) for layer in STACKS[name]()]
    # The W of an equilibrium layer is computed in its precision: take it where it is exact.
    return [x.double() if isinstance(x, EquilibriumLinear) else x for x in layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STACKS)
def test_outputs_and_bound_are_kept(name, dtype):
    layers = made(name, dtype)
    layer = EquilibriumLinear.from_weights([x.weights() for x in layers], trainable=True, tol=1e-13)
    x = torch.randn(20, 6, dtype=torch.float64)
    expected = x
    with torch.no_grad():
        for part in layers:
            expected = part.double()(expected) if dtype == torch.float64 else _exact(part, expected)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    weights = [x.weights() for x in layers]
    bound = 1.0
    for w in weights:
        bound *= w.gamma
    assert layer.gamma == pytest.approx(bound, rel=1e-15)
    assert layer.certificate().bound == layer.gamma


def _exact(part, x):
    if isinstance(part, EquilibriumLinear):
        return part(x)
    return part.evaluate(x, torch.float64, part.parameterization.compute_in_float64(torch.float32))


@pytest.mark.parametrize("name", STACKS)
def test_the_bound_survives_training(name):
    layer = EquilibriumLinear.from_weights([x.weights() for x in made(name)], trainable=True)
    x, target = (
        torch.randn(32, 6, dtype=torch.float64),
        torch.randn(32, layer.weights().out_features),
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    first = None
    for _ in range(40):
        loss = (layer(x) - 0.5 * target).square().mean()
        first = float(loss.detach()) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.95 * first
    assert layer.certificate().bound == layer.gamma
    W = layer.weights().W.detach()
    assert float(W.triu().abs().max()) > 1e-3  # it is no longer explicit


def test_the_stack_is_certified_with_the_product_of_bounds():
    a, b = (
        perturb(EquilibriumLinear(5, 4, 3, gamma=2.0)),
        perturb(EquilibriumLinear(3, 6, 2, gamma=3.0)),
    )
    with torch.no_grad():
        whole = stack(a.double().weights(), b.double().weights())
    assert whole.gamma == 6.0
    assert certify(whole).bound == 6.0
    x = torch.randn(3, 5, dtype=torch.float64)
    a.tol = b.tol = 1e-13
    torch.testing.assert_close(
        EquilibriumLinear.from_weights(whole, trainable=True, tol=1e-13)(x), b(a(x))
    )


def test_every_free_tensor_moves_the_layer():
    parameterization = CompleteParameterization(
        stack(*(x.weights() for x in made("three SLL")[:2]))
    )
    out = sum((t * torch.randn_like(t)).sum() for t in parameterization().tensors().values())
    out.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in parameterization.parameters())


def test_feedback_is_zero_for_a_stack_and_only_for_one():
    weights = [x.weights() for x in made("three SLL")]
    W = stack(stack(*weights[:2]), weights[2]).W
    assert float(feedback(W, (4, 9, 3))) == 0
    W[2, 3] = 0.5
    assert float(feedback(W, (4, 9, 3))) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="do not add up"):
        feedback(W, (4, 9))


def weights(**changes):
    w = SLLLinear(3, 2, dtype=torch.float64).weights()
    fields = {"W": w.W, "U": w.U, "b": w.b, "C": w.C, "D": w.D, "b_y": w.b_y,
              "Lambda": w.Lambda, "gamma": w.gamma}  # fmt: skip
    return DenseWeights(**{**fields, **changes})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: weights(gamma=None), "claim no bound"),
        (lambda: weights(gamma=0.9), "must be below gamma"),
        (lambda: weights(C=3 * weights().C), "do not satisfy the certificate"),
        (lambda: AOLLinear(3, 3).weights(), "no hidden units"),
        (lambda: [weights(), weights(gamma=None)], "claim a bound"),
        (lambda: [weights(), SLLLinear(4, 2).weights()], "3 outputs do not fit 4 inputs"),
    ],
)
def test_bad_weights_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        EquilibriumLinear.from_weights(given(), trainable=True)


def test_unit_bound_is_a_millionth_above_one():
    assert UNIT_BOUND == 1 + 1e-6
