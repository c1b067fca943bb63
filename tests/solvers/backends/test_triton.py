"""The loop for CUDA devices: in Triton's interpreter where there is none, with small tiles."""

import dataclasses
import math

import pytest
import torch

from solvers import (
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    PeacemanRachford,
    ReLU,
    Tanh,
    dependencies,
    equilibrium,
    fixed_step_equilibrium,
    solve,
)
from solvers import backends as fused
from solvers.backends import triton as device
from solvers.backends import triton_tiles as tiles
from solvers.backends.step import Request
from solvers.backends.triton_steps import Steps
from solvers.backends.triton_tiles import Loop
from solvers.operators import memo
from tests.problems import monotone_operator, random_inclusion
from tests.solvers.test_fixed_steps import NoLook

pytest.importorskip("triton")
HERE = "cuda" if torch.cuda.is_available() else "cpu"
CUT = tiles.choose_cut
METHODS = [PeacemanRachford, DouglasRachford, ForwardBackward]
# Units: of a program that has all in its registers, of one that has tiles, of one launch a step.
SIZES = [(3, 5), (16, 18), (21, 17), (27, 18)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Odd sizes meet every boundary of a tile, and the interpreter stays quick."""
    monkeypatch.setattr(fused, "_backend", lambda problem: device)

    def cut(n, dtype, most):
        blocks = (16,) * -(-n // 16)
        held = {3: 0, 16: 1}.get(n, 2) if dtype == torch.float32 else 0
        return tiles.Cut(blocks, rows=16, depth=16, warps=4, resident=n <= 24, held=held)

    monkeypatch.setattr(tiles, "choose_cut", cut)


def on_device(problem):
    operator = problem.operator
    activation = problem.activation
    if isinstance(activation, LinearSlope):
        activation = LinearSlope(activation.d.to(HERE))
    W = DenseOperator(operator.W.to(HERE), operator.metric.to(HERE), operator.transposed)
    return Inclusion(W, problem.bias.to(HERE), activation)


def activation(kind, problem):
    if kind == "linear":
        return LinearSlope(torch.rand_like(problem.bias).round(decimals=1))
    return {"relu": ReLU(), "leaky": LeakyReLU(0.2)}[kind]


@pytest.mark.parametrize(
    ("method", "kind", "dtype"),
    [
        (PeacemanRachford, "relu", torch.float32), (PeacemanRachford, "leaky", torch.float64),
        (PeacemanRachford, "linear", torch.float64), (DouglasRachford, "linear", torch.float64),
        (ForwardBackward, "leaky", torch.float64),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("n", "samples"), SIZES)
def test_the_loop_of_the_device_agrees_with_the_plain_one(method, kind, dtype, n, samples):
    problem = random_inclusion(n, (samples,), dtype=dtype, m=1.0, skew=0.3, seed=n)
    problem = on_device(Inclusion(problem.operator, problem.bias, activation(kind, problem)))
    options = {"tol": 1e-2 if method is ForwardBackward else 1e-4, "on_failure": "raise"}
    z0 = None if n in (3, 21) else torch.randn_like(problem.bias)
    one = solve(problem, method(compiled=True), z0=z0, **options)
    other = solve(problem, method(compiled=False), z0=z0, **options)
    assert (one.stats.loop, other.stats.loop) == ("device", "torch")
    assert one.stats.max_steps <= 1.2 * other.stats.max_steps + 4
    assert (problem.relative_residual(one.value, problem.noise) <= 1.01 * one.tol).all()
    distance = problem.operator.norm(one.value - other.value)
    assert (distance <= one.error_bound + other.error_bound).all()


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-6])
@pytest.mark.parametrize(("n", "m"), [(7, 0.1), (80, 0.1), (80, 0.001), (150, 0.1)])
def test_increments_cost_no_steps_and_say_the_residual(monkeypatch, n, m, tol):
    """With the tiles of the device: 80 units are 64 and 16, 150 are padded to 256."""
    monkeypatch.setattr(tiles, "choose_cut", CUT)
    problem = on_device(random_inclusion(n, (19,), dtype=torch.float32, m=m, seed=n))
    one = solve(problem, PeacemanRachford(compiled=True), tol=tol, on_failure="raise")
    other = solve(problem, PeacemanRachford(compiled=False), tol=tol, on_failure="raise")
    assert one.stats.loop == "device"
    assert one.stats.max_steps <= other.stats.max_steps + 2
    assert one.stats.checks <= 3 < other.stats.checks + 1
    exact = problem.to(torch.float64).relative_residual(one.value.double())
    assert ((one.residual - exact).abs() <= 0.05 * tol + 2e-7).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [16, 21, 27])
def test_a_given_number_of_steps_gives_the_same_iterate(method, n):
    problem = on_device(random_inclusion(n, (19,), m=0.05, skew=3.0))
    z0 = torch.randn_like(problem.bias)
    for k in (2, 7):
        options = {"tol": 1e-14, "max_steps": k, "z0": z0}
        with pytest.warns(RuntimeWarning, match=f"stopped at its step limit after {k} steps"):
            one = solve(problem, method(compiled=True), **options)
        with pytest.warns(RuntimeWarning, match=f"stopped at its step limit after {k} steps"):
            other = solve(problem, method(compiled=False), **options)
        torch.testing.assert_close(one.value, other.value, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(one.residual, other.residual, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [16, 21])
def test_samples_leave_when_they_are_done(n):
    """A zero sample needs one step, hard ones many; tiles do not wait for each other."""
    problem = on_device(random_inclusion(n, (33,), m=1.0))
    bias = problem.bias.clone()
    bias[:16] = 0.0
    solution = solve(Inclusion(problem.operator, bias, ReLU()), tol=1e-6, on_failure="raise")
    steps = solution.stats.steps
    assert int(steps[:16].max()) < int(steps[16:].min())
    assert not bool(solution.value[:16].any())
    assert solution.stats.checks == 2


@pytest.mark.parametrize("n", [16, 21, 27])
def test_strides_adjoints_and_gradients(n):
    problem = on_device(random_inclusion(n, (18,)))
    strided = torch.stack([problem.bias, problem.bias], -1)[..., 0]
    tol = {"tol": 1e-6, "on_failure": "raise"}
    expected = solve(problem, **tol).value
    actual = solve(Inclusion(problem.operator, strided, problem.activation), **tol).value
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    adjoint = Inclusion(problem.operator.T, problem.bias, LinearSlope(torch.rand_like(strided)))
    one = solve(adjoint, PeacemanRachford(compiled=True), **tol).value
    other = solve(adjoint, PeacemanRachford(compiled=False), **tol).value
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    gradients = []
    for compiled in (True, False):
        W = problem.operator.W.clone().requires_grad_()
        live = Inclusion(DenseOperator(W, problem.operator.metric), problem.bias, ReLU())
        z = equilibrium(live, PeacemanRachford(compiled=compiled), tol=1e-6).value
        gradients.append(torch.autograd.grad(z.sin().sum(), W)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [16, 21, 27])
def test_what_is_not_finite_is_named(n):
    problem = on_device(random_inclusion(n, (20,)))
    bias = problem.bias.clone()
    bias[3, 2] = math.nan
    with pytest.raises(ValueError, match="bias contains NaN or Inf in 1 of 20"):
        solve(Inclusion(problem.operator, bias, ReLU()), PeacemanRachford(compiled=True))


@pytest.mark.parametrize("n", [16, 27])
def test_an_empty_batch_and_changed_weights(n):
    problem = on_device(random_inclusion(n, (9,)))
    empty = Inclusion(problem.operator, problem.bias[:0], ReLU())
    assert solve(empty, PeacemanRachford(compiled=True)).value.shape == (0, n)
    solve(problem, PeacemanRachford(compiled=True))
    with torch.no_grad():
        problem.operator.W.mul_(0.5)
    solution = solve(problem, PeacemanRachford(compiled=True), tol=1e-9, on_failure="raise")
    fresh = DenseOperator(problem.operator.W.clone(), problem.operator.metric)
    assert (Inclusion(fresh, problem.bias, ReLU()).relative_residual(solution.value) <= 1e-9).all()


def test_refusals_say_why(monkeypatch):
    problem = on_device(random_inclusion(5, (3,)))
    with pytest.raises(ValueError, match="is not piecewise linear"):
        solve(dataclasses.replace(problem, activation=Tanh()), PeacemanRachford(compiled=True))
    monkeypatch.setattr(device, "has_triton", lambda: False)
    assert device.find_obstacle(problem) == "Triton is not installed (pip install triton)"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if HERE == "cpu":
        assert device.find_obstacle(problem) == "the problem is on cpu, not on a CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [80, 300, 700])
def test_full_tiles_on_the_device(n, dtype, monkeypatch):
    monkeypatch.undo()
    problem = random_inclusion(n, (1000,), dtype=dtype, m=0.3)
    one = solve(on_device(problem), PeacemanRachford(compiled=True), tol=1e-5, on_failure="raise")
    other = solve(problem.to(torch.float64), tol=1e-10, on_failure="raise")
    distance = other.value.sub(one.value.double().cpu())
    assert (problem.to(torch.float64).operator.norm(distance) <= 1.01 * one.error_bound.cpu()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 16, 21, 27])
@pytest.mark.parametrize("activation", [ReLU(), LeakyReLU(0.2)], ids=repr)
def test_a_budget_is_one_launch_where_the_matrix_stays_on_the_chip(
    n, dtype, activation, monkeypatch
):
    operator = monotone_operator(n, m=0.5, dtype=dtype)
    metric, W = operator.metric.to(HERE), operator.W.to(HERE)
    v = torch.randn(7, n, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(HERE)
    found = {}
    launches = []
    own = device.run_fixed_steps

    def counted(*arguments):
        launches.append(own(*arguments))
        return launches[-1]

    for name in ("kernel", "plain"):
        monkeypatch.setattr(
            device, "run_fixed_steps", counted if name == "kernel" else lambda *a: None
        )
        leaves = W.clone().requires_grad_(), v.clone().requires_grad_()
        adjoint = v.new_empty(7)
        z, residual = fixed_step_equilibrium(
            *leaves, activation, step_size=0.7, steps=80, metric=metric, adjoint_residual=adjoint
        )
        z.square().sum().backward()
        found[name] = z, leaves[0].grad, leaves[1].grad, residual, adjoint
    assert [launch is not None for launch in launches] == [n <= 24] * 2
    tol = 1e-5 if dtype == torch.float32 else 1e-8
    for one, other in zip(found["kernel"][:3], found["plain"][:3], strict=True):
        torch.testing.assert_close(one, other, rtol=100 * tol, atol=100 * tol)
    for residual in found["kernel"][3:]:
        assert (residual < tol).all()


@pytest.mark.parametrize("n", [16, 21, 27])
@pytest.mark.parametrize("step_size", [0.5, torch.tensor(0.5), "per unit"], ids=str)
@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_a_budget_never_waits_for_the_device(n, step_size, activation, monkeypatch):
    step = torch.full((n,), 0.5) if step_size == "per unit" else step_size
    W, v = torch.zeros(n, n, requires_grad=True), torch.ones(3, n)
    r = torch.zeros(3)

    def run():
        z, _ = fixed_step_equilibrium(W, v, activation, step_size=step, steps=3, adjoint_residual=r)
        z.sum().backward()

    run()  # numbers that are kept come from the host once
    compared = []

    def counted(tensors, others):
        compared.extend(tensors)
        return True

    for module in (dependencies, memo):
        monkeypatch.setattr(module, "are_identical", counted)
    with NoLook():
        run()
    assert compared == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_budget_is_spent_where_the_state_is_slow(dtype):
    """Unit 0 has a rate near 1, which no displacement tells from rest, and the others none."""
    n, W = 16, torch.zeros(16, 16, dtype=dtype)
    W[0, 0] = 0.997
    v = torch.full((5, n), 0.7, dtype=dtype)
    v[:, 0] = 1e-3
    _, residual = fixed_step_equilibrium(W, v, ReLU(), step_size=0.7, steps=4000)
    assert (residual < 1e-6).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [3, 16, 21])
def test_a_bad_sample_of_a_budget_spoils_no_other(n, bad):
    operator = monotone_operator(n, m=0.5, dtype=torch.float32)
    v = torch.randn(7, n, generator=torch.Generator().manual_seed(0))
    arguments = {"activation": ReLU(), "step_size": 0.7, "steps": 80, "metric": operator.metric}
    whole, _ = fixed_step_equilibrium(operator.W, v, **arguments)
    v[3, n - 1] = bad
    spoilt, told = fixed_step_equilibrium(operator.W, v, **arguments)
    others = [0, 1, 2, 4, 5, 6]
    assert not told[3] < 1e-3
    assert (told[others] < 1e-4).all()
    torch.testing.assert_close(spoilt[others], whole[others], rtol=1e-4, atol=1e-4)


def test_few_steps_end_with_an_exact_one():
    W = 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4
    v = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    for steps in (1, 2, 4, 5):
        found = fixed_step_equilibrium(W, v, ReLU(), step_size=1.0, steps=steps)[1]
        exact = fixed_step_equilibrium(W.double(), v.double(), ReLU(), step_size=1.0, steps=steps)[
            1
        ]
        assert (found <= 1.1 * exact + 2e-6).all()


def test_the_numbers_of_a_captured_graph_stay_where_they_are(monkeypatch):
    handed = []
    own = tiles._permanent_numbers

    def watched(*key):
        handed.append(own(*key))
        return handed[-1]

    monkeypatch.setattr(tiles, "_permanent_numbers", watched)
    W, v = torch.zeros(16, 16), torch.ones(3, 16)
    fixed_step_equilibrium(W, v, ReLU(), step_size=0.5, steps=3)
    for tol in range(1, 300):
        own(0.0, 1.0, float(tol), torch.float32, torch.device(HERE))
    fixed_step_equilibrium(W, v, ReLU(), step_size=0.5, steps=3)
    first, second = handed
    assert first is second


@pytest.mark.parametrize("n", [16, 27])
def test_samples_of_every_size_are_solved(n):
    """No square overflows or vanishes, in one launch or in one a step."""
    operator = monotone_operator(n, m=0.5, dtype=torch.float32)
    v = torch.randn(6, n, generator=torch.Generator().manual_seed(0))
    v = v * torch.tensor([1e-28, 1e-22, 1.0, 1e12, 1e25, 1e30])[:, None]
    problem = on_device(Inclusion(operator, v, ReLU()))
    found = device.run(
        problem, PeacemanRachford().iteration(problem), Request(tol=1e-4, max_steps=200)
    )
    assert (found.residual <= 1e-4).all()
    true = Inclusion(operator.to(torch.float64), v.double(), ReLU())
    expected = true.relative_residual(found.value.double().cpu())
    torch.testing.assert_close(found.residual.double().cpu(), expected, rtol=0.01, atol=1e-6)


def test_what_rounding_of_v_makes_of_a_residual_is_that_of_the_units_that_are_not_zero():
    n, operator = 27, monotone_operator(27, m=0.5, dtype=torch.float32)
    problem = on_device(Inclusion(operator, torch.randn(5, n), ReLU()))
    z = torch.relu(torch.randn(5, n)).to(HERE)
    steps = Steps(Loop.prepare(problem, PeacemanRachford(step_size=1.0).iteration(problem)))
    for found, expected in zip(
        steps.residual(z, problem.bias), problem.residual_and_roundoff(z), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("n", [3, 16, 21, 27])
def test_exact_products_are_as_exact_as_float32(n):
    """One step and one residual: parts of bfloat16 that were left out would be 2⁻¹⁶ of them."""
    W = torch.randn(n, n, generator=torch.Generator().manual_seed(0)) / (4 * n**0.5)
    v = torch.randn(32, n, generator=torch.Generator().manual_seed(1))
    W, v = W.to(HERE), v.to(HERE)
    z, residual = fixed_step_equilibrium(W, v, LeakyReLU(0.5), step_size=1.0, steps=1)
    exact, same = fixed_step_equilibrium(
        W.double(), v.double(), LeakyReLU(0.5), step_size=1.0, steps=1
    )
    assert ((z - exact).norm(dim=1) <= 6e-7 * exact.norm(dim=1)).all()
    assert ((residual - same).abs() <= 6e-7).all()
