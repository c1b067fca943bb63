"""Elementwise passes for CUDA devices: in Triton's interpreter where there is none."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from solvers import Inclusion, LeakyReLU, LinearSlope, PeacemanRachford, ReLU, Tanh, backends, solve
from solvers.backends import pointwise
from solvers.backends import triton_launch as launch
from solvers.backends.triton_launch import KernelWarning
from tests.problems import convolution_operator, random_inclusion

pytest.importorskip("triton")
HERE = "cuda" if torch.cuda.is_available() else "cpu"
# Samples × channels × pixels: every boundary of small tiles, one channel, one pixel.
SHAPES = [
    (5, 7),
    (1, 1),
    (33, 3),
    (2, 7, 3, 5),
    (3, 1, 4, 4),
    (2, 5, 1, 1),
    (2, 3, 11),
    (1, 2, 9, 8),
]
SIGMAS = [ReLU(), LeakyReLU(0.3), None]


@pytest.fixture
def everywhere(monkeypatch):
    """Kernels take tensors of the CPU too, in small tiles, several per program."""
    monkeypatch.setattr(pointwise, "serves", lambda tensor: True)
    monkeypatch.setattr(pointwise, "_TILE", 32)
    monkeypatch.setattr(pointwise, "_WIDEST", 8)
    monkeypatch.setattr(pointwise, "_REPEAT", 2)
    monkeypatch.setattr(pointwise, "_MANY", 4)


def draw_report(shape, dtype=torch.float64, grad=False):
    """Return u, b, t and s."""
    c = shape[1]
    tensors = (torch.randn(s, dtype=dtype, device=HERE) for s in (shape, (c,), (c,), (c,)))
    return tuple(t.requires_grad_(grad) for t in tensors)


def composed(u, b, t, s, sigma):
    def spread(vector):
        return vector.view(-1, *[1] * (u.ndim - 2))

    v = u if s is None else u * spread(s)
    v = v if b is None else v + spread(b)
    return (v if sigma is None else sigma(v)) * spread(t)


def layouts(u):
    yield u
    if u.ndim == 4:
        yield u.to(memory_format=torch.channels_last)
        yield u.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    yield torch.stack([u, u], -1)[..., 0]


def variants(b, s):
    return [(b, None), (None, None), (b, s), (None, s)]


@pytest.mark.parametrize("sigma", SIGMAS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_activation_and_scale_in_one_pass(everywhere, sigma, dtype, shape):
    u, b, t, s = draw_report(shape, dtype)
    for bias, inner in variants(b, s):
        expected = composed(u, bias, t, inner, sigma)
        for own in layouts(u):
            stored = own.clone()
            found = backends.activate(own, bias, t, sigma, inner=inner)
            torch.testing.assert_close(found, expected)
            assert torch.equal(own, stored)
        own = u.clone()
        found = backends.activate(own, bias, t, sigma, inner=inner, overwrite=True)
        torch.testing.assert_close(found, expected)
        assert found.data_ptr() == own.data_ptr()


@pytest.mark.parametrize("sigma", SIGMAS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_in_one_pass(everywhere, monkeypatch, sigma, dtype, shape):
    u, b, t, s = draw_report(shape, dtype, grad=True)
    monkeypatch.setattr(pointwise, "_pull_back", None)  # the kernel answers alone
    for bias, inner in variants(b, s):
        inputs = [x for x in (u, bias, t, inner) if x is not None]
        expected = composed(u, bias, t, inner, sigma)
        for own, g in zip(layouts(u), layouts(torch.randn_like(u)), strict=True):
            found = backends.activate(own, bias, t, sigma, inner=inner)
            torch.testing.assert_close(found, expected)
            wanted = torch.autograd.grad(expected, inputs, g, retain_graph=True)
            torch.testing.assert_close(torch.autograd.grad(found, inputs, g), wanted)


@pytest.mark.parametrize("shape", [(9, 17), (2, 7, 3, 5)], ids=str)
@pytest.mark.parametrize("which", range(4))
def test_gradients_of_one_argument_alone(everywhere, shape, which):
    inputs = [x.requires_grad_(i == which) for i, x in enumerate(draw_report(shape))]
    u, b, t, s = inputs
    y = backends.activate(u, b, t, LeakyReLU(0.3), inner=s)
    expected = composed(u, b, t, s, LeakyReLU(0.3))
    g = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs[which], g), torch.autograd.grad(expected, inputs[which], g)
    )


@pytest.mark.parametrize("sigma", SIGMAS, ids=repr)
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2, 2)], ids=str)
def test_derivatives_of_first_and_second_order(everywhere, sigma, shape):
    u, b, t, s = draw_report(shape, grad=True)
    with torch.no_grad():
        u += torch.sign(u * s.view(-1, *[1] * (u.ndim - 2)))  # away from the kink

    def function(u, b, t, s):
        return backends.activate(u, b, t, sigma, inner=s)

    assert gradcheck(function, (u, b, t, s), check_batched_grad=True)
    assert gradgradcheck(function, (u, b, t, s))


@pytest.mark.parametrize("sigma", SIGMAS, ids=repr)
def test_what_is_not_finite_is_what_pytorch_makes_of_it(everywhere, sigma):
    values = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0]
    u = torch.tensor([[v] * 2 for v in values], device=HERE, requires_grad=True)
    b, t = torch.zeros(2, device=HERE), torch.tensor([2.0, -0.5], device=HERE)
    found, expected = backends.activate(u, b, t, sigma), composed(u, b, t, None, sigma)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    for g in (torch.ones_like(u), torch.full_like(u, torch.inf)):
        torch.testing.assert_close(
            torch.autograd.grad(found, u, g, retain_graph=True),
            torch.autograd.grad(expected, u, g, retain_graph=True),
            equal_nan=True,
        )


def test_an_argument_changed_before_the_backward_pass_is_noticed(everywhere):
    u, b, t, _ = draw_report((3, 4), grad=True)
    y = backends.activate(u * 1, b, t, ReLU())
    with torch.no_grad():
        t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Refused:
    """A kernel that no compiler takes."""

    def __init__(self, name):
        self.__name__ = name

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            raise RuntimeError("no such architecture")

        return launch


@pytest.fixture
def refused(everywhere, monkeypatch):
    """No kernel can be compiled."""
    names = ("activate", "activate_backward", "reflect_sum")
    kernels = SimpleNamespace(**{name: Refused(name) for name in names})
    monkeypatch.setattr(pointwise, "_kernels", lambda: kernels)
    launch.forget_failures()
    yield
    launch.forget_failures()


@pytest.mark.parametrize("sigma", SIGMAS, ids=repr)
def test_pytorch_takes_the_place_of_kernels_that_fail(refused, sigma):
    u, b, t, s = inputs = draw_report((2, 3, 4, 4), grad=True)
    with pytest.warns(KernelWarning, match="kernel activate does not run .*no such architecture"):
        found = backends.activate(u, b, t, sigma, inner=s)
    expected = composed(u, b, t, s, sigma)
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(u)
    with pytest.warns(KernelWarning, match="kernel activate_backward does not run"):
        actual = torch.autograd.grad(found, inputs, g)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, inputs, g))
    backends.activate(u, b, t, sigma, inner=s).sum().backward()  # no warning: they are errors here


@pytest.mark.parametrize("kind", ["relu", "leaky", "linear"])
@pytest.mark.parametrize("alpha", [0.5, torch.tensor(0.5), torch.linspace(0.3, 0.9, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reflections_are_those_of_the_activation(everywhere, kind, alpha, dtype):
    problem = random_inclusion(7, (19,), dtype=dtype)
    sigma = {"relu": ReLU(), "leaky": LeakyReLU(0.2)}.get(kind)
    sigma = sigma or LinearSlope(torch.rand_like(problem.bias).round(decimals=1))
    problem = dataclasses.replace(problem, activation=sigma)
    alpha = alpha.to(dtype) if isinstance(alpha, torch.Tensor) else alpha
    x = torch.randn_like(problem.bias)
    for shift in (problem.bias, torch.stack([problem.bias] * 2, -1)[..., 0]):
        found = backends.reflect_sum(problem, alpha, shift)(x)
        torch.testing.assert_close(found, 2 * sigma.prox(x, alpha) - x + shift)


@pytest.mark.parametrize("kind", ["relu", "leaky", "linear"])
def test_convolutions_reflect_and_add_in_one_pass(everywhere, monkeypatch, kind):
    operator = convolution_operator(4, 3, (6, 5))
    bias = torch.randn(3, operator.n, dtype=torch.float64)
    sigma = {"relu": ReLU(), "leaky": LeakyReLU(0.2)}.get(kind)
    sigma = sigma or LinearSlope(torch.rand_like(bias).round(decimals=1))
    problem = Inclusion(operator, bias, sigma)
    one = solve(problem, PeacemanRachford(), tol=1e-9, on_failure="raise")
    monkeypatch.setattr(pointwise, "serves", lambda tensor: False)
    other = solve(problem, PeacemanRachford(), tol=1e-9, on_failure="raise")
    torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-10)


def test_a_reflection_that_fails_is_pytorchs(refused):
    problem = random_inclusion(7, (3,))
    x = torch.randn_like(problem.bias)
    apply = backends.reflect_sum(problem, 0.5, problem.bias)
    expected = x.abs() + problem.bias
    with pytest.warns(KernelWarning, match="kernel reflect_sum does not run"):
        torch.testing.assert_close(apply(x.clone()), expected)
    torch.testing.assert_close(apply(x.clone()), expected)


def test_pointwise_kernels_leave_the_cpu_to_pytorch():
    assert not backends.activates(torch.randn(5, 7), ReLU())
    problem = random_inclusion(5, (3,))
    assert backends.reflect_sum(problem, 0.5, problem.bias) is None


def test_what_kernels_serve(everywhere):
    u = torch.randn(5, 7)
    for sigma in SIGMAS:
        assert backends.activates(u, sigma)
        assert not backends.activates(u[:0], sigma)
    assert not backends.activates(u, Tanh())
    assert backends.reflect_sum(random_inclusion(5, (0,)), 0.5, torch.zeros(0, 5)) is None


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a CUDA device."""

    @property
    def device(self):
        return torch.device("cuda")


