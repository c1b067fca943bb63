"""T ⪰ UUᵀ in exact arithmetic for the stored numbers, and tight."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from lben.parameterizations import (
    Gershgorin,
    Orthonormal,
    Spectral,
)
from lben.parameterizations.multipliers import FLOOR, absolute_row_sums, gram

SHAPES = [(5, 5), (30, 7), (7, 30), (300, 40), (1, 1)]
KERNELS = [(3, 2, 3, 3), (2, 5, 3, 3), (4, 4, 2, 2), (3, 3, 1, 1)]
RULES = [
    lambda n, dtype: Gershgorin(n, dtype=dtype),
    lambda n, dtype: Gershgorin(n, squarings=2, dtype=dtype),
    lambda n, dtype: Gershgorin(n, learn_q=False, dtype=dtype),
    lambda n, dtype: Spectral(0),
    lambda n, dtype: Spectral(3),
]


def draw_report(rule, n, dtype):
    made = rule(n, dtype)
    if getattr(made, "log_q", None) is not None:
        torch.nn.init.normal_(made.log_q)
    return made


def operator(U, size=6):
    """The matrix of a kernel's zero-padded convolution of size × size images."""
    _, p, k, _ = U.shape
    basis = torch.eye(p * size * size, dtype=U.dtype).reshape(-1, p, size, size)
    return functional.conv2d(basis, U, padding=k - 1).flatten(1).T


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_T_lies_above_the_gram_matrix(rule, dtype, shape):
    U = torch.randn(shape, dtype=dtype)
    T = draw_report(rule, shape[0], dtype)(U).detach().double()
    gap = torch.diag(T) - U.double() @ U.double().T
    assert float(torch.linalg.eigvalsh(gap)[0]) >= -1e-13 * float(T.max())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", KERNELS)
def test_T_lies_above_the_convolution(rule, dtype, shape):
    U = torch.randn(shape, dtype=dtype)
    T = draw_report(rule, shape[0], dtype)(U).detach().double()
    A = operator(U.double())
    gap = torch.diag(T.repeat_interleave(len(A) // shape[0])) - A @ A.T
    assert float(torch.linalg.eigvalsh(gap)[0]) >= -1e-12 * float(T.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 30, 300])
def test_gershgorin_lies_above_the_exact_sum_of_the_stored_numbers(dtype, n):
    U = torch.randn(n, 50, dtype=dtype)
    rule = draw_report(RULES[0], n, dtype)
    T, q = rule(U).detach().double(), rule.log_q.detach().exp().double()
    exact = ((U.double() @ U.double().T).abs() @ q) / q
    assert (exact <= T).all()
    assert (exact * (1 + (1e-3 if dtype == torch.float32 else 1e-11)) >= T).all()


def test_squaring_tightens_gershgorin():
    U = torch.randn(40, 40, dtype=torch.float64)
    sums = [float((1 / Gershgorin(40, squarings=s, learn_q=False)(U)).sum()) for s in (0, 1, 3)]
    assert sums[0] < 0.8 * sums[1] < 0.8 * sums[2]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e12])
@pytest.mark.parametrize("rule", RULES)
def test_extreme_weights_give_finite_multipliers(scale, rule):
    U = torch.randn(6, 5) * scale
    T = draw_report(rule, 6, torch.float32)(U)
    assert torch.isfinite(1 / T).all()
    assert (T >= FLOOR).all()


def test_orthonormal_is_right_for_every_matrix_and_tight_for_orthogonal_ones():
    U = torch.nn.init.orthogonal_(torch.empty(20, 30))
    assert 1 <= float(Orthonormal()(U)[0]) < 1 + 1e-5
    U = torch.randn(20, 30)
    assert float(Orthonormal()(U)[0]) >= float(torch.linalg.matrix_norm(U.double(), 2)) ** 2
    assert Orthonormal()(torch.randn(30, 20)).shape == (30,)
    with pytest.raises(ValueError, match="takes a matrix"):
        Orthonormal()(torch.randn(2, 2, 3, 3))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (2, 3, 3, 3)])
def test_multipliers_are_differentiable(rule, shape):
    made = draw_report(rule, shape[0], torch.float64)
    U = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = tuple(made.parameters())

    def call(U, *values):
        names = [name for name, _ in made.named_parameters()]
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (U,))

    assert gradcheck(call, (U, *parameters))


def test_row_sums_of_many_blocks():
    U = torch.randn(700, 9, dtype=torch.float64, requires_grad=True)
    q = torch.rand(700, dtype=torch.float64, requires_grad=True)
    w = torch.randn(700, dtype=torch.float64)
    expected = (U @ U.T).abs() @ q
    found = absolute_row_sums(U, q)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found @ w, (U, q)), torch.autograd.grad(expected @ w, (U, q)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_the_gram_kernel_is_the_operator_times_its_transpose():
    U = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    A = operator(U, size=9)
    side = 9 + 2
    row = (A @ A.T)[5 * side + 5].reshape(2, side, side)
    torch.testing.assert_close(row[:, 3:8, 3:8], gram(U)[:, 0].flip(1, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gershgorin(0), "units must be at least 1"),
        (lambda: Gershgorin(3, squarings=-1), "squarings at least 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_reduced_precision_of_products_does_not_reach_T():
    U = torch.randn(40, 300)
    rule = Gershgorin(40)
    before = rule(U)
    torch.set_float32_matmul_precision("medium")
    try:
        after = rule(U)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(after, before)
