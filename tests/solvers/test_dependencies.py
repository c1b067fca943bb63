"""Whatever a cached value depends on may change in any way that PyTorch has: it is seen."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from solvers import (
    DenseOperator,
    Inclusion,
    LinearSlope,
    ReLU,
    Tanh,
    ZeroOperator,
    dependencies,
    equilibrium,
    solve,
)
from solvers.dependencies import Snapshot, are_identical, collect_dependencies, must_not_cache
from solvers.operators import memo
from tests.problems import (
    block_triangular_operator,
    convolution_operator,
    low_rank_operator,
    monotone_operator,
    updated_convolution_operator,
)

OPERATORS = {
    "dense": lambda: monotone_operator(6),
    "low rank": lambda: low_rank_operator(6, 2),
    "convolution": lambda: convolution_operator(2, 3, (3, 4)),
    "convolution plus low rank": updated_convolution_operator,
    "block triangular": lambda: block_triangular_operator(monotone=True),
    "zero": lambda: ZeroOperator(torch.linspace(0.5, 2, 5, dtype=torch.float64)),
}


def same(a, b):
    return are_identical((a,), (b,))


def fused_step(t):
    p = nn.Parameter(t)
    p.grad = 0.1 * t
    torch.optim.SGD([p], lr=1.0, fused=True).step()


def assign(t):
    t.data = 0.9 * t


WAYS = {
    "in place": lambda t: t.mul_(0.9),
    "an entry": lambda t: t.view(-1)[-1:].add_(0.01),
    ".data": lambda t: t.data.mul_(0.9),
    "numpy": lambda t: np.multiply(t.numpy(), 0.9, out=t.numpy()),
    "foreach": lambda t: torch._foreach_mul_([t], 0.9),
    "fused optimizer": fused_step,
    "data of another": assign,
    "copy_": lambda t: t.copy_(0.9 * t),
}


def observed(W):
    """Return what a memo keeps, in numbers."""
    z = torch.linspace(-1, 1, W.n, dtype=W.dtype)
    step = torch.full((W.n,), 0.7, dtype=W.dtype)
    numbers = [torch.tensor([W.constants().m, W.constants().L, W.log_determinant()]).double()]
    numbers += [torch.tensor([float(W.is_monotone()), W.mean_log_eigenvalue()])]
    numbers += [W.resolvent(0.5).solve(z), W.resolvent(0.5).T.solve(z), W.resolvent(step).solve(z)]
    numbers += [W.norm(z).reshape(1), W.T.norm(z).reshape(1), W.T.resolvent(0.5).solve(z)]
    numbers += [W.to(torch.float32).mv(z.float()), W.rounding(z).reshape(1), W.metric, W.T.T.metric]
    return torch.cat([n.double() for n in numbers])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_see_every_change(kind, way):
    W = OPERATORS[kind]()
    metrics = [W.channel_metric] if hasattr(W, "channel_metric") else []
    metrics += [W.base.channel_metric] if hasattr(W, "base") else []
    metrics += [] if metrics else [W.metric]
    for tensor in (*W.tensors, *metrics):
        before = observed(W)
        assert torch.equal(observed(W), before)
        WAYS[way](tensor)
        after = observed(W)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, observed(copy.deepcopy(W)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in OPERATORS if kind != "zero"])
def test_operators_rebuilt_on_other_values_do_not_use_what_was_kept(kind):
    W = OPERATORS[kind]()
    observed(W)
    other = W.rebuild(tuple(0.9 * t for t in W.tensors))
    torch.testing.assert_close(observed(other), observed(copy.deepcopy(other)), rtol=0, atol=0)


def test_a_step_that_changes_in_place_is_another_step():
    W, step = monotone_operator(5), torch.full((5,), 0.5, dtype=torch.float64)
    first, z = W.resolvent(step), torch.ones(5, dtype=torch.float64)
    expected = first.T.solve(z)
    step.mul_(2)
    assert torch.equal(first.T.solve(z), expected)
    torch.testing.assert_close(W.resolvent(step).solve(z), W.resolvent(1.0).solve(z))


def test_a_solve_reports_the_residual_of_the_weights_as_they_are():
    rng = np.random.default_rng(0)
    A = 0.05 * rng.standard_normal((10, 10))
    W, v = torch.from_numpy(A), torch.from_numpy(rng.standard_normal((3, 10)))
    problem = Inclusion(DenseOperator(W), v, ReLU())
    earlier = solve(problem, tol=1e-10)
    A *= -3.0
    later = solve(problem, tol=1e-10)
    z = later.value
    moved = torch.relu(z @ W.T + v) - z
    assert float((moved.norm(dim=1) / z.norm(dim=1)).max()) <= 1e-10
    away = (earlier.value - z).norm(dim=1)
    assert bool((earlier.error_bound >= away * (1 - 1e-6)).all())  # for the weights at first use


def test_a_lookup_within_a_solve_compares_nothing(monkeypatch):
    looks = []
    monkeypatch.setattr(memo, "are_identical", lambda *_: looks.append(1) or True)
    W = monotone_operator(5)
    W.constants()
    looks.clear()
    with W.settled():
        count = len(looks)
        for _ in range(9):
            W.constants()
            W.T.norm(torch.ones(5, dtype=torch.float64))
        assert len(looks) == count
    W.constants()
    assert len(looks) > count


@pytest.mark.parametrize("mode", ["inference", "autocast", "grad"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_modes_do_not_reach_what_is_kept(kind, mode):
    W = OPERATORS[kind]()
    expected = observed(copy.deepcopy(W))
    manager = {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "grad": torch.enable_grad(),
    }[mode]
    with manager:
        observed(W)
    assert torch.equal(observed(W), expected)
    x = torch.ones(W.n, dtype=torch.float64, requires_grad=True)
    W.resolvent(0.5).solve(x).sum().backward()  # an inference tensor could not be saved
    assert x.grad is not None


def test_nothing_is_kept_in_a_transform():
    W, built = monotone_operator(4), []

    def look(x):
        W.memo("marker", lambda: built.append(1) or torch.ones(1))
        assert must_not_cache()
        return x * W.metric.sum()

    torch.func.grad(lambda x: look(x).sum())(torch.ones(2, dtype=torch.float64))
    torch.func.vmap(look)(torch.ones(2, dtype=torch.float64))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(2, dtype=torch.float64))
    assert len(built) == 3
    assert not must_not_cache()
    assert W.memo("marker", lambda: 7) == 7


def test_sameness_is_of_bits():
    x = torch.tensor([0.0, torch.nan, 1.0])
    assert same(x, x.clone())
    assert not same(x, torch.tensor([-0.0, torch.nan, 1.0]))
    assert not same(x, x.double())
    assert not same(x, x[:, None])
    square = torch.randn(5, 5)
    kernel = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for t in (square.T, square[::2, 1:], kernel, torch.fft.fft(square).T, square > 0):
        other, last = t.clone(), (-1,) * t.ndim
        assert same(t, other)
        other[last] = ~other[last] if t.dtype == torch.bool else 9
        assert not same(t, other)
    assert same(torch.ones(0), torch.ones(0))
    assert not same(x.to("meta"), x.to("meta"))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.plain = nn.Parameter(torch.ones(2)), torch.ones(2)
        self.register_buffer("buffer", torch.ones(2), persistent=False)
        self.options, self.array, self.inner = {"a": [1, 2]}, np.ones(2), nn.ReLU()


SETTINGS = {
    "plain tensor": lambda m: m.plain.data.add_(1),
    "buffer": lambda m: m.buffer.add_(1),
    "option in a list": lambda m: m.options["a"].append(3),
    "array": lambda m: m.array.__iadd__(1),
    "type of a child": lambda m: setattr(m, "inner", nn.Sigmoid()),
    "setting of a child": lambda m: setattr(m.inner, "inplace", True),
    "new setting": lambda m: setattr(m, "gamma", 0.5),
    "mode": lambda m: m.eval(),
    "hook": lambda m: m.register_forward_hook(lambda *_: None),
    "removed": lambda m: delattr(m, "plain"),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_every_setting_of_a_module_is_read(change):
    module = Scaled()
    snapshot = Snapshot.take(*collect_dependencies(module))
    assert snapshot.fits(*collect_dependencies(module))
    SETTINGS[change](module)
    assert not snapshot.fits(*collect_dependencies(module))


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize(
    "send",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)),
     lambda o: pickle.loads(bytes(ForkingPickler.dumps(o)))],
    ids=["deepcopy", "pickle", "to a process"],
)  # fmt: skip
def test_problems_and_solutions_can_be_sent_with_a_graph(kind, send):
    W = OPERATORS[kind]()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    W = W.rebuild(tuple(scale * t for t in W.tensors))
    problem = Inclusion(W, scale * torch.ones(2, W.n, dtype=torch.float64), Tanh())
    solution = equilibrium(problem, tol=1e-10)
    received = send(solution)
    assert torch.equal(received.value, solution.value)
    assert torch.equal(received.error_bound, solution.error_bound)
    assert received.message() == solution.message()
    assert received.likely_causes() == solution.likely_causes()
    again = solve(send(problem), tol=1e-10)
    torch.testing.assert_close(again.value, solution.value.detach())
    send(LinearSlope(0.5 * problem.bias))


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Where values are compared: in the host's memory, or as on a device, whose memory it hides."""
    if request.param == "device":
        monkeypatch.setattr(dependencies, "_is_on_host", lambda t: False)