def test_kernels_run_on_plain_float_tensors_of_a_device(monkeypatch):
    def serves(dtype):
        return pointwise.serves(torch.zeros(2, dtype=dtype).as_subclass(OnDevice))

    assert not serves(torch.float32)  # a subclass may mean anything
    monkeypatch.setattr(pointwise, "_PLAIN", (OnDevice,))
    assert serves(torch.float32)
    assert serves(torch.float64)
    assert not serves(torch.bfloat16)
    assert not serves(torch.int64)
    assert not pointwise.serves(torch.zeros(2))
    with torch.autograd.forward_ad.dual_level():
        assert not serves(torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not serves(torch.float32)


def test_numbers_are_brought_to_the_device_once():
    like = torch.zeros(3)
    one = pointwise.constant(0.25, like.dtype, like.device)
    assert pointwise.constant(0.25, like.dtype, like.device) is one
    assert pointwise.constant(0.25, torch.float64, like.device).dtype == torch.float64
    with torch.inference_mode():
        assert not pointwise.constant(0.375, like.dtype, like.device).is_inference()


def test_cuts_cover_every_number_and_stay_below_the_limits_of_a_grid():
    for rows, columns in ((1, 1), (5, 1000), (2**33, 3), (7, 2**24)):
        cut = pointwise._Cut.by_column(rows, columns)
        assert cut.tile[0] * cut.tile[1] == pointwise._TILE
        for repeat in (1, 8):
            down, across = cut._blocks(repeat)
            assert down * cut.tile[0] * repeat >= rows
            assert across * cut.tile[1] >= columns
            assert cut.programs(repeat) == down * across
        assert cut.obstacle() is None
    assert "too many" in pointwise._Cut.by_column(2**45, 1).obstacle()
    assert "too many" in pointwise._Cut(2**31, 4, 4, False, (256, 4)).obstacle()
    assert pointwise._Cut.by_column(2**20, 64).repeat() == 8
    assert pointwise._Cut.by_column(64, 64).repeat() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("sigma", SIGMAS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4096, 300), (65, 48, 31, 33), (256, 64, 32, 32)], ids=str)
def test_full_tiles_on_the_device(sigma, dtype, shape):
    u, b, t, s = inputs = draw_report(shape, dtype, grad=True)
    g = torch.randn_like(u)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = composed(*wide, sigma)
    wanted = torch.autograd.grad(expected, wide, g.double())
    for own in [u, u.to(memory_format=torch.channels_last)] if u.ndim == 4 else [u]:
        found = backends.activate(own, b, t, sigma, inner=s)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        actual = torch.autograd.grad(found, inputs, g)
        torch.testing.assert_close(actual[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
        for one, other in zip(actual[1:], wanted[1:], strict=True):
            size = torch.linalg.vector_norm(other)
            assert torch.linalg.vector_norm(one.double() - other) <= 1e-5 * size


@pytest.mark.gpu
@pytest.mark.slow
def test_more_numbers_than_32_bits_count_on_the_device():
    u = torch.zeros(2**15 + 1, 2**16, device="cuda")
    u[-1, -1] = 2.0
    bias, scale = torch.zeros(2, 2**16, device="cuda")
    scale[-1] = 3.0
    y = backends.activate(u, bias, scale, ReLU(), overwrite=True)
    assert float(y[-1, -1]) == 6.0
    assert float(y.sum(dtype=torch.float64)) == 6.0
