"""Graphs, compiled or traced, run the tensors that certificates are about, as they are now."""

import copy
import gc
import warnings
from fractions import Fraction

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lben import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    LipschitzSequential,
    NormalizedLinear,
    OrthogonalConv2d,
    OrthogonalLinear,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)

VECTORS = {
    "SLL": lambda: SLLLinear(6, 4),
    "SLL squared": lambda: SLLLinear(6, 4, squarings=1),
    "CPL": lambda: CPLLinear(6, 4),
    "AOL": lambda: AOLLinear(6, 4, learn_q=True),
    "spectral": lambda: SpectralLinear(6, 4),
    "Cayley": lambda: OrthogonalLinear(6, 4),
    "exponential": lambda: OrthogonalLinear(6, 6, orthogonal_map="matrix_exp"),
    "sandwich": lambda: SandwichLinear(6, 4),
    "head": lambda: NormalizedLinear(6, 4),
    "orthonormal head": lambda: NormalizedLinear(6, 4, kind="orthonormal"),
}
IMAGES = {
    "SLL of images": lambda: SLLConv2d(3, 2),
    "CPL of images": lambda: CPLConv2d(3, 2),
    "AOL of images": lambda: AOLConv2d(3, 2),
    "spectral of images": lambda: SpectralConv2d(3, 3, circular=True),
    "sandwich of images": lambda: SandwichConv2d(3, 2),
    "Cayley of images": lambda: OrthogonalConv2d(3, 3, image=(5, 6)),
}
ALL = VECTORS | IMAGES


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compilers
        yield


def input_of(kind):
    return torch.randn(3, 6) if kind in VECTORS else torch.randn(2, 3, 5, 6)


def move(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(1.5).add_(torch.randn_like(p))


def what_runs(layer):
    """The tensors that a graph is given, and those that are proved."""
    source = layer.source()
    with torch.no_grad():
        return layer.in_graph(torch.float32), source(torch.float32)


@pytest.mark.parametrize("kind", ALL)
def test_the_operator_returns_the_bits_that_are_proved(kind):
    layer = ALL[kind]()
    for _ in range(2):
        inside, outside = what_runs(layer)
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
        move(layer)
    torch.library.opcheck(
        torch.ops.lben.running.default,
        ([*layer.parameters(), *layer.buffers()], layer.name_in_graphs, "float32"),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_compiled_layers_follow_their_weights(kind, training):
    layer, x = ALL[kind]().train(training), input_of(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
        move(layer)
    gradients = []
    for call in (compiled, layer):
        layer.zero_grad()
        call(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["jit", "export", "make_fx"])
@pytest.mark.parametrize("kind", ALL)
def test_traced_layers_follow_their_weights(kind, how):
    layer, x = ALL[kind]().eval(), input_of(kind)
    with torch.no_grad():
        if how == "jit":
            traced = torch.jit.trace(layer, x)
        elif how == "export":
            traced = torch.export.export(layer, (x,)).module()
        else:
            traced = make_fx(layer)(x)
        for _ in range(2):
            torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-6)
            move(layer)
            if how == "export":
                traced.load_state_dict(layer.state_dict(), strict=False)


@pytest.mark.parametrize("kind", ["head", "AOL"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_what_a_compiled_layer_does_to_the_identity_is_what_is_proved(kind, backend):
    layer = {"head": NormalizedLinear, "AOL": AOLLinear}[kind](300, 10).eval()
    with torch.no_grad():
        (layer.bias if kind == "head" else layer.parameterization.b_y).zero_()
        found = torch.compile(layer, backend=backend)(torch.eye(300))  # one product per entry
    proved = layer.weights().D.T
    if kind == "head":
        assert torch.equal(found.double(), proved)
        bounds = layer.pair_certificate()
        for i in range(10):
            for j in range(i):
                gaps = (found[:, i].double() - found[:, j].double()).tolist()
                assert sum(Fraction(g) ** 2 for g in gaps) <= Fraction(float(bounds[i][j])) ** 2
    else:
        assert torch.equal(found, proved.float())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SLL", "SLL of images", "spectral of images", "sandwich"])
def test_inductor_runs_the_same_tensors(kind):
    layer, x = ALL[kind](), input_of(kind)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        shape = tuple(x.shape[1:])
        away = (compiled(x) - layer(x)).double().flatten(1).norm(dim=1)
        growth = layer.rounding_growth(shape, torch.float32)
        assert (away <= 2 * (growth.constant + growth.slope * x.flatten(1).norm(dim=1))).all()


def test_a_chain_is_one_graph():
    chain = LipschitzSequential(SLLLinear(6, 4), SLLLinear(6, 4), NormalizedLinear(6, 3))
    x = torch.randn(5, 6)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), chain(x))
    assert len({layer.name_in_graphs for layer in chain}) == 3


def test_copies_are_not_mistaken_for_each_other():
    for layer in (SLLLinear(6, 4), NormalizedLinear(6, 4, kind="orthonormal")):
        twin = copy.deepcopy(layer)
        assert twin.name_in_graphs != layer.name_in_graphs
        move(twin)
        x = torch.randn(2, 6)
        for one in (layer, twin):
            compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), one(x))


def test_gradients_of_the_operator_are_those_of_the_layer():
    layer = SLLLinear(5, 4, dtype=torch.float64)
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def running(*values):
        return tuple(torch.ops.lben.running(list(values), layer.name_in_graphs, "float64"))

    assert torch.autograd.gradcheck(running, values)
    (gradient,) = torch.autograd.grad(running(*values)[2].sum(), values[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.sum().backward()


def test_second_derivatives_in_the_input_are_exact():
    layer = SLLLinear(5, 4, dtype=torch.float64)
    traced = make_fx(layer)(torch.randn(1, 5, dtype=torch.float64))
    x = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(traced, (x,))


@pytest.mark.parametrize("kind", ["SLL", "head"])
def test_a_graph_in_reduced_precision_is_refused(kind):
    layer, x = ALL[kind](), input_of(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="fp32_precision"):
            compiled(x)
        torch.testing.assert_close(layer(x), expected)  # eager calls are full by themselves
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(compiled(x), expected)


def test_a_graph_refuses_weights_that_are_no_numbers():
    layer, x = SLLLinear(6, 4), torch.randn(2, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    with torch.no_grad():
        layer.parameterization.U[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        compiled(x)


def test_a_graph_whose_layer_is_gone_says_so():
    layer, x = SLLLinear(6, 4), torch.randn(2, 6)
    traced = torch.export.export(layer, (x,)).module()
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match="keep it as long"):
        traced(x)


def test_symbolic_tracing_is_refused():
    for kind in ("SLL", "head", "SLL of images"):
        with pytest.raises(TypeError, match="symbolic_trace runs without numbers"):
            torch.fx.symbolic_trace(ALL[kind]())


@pytest.mark.parametrize("kind", ALL)
def test_a_graph_takes_its_tensors_from_the_operator(kind):
    graph = make_fx(ALL[kind]())(input_of(kind)).graph
    assert any(node.target is torch.ops.lben.running.default for node in graph.nodes)
