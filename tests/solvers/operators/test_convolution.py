"""Convolutions on a torus: against matrices, under translation, and as zero padding."""

import pytest
import torch

from solvers import (
    ConvolutionOperator,
    DenseOperator,
    Inclusion,
    LeakyReLU,
    LowRankUpdate,
    Masked,
    PeacemanRachford,
    ReLU,
    Tanh,
    equilibrium,
    solve,
)
from solvers.methods.step_size import Determinant, JacobiDeterminant
from tests.problems import SpectralConvolution, convolution_operator, updated_convolution_operator

OPERATORS = {
    "convolution": lambda: convolution_operator(3, 3, (5, 4)),
    "updated": updated_convolution_operator,
}


@pytest.fixture(params=OPERATORS)
def W(request):
    return OPERATORS[request.param]()


def dense(W):
    return DenseOperator(W.mv(torch.eye(W.n, dtype=W.dtype)).T.contiguous(), W.metric)


@pytest.mark.parametrize("rule", [Determinant(), JacobiDeterminant()], ids=repr)
def test_step_sizes_are_those_of_the_matrix(W, rule):
    if isinstance(W, LowRankUpdate):
        alone = ConvolutionOperator(W.base.kernel, W.base.image, W.base.channel_metric)
        assert torch.equal(torch.as_tensor(rule(W)), torch.as_tensor(rule(alone)))
        W = alone
    step, expected = rule(W), rule(dense(W))
    torch.testing.assert_close(torch.as_tensor(step), torch.as_tensor(expected))


def test_the_mean_of_a_coarser_torus_is_near():
    kernel = 0.1 * torch.randn(2, 2, 3, 3, dtype=torch.float64)
    W = ConvolutionOperator(kernel, (16, 18))
    near, exact = W.mean_log_eigenvalue(), W.log_determinant() / W.n
    assert near != exact
    assert near == pytest.approx(exact, abs=1e-3)  # of a step size's logarithm


@pytest.mark.parametrize("sigma", [ReLU(), Tanh(), LeakyReLU(0.2)], ids=repr)
def test_solution_and_gradients_are_those_of_the_matrix(W, sigma):
    v = torch.randn(4, W.n, dtype=W.dtype, requires_grad=True)
    g = torch.randn(4, W.n, dtype=W.dtype)
    options = {"tol": 1e-13, "on_failure": "raise"}
    tensors = tuple(t.detach().clone().requires_grad_() for t in W.tensors)
    results = []
    for operator in (W.rebuild(tensors), None):
        if operator is None:  # the matrix, as a function of the same tensors
            basis = torch.eye(W.n, dtype=W.dtype)
            operator = DenseOperator(W.rebuild(tensors).mv(basis).T.contiguous(), W.metric)
        z = equilibrium(Inclusion(operator, v, sigma), PeacemanRachford(), **options).value
        results.append((z, *torch.autograd.grad((z * g).sum(), (v, *tensors))))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10)


def test_second_derivatives():
    W = convolution_operator(2, 3, (3, 3))
    kernel = W.kernel.clone().requires_grad_()
    v = torch.randn(1, W.n, dtype=W.dtype, requires_grad=True)

    def f(kernel, v):
        operator = ConvolutionOperator(kernel, W.image, W.channel_metric)
        problem = Inclusion(operator, v, Tanh())
        return equilibrium(problem, PeacemanRachford(), tol=1e-14, on_failure="raise").value

    assert torch.autograd.gradcheck(f, (kernel, v))
    assert torch.autograd.gradgradcheck(f, (kernel, v))


