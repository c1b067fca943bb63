"""An equilibrium layer: gradients, caches, inputs, dtypes and what it refuses."""

import copy
import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from lben import (
    EquilibriumConv2d,
    EquilibriumLinear,
    PooledEquilibriumConv2d,
    stack,
)
from solvers import (
    ForwardBackward,
    ImplicitGradient,
    LeakyReLU,
    PeacemanRachford,
    ReLU,
    SolveError,
    SolveWarning,
    Tanh,
)

SIZES = (4, 5, 3)

TIGHT = {"dtype": torch.float64, "tol": 1e-13, "max_steps": 5000, "on_failure": "raise"}

VARIANTS = [
    {},
    {"gamma": 0.3, "activation": Tanh()},
    {"activation": LeakyReLU(0.1), "feedthrough": True},
    {"gamma": None},
    {"gamma": None, "learn_metric": False},
]


def make(**options):
    return EquilibriumLinear(*SIZES, **{"epsilon": 0.1, **TIGHT, **options})


def draw(*shape):
    return torch.randn(*shape, SIZES[0], dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_gradcheck_for_every_parameter_and_the_input(variant):
    layer = make(**variant)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    names = [n for n, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    x = draw(2).requires_grad_()

    def f(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *values))


@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
def test_output_solves_the_equations(variant):
    layer = make(**variant)
    x = draw(6)
    w, solution = layer.weights(), layer.equilibrium(x)
    z = solution.value
    torch.testing.assert_close(z, layer.activation(z @ w.W.T + x @ w.U.T + w.b))
    y = z @ w.C.T + w.b_y + (0 if w.D is None else x @ w.D.T)
    torch.testing.assert_close(layer(x), y)
    assert (layer.certificate().bound < torch.inf) == (layer.gamma is not None)


@pytest.mark.parametrize("method", [PeacemanRachford(step_size=0.4), ForwardBackward()], ids=repr)
def test_methods_agree(method):
    layer = make(epsilon=0.5)
    x = draw(6)
    expected = layer(x)
    layer.method = method
    torch.testing.assert_close(layer(x), expected)


def test_every_variant_acts():
    outputs = set()
    for variant in VARIANTS:
        torch.manual_seed(0)
        layer = make(**variant)
        torch.manual_seed(1)
        outputs.add(round(float(layer(draw(3)).detach().sum()), 9))
    assert len(outputs) >= len(VARIANTS) - 1  # Λ starts at I, so monDEQ starts as well-posed
    assert make(gamma=None).parameterization.log_metric is not None
    assert make(gamma=None, learn_metric=False).parameterization.log_metric is None


def count_assemblies(layer, monkeypatch):
    calls = []
    original = layer.parameterization.forward
    monkeypatch.setattr(layer.parameterization, "forward", lambda: calls.append(1) or original())
    return calls


def test_weights_are_assembled_once_while_nothing_changes(monkeypatch):
    layer = make()
    calls = count_assemblies(layer, monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            layer(draw(2))
    layer.requires_grad_(False)
    x = draw(2).requires_grad_()
    layer(x).sum().backward()
    assert len(calls) == 1
    assert x.grad is not None


def by_optimizer(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(draw(3)).square().sum().backward()
    optimizer.step()


def in_place(layer):
    with torch.no_grad():
        layer.parameterization.V[0, 0] += 0.5


def by_data(layer):
    layer.parameterization.V.data[0, 0] += 0.5


def by_new_data(layer):
    layer.parameterization.U.data = torch.randn_like(layer.parameterization.U)


def by_new_parameter(layer):
    layer.parameterization.b = nn.Parameter(torch.ones_like(layer.parameterization.b))


def by_state_dict(layer):
    layer.load_state_dict({k: v + 0.1 for k, v in layer.state_dict().items()})


def by_dtype(layer):
    layer.float()
    layer.double()
    in_place(layer)


CHANGES = [by_optimizer, in_place, by_data, by_new_data, by_new_parameter, by_state_dict, by_dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_cache_is_dropped_the_moment_a_parameter_changes(change):
    layer = make()
    x = draw(4)
    with torch.no_grad():
        before = layer(x)
        change_here = torch.enable_grad()
        with change_here:
            change(layer)
        after = layer(x)
        fresh = make()
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(after, fresh(x), rtol=1e-12, atol=1e-12)
    assert (after - before).abs().max() > 1e-6


def test_cached_and_differentiated_outputs_agree():
    layer = make()
    x = draw(4)
    with torch.no_grad():
        cached = layer(x)
    torch.testing.assert_close(layer(x).detach(), cached, rtol=1e-12, atol=1e-12)


def test_state_dict_and_deepcopy():
    layer = make()
    x = draw(4)
    with torch.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(twin(x), expected)
        in_place(twin)
        torch.testing.assert_close(layer(x), expected)
        assert (twin(x) - expected).abs().max() > 1e-6
    other = make()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x).detach(), expected)


def test_double_use_in_one_graph():
    layer = EquilibriumLinear(4, 5, 4, **TIGHT)
    x = draw(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(torch.tanh(layer(x))), (x,))


def test_no_grad_records_nothing():
    layer = make()
    with torch.no_grad():
        assert not layer(draw(2)).requires_grad
    assert layer(draw(2)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    layer = EquilibriumLinear(*SIZES, dtype=dtype, tol=1e-5)
    x = draw(3).to(dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    layer = make()
    x = draw(9)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_leading_dimensions(shape):
    assert make()(draw(*shape)).shape == (*shape, 3)


def test_warm_start_saves_iterations():
    layer = make(epsilon=1e-3)
    x = draw(8)
    cold = layer.equilibrium(x)
    layer.tol = 1e-12
    warm = layer.equilibrium(x, z0=cold.value.detach())
    assert warm.stats.max_steps < cold.stats.max_steps


def test_bound_is_never_exceeded_and_is_approached():
    layer = EquilibriumLinear(6, 12, 4, gamma=0.5, **TIGHT).requires_grad_(False)
    x = torch.randn(300, 6, dtype=torch.float64)
    d = 1e-3 * torch.randn(300, 6, dtype=torch.float64)
    for _ in range(60):
        d.requires_grad_()
        change = (layer(x + d) - layer(x)).square().sum()
        (g,) = torch.autograd.grad(change, d)
        d = 1e-3 * g / g.norm(dim=1, keepdim=True).clamp_min(1e-30)
    quotient = (layer(x + d) - layer(x)).norm(dim=1) / d.norm(dim=1).clamp_min(1e-30)
    assert quotient.max() <= 0.5
    assert quotient.max() > 0.3


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5, dtype=torch.float64), r"expected 4 features .* got shape \(3, 5\)"),
        (torch.zeros(()), "expected 4 features"),
        (torch.zeros(3, 4), r"x is torch\.float32, the layer is torch\.float64"),
        (torch.zeros(3, 4, dtype=torch.long), r"x is torch\.int64"),
        (torch.full((2, 4), torch.nan, dtype=torch.float64), "NaN or Inf in 2 of 2 samples"),
        (torch.full((2, 4), torch.inf, dtype=torch.float64), "first at sample 0, feature 0"),
    ],
)
def test_bad_inputs_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        make()(x)


