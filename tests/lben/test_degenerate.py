"""Constant outputs, dead units, equal rows, no units: tiny bounds, and the least of all at hand."""

import dataclasses
import math

import pytest
import torch

from lben import (
    Claim,
    DenseWeights,
    EquilibriumClassifierConfig,
    EquilibriumLinear,
    PooledEquilibriumConv2d,
    certify,
    margin_radius,
    tighten_diagonal,
    tighten_pairs,
    tighten_scaled,
)
from lben.certificates import IntervalClaim
from lben.radii.local import LocalCertifier, OperatingPoints
from lben.tightening import tighten_linf, tighten_pooled
from solvers import ReLU

change = dataclasses.replace
EYE = torch.eye(8, dtype=torch.float64)
ALIVE = 1 - EYE[0, :6]


def layer(p=5, n=6, q=3, gamma=None, feedthrough=False):
    torch.manual_seed(0)
    made = EquilibriumLinear(p, n, q, gamma=1.0, feedthrough=feedthrough, dtype=torch.float64)
    return change(made.weights().apply(torch.Tensor.detach), gamma=gamma)


def dead_units(rho, gamma=None):
    """One unit that counts, and two that see no input and are not read out."""
    W = torch.zeros(3, 3, dtype=torch.float64)
    W[1, 2] = W[2, 1] = rho
    return DenseWeights(
        W=W, U=EYE[:3, :1], b=0 * EYE[0, :3], C=torch.tensor([[-0.5, 0, 0], [0.5, 0, 0]]).double(),
        D=None, b_y=0 * EYE[0, :2], Lambda=EYE.sum(0)[:3], gamma=gamma,
    )  # fmt: skip


def with_equal_rows(w, slight=0.0):
    C = w.C.clone()
    C[1] = C[0] * (1 + slight)
    D = None if w.D is None else w.D.clone()
    if D is not None:
        D[1] = D[0]
    return change(w, C=C, D=D)


def ones(w):
    return change(w, W=-torch.ones_like(w.W), U=torch.ones_like(w.U), C=torch.ones_like(w.C))


CASES = {
    "plain": lambda w: w,
    "C = 0": lambda w: change(w, C=0 * w.C),
    "U = 0": lambda w: change(w, U=0 * w.U),
    "W = 0": lambda w: change(w, W=0 * w.W),
    "C = U = 0": lambda w: change(w, C=0 * w.C, U=0 * w.U),
    "D = 0": lambda w: change(w, D=torch.zeros(3, 5, dtype=torch.float64)),
    "two equal rows": with_equal_rows,
    "two nearly equal rows": lambda w: with_equal_rows(w, 1e-15),
    "a dead unit": lambda w: change(w, U=w.U * ALIVE[:, None], C=w.C * ALIVE),
    "an unread unit": lambda w: change(w, C=w.C * ALIVE),
    "ones": ones,
    "rank one": lambda w: change(w, U=w.U[:, :1] @ w.U[:1], C=w.C[:, :1] @ w.C[:1]),
    "small C": lambda w: change(w, C=1e-100 * w.C),
    "large U": lambda w: change(w, U=1e100 * w.U),
    "small and large": lambda w: change(w, C=1e-100 * w.C, U=1e100 * w.U),
    "large Λ": lambda w: change(w, Lambda=1e100 * w.Lambda),
    "one output": lambda w: change(w, C=w.C[:1], D=None if w.D is None else w.D[:1], b_y=w.b_y[:1]),
    "one input": lambda w: change(w, U=w.U[:, :1], D=None if w.D is None else w.D[:, :1]),
    "no units": lambda w: change(
        w, W=w.W[:0, :0], U=w.U[:0], b=w.b[:0], C=w.C[:, :0], Lambda=w.Lambda[:0]
    ),
    "no outputs": lambda w: change(w, C=w.C[:0], D=None if w.D is None else w.D[:0], b_y=w.b_y[:0]),
    "no inputs": lambda w: change(w, U=w.U[:, :0], D=None if w.D is None else w.D[:, :0]),
}  # fmt: skip


def least(pairs):
    return [row[j] for i, row in enumerate(pairs) for j in range(i + 1, len(pairs))]


@pytest.mark.parametrize("feedthrough", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_bound_is_proved_and_they_are_ordered(case, feedthrough):
    w = CASES[case](layer(feedthrough=feedthrough))
    p, above = w.in_features, 1 + 1e-12
    whole = certify(w, tighten_diagonal(w)).bound
    pairs = certify(w, tighten_pairs(w))
    largest = certify(w, tighten_linf(w))
    best = certify(w, tighten_linf(w, fix_multiplier=False))
    assert all(b <= 2**0.5 * whole * above for b in least(pairs))
    assert all(b <= c * above for b, c in zip(least(best), least(largest), strict=True))
    if p:
        root = p**0.5 * (1 + 1e-7)
        assert all(b <= root * c for b, c in zip(least(best), least(pairs), strict=True))
    intervals = least(certify(w, IntervalClaim()))
    assert all(b <= c for b, c in zip(least(largest), intervals, strict=True))
    if w.D is None or not bool(w.D.any()):
        assert whole <= certify(w, tighten_scaled(w)).bound * above
        stored = certify(w, tighten_pairs(w, fix_multiplier=True))
        assert all(b <= c * above for b, c in zip(least(pairs), least(stored), strict=True))
        if p:
            assert all(b <= root * c for b, c in zip(least(largest), least(stored), strict=True))
        if case in ("C = 0", "U = 0", "C = U = 0", "no units", "no inputs"):
            assert whole < 1e-150
            assert not least(pairs) or max(least(pairs)) < 1e-150
    if case == "two equal rows":
        assert pairs[0][1] < 1e-150
        y = torch.tensor([[1.0, 0.5, -1.0]], dtype=torch.float64)
        assert float(margin_radius(y, torch.tensor([0]), pairs)) < math.inf


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-9])
def test_dead_units_do_not_stop_the_program(rho, gap):
    weights = dead_units(rho)
    assert certify(weights, tighten_diagonal(weights, gap=gap)).bound <= 0.5**0.5 * (1 + 1e-6)


