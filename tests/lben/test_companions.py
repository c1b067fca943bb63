"""Companions are 1-Lipschitz, heads know how far logits can part, chains add up."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from lben import (
    AOLConv2d,
    AveragePooling,
    ChannelPadding,
    EquilibriumLinear,
    Flatten,
    GroupSort,
    Householder,
    InvertibleDownsampling,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    NormPooling,
    SLLConv2d,
    SLLLinear,
)
from lben.parameterizations.explicit import UNIT_BOUND

COMPANIONS = [
    Flatten(), ChannelPadding(9), InvertibleDownsampling(2), AveragePooling(2), NormPooling(2),
    GroupSort(), GroupSort(3), Householder(6, dtype=torch.float64),
]  # fmt: skip
ISOMETRIES = COMPANIONS[:3]


@pytest.mark.parametrize("companion", COMPANIONS, ids=str)
@torch.no_grad()
def test_companions_are_1_lipschitz_and_reach_it(companion):
    a = torch.randn(500, 6, 4, 4, dtype=torch.float64)
    near = a + 1e-3 * torch.randn_like(a)
    flat = a + 0.1  # differences that pooling keeps
    for b in (near, torch.randn_like(a), flat):
        change = (companion(a) - companion(b)).flatten(1).norm(dim=1)
        distance = (a - b).flatten(1).norm(dim=1)
        assert float((change / distance).max()) <= 1 + 1e-12
    kept = (companion(a) - companion(flat)).flatten(1).norm() / (a - flat).flatten(1).norm()
    assert float(kept) > (0.4 if isinstance(companion, NormPooling) else 0.99)


@pytest.mark.parametrize("companion", ISOMETRIES, ids=str)
def test_isometries_keep_every_norm(companion):
    x = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(companion(x).norm(), x.norm())


@pytest.mark.parametrize("companion", COMPANIONS, ids=str)
def test_companions_are_differentiable(companion):
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(companion, (x,))


@pytest.mark.parametrize("companion", COMPANIONS, ids=str)
def test_rounding_of_companions_is_bounded(companion):
    x = torch.randn(50, 6, 4, 4)
    error = (companion.float()(x).double() - companion.double()(x.double())).flatten(1).norm(dim=1)
    assert (error <= companion.float().rounding(x).double()).all()


def test_householder_reflects_beyond_its_line_only():
    layer = Householder(2, dtype=torch.float64)
    x = torch.tensor([[1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(y[1], x[1])
    torch.testing.assert_close(y[0], x[0].flip(0))  # θ = π/2 is MaxMin


def test_group_sort_sorts():
    x = torch.randn(3, 6)
    assert torch.equal(GroupSort(3)(x), x.unflatten(1, (2, 3)).sort(2).values.flatten(1))
    assert torch.equal(GroupSort(2)(x), x.unflatten(1, (3, 2)).sort(2).values.flatten(1))


@pytest.mark.parametrize("kind", ["rows", "orthonormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_bound_pairs_of_logits(kind, dtype):
    head = NormalizedLinear(20, 5, kind=kind, dtype=dtype)
    bounds, Q = head.pair_bounds(), head.matrix().detach().double()
    exact = (Q[:, None] - Q[None]).norm(dim=2)
    off = ~torch.eye(5, dtype=torch.bool)
    assert (bounds[off] >= exact[off]).all()
    assert (bounds[off] <= exact[off] * (1 + 1e-12)).all()
    if kind == "orthonormal":
        torch.testing.assert_close(bounds[off], torch.full((20,), math.sqrt(2.0)).double())
    assert head.certificate().bound >= float(torch.linalg.matrix_norm(Q, 2))
    x = torch.randn(30, 20, dtype=dtype)
    error = (head(x).double() - (x.double() @ Q.T + head.bias.double())).norm(dim=1)
    assert (error <= head.rounding(x).double()).all()


def test_a_chain_proves_each_layer():
    chain = LipschitzSequential(
        ChannelPadding(4), SLLConv2d(4, 2), AOLConv2d(4, 6), GroupSort(), AveragePooling(4),
        Flatten(), SLLLinear(24, 8), EquilibriumLinear(24, 5, 3, gamma=0.5),
    ).double()  # fmt: skip
    proofs = chain.certificates((3, 8, 8))
    assert [p.bound for p in proofs] == [UNIT_BOUND] * 3 + [0.5]
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    loose, error, steps = chain.with_error(x, proofs)
    chain[-1].tol = 1e-13
    tight, small, more = chain.with_error(x, proofs)
    assert ((loose - tight).norm(dim=1) <= error + small).all()
    assert float(small.max()) < 1e-9 < float(error.max())
    assert 0 < steps < more


def test_rounding_adds_up_along_a_chain():
    chain = LipschitzSequential(SLLConv2d(3, 4), GroupSort(3), Flatten(), SLLLinear(48, 30))
    x = torch.randn(20, 3, 4, 4)
    with torch.no_grad():
        y, bound, _ = chain.with_error(x, chain.certificates((3, 4, 4)))
        exact = x.double()
        for layer in chain:
            tensors = getattr(layer, "parameterization", None)
            if tensors is None:
                exact = layer(exact)
            else:
                exact = layer.evaluate(exact, torch.float64, tensors.exact(torch.float32))
    assert ((y.double() - exact).norm(dim=1) <= bound.double()).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelPadding(0), "channels must be at least 1"),
        (lambda: ChannelPadding(2)(torch.zeros(1, 3, 4, 4)), "at most 2 channels"),
        (lambda: InvertibleDownsampling(0), "stride must be at least 1"),
        (lambda: InvertibleDownsampling(2)(torch.zeros(1, 3, 5, 4)), "multiples of 2"),
        (lambda: AveragePooling(0), "size must be at least 1"),
        (lambda: AveragePooling(3)(torch.zeros(1, 3, 4, 4)), "multiples of 3"),
        (lambda: NormPooling(3)(torch.zeros(1, 3, 4, 4)), "multiples of 3"),
        (lambda: GroupSort(1), "group must be at least 2"),
        (lambda: GroupSort(2)(torch.zeros(1, 3, 4, 4)), "multiple of 2"),
        (lambda: Householder(3), "channels must be even"),
        (lambda: Householder(4)(torch.zeros(1, 6)), "expected 4 channels"),
        (lambda: NormalizedLinear(3, 4, kind="orthonormal"), "do not fit into 3 features"),
        (lambda: NormalizedLinear(3, 0), "sizes must be at least 1"),
        (lambda: NormalizedLinear(3, 2)(torch.zeros(1, 4)), "expected 3 features"),
        (lambda: LipschitzSequential(nn.Linear(2, 2)), "Linear has no proved Lipschitz bound"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("std", [1e-50, 1e300])
def test_a_std_that_cannot_be_stored_is_refused(std):
    with pytest.raises(ValueError, match="mean and std must be numbers of"):
        Normalize((0.0,), (std,))