def test_bad_parameters_and_overflow_are_named():
    layer = make()
    with pytest.raises(ValueError, match=r"overflows torch\.float64"):
        layer(
            torch.full((1, 4), 1.7e308, dtype=torch.float64)
            * torch.sign(layer.parameterization.U.detach()[:1])
        )
    by_data(layer)
    layer.parameterization.b.data[1] = torch.nan
    with pytest.raises(ValueError, match=r"parameter parameterization\.b contains NaN"):
        layer(draw(1))


@pytest.mark.parametrize("gamma", [0.0, -2.0, float("nan"), float("inf")])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match="gamma must be a positive, finite Lipschitz bound"):
        make(gamma=gamma)


def test_tolerance_below_what_the_dtype_holds_is_refused():
    layer = EquilibriumLinear(*SIZES, tol=1e-9)
    with pytest.raises(ValueError, match=r"tol = 1e-09 is below what torch\.float32 can hold"):
        layer(torch.zeros(1, 4))


def test_a_missed_tolerance_is_never_silent():
    layer = make(epsilon=1e-3, max_steps=1, on_failure="warn")
    with pytest.warns(SolveWarning, match="forward solve"):
        layer(draw(3))
    layer.on_failure = "raise"
    with pytest.raises(SolveError, match="stopped at its step limit after 1 steps"):
        layer(draw(3))


