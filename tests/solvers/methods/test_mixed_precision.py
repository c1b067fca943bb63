import copy
from dataclasses import dataclass

import pytest
import torch

from solvers import (
    Anderson,
    BlockSubstitution,
    DenseOperator,
    Inclusion,
    LeakyReLU,
    MixedPrecision,
    PeacemanRachford,
    ReLU,
    Request,
    Tanh,
    equilibrium,
    solve,
)
from solvers.methods.mixed_precision import use_tensor_cores
from solvers.operators.matrix import DenseMap
from tests.problems import block_triangular_operator, low_rank_operator, random_inclusion

PLAIN = PeacemanRachford(compiled=False)
LOW = [MixedPrecision(), MixedPrecision(inner=torch.float16)]
# n, m and skew; PyTorch's loop in float32 takes from 26 to 440 steps to 1e-6
PROBLEMS = [
    (50, 0.3, 1.0, ReLU()),
    (50, 0.3, 1.0, Tanh()),
    (200, 0.1, 5.0, ReLU()),
    (200, 0.01, 5.0, Tanh()),
    (400, 0.001, 10.0, ReLU()),
]


@dataclass(frozen=True, kw_only=True, repr=False)
class Uncorrected(MixedPrecision):
    """Never returns to full precision after the first step."""

    def step(self, problem, state):
        state = super().step(problem, state)
        state.left = 2
        return state


@pytest.fixture
def products(monkeypatch):
    """Counts the products with K in full precision."""
    count = [0]
    add = DenseMap.add

    def counted(self, *arguments):
        count[0] += 1
        return add(self, *arguments)

    monkeypatch.setattr(DenseMap, "add", counted)
    return count


@pytest.mark.parametrize(("n", "m", "skew", "activation"), PROBLEMS)
def test_float32_tolerances_are_reached_with_fewer_full_products(n, m, skew, activation, products):
    problem = random_inclusion(n, (8,), activation, dtype=torch.float32, m=m, skew=skew)
    for tol in (1e-5, 1e-6):
        products[0] = 0
        plain = solve(problem, PLAIN, tol=tol, on_failure="raise").stats.max_steps
        full = products[0]
        for method in LOW:
            products[0] = 0
            solution = solve(problem, method, tol=tol, on_failure="raise")
            assert (solution.residual <= tol).all()
            assert solution.stats.max_steps <= 1.3 * plain + 8
            assert products[0] <= full / 2


@pytest.mark.parametrize(("n", "m", "skew", "activation"), PROBLEMS)
def test_without_correction_low_precision_does_not_get_there(n, m, skew, activation):
    problem = random_inclusion(n, (8,), activation, dtype=torch.float32, m=m, skew=skew)
    request = Request(tol=1e-5, max_steps=400)
    with torch.no_grad():
        residual = Uncorrected().run(problem, request).residual
        assert residual.max() > 10 * request.tol
        assert MixedPrecision().run(problem, request).residual.max() <= request.tol