def test_the_direct_product_and_that_of_the_transform_agree():
    W = convolution_operator(3, 3, (5, 4))
    z, u = torch.randn(2, 6, W.n, dtype=W.dtype)
    results = []
    for kind in (SpectralConvolution, ConvolutionOperator):
        operator = kind(W.kernel, W.image, W.channel_metric)
        assert operator._is_direct == (kind is ConvolutionOperator)
        results.append(
            (operator.mv(z), operator.T.mv(z), *operator.pullback(u, z),
             operator.relax(0.3).add(z, u, None))
        )  # fmt: skip
        error = (operator.mv(z) - z @ dense(W).W.T).abs()
        bound = operator.magnitude(z.abs()) * operator.summands * torch.finfo(W.dtype).eps
        assert (error <= bound).all()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_translations_pass_through_a_solve():
    W = convolution_operator(2, 3, (6, 5))
    v = torch.randn(3, 2, 6, 5, dtype=W.dtype)

    def z(v):
        problem = Inclusion(W, v.flatten(1), ReLU())
        return solve(problem, PeacemanRachford(), tol=1e-14).value.reshape(v.shape)

    torch.testing.assert_close(z(v.roll((2, -1), (2, 3))), z(v).roll((2, -1), (2, 3)))


@pytest.mark.parametrize("sigma", [ReLU(), Tanh(), LeakyReLU(0.2)], ids=repr)
def test_a_mask_makes_the_torus_a_zero_padded_image(sigma):
    kernel = convolution_operator(2, 5, (5, 5)).kernel
    torus = ConvolutionOperator(kernel, (6, 7))
    inside = torch.zeros(2, 6, 7, dtype=torch.bool)
    inside[:, :4, :5] = True
    v = torch.randn(3, 2, 6, 7, dtype=kernel.dtype)
    problem = Inclusion(torus, v.flatten(1), Masked(sigma, inside.flatten()))
    z = solve(problem, PeacemanRachford(), tol=1e-14).value.reshape(v.shape)
    assert torch.equal(z[:, ~inside], torch.zeros_like(z[:, ~inside]))
    image = z[:, :, :4, :5]
    again = sigma(torch.nn.functional.conv2d(image, kernel, padding=2) + v[:, :, :4, :5])
    torch.testing.assert_close(image, again, rtol=1e-11, atol=1e-12)


def test_a_mask_is_a_prox_like_others():
    inside = torch.tensor([True, False, True])
    sigma, x = Masked(Tanh(), inside), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(sigma.prox(x, 1.0), sigma(x))
    given = x.clone()
    torch.testing.assert_close(sigma.reflector(0.7)(given), 2 * sigma.prox(x, 0.7) - x)
    assert torch.equal(sigma.slope(sigma(x))[:, 1], torch.zeros(7, dtype=x.dtype))
    assert sigma.part(slice(1, 3)).mask.tolist() == [False, True]


def test_large_kernels_are_multiplied_by_the_transform():
    assert ConvolutionOperator(torch.zeros(24, 24, 5, 5), (6, 6))._is_direct
    assert not ConvolutionOperator(torch.zeros(25, 25, 5, 5), (6, 6))._is_direct


def test_bad_operators_are_refused_by_name():
    kernel = torch.zeros(2, 2, 3, 3)
    with pytest.raises(ValueError, match=r"shape \(c, c, k, k\)"):
        ConvolutionOperator(kernel[:1], (4, 4))
    with pytest.raises(ValueError, match="must be odd"):
        ConvolutionOperator(kernel[..., :2, :2], (4, 4))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        ConvolutionOperator(kernel, (2, 4))
    with pytest.raises(ValueError, match="one number per unit"):
        ConvolutionOperator(kernel, (4, 4), torch.ones(3))
    W = ConvolutionOperator(kernel, (4, 4))
    with pytest.raises(ValueError, match="equal within each channel"):
        W.resolvent(torch.rand(W.n))
    with pytest.raises(ValueError, match="must have shape"):
        LowRankUpdate(W, torch.zeros(5, 1), torch.zeros(5, 1))
    with pytest.raises(ValueError, match="float64"):
        LowRankUpdate(W, torch.zeros(W.n, 1).double(), torch.zeros(W.n, 1).double())
