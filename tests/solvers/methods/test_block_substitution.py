import dataclasses
import itertools

import pytest
import torch

from solvers import (
    BlockSubstitution,
    BlockTriangularOperator,
    DenseOperator,
    DouglasRachford,
    ForwardBackward,
    Inclusion,
    LeakyReLU,
    LinearSlope,
    LowRankOperator,
    NonFiniteError,
    NotMonotoneError,
    PeacemanRachford,
    ReLU,
    Request,
    SolveError,
    SolveWarning,
    Status,
    Tanh,
    ZeroOperator,
    equilibrium,
    solve,
)
from tests.problems import block_triangular_operator, low_rank_operator, monotone_operator

F64 = torch.float64


def bias(W, batch=(7,), seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*batch, W.n, generator=g, dtype=F64).to(W.dtype)


def feed_forward(widths, dtype=F64):
    g = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(after, before, generator=g, dtype=dtype) / before**0.5
        for before, after in itertools.pairwise(widths)
    ]
    blocks = [ZeroOperator(torch.ones(n, dtype=dtype)) for n in widths]
    couplings = {(i + 1, i): weight for i, weight in enumerate(weights)}
    return weights, BlockTriangularOperator(blocks, couplings)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("activation", [ReLU(), Tanh(), LeakyReLU(0.1)], ids=repr)
def test_a_feed_forward_net_is_evaluated_and_not_iterated(activation, dtype):
    weights, W = feed_forward([6, 8, 5, 3], dtype)
    v = bias(W, (2, 4))
    inputs = v.split([6, 8, 5, 3], dim=-1)
    layers = [activation(inputs[0])]
    for weight, v_i in zip(weights, inputs[1:], strict=True):
        layers.append(activation(layers[-1] @ weight.T + v_i))
    solution = solve(Inclusion(W, v, activation), BlockSubstitution(), on_failure="raise")
    u = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(solution.value, torch.cat(layers, -1), rtol=u, atol=u)
    assert solution.stats.max_steps == 0
    assert solution.residual.max() <= u


def test_backpropagation_through_a_net_is_the_adjoint_sweep():
    weights, W = feed_forward([6, 8, 5, 3])
    v, tensors = bias(W).requires_grad_(), [t.requires_grad_() for t in weights]
    z = equilibrium(Inclusion(W, v, Tanh()), BlockSubstitution(), tol=1e-14).value
    cotangent = torch.randn_like(z)
    inputs = v.split([6, 8, 5, 3], dim=-1)
    layers = [torch.tanh(inputs[0])]
    for weight, v_i in zip(weights, inputs[1:], strict=True):
        layers.append(torch.tanh(layers[-1] @ weight.T + v_i))
    expected = torch.autograd.grad((torch.cat(layers, -1) * cotangent).sum(), [v, *tensors])
    actual = torch.autograd.grad((z * cotangent).sum(), [v, *tensors])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("monotone", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        BlockSubstitution(),
        BlockSubstitution(method=PeacemanRachford(compiled=False)),
        BlockSubstitution(method=ForwardBackward()),
        BlockSubstitution(method=DouglasRachford()),
        PeacemanRachford(),
        DouglasRachford(),
    ],
    ids=repr,
)
def test_a_sweep_finds_the_solution_in_either_direction(method, monotone, transposed):
    W = block_triangular_operator(monotone=monotone)
    W = W.T if transposed else W
    slope = LinearSlope(torch.rand(7, W.n, generator=torch.Generator().manual_seed(1), dtype=F64))
    for activation in (ReLU(), Tanh(), slope):
        solution = solve(
            Inclusion(W, bias(W), activation), method, tol=1e-11, max_steps=5000, on_failure="raise"
        )
        z = solution.value
        torch.testing.assert_close(z, activation(W.mv(z) + bias(W)), rtol=1e-8, atol=1e-9)
        assert (solution.residual <= 1e-11).all()