@pytest.mark.parametrize("method", LOW, ids=repr)
@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_float32_solution_is_within_its_proved_bound_of_the_float64_one(method, tol):
    problem = random_inclusion(100, (20,), dtype=torch.float32)
    exact = solve(problem.to(torch.float64), tol=1e-13, on_failure="raise").value
    solution = solve(problem, method, tol=tol, on_failure="raise")
    error = problem.to(torch.float64).operator.norm(solution.value.double() - exact)
    assert (error <= solution.error_bound).all()
    assert solution.error_bound.max() <= 100 * error.max()


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16, torch.float32])
def test_float64_is_served_to_its_last_digits(inner, products):
    problem = random_inclusion(100, (20,), m=0.05, skew=3.0)
    solution = solve(problem, MixedPrecision(inner=inner), tol=1e-13, on_failure="raise")
    assert products[0] < 0.2 * solution.stats.max_steps
    torch.testing.assert_close(
        solution.value, solve(problem, tol=1e-13).value, rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("m", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_blocks_end_where_their_errors_are_what_is_left(m, activation):
    problem = random_inclusion(50, (8,), activation, m=m)
    plain = solve(problem, PLAIN, tol=1e-13, on_failure="raise").stats.max_steps
    mixed = solve(problem, MixedPrecision(), tol=1e-13, on_failure="raise").stats.max_steps
    assert mixed <= 1.3 * plain  # blocks that went on would take two or three times the steps


def spoilt(monkeypatch, spoil):
    init = MixedPrecision.init

    def replaced(self, problem, z0):
        state = init(self, problem, z0)
        state.low = spoil(state.low)
        return state

    monkeypatch.setattr(MixedPrecision, "init", replaced)


@pytest.mark.parametrize(
    "spoil", [lambda K: -K, lambda K: 1e3 * K, torch.randn_like, torch.zeros_like]
)
def test_where_low_precision_is_useless_the_steps_are_full_ones(spoil, monkeypatch, products):
    problem = random_inclusion(100, (8,), dtype=torch.float32, m=0.05, skew=3.0)
    plain = solve(problem, PLAIN, tol=1e-6, on_failure="raise").stats
    spoilt(monkeypatch, spoil)
    products[0] = 0
    solution = solve(problem, MixedPrecision(), tol=1e-6, on_failure="raise")
    assert solution.stats.max_steps <= 2 * plain.max_steps + 16
    assert products[0] >= 0.8 * plain.max_steps


@pytest.mark.parametrize("method", LOW, ids=repr)
def test_neither_the_metric_nor_the_size_of_v_leaves_float16(method):
    # W in units of every unit's own: an equal problem, but K has entries up to 2⁴⁰.
    problem = random_inclusion(60, (8,), m=0.1, skew=3.0)
    D = 2.0 ** torch.linspace(-20, 20, 60, dtype=torch.float64).round()
    operator = problem.operator
    operator = DenseOperator(D[:, None] * operator.W / D, operator.metric / D**2)
    expected = solve(problem, method, tol=1e-9, on_failure="raise")
    for size in (2.0**-40, 2.0**40):
        scaled = Inclusion(operator, problem.bias * D * size, ReLU())
        assert PLAIN.init(scaled, None).map.matrix.abs().max() > torch.finfo(torch.float16).max
        solution = solve(scaled, method, tol=1e-9, on_failure="raise")
        assert solution.stats.max_steps <= 1.1 * expected.stats.max_steps
        back = solution.value / D / size
        torch.testing.assert_close(back, expected.value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_errors_as_large_as_the_gain_are_noticed(seed):
    # About 2000 steps: rounding to bfloat16 moves a step by as much as the step gains.
    problem = random_inclusion(60, (8,), m=0.001, skew=60.0, seed=seed)
    plain = solve(problem, PLAIN, tol=1e-6, max_steps=20000, on_failure="raise").stats
    mixed = solve(problem, MixedPrecision(), tol=1e-6, max_steps=20000, on_failure="raise").stats
    assert plain.max_steps > 500
    assert mixed.max_steps <= 2 * plain.max_steps


@pytest.mark.parametrize("activation", [ReLU(), LeakyReLU(0.2), Tanh()], ids=repr)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_agree_with_those_of_peaceman_rachford(activation, autocast, products):
    problem = random_inclusion(60, (2, 7), activation, dtype=torch.float32, m=0.1, skew=2.0)
    cotangent = torch.randn_like(problem.bias)

    def gradients(method):
        W, v = (t.clone().requires_grad_() for t in (problem.operator.W, problem.bias))
        operator = DenseOperator(W, problem.operator.metric)
        products[0] = 0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            solution = equilibrium(
                Inclusion(operator, v, activation), method, tol=1e-6, on_failure="raise"
            )
            forward = products[0]
            solution.value.backward(cotangent)
        assert solution.value.dtype == torch.float32
        return (solution.value.detach(), W.grad, v.grad), (forward, products[0] - forward)

    actual, few = gradients(MixedPrecision())
    expected, many = gradients(PLAIN)
    for a, e in zip(actual, expected, strict=True):
        assert torch.linalg.norm(a - e) <= 1e-4 * torch.linalg.norm(e)
    assert all(2 * a <= b for a, b in zip(few, many, strict=True))  # forward and backward


def test_second_derivatives_pass_through():
    problem = random_inclusion(4, (1,), Tanh())

    def value(W, v):
        operator = DenseOperator(W, problem.operator.metric)
        return equilibrium(Inclusion(operator, v, Tanh()), MixedPrecision(), tol=1e-13).value

    leaves = (problem.operator.W.requires_grad_(), problem.bias.requires_grad_())
    assert torch.autograd.gradgradcheck(value, leaves)


def test_changed_weights_are_rounded_anew(products):
    problem = random_inclusion(100, (8,), dtype=torch.float32, m=0.1, skew=3.0)
    solve(problem, MixedPrecision(), tol=1e-6, on_failure="raise")
    low = MixedPrecision().init(problem, None).low
    assert MixedPrecision().init(problem, None).low is low
    problem.operator.W.mul_(0.5)
    products[0] = 0
    solution = solve(problem, MixedPrecision(), tol=1e-6, on_failure="raise")
    assert not torch.equal(MixedPrecision().init(problem, None).low, low)
    assert products[0] <= 0.5 * solution.stats.max_steps  # with the old K none would be low
    fresh = Inclusion(copy.deepcopy(problem.operator), problem.bias, ReLU())
    assert torch.equal(solve(fresh, MixedPrecision(), tol=1e-6).value, solution.value)


def test_a_warm_start_and_samples_that_leave_are_handled():
    problem = random_inclusion(100, (32,), m=0.05, skew=3.0, dtype=torch.float32)
    problem.bias[:20] *= 1e-3
    problem.bias[0] = 0
    cold = solve(problem, MixedPrecision(), tol=1e-6, on_failure="raise")
    assert (cold.value[0] == 0).all()
    warm = solve(problem, MixedPrecision(), tol=1e-6, z0=cold.value, on_failure="raise")
    assert warm.stats.max_steps < 0.5 * cold.stats.max_steps


def test_it_can_be_accelerated():
    problem = random_inclusion(100, (8,), m=0.05, skew=3.0, dtype=torch.float32)
    assert solve(problem, Anderson(method=MixedPrecision()), tol=1e-6, on_failure="raise").converged


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"inner must be one of torch\.bfloat16, .* got torch\.f"):
        MixedPrecision(inner=torch.float64)
    with pytest.raises(ValueError, match="inner must be one of"):
        MixedPrecision(inner="bf16")
    with pytest.raises(ValueError, match="step_size must be positive and finite, got -1"):
        MixedPrecision(step_size=-1.0)


def test_problems_that_it_does_not_serve_are_refused():
    single = random_inclusion(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"inner = torch\.float32 is no lower .* on cpu"):
        solve(single, MixedPrecision(inner=torch.float32))
    problem = Inclusion(low_rank_operator(12, 3), torch.zeros(2, 12, dtype=torch.float64), ReLU())
    with pytest.raises(ValueError, match="needs a DenseOperator, got a LowRankOperator"):
        solve(problem, MixedPrecision())
    W = block_triangular_operator(monotone=True)
    problem = Inclusion(W, torch.zeros(2, W.n, dtype=torch.float64), ReLU())
    with pytest.raises(ValueError, match="needs a DenseOperator"):
        solve(problem, MixedPrecision())
    with pytest.raises(ValueError, match="needs a DenseOperator"):
        solve(problem, BlockSubstitution(method=MixedPrecision()))


def test_repr_is_python():
    for method in (*LOW, MixedPrecision(step_size=0.3)):
        assert eval(repr(method)) == method
    assert repr(MixedPrecision()) == "MixedPrecision()"


class OnCuda:
    """Says of itself that it is a float32 tensor on CUDA."""

    dtype, device = torch.float32, torch.device("cuda")


def test_tf32_is_asked_for_on_cuda_alone_and_handed_back_even_after_an_error():
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    with pytest.raises(ZeroDivisionError), use_tensor_cores(OnCuda()):
        assert setting.fp32_precision == "tf32"
        raise ZeroDivisionError
    assert setting.fp32_precision == before
    for factor in (torch.ones(1), torch.ones(1, dtype=torch.bfloat16)):
        with use_tensor_cores(factor):
            assert setting.fp32_precision == before


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_agrees_with_the_cpu_in_float64(inner, dtype, products):
    problem = random_inclusion(256, (64,), m=0.05, skew=3.0)
    exact = solve(problem, tol=1e-13, on_failure="raise").value
    W, metric, v = (
        t.to("cuda", dtype) for t in (problem.operator.W, problem.operator.metric, problem.bias)
    )
    moved = Inclusion(DenseOperator(W, metric), v, ReLU())
    before = torch.backends.cuda.matmul.fp32_precision
    products[0] = 0
    solution = solve(moved, MixedPrecision(inner=inner), tol=1e-6, on_failure="raise")
    assert products[0] <= 0.5 * solution.stats.max_steps
    assert torch.backends.cuda.matmul.fp32_precision == before
    error = problem.operator.norm(solution.value.cpu().double() - exact)
    stored = 1e-5 * problem.operator.norm(exact)  # rounding of the problem itself
    assert (error <= solution.error_bound.cpu() + stored).all()
