import os
import subprocess
import sys

import pytest
import torch
import torchdeq

from solvers import (
    DenseOperator,
    ForwardBackward,
    ForwardStep,
    Inclusion,
    JacobiDeterminant,
    LeakyReLU,
    LinearSlope,
    Method,
    PeacemanRachford,
    ReLU,
    Sigmoid,
    Softplus,
    SolveError,
    SolveWarning,
    Status,
    Tanh,
    equilibrium,
    solve,
)
from solvers.torchdeq import FixedPointMap, TorchDEQ, torchdeq_solver
from tests.problems import random_inclusion

ACTIVATIONS = [ReLU(), LeakyReLU(0.2), Tanh(), Sigmoid(), Softplus()]
METHODS = [
    TorchDEQ(solver="fixed_point_iter"),
    TorchDEQ(solver="fixed_point_iter", tau=0.7, step_size=JacobiDeterminant()),
    TorchDEQ(step_size=0.2),
    TorchDEQ(step_size=1.0, lam=1e-12),
    TorchDEQ(step_size=0.3, m=4, tau=0.8),
    TorchDEQ(solver="broyden"),
    TorchDEQ(solver="broyden", step_size=1.0),
    TorchDEQ(solver="broyden", step_size=0.5, ls=True, LBFGS_thres=100),
]


def easy(activation=None, dtype=torch.float64, n=8, batch=(5,)):
    return random_inclusion(n, batch, activation, m=1.0, skew=0.5, dtype=dtype)


# torchdeq's solvers behind our interface


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_torchdeq_reaches_our_tolerance(method, activation):
    problem = easy(activation)
    expected = solve(problem, tol=1e-12, on_failure="raise").value
    solution = solve(problem, method, tol=1e-8, on_failure="raise")
    torch.testing.assert_close(solution.value, expected, rtol=1e-6, atol=1e-7)
    assert (problem.relative_residual(solution.value) <= 1e-8).all()
    warm = solve(problem, method, tol=1e-7, z0=solution.value, on_failure="raise")
    assert warm.stats.max_steps == 0
    nearly = solve(problem, method, tol=1e-6, z0=solution.value + 1e-6, on_failure="raise")
    assert nearly.stats.max_steps < solution.stats.max_steps / 2


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_the_residual_of_the_map_bounds_ours_as_the_tolerance_supposes(activation, alpha):
    problem = random_inclusion(10, (200,), activation)
    z = torch.randn(200, 10, dtype=torch.float64) * 3
    ours, theirs = (problem.image(z) - z).abs(), (FixedPointMap(problem, alpha)(z) - z).abs()
    assert (ours <= theirs / min(1.0, alpha) + 1e-12).all()
    assert (theirs <= ours * max(1.0, alpha) + 1e-12).all()


def test_the_tolerance_is_predicted_so_that_one_run_is_enough():
    # One check is that of the start. Without the factor α a step of 0.02 would stop 50 times early.
    for method in (TorchDEQ(solver="fixed_point_iter", step_size=0.02), TorchDEQ(step_size=0.1)):
        assert solve(easy(), method, tol=1e-6, on_failure="raise").stats.checks == 2


def test_it_starts_again_where_torchdeq_stops_early():
    # torchdeq adds 1e-9 to the norm it divides by: a state of 1e-9 passes at half its residual.
    problem = easy()
    tiny = Inclusion(problem.operator, problem.bias * 1e-11, ReLU())
    solution = solve(tiny, TorchDEQ(solver="fixed_point_iter"), tol=1e-8, on_failure="raise")
    assert solution.stats.checks > 2
    assert (tiny.relative_residual(solution.value) <= 1e-8).all()


class Counting(torch.nn.Module):
    """Stands for torchdeq.solver.get_solver's answer, and counts what it evaluates."""

    def __init__(self, name):
        super().__init__()
        self.solver, self.count = torchdeq.solver.get_solver(name), 0

    def forward(self, func, x0, **options):
        def counted(x):
            self.count += 1
            return func(x)

        return self.solver(counted, x0, **options)