def test_error_bound_holds_in_a_monotone_metric_and_is_infinite_without():
    W = block_triangular_operator(monotone=True)
    problem = Inclusion(W, bias(W), Tanh())
    loose = solve(problem, BlockSubstitution(), tol=1e-3, on_failure="raise")
    exact = solve(problem, BlockSubstitution(), tol=1e-14, max_steps=9000, on_failure="raise")
    error = W.norm(loose.value - exact.value)
    assert (error <= loose.error_bound).all()
    assert (loose.error_bound < 1).all()
    assert (error > 0).all()
    problem = Inclusion(block_triangular_operator(), bias(W), Tanh())
    assert (solve(problem, BlockSubstitution()).error_bound == torch.inf).all()


def test_steps_are_summed_over_the_blocks():
    operators = [monotone_operator(6, m=0.1, seed=s) for s in range(3)]
    W = BlockTriangularOperator(operators, {})
    v = bias(W)
    parts = [
        solve(Inclusion(block, v_i, ReLU()), tol=5e-7)
        for block, v_i in zip(operators, v.split(6, dim=-1), strict=True)
    ]
    solution = solve(Inclusion(W, v, ReLU()), BlockSubstitution(), tol=1e-6)
    assert torch.equal(solution.stats.steps, sum(part.stats.steps for part in parts))
    torch.testing.assert_close(solution.value, torch.cat([part.value for part in parts], -1))


def test_what_misses_the_whole_tolerance_is_swept_again():
    # One unit, small beside its neighbours, counts 1e8 times more in the operator's metric than in
    # that of its block: the block's tolerance says little about it.
    first, second = monotone_operator(5, m=0.05), monotone_operator(5, m=0.05, seed=1)
    metric = torch.cat([first.metric, second.metric])
    metric[5] *= 1e8
    W = BlockTriangularOperator([first, second], {(1, 0): torch.eye(5, dtype=F64)}, metric)
    v = bias(W, (40,))
    v[:, 5] *= 1e-3
    problem = Inclusion(W, v, Tanh())
    once = BlockSubstitution()._substitute_blocks(problem, Request(tol=5e-3, max_steps=5000))
    assert once.residual.max() > 1e-2
    solution = solve(problem, BlockSubstitution(), tol=1e-2, on_failure="raise")
    assert solution.residual.max() <= 1e-2
    assert (solution.stats.steps > once.steps).any()
    done = once.residual <= 1e-2
    assert done.any()
    assert torch.equal(solution.value[done], once.value[done])


class Sloppy(PeacemanRachford):
    """Claims to have solved what it did not touch."""

    def run(self, problem, request):
        honest = super().run(problem, request)
        return dataclasses.replace(
            honest, value=honest.value + 0.1, residual=torch.zeros_like(honest.residual)
        )


def test_a_block_is_not_taken_at_its_word():
    W = block_triangular_operator()
    with pytest.raises(SolveError, match=r"In block \d, the hardest: Causes"):
        solve(Inclusion(W, bias(W), ReLU()), BlockSubstitution(method=Sloppy()), on_failure="raise")


def test_step_limit_covers_the_sum_and_failure_names_a_block():
    W = block_triangular_operator()
    with pytest.warns(SolveWarning, match=r"In block \d, the hardest"):
        solution = solve(Inclusion(W, bias(W), Tanh()), BlockSubstitution(), tol=1e-12, max_steps=9)
    assert solution.status is Status.MAX_STEPS
    assert solution.stats.max_steps == 9


class Recording(PeacemanRachford):
    """Notes what it was allowed."""

    def run(self, problem, request):
        LIMITS.append(request.max_steps)
        return super().run(problem, request)


LIMITS = []


