"""The primal–dual method finds known optima, with and without the structure of a chain."""

import itertools
import math

import pytest
import torch

from lben.tightening.primal_dual import Program, Rows, minimise


def random_layers(depth, width, inputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [inputs] + [width] * depth
    return [
        torch.randn(b, a, generator=generator, dtype=torch.float64) / math.sqrt(a)
        for a, b in itertools.pairwise(sizes)
    ]


def program_of_layers(layers, output, low=0.0, high=1.0, groups=None):
    """y = output · σ(W_K … σ(W_1 x))."""
    sizes = [layers[0].shape[1], *(len(W) for W in layers)]
    p, N = sizes[0], sum(sizes)
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    rows = tuple(
        Rows(
            coordinates=slice(ends[k] - sizes[k], ends[k]),
            units=slice(ends[k] - p, ends[k + 1] - p), values=W.T[None],
        )
        for k, W in enumerate(layers)
    )  # fmt: skip
    constant = torch.zeros(1, N, N, dtype=torch.float64)
    constant[0, ends[-2] :, ends[-2] :] = -output.T @ output
    slopes = torch.ones(1, N - p, dtype=torch.float64)
    return Program(
        groups=tuple(sizes) if groups is None else groups, inputs=p, rows=rows,
        states=torch.arange(p, N), low=low * slopes, high=high * slopes, constant=constant,
    )  # fmt: skip


def find_start(program, tau=1e3):
    """λ falls from layer to layer, until S is positive definite."""
    n = len(program.states)
    for share in (0.5, 0.2, 0.1, 0.03, 0.01):
        lam = torch.cat(
            [torch.full((r.units.stop - r.units.start,), tau * share ** (k + 1))
             for k, r in enumerate(program.rows)]
        ).double()  # fmt: skip
        scale = 1.0 / float(lam[-1])
        y = torch.cat([torch.tensor([tau]).double(), lam])[None] * max(scale, 1.0) * 10
        S = program.constant + program.assemble(y)
        if float(torch.linalg.eigvalsh(S)[0, 0]) > 0:
            return y
    raise AssertionError(f"no start for {n} units")


def test_one_unit_has_its_constant():
    program = program_of_layers([torch.tensor([[2.0]]).double()], torch.tensor([[3.0]]).double())
    found = minimise(program, find_start(program), gap=1e-9)
    assert 36 <= float(found.y[0, 0]) <= 36 * (1 + 1e-9)
    assert bool(found.converged)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.2, 1.1), (0.5, 0.9)])
def test_slopes_that_are_all_alike_scale_one_layer(low, high):
    """One layer of a rotation: the bound is the largest slope."""
    rotation = torch.linalg.qr(random_layers(1, 4, 4)[0])[0]
    program = program_of_layers([rotation], torch.eye(4).double(), low, high)
    start = torch.cat([torch.tensor([[50.0]]), torch.full((1, 4), 5.0)], 1).double()
    found = minimise(program, start, gap=1e-9)
    assert max(abs(low), high) ** 2 == pytest.approx(float(found.y[0, 0]), rel=1e-6)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_the_chain_structure_changes_the_cost_and_not_the_optimum(depth):
    layers, output = random_layers(depth, 5), random_layers(1, 2, 5, seed=1)[0]
    chain = program_of_layers(layers, output)
    whole = program_of_layers(layers, output, groups=(3 + 5 * depth,))
    found = [minimise(p, find_start(p), gap=1e-9) for p in (chain, whole)]
    assert all(bool(f.converged) and f.steps <= 40 for f in found)
    torch.testing.assert_close(found[0].y[0, 0], found[1].y[0, 0], rtol=1e-8, atol=0)


def test_no_multiplier_nearby_has_a_smaller_bound():
    """At the optimum the least τ for λ is no smaller for random changes of λ."""
    layers, output = random_layers(2, 4), random_layers(1, 2, 4, seed=1)[0]
    program = program_of_layers(layers, output)
    found = minimise(program, find_start(program), gap=1e-10)
    least = float(found.y[0, 0])

    def tau(lam):
        y = torch.cat([torch.zeros(1).double(), lam])[None]
        S = (program.constant + program.assemble(y))[0]
        inner = torch.linalg.eigvalsh(S[3:, 3:])
        if float(inner[0]) <= 0:
            return math.inf
        side = S[3:, :3]
        return float(torch.linalg.eigvalsh(side.T @ torch.linalg.solve(S[3:, 3:], side))[-1])

    torch.manual_seed(0)
    lam = found.y[0, 1:]
    assert tau(lam) == pytest.approx(least, rel=1e-6)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(50):
            assert tau(lam * (1 + size * torch.randn(8).double())) >= least * (1 - 1e-8)


def test_a_program_that_runs_out_of_steps_says_so_and_tells_its_gap():
    layers, output = random_layers(3, 5), random_layers(1, 2, 5, seed=1)[0]
    program = program_of_layers(layers, output)
    best = float(minimise(program, find_start(program), gap=1e-9).y[0, 0])
    early = minimise(program, find_start(program), gap=1e-9, max_steps=6)
    assert not bool(early.converged)
    assert early.steps == 6
    assert float(early.gap) > 1e-9
    assert float(early.y[0, 0]) * (1 - float(early.gap)) <= best * (1 + 1e-9)


def test_a_start_outside_the_cone_is_refused():
    program = program_of_layers(random_layers(2, 4), random_layers(1, 2, 4)[0])
    with pytest.raises(ValueError, match="strictly feasible"):
        minimise(program, torch.full((1, 9), 1e-6, dtype=torch.float64))
    with pytest.raises(ValueError, match="strictly feasible"):
        minimise(program, -find_start(program))
