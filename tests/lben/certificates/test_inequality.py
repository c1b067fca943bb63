"""M(Λ, γ) as displayed, its quadratic form, and the matrices that stand for it."""

import numpy as np
import pytest
import torch

from lben import DenseWeights
from lben.certificates.inequality import Inequality
from tests.lben.weights.kinds import KINDS


def random_weights(n=4, p=3, q=2, D=None):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    W, zero = 0.2 * draw(n, n), torch.zeros(n, dtype=torch.float64)
    return DenseWeights(
        W=W, U=draw(n, p), b=zero, C=draw(q, n), D=D, b_y=zero[:q], Lambda=zero.add(1).exp(),
        gamma=None,
    )  # fmt: skip


def displayed(w, gamma):
    """The matrix of the module's docstring, block by block."""
    W, U, C, Lambda = (t.numpy() for t in (w.W, w.U, w.C, torch.diag(w.Lambda)))
    D = np.zeros((len(C), U.shape[1])) if w.D is None else w.D.numpy()
    side = -(U.T @ Lambda + D.T @ C / gamma)
    corner = gamma * np.eye(U.shape[1]) - D.T @ D / gamma
    rest = 2 * Lambda - Lambda @ W - W.T @ Lambda - C.T @ C / gamma
    return np.block([[corner, side], [side.T, rest]])


def feedthrough(kind):
    D = {"none": None, "dI": 0.5 * torch.eye(3), "matrix": torch.randn(2, 3)}[kind]
    return D if D is None else D.double()


def test_a_full_feedthrough_gives_the_displayed_matrix():
    w = random_weights(D=feedthrough("matrix"))
    found = Inequality.of(w, w.Lambda.numpy()).reduced(30.0)
    np.testing.assert_allclose(found.mid, displayed(w, 30.0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["none", "dI", "matrix"])
@pytest.mark.parametrize("gamma", [1.0, 3.0, 8.0, 40.0])
def test_the_margin_is_positive_where_the_displayed_matrix_is_positive_definite(kind, gamma):
    w = random_weights(q=3 if kind == "dI" else 2, D=feedthrough(kind))
    smallest = float(np.linalg.eigvalsh(displayed(w, gamma))[0])
    inequality = Inequality.of(w, w.Lambda.numpy())
    assert abs(smallest) > 1e-6
    assert (inequality.margin(gamma) > 0) == (smallest > 0)
    assert inequality.smallest_eigenvalue(gamma) == pytest.approx(smallest, abs=1e-10)


def test_the_quadratic_form_is_that_of_the_proof():
    """γ‖Δx‖² − ‖Δy‖²/γ − 2ΔzᵀΛ(Δv − Δz), for any Δx and Δz."""
    w, gamma = random_weights(D=feedthrough("matrix")), 3.0
    dx, dz = torch.randn(3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    dv, dy = w.W @ dz + w.U @ dx, w.C @ dz + w.D @ dx
    expected = gamma * dx @ dx - dy @ dy / gamma - 2 * dz @ (w.Lambda * (dv - dz))
    both = torch.cat([dx, dz]).numpy()
    assert both @ displayed(w, gamma) @ both == pytest.approx(float(expected))


@pytest.mark.parametrize("unit", [0.25, 1.0, 2.0**40])
def test_units_change_no_sign_and_are_exact(unit):
    w = random_weights()
    inequality = Inequality.of(w, w.Lambda.numpy())
    scaled = inequality.in_units_of(unit)
    assert not scaled.W.radius.any()
    for gamma in (1.0, 40.0):
        signs = [
            float(np.linalg.eigvalsh(i.reduced(g).mid)[0]) > 0
            for i, g in ((inequality, gamma), (scaled, gamma / unit))
        ]
        assert signs[0] == signs[1]


def test_a_corner_that_is_not_positive_proves_nothing():
    w = random_weights(q=3, D=feedthrough("dI"))
    assert Inequality.of(w, w.Lambda.numpy()).margin(0.4) == -np.inf


@pytest.mark.parametrize("kind", ["dense", "dense without D"])
def test_the_margin_changes_sign_where_the_bound_becomes_false(kind):
    w = KINDS[kind]()
    block, low, high = Inequality.of(w, w.Lambda.numpy()), 1e-3, 10 * w.gamma
    assert block.margin(high) > 0 >= block.margin(low)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if block.margin(middle) > 0 else (middle, high)
    root = w.Lambda.sqrt()
    best = 0.0
    for _ in range(300):
        slopes = torch.rand(6).round().double()
        K = torch.linalg.solve(torch.eye(6) - slopes[:, None] * w.W, slopes.diag())
        J = w.C @ K @ w.U + (0 if w.D is None else w.D)
        best = max(best, float(torch.linalg.matrix_norm(J, 2)))
    assert best <= high <= w.gamma * (1 + 1e-6)
    assert block.smallest_eigenvalue(high * 1.01) > 0
    assert block.output_gain() >= float(torch.linalg.matrix_norm(w.C / root, 2))