def test_repr_tells_the_configuration():
    text = repr(make(activation=ReLU()))
    assert "gamma=1.0" in text
    assert "method=Auto()" in text


def lost_products(n, q, batch):
    """Return a layer with W = 0, Cz below half an ulp of b_y, and an input."""
    layer = EquilibriumLinear(
        1, n, q, gamma=None, learn_metric=False, epsilon=0.75, dtype=torch.float64, tol=1e-12
    )
    P = layer.parameterization
    with torch.no_grad():
        P.V.copy_(0.5 * torch.eye(n))
        for name, value in {
            "N": 0.0, "U": 0.0, "b": 0.49 * 2.0**-52, "C": 1.0, "b_y": 1.0
        }.items():  # fmt: skip
            getattr(P, name).fill_(value)
        assert not bool(layer.weights().W.any())
    return layer, torch.zeros(batch, 1, dtype=torch.float64)


@pytest.mark.parametrize(("n", "q", "batch"), [(1000, 256, 8), (300, 16, 1), (1000, 256, 64)])
def test_a_readout_whose_accumulators_start_with_the_bias(n, q, batch):
    layer, x = lost_products(n, q, batch)
    found = layer.forward_with_error(x, layer.certificate())
    y, error = found.value, found.error
    exact = 1 + n * Fraction(0.49 * 2.0**-52)
    for row, bound in zip(y, error, strict=True):
        true = sum((Fraction(float(a)) - exact) ** 2 for a in row)
        assert true <= Fraction(float(bound)) ** 2


def test_rounding_that_overflows_or_underflows_is_known_to():
    layer = EquilibriumLinear(4, 5, 3, feedthrough=True, dtype=torch.float64)
    w = layer.weights().apply(torch.Tensor.detach)
    z = torch.full((2, 5), 1.7e308, dtype=torch.float64)
    x = torch.full((2, 4), 1.7e308, dtype=torch.float64)
    for bound in w.rounding(x, z):
        assert (bound > 1e290).all()
        assert not bound.isnan().any()
    nothing = w.apply(torch.zeros_like)
    nothing = dataclasses.replace(nothing, Lambda=w.Lambda)
    for bound in nothing.rounding(0 * x, 0 * z):
        assert (bound > 0).all()


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"activation": nn.ReLU()}, TypeError, r"ProximalActivation.*solvers\.ReLU\(\)"),
        ({"activation": torch.tanh}, TypeError, r"ProximalActivation.*solvers\.Tanh\(\)"),
        ({"activation": "sigmoid"}, TypeError, r"ProximalActivation.*solvers\.Sigmoid\(\)"),
        ({"method": PeacemanRachford}, TypeError, r"method must.*PeacemanRachford\(\)"),
        ({"method": "anderson"}, TypeError, "method must be a solvers.Method"),
        ({"gradient": ImplicitGradient}, TypeError, r"gradient must.*ImplicitGradient\(\)"),
        ({"tol": "small"}, TypeError, "tol must be a number"),
        ({"tol": -1.0}, ValueError, "tol = -1.0"),
        ({"max_steps": 1e3}, TypeError, "max_steps must be an integer"),
        ({"on_failure": "error"}, ValueError, "on_failure must be"),
    ],
)
@pytest.mark.parametrize("kind", [EquilibriumLinear, EquilibriumConv2d, PooledEquilibriumConv2d])
def test_layers_refuse_other_kinds_at_construction(kind, options, error, named):
    image = {} if kind is EquilibriumLinear else {"image": (8, 8)}
    with pytest.raises(error, match=named):
        kind(3, 4, 2, **image, **options)


