"""What layers keep is that of their parameters and settings as they are, in every way of change."""

import copy
import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from torch import func, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lben import (
    AOLConv2d,
    AOLLinear,
    CPLConv2d,
    CPLLinear,
    EquilibriumConv2d,
    EquilibriumLinear,
    FeedforwardClassifierConfig,
    NormalizedLinear,
    OrthogonalConv2d,
    OrthogonalLinear,
    PooledEquilibriumConv2d,
    SandwichConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
    SpectralConv2d,
    SpectralLinear,
)
from lben.certificates import CertificateError
from lben.layers import LipschitzSequential
from solvers import Tanh

F64 = {"dtype": torch.float64}
TIGHT = {**F64, "tol": 1e-12}
LAYERS = {
    "SLL": (lambda: SLLLinear(5, 7, **F64), (5,)),
    "SLL squared": (lambda: SLLLinear(5, 7, squarings=2, activation=Tanh(), **F64), (5,)),
    "CPL": (lambda: CPLLinear(5, 7, **F64), (5,)),
    "AOL": (lambda: AOLLinear(5, 4, learn_q=True, **F64), (5,)),
    "spectral": (lambda: SpectralLinear(5, 4, **F64), (5,)),
    "orthogonal": (lambda: OrthogonalLinear(5, 4, **F64), (5,)),
    "sandwich": (lambda: SandwichLinear(5, 4, **F64), (5,)),
    "SLL images": (lambda: SLLConv2d(2, 3, **F64), (2, 5, 5)),
    "CPL images": (lambda: CPLConv2d(2, 3, **F64), (2, 5, 5)),
    "AOL images": (lambda: AOLConv2d(2, 3, **F64), (2, 5, 5)),
    "spectral images": (lambda: SpectralConv2d(2, 3, **F64), (2, 5, 5)),
    "sandwich images": (lambda: SandwichConv2d(2, 3, **F64), (2, 5, 5)),
    "orthogonal images": (lambda: OrthogonalConv2d(2, 2, image=(5, 5), **F64), (2, 5, 5)),
    "head": (lambda: NormalizedLinear(5, 4, **F64), (5,)),
    "orthonormal head": (lambda: NormalizedLinear(5, 4, kind="orthonormal", **F64), (5,)),
    "equilibrium": (lambda: EquilibriumLinear(5, 6, 3, feedthrough=True, **TIGHT), (5,)),
    "equilibrium of images": (
        lambda: EquilibriumConv2d(2, 3, 2, image=(5, 5), **TIGHT), (2, 5, 5)
    ),
    "pooled": (lambda: PooledEquilibriumConv2d(2, (2, 3), 2, image=(8, 8), **TIGHT), (2, 8, 8)),
}  # fmt: skip
EXPLICIT = [
    name for name in LAYERS if name not in ("equilibrium", "equilibrium of images", "pooled")
]


def make(kind, batch=3):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    return build(), torch.randn(batch, *shape, dtype=torch.float64)


def first(layer):
    return max(layer.parameters(), key=torch.Tensor.numel)


class Flipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 0.5

    def forward(self, x):
        return x.tanh() + self.factor * x.flip(0)


def register(layer):
    module = getattr(layer, "parameterization", layer)
    name = next(n for n, p in module.named_parameters(recurse=False) if p.ndim > 1)
    parametrize.register_parametrization(module, name, Flipped())
    return module, name


def moved(t):
    """Return another value, in another direction than t: some layers do not see a factor."""
    noise = torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=t.dtype)
    return t.detach() + 0.2 * noise


def fused_step(layer):
    for p in layer.parameters():
        p.grad = p.detach() - moved(p)
    torch.optim.SGD(layer.parameters(), lr=1.0, fused=True).step()


def assign(layer):
    first(layer).data = moved(first(layer))


def another_parameter(layer):
    owner, name = next(
        (m, n) for m in layer.modules() for n, p in m._parameters.items() if p is first(layer)
    )
    owner._parameters[name] = nn.Parameter(moved(first(layer)))