def test_the_program_itself_is_not_stopped_by_dead_units():
    """Not by taking what Λ as it is shows: that is not the best here."""
    torch.manual_seed(0)
    alive = layer(n=4)
    alive = change(alive, W=0.3 * torch.randn(4, 4, dtype=torch.float64))
    n = 6
    W, U, C = torch.zeros(n, n).double(), torch.zeros(n, 5).double(), torch.zeros(3, n).double()
    W[:4, :4], U[:4], C[:, :4] = alive.W, alive.U, alive.C
    W[4, 5] = W[5, 4] = 0.9
    both = change(alive, W=W, U=U, C=C, b=0 * W[0], Lambda=1 + 0 * W[0])
    expected = tighten_diagonal(alive, gap=1e-7).gamma
    assert tighten_diagonal(both, gap=1e-7).gamma == pytest.approx(expected, rel=1e-5)
    assert expected < 0.999 * tighten_scaled(alive).gamma


def test_a_false_claim_of_the_weights_is_not_proposed():
    honest = layer()
    false = change(honest, gamma=0.01)
    for propose in (tighten_scaled, tighten_diagonal):
        assert certify(false, propose(false)).bound > 0.01
    stored = tighten_pairs(false, fix_multiplier=True)
    assert min(least(certify(false, stored))) > 0.01
    certify(false, tighten_linf(false))


def test_a_true_claim_of_the_weights_is_never_given_up():
    """Here it is the least: another Λ than that of the claim shows no less."""
    w = DenseWeights(
        W=0 * EYE, U=EYE, b=0 * EYE[0], C=EYE, D=None, b_y=0 * EYE[0], Lambda=EYE.sum(0),
        gamma=1 + 1e-10,
    )  # fmt: skip
    assert tighten_scaled(w).gamma == tighten_diagonal(w).gamma == 1 + 1e-10
    assert max(least(certify(w, tighten_pairs(w)))) <= 2**0.5 * (1 + 2e-7)


def test_intervals_have_no_bound_where_the_comparison_matrix_is_singular():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    w = DenseWeights(
        W=turn, U=EYE[:2, :2], b=0 * EYE[0, :2], C=EYE[:2, :2], D=None, b_y=0 * EYE[0, :2],
        Lambda=EYE.sum(0)[:2], gamma=None,
    )  # fmt: skip
    assert least(certify(w, IntervalClaim())) == [math.inf]


@pytest.mark.parametrize("what", ["C", "U", "both", "W", "small", "large"])
def test_pooled_weights(what):
    torch.manual_seed(0)
    made = PooledEquilibriumConv2d(2, 3, 2, image=(4, 4), gamma=None, dtype=torch.float64)
    w = made.weights().apply(torch.Tensor.detach)
    if what in ("C", "both"):
        w = change(w, C=0 * w.C)
    if what in ("U", "both"):
        w = change(w, state=change(w.state, U=0 * w.state.U))
    if what == "W":
        w = change(w, state=change(w.state, W=None))
    if what in ("small", "large"):
        w = change(w, C=w.C * (1e-100 if what == "small" else 1e100))
    bound = certify(w, tighten_pooled(w)).bound
    assert 0 < bound < math.inf
    assert bound < 1e-90 or what in ("W", "large")


@pytest.mark.parametrize("what", ["C = 0", "U = 0", "rows"])
def test_a_classifier_of_constants(what):
    torch.manual_seed(0)
    net = EquilibriumClassifierConfig(
        shape=(1, 2, 2), classes=3, mean=(0.3,), std=(0.4,), hidden=6
    ).build().double()  # fmt: skip
    free = net.layer.parameterization
    with torch.no_grad():
        if what == "C = 0":
            free.C.zero_()
        elif what == "U = 0":
            free.U.zero_()
        else:
            free.C[1] = free.C[0]
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    for bound in net.bounds:
        found = net.certified_radius(x, torch.tensor([0, 1]), net.certificate(bound=bound))
        assert bool((found >= 0).all())
        assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    "what", ["C = 0", "U = 0", "W = 0", "two equal rows", "no units", "rank one"]
)
def test_local_proofs_of_constants(what):
    w = CASES[what](layer())
    local = LocalCertifier(w, ReLU(), certify(w, tighten_diagonal(w)).bound)
    v = torch.ones(2, w.hidden_features, dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    operating_points = OperatingPoints(v=v, v_error=0 * v, logits=y, logit_error=0 * y[:, 0])
    labels = y.argmax(1)
    for constraints in (False, True):
        held = local.certifies(
            operating_points, labels, torch.tensor([0.0, math.inf]), constraints=constraints
        )
        assert held.tolist() == [True, False]
    assert certify(w, Claim(None, w.Lambda)).bound == math.inf