def test_what_is_set_later_is_refused_then_or_when_it_runs():
    layer = EquilibriumLinear(3, 4, 2)
    with pytest.raises(TypeError, match=r"ProximalActivation.*solvers\.ReLU\(\)"):
        layer.activation = nn.ReLU()
    layer.method = PeacemanRachford
    with pytest.raises(TypeError, match="method must"):
        layer(torch.ones(1, 3))


def test_arrays_are_named_with_what_to_do():
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor.*from_numpy"):
        EquilibriumLinear(3, 4, 2)(np.ones((2, 3)))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_dimensions_of_any_number(shape, dtype):
    layer = EquilibriumLinear(6, 8, 4, feedthrough=True, dtype=dtype)
    x = torch.randn(*shape, 6, dtype=dtype, requires_grad=True)
    found = layer.forward_with_error(x, layer.certificate())
    y, error = found.value, found.error
    found = layer.forward_with_error(x.reshape(-1, 6), layer.certificate())
    rows, errors = found.value, found.error
    assert y.shape == (*shape, 4)
    assert error.shape == shape
    torch.testing.assert_close(y.reshape(-1, 4), rows)
    torch.testing.assert_close(error.reshape(-1), errors, rtol=1e-3, atol=1e-9)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        if len(shape) != 1:
            with pytest.raises(ValueError, match=r"x must be \(batch, p\)"):
                layer.operating_points(x, layer.certificate())


def test_images_without_a_batch_are_told_what_to_add():
    layer = EquilibriumConv2d(3, 4, image=(8, 8))
    x = torch.randn(3, 8, 8)
    with pytest.raises(ValueError, match=r"add a batch dimension, x\[None\]"):
        layer(x)
    with pytest.raises(ValueError, match="merge the leading dimensions"):
        layer(x.expand(2, 5, 3, 8, 8))
    batch = x.expand(2, 3, 8, 8)
    proof = layer.certificate()
    last = batch.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last), layer(batch))
    assert layer.forward_with_error(batch[:0], proof).error.shape == (0,)
    assert layer.forward_with_error(last, proof).error.shape == (2,)


def test_layers_of_unequal_types_are_not_stacked():
    single, double = EquilibriumLinear(4, 3, 4), EquilibriumLinear(4, 3, 4, dtype=torch.float64)
    for a, b in ((single, double), (double, single)):
        with pytest.raises(ValueError, match=r"dtype must be one, got torch\.float"):
            stack(a.weights(), b.weights())


@pytest.mark.parametrize("write", ["data", "numpy"])
def test_writing_to_weights_that_were_given_changes_no_layer(write):
    layer, x = EquilibriumLinear(5, 6, 3).requires_grad_(False), torch.randn(4, 5)
    proof, y = layer.certificate(), layer(x)
    given = layer.weights().W
    given.data.mul_(0.9) if write == "data" else np.multiply(given, 0.9, out=given.numpy())
    assert torch.equal(layer(x), y)
    layer.forward_with_error(x, proof)


@pytest.fixture
def shortened():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore")
def test_a_trace_runs_no_shortened_products(shortened):
    layer, x = EquilibriumLinear(5, 6, 3), torch.randn(4, 5)
    torch.set_float32_matmul_precision("highest")
    trace = torch.jit.trace(layer, (x,), check_trace=False)
    torch.testing.assert_close(trace(2 * x), layer(2 * x))
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(RuntimeError, match=r"mkldnn\.matmul\.fp32_precision"):
        trace(x)
    layer(x)


# What it returns goes through the wrapper of the hook for annotations, which is compiled as well.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiler_leaves_a_solve_alone():
    torch._dynamo.reset()
    layer, x = EquilibriumLinear(5, 6, 3), torch.randn(4, 5)
    made = []
    compiled = torch.compile(layer, backend=lambda graph, _: made.append(graph) or graph.forward)
    assert torch.equal(compiled(x), layer(x))
    assert not made  # else the weights would be made once more, and rounded otherwise


def test_there_is_no_graph_of_a_solve():
    layer, x = EquilibriumLinear(5, 6, 3), torch.randn(4, 5)
    for make in (lambda: torch.export.export(layer, (x,)), lambda: torch.fx.symbolic_trace(layer)):
        with pytest.raises(ValueError, match="steps that look at numbers"):
            make()