@pytest.mark.parametrize("limit", [1, 2, 3, 17])
@pytest.mark.parametrize(
    "method",
    [
        TorchDEQ(),
        TorchDEQ(solver="fixed_point_iter"),
        TorchDEQ(solver="broyden"),
        TorchDEQ(solver="broyden", ls=True),
    ],
    ids=repr,
)
def test_the_step_limit_holds_and_is_reported(monkeypatch, method, limit):
    counting = Counting(method.solver)
    torchdeq.solver.register_solver("counting", counting)
    monkeypatch.setattr(torchdeq.solver, "get_solver", lambda name: counting)
    problem = easy()
    with pytest.warns(SolveWarning, match=f"stopped at its step limit after {limit} steps"):
        solution = solve(problem, method, tol=1e-12, max_steps=limit)
    assert solution.status is Status.MAX_STEPS
    # An evaluation that is refused is asked for once more than it is made.
    assert limit <= counting.count <= limit + 1
    assert (solution.residual <= problem.relative_residual(0 * problem.bias)).all()
    torch.testing.assert_close(problem.relative_residual(solution.value), solution.residual)


def steps(method, tol=1e-8):
    return solve(easy(), method, tol=tol, max_steps=3000, on_failure="raise").stats.max_steps


def test_every_option_acts():
    assert steps(TorchDEQ(solver="fixed_point_iter", tau=0.5)) > 1.5 * steps(
        TorchDEQ(solver="fixed_point_iter")
    )
    assert steps(TorchDEQ(step_size=1.0, lam=1e-14)) < 0.5 * steps(TorchDEQ(step_size=1.0))
    assert steps(TorchDEQ(step_size=0.3, m=2)) != steps(TorchDEQ(step_size=0.3, m=8))
    assert steps(TorchDEQ(step_size=0.3, tau=0.5)) != steps(TorchDEQ(step_size=0.3))
    search = TorchDEQ(solver="broyden", step_size=1.0, ls=True)
    assert steps(search) != steps(TorchDEQ(solver="broyden", step_size=1.0))
    # A full memory overwrites what the rest was built on, see Note [Broyden's memory].
    with pytest.warns(SolveWarning, match=r"LBFGS_thres=2\) stopped at its step limit"):
        solve(easy(), TorchDEQ(solver="broyden", step_size=0.1, LBFGS_thres=2), max_steps=500)


@pytest.mark.parametrize("method", [TorchDEQ(step_size=0.3), TorchDEQ(solver="broyden")], ids=repr)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_gradients_with_torchdeq_forward_and_backward(method, activation):
    problem = easy(activation)
    W, v = problem.operator.W.requires_grad_(), problem.bias.requires_grad_()
    gradients = []
    for m in (method, None):
        z = equilibrium(problem, m, tol=1e-10, max_steps=9000, on_failure="raise").value
        gradients.append(torch.autograd.grad(z.square().sum(), (W, v)))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_shapes_and_float32(shape):
    problem = easy(dtype=torch.float32, batch=shape)
    solution = solve(problem, TorchDEQ(step_size=0.3), tol=1e-4, on_failure="raise")
    assert solution.value.shape == (*shape, 8)
    assert solution.value.dtype == torch.float32
    assert (problem.relative_residual(solution.value) <= 1e-4).all()


def test_what_torchdeq_makes_worse_is_not_taken():
    # z ↦ 1 − 3z triples the distance to 1/4 at every evaluation.
    W = -3 * torch.eye(4, dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), torch.ones(2, 4, dtype=torch.float64), LeakyReLU(1.0))
    z0 = torch.full((2, 4), 0.25 + 1e-3, dtype=torch.float64)
    method = TorchDEQ(solver="fixed_point_iter", step_size=1.0)
    with pytest.warns(SolveWarning):
        solution = solve(problem, method, z0=z0, max_steps=20)
    assert torch.equal(solution.value, z0)