def test_a_block_gets_the_steps_that_earlier_blocks_left():
    LIMITS.clear()
    blocks = [monotone_operator(6, m=0.1, seed=s) for s in range(3)]
    W = BlockTriangularOperator(blocks, {})
    with pytest.warns(SolveWarning, match="stopped at its step limit"):
        solve(
            Inclusion(W, bias(W), ReLU()),
            BlockSubstitution(method=Recording()),
            tol=1e-12,
            max_steps=9,
        )
    assert LIMITS == [9, 1, 1]  # a block whose turn comes too late still gets a value
    LIMITS.clear()
    first = solve(Inclusion(blocks[0], bias(W)[:, :6], ReLU()), tol=5e-4).stats.max_steps
    solve(
        Inclusion(W, bias(W), ReLU()),
        BlockSubstitution(method=Recording()),
        tol=1e-3,
        max_steps=500,
    )
    assert LIMITS[:2] == [500, 500 - first]


def test_warm_start_saves_steps():
    W = block_triangular_operator()
    problem = Inclusion(W, bias(W), Tanh())
    cold = solve(problem, BlockSubstitution(), tol=1e-12)
    warm = solve(problem, BlockSubstitution(), tol=1e-8, z0=cold.value)
    assert warm.stats.max_steps < cold.stats.max_steps / 2
    torch.testing.assert_close(warm.value, cold.value, rtol=1e-7, atol=1e-8)


def test_float32_goes_on_in_float64():
    W = block_triangular_operator(dtype=torch.float32)
    solution = solve(
        Inclusion(W, 30 * bias(W), ReLU()), BlockSubstitution(), tol=5e-7, on_failure="raise"
    )
    assert solution.residual.max() <= 5e-7
    assert solution.value.dtype == torch.float32


def test_empty_batch_and_no_batch():
    W = block_triangular_operator()
    assert solve(Inclusion(W, bias(W, (0,)), ReLU()), BlockSubstitution()).value.shape == (0, W.n)
    assert solve(Inclusion(W, bias(W, ()), ReLU()), BlockSubstitution()).value.shape == (W.n,)


@pytest.mark.parametrize("activation", [ReLU(), Tanh()], ids=repr)
def test_first_and_second_derivatives(activation):
    blocks = [
        monotone_operator(2, m=1.0),
        ZeroOperator(torch.tensor([0.5, 1.0], dtype=F64)),
        low_rank_operator(3, 1, m=1.0),
    ]
    g = torch.Generator().manual_seed(2)
    couplings = {
        (i, j): torch.randn(blocks[i].n, blocks[j].n, generator=g, dtype=F64)
        for i, j in ((1, 0), (2, 0), (2, 1))
    }
    d, A, B = (t.requires_grad_() for t in blocks[2].tensors)
    inputs = (blocks[0].W.requires_grad_(), d, A, B, *couplings.values())
    inputs = (*inputs, torch.randn(2, 7, generator=g, dtype=F64))
    for t in inputs:
        t.requires_grad_()

    def f(W, d, A, B, W10, W20, W21, v):
        operator = BlockTriangularOperator(
            [
                DenseOperator(W, blocks[0].metric),
                blocks[1],
                LowRankOperator(d, A, B, blocks[2].metric),
            ],
            {(1, 0): W10, (2, 0): W20, (2, 1): W21},
        )
        return equilibrium(
            Inclusion(operator, v, activation), BlockSubstitution(), tol=1e-14, max_steps=9000
        ).value

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_gradients_equal_those_of_the_assembled_matrix():
    W = block_triangular_operator()
    tensors = tuple(t.requires_grad_() for t in W.tensors)
    v = bias(W)
    units = torch.arange(W.n)
    full = DenseOperator(W.submatrix(units, units), W.metric)
    z = equilibrium(Inclusion(W, v, Tanh()), BlockSubstitution(), tol=1e-13).value
    dense = solve(Inclusion(full, v, Tanh()), tol=1e-13, require_monotone=False).value
    torch.testing.assert_close(z, dense)
    actual = torch.autograd.grad(z.square().sum(), tensors)
    # ∂ℓ/∂W = u zᵀ with u = D(Wᵀu + g), solved directly.
    D = torch.diag_embed(1 - dense.square())
    system = torch.eye(W.n, dtype=F64) - D @ full.W.T
    u = torch.linalg.solve(system, D @ (2 * dense)[..., None]).squeeze(-1)
    torch.testing.assert_close(actual, W.pullback(u, dense), rtol=1e-8, atol=1e-9)


