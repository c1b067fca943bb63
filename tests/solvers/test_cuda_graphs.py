from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solvers import (
    DenseOperator,
    GraphedCallable,
    Inclusion,
    ReLU,
    Softplus,
    Tanh,
    fixed_step_equilibrium,
    refine_inverse,
    resolvent_inverse,
    solve,
)
from solvers import cuda_graphs as graphs
from tests.problems import random_inclusion


def budgeted(activation=None, step_size=1.0, steps=60):
    activation = activation or Tanh()
    return lambda W, v: fixed_step_equilibrium(W, v, activation, step_size=step_size, steps=steps)


def arguments(batch=(7,), seed=0, device="cpu", grad=True):
    problem = random_inclusion(6, batch, seed=seed)
    pieces = problem.operator.W, problem.bias
    return tuple(t.to(device).requires_grad_(grad) for t in pieces)


# Note [A machine that records]
# What a capture does is done here on the CPU: every operation is recorded with the memory that it
# read and wrote, a look at a number is refused, a replay runs the operations again from and to the
# same memory, and a backward graph leaves rubbish in the memory of the forward graph's results,
# whose pool it shares. Libraries have a handle per stream: an inverse on a stream that is captured
# is refused unless there was one on this stream before, and where the machine says so always. After
# a capture that failed others fail until the device has come to rest.
class FakeGraph:
    def __init__(self):
        self.operations, self.pooled, self.replays = [], None, 0

    def pool(self):
        return self

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for operation, args, kwargs, results in self.operations:
            again = tree_leaves(operation(*args, **kwargs))
            for old, new in zip(results, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        if self.pooled is not None:
            self.pooled.spoil()

    def spoil(self):
        """Overwrite all memory that the recording itself allocated."""
        outside, made = set(), {}
        for _, args, kwargs, results in self.operations:
            read = (t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            outside |= {storage(t) for t in read} - made.keys()
            made |= {storage(t): t for t in results if storage(t) not in outside}
        for t in made.values():
            if t.is_floating_point():
                t.fill_(torch.nan)


def storage(t):
    return t.untyped_storage().data_ptr()


INVERSES = (torch.ops.aten.linalg_inv_ex, torch.ops.aten.linalg_lu_factor_ex)


class Machine(list):
    """The captures in their order.

    Attributes:
        streams: the current one last.
        handles: streams on which there was a factorization.
        invalid: whether a capture failed and the device has not come to rest since.
        factors: whether factorizations may be captured at all.
    """

    def __init__(self):
        super().__init__()
        self.streams, self.handles, self.invalid, self.factors = [object()], set(), False, True

    def capture_inverse(self):
        if not self.factors or self.streams[-1] not in self.handles:
            raise RuntimeError("operation failed due to a previous error during capture")


class Handles(TorchDispatchMode):
    """Notes on which streams there was a factorization."""

    def __init__(self, machine):
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in INVERSES:
            self.machine.handles.add(self.machine.streams[-1])
        return operation(*args, **kwargs or {})


class Recorder(TorchDispatchMode):
    def __init__(self, graph, machine):
        super().__init__()
        self.graph, self.machine = graph, machine

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        if operation.overloadpacket in INVERSES:
            self.machine.capture_inverse()
        results = operation(*args, **kwargs)
        self.graph.operations.append((operation, args, kwargs, tree_leaves(results)))
        return results


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def machine(monkeypatch):
    """A CPU on which functions can be captured; holds the captures in their order."""
    captured = Machine()

    @contextmanager
    def on(stream):
        captured.streams.append(stream)
        with nullcontext() if stream is captured.streams[0] else Handles(captured):
            yield
        captured.streams.pop()

    @contextmanager
    def capture(graph, pool=None, stream=None):
        if captured.invalid:
            raise RuntimeError("the device has not come to rest since a capture failed")
        captured.append(graph)
        graph.pooled = pool
        captured.streams.append(stream)
        try:
            with Recorder(graph, captured):
                yield
        except RuntimeError:
            captured.invalid = True
            raise
        finally:
            captured.streams.pop()

    def synchronize(device=None):
        captured.invalid = False

    current = captured.streams[0] = Stream()
    fakes = {
        "device": lambda device: nullcontext(),
        "stream": on,
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: current,
        "synchronize": synchronize,
        "get_rng_state": lambda device: torch.get_rng_state(),
        "set_rng_state": lambda state, device: torch.set_rng_state(state),
        "is_current_stream_capturing": lambda: False,
        "CUDAGraph": FakeGraph,
        "graph": capture,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    return captured


def check_equal(graphed, function, inputs):
    g = torch.randn_like(inputs[1])
    (z, residual), (expected, own) = graphed(*inputs), function(*inputs)
    torch.testing.assert_close((z, residual), (expected, own), rtol=1e-12, atol=1e-14)
    assert not residual.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(z, inputs, g), torch.autograd.grad(expected, inputs, g)
    )


@pytest.mark.parametrize(("activation", "step_size"), [(ReLU(), 0.5), (Softplus(), 0.5)], ids=repr)
def test_replays_are_calls(machine, activation, step_size):
    function = budgeted(activation, step_size, steps=10)
    graphed = GraphedCallable(function)
    for seed in range(3):  # new weights and new inputs every time
        check_equal(graphed, function, arguments(seed=seed))
        assert graphed.status == "replayed"
    assert graphed.replays == 3
    assert [graph.replays for graph in machine] == [3, 3]  # one forward, one backward


def test_weights_changed_in_place_are_noticed(machine):
    function, (W, v) = budgeted(), arguments(grad=False)
    graphed = GraphedCallable(function)
    before = graphed(W, v)[0]
    W.mul_(0.5)
    after = graphed(W, v)[0]
    expected = solve(Inclusion(DenseOperator(W), v, Tanh()), tol=1e-12).value
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)
    assert (before - after).abs().max() > 1e-2
    assert len(machine) == 1  # nothing needs a backward graph


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_backward_passes_may_come_in_any_order(machine, order):
    check_orders(budgeted(), order, "cpu")
    assert machine[0].replays > 3  # some were computed forward again


def check_orders(function, order, device):
    graphed = GraphedCallable(function)
    calls = [arguments(seed=seed, device=device) for seed in range(3)]
    results = [graphed(*inputs)[0] for inputs in calls]
    expected = [function(*inputs)[0] for inputs in calls]
    for i in order:
        torch.testing.assert_close(results[i], expected[i])
        for _ in range(2):
            actual = torch.autograd.grad(results[i].sin().sum(), calls[i], retain_graph=True)
            wanted = torch.autograd.grad(expected[i].sin().sum(), calls[i], retain_graph=True)
            torch.testing.assert_close(actual, wanted)


def test_results_and_gradients_stay_what_they_are(machine):
    graphed, (W, v) = GraphedCallable(budgeted()), arguments()
    z, _ = graphed(W, v)
    z.sum().backward()
    stored = z.detach().clone(), W.grad.clone()
    graphed(*arguments(seed=1))[0].sum().backward()
    torch.testing.assert_close((z.detach(), W.grad), stored, rtol=0, atol=0)


def test_each_kind_of_call_has_its_graph_and_the_one_unused_for_longest_goes(machine):
    graphed = GraphedCallable(budgeted(), limit=2)

    def captures(*inputs):
        before = len(machine)
        graphed(*inputs)
        return len(machine) - before

    seven, five = arguments(), arguments((5,))
    assert captures(*seven) == 2  # forward and backward
    assert captures(*five) == 2
    assert captures(*seven) == captures(*five) == captures(*seven) == 0
    with torch.no_grad():
        assert captures(*seven) == 1  # drops five
    assert captures(*seven) == 0
    assert captures(*five) == 2
    half = tuple(t.detach().float().requires_grad_() for t in seven)
    assert captures(*half) == 2
    assert captures(half[0].detach(), half[1]) == 2
    torch.set_autocast_enabled("cuda", True)
    try:
        assert captures(half[0].detach(), half[1]) == 2
    finally:
        torch.set_autocast_enabled("cuda", False)
    with torch.inference_mode():
        assert captures(*half) == 1
    assert captures(*half) == 2
    assert len(graphed._recordings) == 2


def test_a_graph_that_was_dropped_still_serves_its_backward_pass(machine):
    graphed, (W, v) = GraphedCallable(budgeted(), limit=1), arguments()
    z, _ = graphed(W, v)
    graphed(*arguments((5,)))
    actual = torch.autograd.grad(z.sum(), (W, v))
    expected = torch.autograd.grad(budgeted()(W, v)[0].sum(), (W, v))
    torch.testing.assert_close(actual, expected)


def test_arguments_without_influence_and_results_without_gradient(machine):
    graphed = GraphedCallable(lambda x, y, k: (x.square(), k * 2, x))
    x, y = torch.randn(2, 3).requires_grad_(), torch.randn(3).requires_grad_()
    square, twice, same = graphed(x, y, torch.arange(3))
    assert twice.tolist() == [0, 2, 4]
    x_grad, y_grad = torch.autograd.grad((square + same).sum(), (x, y), allow_unused=True)
    torch.testing.assert_close(x_grad, 2 * x.detach() + 1)
    assert y_grad is None


def test_an_argument_changed_before_the_backward_pass_is_noticed(machine):
    (W, v), graphed = arguments(), GraphedCallable(budgeted())
    z, _ = graphed(W, v)
    with torch.no_grad():
        W.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_there_is_no_second_derivative(machine):
    W, v = arguments()
    (first,) = torch.autograd.grad(GraphedCallable(budgeted())(W, v)[0].sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def check_not_captured(function, inputs, reason):
    graphed = GraphedCallable(function)
    results = graphed(*inputs)
    assert graphed.status == f"not captured: {reason}"
    assert graphed.replays == 0
    torch.testing.assert_close(results, function(*inputs))
    return graphed


def test_a_look_at_a_number_prevents_a_graph_and_is_tried_once(machine):
    calls = []

    def function(x):
        calls.append(1)
        return (x * float(x.sum()),)

    reason = (
        "the capture failed with RuntimeError: operation not permitted when stream is capturing"
    )
    graphed = check_not_captured(function, (torch.ones(3),), reason)
    before = len(calls)
    torch.testing.assert_close(graphed(torch.ones(3))[0], 3 * torch.ones(3))
    assert len(calls) == before + 1
    assert len(machine) == 1


def test_a_device_comes_to_rest_after_a_capture_that_failed(machine):
    function = budgeted()
    refused = GraphedCallable(lambda W, v: (v * float(v.sum()),))
    refused(*arguments(grad=False))
    assert "the capture failed" in refused.status
    graphed = GraphedCallable(function)
    check_equal(graphed, function, arguments())
    assert graphed.status == "replayed"


def test_a_device_at_rest_tells_its_error_no_second_time(machine, monkeypatch):
    def synchronize(device=None):
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    graphed = GraphedCallable(lambda x: (x * float(x.sum()),))
    torch.testing.assert_close(graphed(torch.ones(3))[0], 3 * torch.ones(3))
    assert "not permitted when stream is capturing" in graphed.status


def test_the_inverse_may_be_an_argument_where_it_cannot_be_captured(machine):
    machine.factors = False
    inside = GraphedCallable(budgeted(ReLU(), 0.5))
    inside(*arguments())
    assert "previous error during capture" in inside.status

    def given(W, v, inverse):
        return fixed_step_equilibrium(W, v, ReLU(), step_size=0.5, steps=60, inverse=inverse)

    graphed, function = GraphedCallable(given), budgeted(ReLU(), 0.5)
    for seed in range(3):
        W, v = arguments(seed=seed)
        inverse = resolvent_inverse(W, step_size=0.5)
        check_equal(lambda W, v, X=inverse: graphed(W, v, X), function, (W, v))
        assert graphed.status == "replayed"
    assert graphed.replays == 3


def test_the_inverse_may_follow_the_weights_within_the_graph(machine):
    machine.factors = False

    def step(W, v, inverse):
        X, error = refine_inverse(W, inverse, step_size=0.5, steps=3)
        return *fixed_step_equilibrium(W, v, ReLU(), step_size=0.5, steps=90, inverse=X), X, error

    graphed, (W, v) = GraphedCallable(step), arguments()
    X = resolvent_inverse(W, step_size=0.5)
    for _ in range(4):
        with torch.no_grad():
            W -= 0.02 * torch.randn_like(W)
        z, residual, X, error = graphed(W, v, X)
        assert graphed.status == "replayed"
        assert float(error) < 1e-12 > float(residual.max())
        expected, _ = budgeted(ReLU(), 0.5, steps=90)(W, v)
        g = torch.randn_like(z)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(
            torch.autograd.grad(z, (W, v), g), torch.autograd.grad(expected, (W, v), g)
        )


def test_forgotten_gradients_prevent_a_graph(machine):
    reason = "a tensor that is no argument requires a gradient"
    inside = torch.ones(3, requires_grad=True)
    check_not_captured(lambda x: (x * inside.exp(),), (torch.ones(3),), reason)
    check_not_captured(lambda x: (x, inside), (torch.ones(3, requires_grad=True),), reason)
    (y,) = GraphedCallable(lambda x: (x * inside.exp(),))(torch.ones(3))
    y.sum().backward()
    torch.testing.assert_close(inside.grad, inside.detach().exp())


def test_random_numbers_prevent_a_graph_and_are_not_used_up(machine):
    graphed = GraphedCallable(lambda x: (x * torch.rand(3),))
    torch.manual_seed(0)
    (drawn,) = graphed(torch.ones(3))
    assert graphed.status == "not captured: the function draws random numbers"
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, torch.rand(3))


def test_other_obstacles_are_named(machine, monkeypatch):
    def double(x):
        return (2 * x,)

    x = torch.ones(3)
    with torch.autograd.set_detect_anomaly(True):
        check_not_captured(double, (x,), "anomaly detection is on")
    with torch.autograd.forward_ad.dual_level():
        check_not_captured(double, (x,), "forward-mode derivatives are active")
    check_not_captured(lambda: (), (), "there are no arguments")
    check_not_captured(lambda x, a: (a * x,), (x, 2.0), "argument 1 is no plain tensor (float)")
    meta = torch.ones(3, device="meta")
    check_not_captured(lambda x, y: (x,), (x, meta), "tensors are on cpu and meta")
    graphed = GraphedCallable(double)
    torch.testing.assert_close(torch.func.vmap(graphed)(x)[0], 2 * x)
    assert graphed.status == "not captured: a function transform is active"
    torch.testing.assert_close(torch.compile(graphed, backend="eager")(x)[0], 2 * x)
    assert graphed.status == "not captured: torch.compile is tracing"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_not_captured(double, (x,), "the stream is being captured already")


def test_a_cpu_is_no_place_for_a_graph():
    function = budgeted()
    graphed = check_not_captured(function, arguments(), "tensors are on cpu")
    check_equal(graphed, function, arguments())
    check_orders(function, (0, 1), "cpu")


def test_errors_of_the_function_are_raised_as_they_are(machine):
    W, v = arguments()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        GraphedCallable(budgeted(steps=0))(W, v)
    for device in ("cpu", "cuda"):
        graphs._DEVICE = device
        with pytest.raises(TypeError, match="returns a tuple of tensors, got Tensor"):
            GraphedCallable(lambda x: x)(v)
        with pytest.raises(TypeError, match="got tuple of Tensor, int"):
            GraphedCallable(lambda x: (x, 1))(v)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        GraphedCallable(budgeted(), limit=0)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_cuda_replays_are_calls(activation):
    function = budgeted(activation, step_size=0.5)
    graphed = GraphedCallable(function)
    for seed in range(3):
        check_equal(graphed, function, arguments(seed=seed, device="cuda"))
        assert graphed.status == "replayed"
    assert graphed.replays == 3


@pytest.mark.gpu
def test_cuda_backward_passes_may_come_in_any_order():
    check_orders(budgeted(), (1, 2, 0), "cuda")


@pytest.mark.gpu
def test_cuda_changed_weights_are_noticed():
    function, (W, v) = budgeted(), arguments(device="cuda", grad=False)
    graphed = GraphedCallable(function)
    graphed(W, v)
    W.mul_(0.5)
    torch.testing.assert_close(graphed(W, v), function(W, v))
    assert (graphed.status, graphed.replays) == ("replayed", 2)


@pytest.mark.gpu
def test_cuda_inverses_may_be_arguments():
    def step(W, v, inverse):
        X, error = refine_inverse(W, inverse, step_size=0.5, steps=3)
        return *fixed_step_equilibrium(W, v, ReLU(), step_size=0.5, steps=60, inverse=X), error

    graphed, (W, v) = GraphedCallable(step), arguments(device="cuda")
    z, residual, error = graphed(W, v, 0.999 * resolvent_inverse(W, step_size=0.5))
    assert graphed.status == "replayed"
    assert float(error) < 1e-12 > float(residual.max())
    torch.testing.assert_close(z, budgeted(ReLU(), 0.5)(W, v)[0])


@pytest.mark.gpu
def test_cuda_captures_that_fail_are_survived():
    x = torch.ones(3, device="cuda")
    graphed = GraphedCallable(lambda x: (x * float(x.sum()),))
    stream = torch.cuda.current_stream()
    for _ in range(2):
        torch.testing.assert_close(graphed(x)[0], 3 * x)
        assert "the capture failed" in graphed.status
    assert torch.cuda.current_stream() == stream
    function = budgeted()
    check_equal(GraphedCallable(function), function, arguments(device="cuda"))