def test_an_overflow_ends_as_an_outcome():
    W = -3 * torch.eye(4, dtype=torch.float64)
    problem = Inclusion(DenseOperator(W), torch.ones(2, 4, dtype=torch.float64), LeakyReLU(1.0))
    calls = []

    class Recording(TorchDEQ):
        def _run_solver(self, *arguments):
            calls.append(super()._run_solver(*arguments))
            return calls[-1]

    method = Recording(solver="fixed_point_iter", step_size=1.0)
    cause = r"step size 1 is above 2m/L² = 0\.5"
    with pytest.warns(SolveWarning, match=cause):
        solution = solve(problem, method, tol=1e-6, max_steps=2000)
    assert not torch.isfinite(calls[0][0]).all()
    assert torch.isfinite(solution.value).all()
    assert (solution.residual > 0.1).all()
    torch.testing.assert_close(problem.relative_residual(solution.value), solution.residual)


def test_a_singular_system_ends_as_an_outcome():
    # A sample that starts at its solution, all units dropped: its Gram matrix is zero.
    problem = easy()
    problem.bias[0] = -1.0
    with pytest.raises(torch.linalg.LinAlgError):
        torchdeq.solver.get_solver("anderson")(
            FixedPointMap(problem, 0.3), torch.zeros_like(problem.bias), lam=0.0
        )
    with pytest.warns(SolveWarning, match=r"lam=0\.0\) stalled above its tolerance after"):
        solution = solve(problem, TorchDEQ(step_size=0.3, lam=0.0), tol=1e-12)
    assert (solution.residual < 1).all()  # what it had evaluated before is kept
    torch.testing.assert_close(problem.relative_residual(solution.value), solution.residual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, "solver must be one of fixed_point_iter, anderson, broyden, got 'n"),
        ({"solver": "broyden", "tau": 0.5}, "broyden would ignore tau; it reads ls, LBFGS_thres"),
        ({"solver": "fixed_point_iter", "m": 3, "lam": 1.0}, "would ignore lam, m; it reads tau"),
        ({"m": 1}, "m is out of range, got 1"),
        ({"tau": 0.0}, "tau is out of range, got 0.0"),
        ({"lam": float("nan")}, "lam is out of range, got nan"),
        ({"solver": "broyden", "LBFGS_thres": 0}, "LBFGS_thres is out of range, got 0"),
        ({"step_size": 0.0}, "step_size must be positive and finite"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TorchDEQ(**options)


def test_repr_is_python():
    method = TorchDEQ(solver="broyden", step_size=0.3, ls=True)
    assert repr(method) == "TorchDEQ(solver='broyden', step_size=0.3, ls=True)"
    assert eval(repr(method)) == method
    assert isinstance(method, Method)


def test_torchdeq_is_imported_on_use_only():
    code = """
import sys, lben, solvers, solvers.torchdeq as interop
assert "torchdeq" not in sys.modules
sys.modules["torchdeq"] = None
from solvers import DenseOperator, Inclusion, ReLU, solve
import torch
problem = Inclusion(DenseOperator(torch.zeros(2, 2)), torch.ones(1, 2), ReLU())
try:
    solve(problem, interop.TorchDEQ())
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert "pip install torchdeq" in done.stdout, done.stderr
    code = "import sys, solvers; assert 'solvers.torchdeq' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0


# Ours behind torchdeq's classes


@pytest.fixture
def splitting():
    torchdeq.solver.register_solver("splitting", torchdeq_solver(PeacemanRachford()))
    return "splitting"


def deq(core="indexing", **options):
    defaults = {
        "f_solver": "splitting", "b_solver": "anderson", "f_tol": 1e-11, "b_tol": 1e-10,
        "f_max_iter": 400, "b_max_iter": 3000,
    }  # fmt: skip
    return torchdeq.get_deq(core=core, **{**defaults, **options})


def with_graph(activation, batch=(4,)):
    problem = easy(activation, n=6, batch=batch)
    problem.operator.W.requires_grad_()
    problem.bias.requires_grad_()
    return problem, (problem.operator.W, problem.bias)


@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize(
    "options",
    [
        {"ift": True},
        {"ift": True, "f_stop_mode": "rel", "b_stop_mode": "rel"},
        {"hook_ift": True},
        {"ift": True, "n_states": 2},
    ],
    ids=repr,
)
@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_torchdeq_classes_agree_with_equilibrium(splitting, core, options, activation):
    problem, leaves = with_graph(activation)
    z = equilibrium(problem, tol=1e-13, max_steps=5000, on_failure="raise").value
    expected = torch.autograd.grad(z.square().sum(), leaves)
    states, info = deq(core, **options)(
        FixedPointMap(problem, ForwardStep()), torch.zeros_like(problem.bias)
    )
    assert len(states) == options.get("n_states", 1)
    torch.testing.assert_close(states[-1], z, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(states[-1].square().sum(), leaves), expected, rtol=1e-6, atol=1e-7
    )
    stop = options.get("f_stop_mode", "abs")
    assert (info[f"{stop}_lowest"] <= 1e-11).all()
    assert info["nstep"].shape == (4,)
    assert info.keys() == torchdeq.solver.solver_stat_from_final_step(z, z).keys()


def test_the_plain_map_may_fail_in_torchdeqs_gradient_where_the_contracting_one_does_not(splitting):
    problem, leaves = with_graph(Tanh())
    norm = torch.linalg.matrix_norm(problem.operator.W, 2)
    assert norm > 1.5
    z = equilibrium(problem, tol=1e-12, max_steps=5000, on_failure="raise").value
    (expected,) = torch.autograd.grad(z.sum(), leaves[1:])
    errors = []
    for step_size in (1.0, ForwardStep()):
        model = deq(ift=True, b_solver="fixed_point_iter")
        (state,), _ = model(FixedPointMap(problem, step_size), torch.zeros_like(problem.bias))
        (g,) = torch.autograd.grad(state.sum(), leaves[1:])
        errors.append(float((g - expected).abs().max()))
    assert not errors[0] < 1e-2
    assert errors[1] < 1e-7


@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_the_one_step_gradient_is_that_of_one_application(splitting, core):
    problem, leaves = with_graph(Tanh())
    map_ = FixedPointMap(problem)
    (state,), _ = deq(core, grad=1)(map_, torch.zeros_like(problem.bias))
    z = solve(problem, tol=1e-12, on_failure="raise").value
    expected = torch.autograd.grad(map_(z).square().sum(), leaves)
    actual = torch.autograd.grad(state.square().sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("core", ["indexing", "sliced"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_evaluation_mode_and_shapes(splitting, core, batch):
    problem = easy(Tanh(), batch=batch)
    model = deq(core).eval()
    (z,), info = model(FixedPointMap(problem), torch.zeros_like(problem.bias))
    expected = solve(problem, tol=1e-12, on_failure="raise").value
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-10)
    assert info["nstep"].min() > 0


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_torchdeqs_own_tolerance_is_met(scale, stop_mode):
    problem = easy()
    problem = Inclusion(problem.operator, problem.bias * scale, ReLU())
    z0 = torch.zeros_like(problem.bias)
    solver = torchdeq_solver(PeacemanRachford(), on_failure="raise")
    _, _, loose = solver(FixedPointMap(problem), z0, 500, 1e-2, stop_mode)
    _, trajectory, tight = solver(FixedPointMap(problem), z0, 500, 1e-7, stop_mode, [3, 500])
    assert loose[f"{stop_mode}_lowest"].max() <= 1e-2
    assert tight[f"{stop_mode}_lowest"].max() <= 1e-7
    assert loose["nstep"].max() < tight["nstep"].max()
    assert len(trajectory) == 2


def test_the_iterations_of_all_runs_count():
    # func(x0) = 0 says nothing of the size of the solution, so the first tolerance is far too wide.
    problem = easy()
    x0 = torch.linalg.solve(problem.operator.W, (-1 - problem.bias).T).T.contiguous()
    map_ = FixedPointMap(problem)
    assert map_(x0).abs().max() == 0
    _, _, info = torchdeq_solver()(map_, x0, 500, 1e-9)
    assert info["abs_lowest"].max() <= 1e-9
    enough = int(info["nstep"].max())
    with pytest.warns(SolveWarning):
        _, _, info = torchdeq_solver()(map_, x0, enough - 6, 1e-9)
    assert info["nstep"].max() <= enough - 6


def test_a_missed_tolerance_is_told():
    problem, z0 = easy(), torch.zeros(5, 8, dtype=torch.float64)
    solver = torchdeq_solver(ForwardBackward())
    with pytest.warns(SolveWarning, match=r"forward solve for torchdeq by ForwardBackward\(\) sto"):
        solver(FixedPointMap(problem), z0, 5, 1e-6)
    message = r"torchdeq's tolerance 1.0e-30 \(stop_mode 'abs', largest .* although the forward"
    with pytest.raises(SolveError, match=message):
        torchdeq_solver(on_failure="raise")(FixedPointMap(problem), z0, 500, 1e-30)
    with pytest.warns(SolveWarning, match=message):
        torchdeq_solver()(FixedPointMap(problem), z0, 500, 1e-30)


def test_a_function_without_an_inclusion_is_refused(splitting):
    problem, leaves = with_graph(Tanh())
    z0 = torch.zeros_like(problem.bias)
    with pytest.raises(TypeError, match=r"func must be a FixedPointMap.*got function"):
        deq()(lambda z: problem.image(z), z0)
    with pytest.raises(TypeError, match="z_init a tensor, not a list; got MDEQWrapper"):
        deq()(FixedPointMap(problem), [z0])
    (state,), _ = deq(ift=True, b_solver="splitting")(FixedPointMap(problem), z0)
    with pytest.raises(TypeError, match="As b_solver take one of torchdeq's own"):
        torch.autograd.grad(state.sum(), leaves)
    with pytest.raises(ValueError, match='stop_mode must be "abs" or "rel", got \'max\''):
        torchdeq_solver()(FixedPointMap(problem), z0, stop_mode="max")
    with pytest.raises(TypeError, match="unexpected keyword argument 'm'"):
        deq()(FixedPointMap(problem), z0, solver_kwargs={"m": 3})


@pytest.mark.parametrize("step_size", [1.0, 0.3, 2.0, JacobiDeterminant()], ids=repr)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_the_map_is_differentiable_twice(activation, step_size):
    problem = easy(activation, n=3, batch=(2,))
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    v = problem.bias.requires_grad_()
    W = problem.operator.W.clone().requires_grad_()
    # A rule's α is a constant, so the weights may vary under a fixed one only.
    alpha = FixedPointMap(problem, step_size).alpha

    class Fixed(type(ForwardStep())):
        def __call__(self, operator):
            return alpha

    def f(z, W, v):
        operator = DenseOperator(W, problem.operator.metric)
        return FixedPointMap(Inclusion(operator, v, activation), Fixed())(z)

    assert torch.autograd.gradcheck(f, (z, W, v))
    assert torch.autograd.gradgradcheck(f, (z, W, v))


def test_the_map_of_an_adjoint_is_differentiable_in_its_slopes():
    problem = easy(n=3, batch=(2,))
    d = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, dtype=torch.float64)

    def f(d):
        return FixedPointMap(Inclusion(problem.operator, problem.bias, LinearSlope(d)), 0.3)(z)

    assert torch.autograd.gradcheck(f, (d,))


def test_a_bad_step_size_of_the_map_is_refused():
    with pytest.raises(ValueError, match="step_size must be positive and finite"):
        FixedPointMap(easy(), -1.0)