def test_couplings_alone_decide_monotonicity_in_a_metric_but_not_solvability():
    W = block_triangular_operator()
    assert W.constants().m < 0
    assert W.is_monotone()
    assert W.T.is_monotone()
    scaled = block_triangular_operator(monotone=True)
    assert scaled.constants().m > 0
    torch.testing.assert_close(W.T.monotone_metric(), 1 / W.monotone_metric())
    for units, block in zip(scaled.layout.units, scaled.blocks, strict=True):
        ratio = scaled.metric[units] / block.metric
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    weak = {key: 1e-3 * t for key, t in W.couplings.items()}
    weakly = BlockTriangularOperator(W.blocks, weak)
    assert torch.equal(weakly.monotone_metric(), weakly.metric)


def test_a_block_that_is_not_monotone_is_refused():
    bad = DenseOperator(2 * torch.eye(2, dtype=F64))
    W = BlockTriangularOperator([ZeroOperator(torch.ones(3, dtype=F64)), bad], {})
    assert not W.is_monotone()
    with pytest.raises(NotMonotoneError, match="m = -1"):
        solve(Inclusion(W, bias(W), ReLU()), BlockSubstitution())
    with pytest.raises(NotMonotoneError, match="block 1 is not strongly monotone"):
        W.monotone_metric()


def test_not_finite_couplings_are_named():
    W = BlockTriangularOperator([ONE, TWO], {(1, 0): torch.tensor([[torch.nan], [1.0]])})
    with pytest.raises(NonFiniteError, match="weights contain NaN"):
        solve(Inclusion(W, torch.ones(2, 3), ReLU()), BlockSubstitution())


def test_other_operators_are_refused():
    W = monotone_operator(3)
    with pytest.raises(ValueError, match="BlockTriangularOperator, got a DenseOperator: use Peace"):
        solve(Inclusion(W, bias(W), ReLU()), BlockSubstitution())


def test_repr_is_the_python_that_makes_it():
    method = BlockSubstitution(method=DouglasRachford(relaxation=0.7))
    assert eval(repr(method)) == method
    assert repr(BlockSubstitution()) == "BlockSubstitution()"


ONE, TWO = ZeroOperator(torch.ones(1)), ZeroOperator(torch.ones(2))


@pytest.mark.parametrize(
    ("blocks", "couplings", "metric", "message"),
    [
        ([], {}, None, "at least one block"),
        ([ONE, TWO], {(0, 1): torch.ones(1, 2)}, None, r"0 ≤ j < i < 2, got \(0, 1\)"),
        ([ONE, TWO], {(1, 1): torch.ones(2, 2)}, None, r"got \(1, 1\)"),
        ([ONE, TWO], {(2, 0): torch.ones(2, 1)}, None, r"got \(2, 0\)"),
        ([ONE, TWO], {(1, -1): torch.ones(2, 2)}, None, r"got \(1, -1\)"),
        ([ONE, TWO], {(1, 0): torch.ones(1, 2)}, None, r"shape \(2, 1\), got \(1, 2\)"),
        ([ONE, TWO], {(1, 0): torch.ones(2, 1).double()}, None, "coupling .* is torch.float64"),
        ([ONE, ZeroOperator(torch.ones(2).double())], {}, None, "block 1 is torch.float64"),
        ([ONE, TWO], {}, torch.ones(2), r"shape \(3,\), got \(2,\)"),
        ([ONE, TWO], {}, torch.ones(3).double(), "metric is torch.float64"),
    ],
)
def test_bad_operators_are_refused(blocks, couplings, metric, message):
    with pytest.raises(ValueError, match=message):
        BlockTriangularOperator(blocks, couplings, metric)


def test_a_zero_operator_needs_a_vector():
    with pytest.raises(ValueError, match=r"must be a vector, got shape \(2, 2\)"):
        ZeroOperator(torch.ones(2, 2))