def load_assigned(layer):
    state = {k: (moved(v) if "base" not in k else v) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def assign_in_place(layer):
    first(layer).data.copy_(moved(first(layer)))


CHANGES = {
    "in place": lambda layer: first(layer).copy_(moved(first(layer))),
    ".data": lambda layer: first(layer).data.copy_(moved(first(layer))),
    "one entry": lambda layer: first(layer).data.view(-1)[-1:].add_(1.0),
    "numpy": lambda layer: np.copyto(first(layer).detach().numpy(), moved(first(layer)).numpy()),
    "shared memory": lambda layer: (layer.share_memory(), assign_in_place(layer)),
    "data of another": assign,
    "another parameter": another_parameter,
    "assigned state": load_assigned,
    "fused optimizer": fused_step,
    "parametrization": register,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_change_is_seen(kind, change):
    layer, x = make(kind)
    if change == "parametrization" and not any(
        p.ndim > 1
        for p in getattr(layer, "parameterization", layer)._parameters.values()
        if p is not None
    ):
        pytest.skip("all of its tensors are parametrized already")
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        assert torch.equal(layer(x), before)
        CHANGES[change](layer)
        after = layer(x)
        torch.testing.assert_close(after, copy.deepcopy(layer)(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after, before, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(layer(x).detach(), after, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["SLL", "SLL images", "equilibrium", "pooled"])
def test_a_parametrization_its_setting_and_its_removal_are_seen(kind):
    layer, x = make(kind)
    layer.eval()
    with torch.no_grad():
        outputs = [layer(x)]
        module, name = register(layer)
        outputs.append(layer(x))
        module.parametrizations[name][0].factor = 0.25
        outputs.append(layer(x))
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        torch.testing.assert_close(layer(x), outputs[-1], rtol=1e-9, atol=1e-10)
        for a, b in itertools.pairwise(outputs):
            assert not torch.allclose(a, b)


SETTINGS = {
    "gamma": ("equilibrium", lambda p: setattr(p, "gamma", 0.3)),
    "epsilon": ("equilibrium", lambda p: setattr(p, "epsilon", 2.0)),
    "gamma of images": ("equilibrium of images", lambda p: setattr(p, "gamma", 0.3)),
    "gamma of pooled": ("pooled", lambda p: setattr(p, "gamma", 0.3)),
    "squarings": ("SLL", lambda p: setattr(p.rule, "squarings", 4)),
    "rule": ("CPL", lambda p: setattr(p, "rule", SLLLinear(5, 7, **F64).parameterization.rule)),
    "hook": ("SLL", lambda p: p.rule.register_forward_hook(lambda *a: 2 * a[-1])),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_seen(setting):
    kind, change = SETTINGS[setting]
    layer, x = make(kind)
    layer.eval()
    with torch.no_grad():
        before = layer(x)
        change(layer.parameterization)
        after = layer(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, copy.deepcopy(layer)(x), rtol=1e-9, atol=1e-10)


def test_the_bound_that_a_layer_names_is_that_of_what_runs():
    layer, _ = EquilibriumLinear(6, 8, 4, gamma=4.0).eval(), torch.manual_seed(0)
    x = torch.randn(200, 6)
    with torch.no_grad():
        layer(x)
        layer.parameterization.gamma = 0.5
        y = layer(x)
    moved = (y[:100] - y[100:]).norm(dim=1) / (x[:100] - x[100:]).norm(dim=1)
    assert float(moved.max()) <= layer.gamma == layer.certificate().bound == 0.5


def test_a_proof_is_checked_against_what_runs():
    chain, x = LipschitzSequential(SLLLinear(64, 64)).eval(), torch.rand(8, 64)
    old = chain.certificate((64,))
    with torch.no_grad():
        chain(x)
    chain[0].parameterization.U.data.view(-1)[1234] += 20.0
    with pytest.raises(CertificateError):
        chain.forward_with_error(x, old)
    found = chain.forward_with_error(x, chain.certificate((64,)))
    y, error = found.value, found.error
    w = chain[0].weights()
    exact = x.double() @ w.D.T + torch.relu(x.double() @ w.U.T + w.b) @ w.C.T + w.b_y
    assert bool(((y.double() - exact).norm(dim=1) <= error.double()).all())


def test_weights_that_somebody_wrote_to_are_made_again():
    layer, x = make("equilibrium")
    with torch.no_grad():
        before = layer(x)
        for name in ("W", "U"):
            getattr(layer.weights(), name).zero_()
            assert torch.equal(layer(x), before)
            assert float(getattr(layer.weights(), name).abs().max()) > 0


@pytest.mark.parametrize("kind", ["SLL", "SLL images", "equilibrium", "pooled"])
def test_threads_may_switch_modes_and_change_parameters_meanwhile(kind):
    layer, x = make(kind)
    expected, over, broken = layer(x).detach(), threading.Event(), []

    def serve():
        try:
            with torch.no_grad():
                while not over.is_set():
                    torch.testing.assert_close(layer(x), expected)
        except Exception as error:
            broken.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    parameters = list(layer.parameters())
    threads = [threading.Thread(target=serve) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            layer.train()
            layer._kept = None
            layer.eval()
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert broken == []
    assert all(p is q for p, q in zip(layer.parameters(), parameters, strict=True))


def curvature(layer, x):
    """Return values, a direction, the loss as a function of values, and the true Hv."""
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(p.detach().clone() for p in layer.parameters())
    direction = tuple(torch.randn_like(v) for v in values)

    def loss(*values):
        y = func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return y.square().sum().sin()

    def slope(s):
        moved = [(v + s * d).requires_grad_() for v, d in zip(values, direction, strict=True)]
        return torch.autograd.grad(loss(*moved), moved)

    truth = [(a - b) / 2e-6 for a, b in zip(slope(1e-6), slope(-1e-6), strict=True)]
    return values, direction, loss, truth


def product(gradients, direction):
    return sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))


@pytest.mark.parametrize("kind", EXPLICIT)
def test_second_derivatives_in_the_parameters(kind):
    layer, x = make(kind)
    values, direction, loss, truth = curvature(layer, x)
    parameters = list(layer.parameters())
    every = tuple(range(len(values)))

    def by_graph(f):
        gradients = torch.autograd.grad(f(), parameters, create_graph=True)
        return torch.autograd.grad(product(gradients, direction), parameters)

    found = {
        "hvp": torch.autograd.functional.hvp(loss, values, direction)[1],
        "graph": by_graph(lambda: layer(x).square().sum().sin()),
        "checkpoint": by_graph(
            lambda: checkpoint(layer, x, use_reentrant=False).square().sum().sin()
        ),
        "reverse over reverse": func.vjp(func.grad(loss, argnums=every), *values)[1](direction),
        "forward over reverse": func.jvp(func.grad(loss, argnums=every), values, direction)[1],
    }
    size = sum(t.square().sum() for t in truth).sqrt()
    for how, hv in found.items():
        gap = sum((a - b).square().sum() for a, b in zip(hv, truth, strict=True)).sqrt()
        assert float(gap / size) < 1e-5, how


def test_third_derivatives_and_accumulated_ones():
    layer, x = make("SLL squared")
    parameters = list(layer.parameters())

    def gradient(order):
        value = layer(x).square().sum().sin()
        for _ in range(order):
            gradients = torch.autograd.grad(value, parameters, create_graph=True)
            value = sum(g.square().sum() for g in gradients)
        return torch.autograd.grad(value, parameters)

    exact = gradient(2)
    direction = [torch.randn_like(p) for p in parameters]

    def value(s):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(s * d)
        gradients = gradient(1)
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(s * d)
        return sum(g.square().sum() for g in gradients)

    slope = float(value(1e-6) - value(-1e-6)) / 2e-6
    assert float(product(exact, direction)) == pytest.approx(slope, rel=1e-4)
    for _ in range(2):  # into .grad, twice, and the graph of what is kept survives
        layer(x).square().sum().sin().backward()
        gradients = torch.autograd.grad(layer(x).sum(), parameters, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
    assert all(bool(p.grad.isfinite().all()) for p in parameters)


def test_second_derivatives_of_a_classifier():
    config = FeedforwardClassifierConfig(
        shape=(1, 8, 8), classes=3, mean=(0.3,), std=(0.4,), channels=(4,), depths=(1,),
        dense_depth=1, dense_hidden=8, conv_hidden=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, x = config.build().double(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    values, direction, loss, truth = curvature(model, x)
    _, hv = torch.autograd.functional.hvp(loss, values, direction)
    gap = sum((a - b).square().sum() for a, b in zip(hv, truth, strict=True)).sqrt()
    assert float(gap / sum(t.square().sum() for t in truth).sqrt()) < 1e-5


@pytest.mark.parametrize("kind", LAYERS)
def test_transforms_give_the_values_of_the_loop_and_leave_nothing(kind):
    layer, x = make(kind)

    def one(x):
        return layer(x[None])[0]

    near = {"rtol": 1e-7, "atol": 1e-8}
    loop = torch.stack([torch.autograd.functional.jacobian(one, row) for row in x])
    torch.testing.assert_close(func.vmap(one)(x), layer(x), **near)
    with torch.no_grad():
        torch.testing.assert_close(func.vmap(one)(x), layer(x), **near)
    torch.testing.assert_close(func.vmap(func.jacrev(one))(x), loop, **near)
    torch.testing.assert_close(func.jacrev(one, chunk_size=1)(x[0]), loop[0], **near)
    vectorized = torch.autograd.functional.jacobian(one, x[0], vectorize=True)
    torch.testing.assert_close(vectorized, loop[0], **near)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(parameters, x):
        return func.functional_call(layer, parameters, (x[None],)).square().sum()

    per_sample = func.vmap(func.grad(loss), (None, 0))(parameters, x)
    total = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for found, expected in zip(per_sample.values(), total, strict=True):
        torch.testing.assert_close(found.sum(0), expected, rtol=1e-6, atol=1e-7)
    with torch.no_grad():  # nothing of a transform is left
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=1e-12, atol=1e-12)
    layer(x).sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_ensembles(kind):
    layer, x = make(kind)
    members = [layer, copy.deepcopy(layer)]
    with torch.no_grad():
        for p in members[1].parameters():
            p.mul_(0.8)
    parameters, buffers = func.stack_module_state(members)
    mapped = func.vmap(lambda p, b: func.functional_call(layer, (p, b), (x,)))(parameters, buffers)
    expected = torch.stack([member(x) for member in members])
    torch.testing.assert_close(mapped, expected, rtol=1e-7, atol=1e-8)
    found = torch.autograd.grad(mapped.square().sum(), list(parameters.values()))
    for i, member in enumerate(members):
        own = torch.autograd.grad(member(x).square().sum(), list(member.parameters()))
        for f, e in zip(found, own, strict=True):
            torch.testing.assert_close(f[i], e, rtol=1e-6, atol=1e-7)