class Looks(TorchDispatchMode):
    """Counts how often the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "equal", "nonzero", "_to_copy")
        return operation(*args, **kwargs or {})


KINDS = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.int8, torch.int64, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", KINDS)
def test_every_bit_counts(place, dtype):
    a = torch.tensor([0, 1, 1, 0, 1, 1]).reshape(2, 3).to(dtype)
    for t in (a, a.T, a[:, ::2], a[:0], a[0, 0], a[:, None]):
        assert same(t, t.clone())
        if t.numel():
            other = t.clone()
            last = (-1,) * t.ndim
            other[last] = 1 - int(t[last].real)
            assert not same(t, other)
    assert not same(a, a.reshape(3, 2))
    assert not same(a, torch.zeros(2, 3, dtype=torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_decide_and_not_numbers(place, dtype):
    zero, nan = torch.zeros(3, dtype=dtype), torch.full((3,), torch.nan, dtype=dtype)
    assert not same(zero, -zero)
    assert same(nan, nan.clone())
    other = nan.clone()
    other.view(torch.uint8)[0] ^= 1  # a NaN of another payload
    assert other.isnan().all()
    assert not same(nan, other)


@pytest.mark.parametrize("kind", OPERATORS)
def test_an_operator_on_a_device_is_waited_for_once_a_solve(monkeypatch, kind):
    """Weights, metric and those of its parts together; and once more where something changed."""
    W = OPERATORS[kind]()
    with W.settled():
        pass
    monkeypatch.setattr(dependencies, "_is_on_host", lambda t: False)
    with Looks() as looks, W.settled():
        pass
    assert looks.count == 1
    memo = W._memo
    W.metric.mul_(2) if kind in ("dense", "zero") else W.tensors[0].mul_(2)
    with W.settled():
        assert W._memo is not memo or any(p._memo for p in W._parts())


def test_pending_negations_and_conjugates_are_done(place):
    z = torch.randn(4, dtype=torch.complex128)
    for t in (z.conj(), z.conj().imag, z.real):
        stored = t.clone()
        assert same(t, stored)
        z.mul_(-1)
        assert not same(t, stored)
        z.mul_(-1)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_snapshot_on_a_device_is_waited_for_once(monkeypatch, count):
    monkeypatch.setattr(dependencies, "_is_on_host", lambda t: False)
    tensors = tuple(torch.randn(3, i + 1) for i in range(count))
    snapshot = Snapshot.take(tensors)
    with Looks() as looks:
        assert snapshot.fits(tensors)
    assert looks.count == 1
    for t in tensors:
        t[0, 0] += 1
        with Looks() as looks:
            assert not snapshot.fits(tensors)
        assert looks.count == 1
        t[0, 0] -= 1
        t.copy_(snapshot.copies[[id(s) for s in tensors].index(id(t))])
    with Looks() as looks:
        assert not snapshot.fits((*tensors[1:], torch.zeros(9)))  # shapes are the host's to tell
    assert looks.count == 0
    assert are_identical((), ())
