"""Multipliers of networks: optimal where the optimum is known, at every depth and scale."""

import math

import numpy as np
import pytest
import torch

from lben import certify
from lben.certificates.network import prove_network
from lben.tightening.layer_program import LayerProgram, minimise_bound
from lben.tightening.network import tighten_network, tighten_network_pairs
from lben.weights.activation import IDENTITY, RELU, Activation
from lben.weights.network import AffineMap, Block, Network

BENT = Activation(name="Bent", low=-0.25, high=1.5, function=lambda v: v)


def network_of(maps, output, inputs, activations=None):
    """Return a network from the matrices {block: matrix} of each block, without biases."""
    activations = [RELU] * len(maps) if activations is None else activations
    blocks = tuple(
        Block(affine=AffineMap.of(m, np.zeros(len(next(iter(m.values()))))), activation=a)
        for m, a in zip(maps, activations, strict=True)
    )
    q = len(next(iter(output.values())))
    return Network(input_shape=(inputs,), blocks=blocks, output=AffineMap.of(output, np.zeros(q)))


def bound_of(network, rows=None, gap=1e-7):
    """The bound that is proved with the multipliers proposed."""
    return prove_network(network, tighten_network(network, rows, gap=gap), rows).bound


def random_chain(depth, width=5, inputs=4, outputs=3, seed=0, activations=None):
    rng = np.random.default_rng(seed)
    sizes = [inputs] + [width] * depth + [outputs]
    maps = [
        {k: rng.standard_normal((sizes[k + 1], sizes[k])) / math.sqrt(sizes[k])}
        for k in range(depth + 1)
    ]
    return network_of(maps[:-1], maps[-1], inputs, activations)


def solve_densely(network, gap=1e-9):
    """γ by the program of a layer with a block triangular W, for slopes in [0, 1]."""
    n, ends = network.units, np.cumsum((0, *network.widths[1:]))
    W, U = np.zeros((n, n)), np.zeros((n, network.widths[0]))
    C = np.zeros((network.out_features, n))
    D = np.zeros((network.out_features, network.widths[0]))

    def fill(affine, rows, states, inputs):
        for j, m in affine.matrices.items():
            if j:
                states[rows, ends[j - 1] : ends[j]] = m
            else:
                inputs[rows] = m

    for k, block in enumerate(network.blocks):
        fill(block.affine, slice(ends[k], ends[k + 1]), W, U)
    fill(network.output, slice(None), C, D)
    program = LayerProgram(
        **{k: torch.tensor(v)[None] for k, v in {"W": W, "U": U, "C": C, "D": D}.items()}
    )
    share = np.concatenate(
        [np.full(w, 1e-2**k) for k, w in enumerate(network.widths[1:])]
    )  # falls with depth: 2Λ − ΛW − WᵀΛ is positive definite
    found = minimise_bound(program, torch.tensor(1 / share[::-1].copy())[None], gap=gap)
    return float(found.tau[0, 0]) ** 0.5


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_chains_have_the_optimum_of_the_dense_program(depth):
    network = random_chain(depth)
    claim = tighten_network(network, gap=1e-9)
    assert claim.gap <= 1e-9
    assert [len(part) for part in claim.multipliers] == [5] * depth
    assert prove_network(network, claim).bound == pytest.approx(solve_densely(network), rel=1e-7)


def test_residual_networks_have_the_optimum_of_the_dense_program():
    """z₂ = σ(W₂z₁), z₃ = σ(W₃z₂ + z₁), y = Cz₃ + Ex."""
    rng = np.random.default_rng(0)
    first, second, third, C, E = (rng.standard_normal((4, 4)) / 2 for _ in range(5))
    network = network_of([{0: first}, {1: second}, {1: np.eye(4), 2: third}], {3: C, 0: 0.3 * E}, 4)
    assert bound_of(network, gap=1e-9) == pytest.approx(solve_densely(network), rel=1e-7)


def test_a_frontier_of_several_blocks_is_one_group():
    """Every block reads all earlier ones: a densely connected network."""
    rng = np.random.default_rng(1)
    maps = [{j: rng.standard_normal((3, 3)) / 3 for j in range(k + 1)} for k in range(4)]
    network = network_of(maps, {j: rng.standard_normal((2, 3)) for j in range(5)}, 3)
    assert bound_of(network, gap=1e-9) == pytest.approx(solve_densely(network), rel=1e-7)


def test_blocks_of_one_slope_are_products():
    rng = np.random.default_rng(2)
    A, B, C = (rng.standard_normal((4, 4)) for _ in range(3))
    whole = network_of([{0: B @ A}], {1: C}, 4)
    parts = network_of([{0: A}, {1: B}], {2: C}, 4, [IDENTITY, RELU])
    assert bound_of(parts, gap=1e-9) == pytest.approx(bound_of(whole, gap=1e-9), rel=1e-8)
    assert [len(part) for part in tighten_network(parts).multipliers] == [0, 4]
    linear = network_of([{0: A}, {1: B}], {2: C}, 4, [IDENTITY, IDENTITY])
    norm = np.linalg.norm(C @ B @ A, 2)
    assert bound_of(linear) == pytest.approx(norm)


def test_other_slopes_scale_as_they_should():
    """|slope| ≤ 1.5 of one unit: the bound of 2 · 1.5 · 3."""
    one = np.ones((1, 1))
    network = network_of([{0: 2 * one}], {1: 3 * one}, 1, [BENT])
    assert bound_of(network) == pytest.approx(9, rel=1e-5)


@pytest.mark.parametrize("factor", [1e-100, 1e-12, 1e12, 1e100])
def test_units_of_a_layer_change_no_bound(factor):
    network = random_chain(3)
    expected = bound_of(network)
    maps = [dict(block.affine.matrices) for block in network.blocks]
    maps[0] = {0: factor * maps[0][0]}
    maps[1] = {1: maps[1][1] / factor}
    scaled = network_of(maps, dict(network.output.matrices), 4)
    assert bound_of(scaled) == pytest.approx(expected, rel=1e-6)


def test_deep_networks_with_tiny_bounds_converge():
    maps = [0.6 * next(iter(b.affine.matrices.values())) for b in random_chain(48, 6).blocks]
    network = network_of([{k: m} for k, m in enumerate(maps)], {48: np.eye(6)}, 4)
    claim = tighten_network(network, max_steps=40)
    assert claim.gap <= 1e-7
    assert 0 < prove_network(network, claim).bound < 1e-7


def test_rows_of_outputs_have_smaller_bounds():
    network = random_chain(2)
    whole = bound_of(network)
    row = np.array([[1.0, 0.0, 0.0]])
    maps = [dict(block.affine.matrices) for block in network.blocks]
    alone = network_of(maps, {2: network.output.matrices[2][:1]}, 4)
    found = bound_of(network, row)
    assert found < whole
    assert found == pytest.approx(bound_of(alone), rel=1e-6)


def test_more_inputs_than_units_cost_nothing():
    rng = np.random.default_rng(3)
    U = rng.standard_normal((5, 300)) / 17
    network = random_chain(2, inputs=300)
    maps = [{0: U}, *(dict(block.affine.matrices) for block in network.blocks[1:])]
    wide = network_of(maps, dict(network.output.matrices), 300)
    maps[0] = {0: np.linalg.qr(U.T)[1].T}
    narrow = network_of(maps, dict(network.output.matrices), 5)
    assert bound_of(wide) == pytest.approx(bound_of(narrow), rel=1e-6)


def test_what_no_output_reads_has_no_part_and_constants_have_no_bound():
    network = random_chain(2)
    maps = [dict(block.affine.matrices) for block in network.blocks]
    dead = network_of([*maps, {1: np.ones((7, 5))}], dict(network.output.matrices), 4)
    assert bound_of(dead) == pytest.approx(bound_of(network), rel=1e-6)
    assert [len(part) for part in tighten_network(dead).multipliers] == [5, 5, 7]
    constant = network_of(maps, {2: np.zeros((3, 5))}, 4)
    assert bound_of(constant) < 1e-100


def test_units_that_nothing_moves_keep_finite_multipliers():
    rng = np.random.default_rng(4)
    first = rng.standard_normal((4, 4))
    first[1] = 0.0
    network = network_of([{0: first}, {1: rng.standard_normal((4, 4))}], {2: np.eye(4)}, 4)
    claim = tighten_network(network)
    assert claim.gap <= 1e-7
    assert all(np.isfinite(part).all() for part in claim.multipliers)


def test_too_few_steps_are_told():
    with pytest.warns(UserWarning, match="ended after 3 steps"):
        claim = tighten_network(random_chain(4), max_steps=3)
    assert claim.gap > 1e-3


def test_pairs_of_outputs_have_bounds_of_their_own():
    network = random_chain(2)
    pairs = certify(network, tighten_network_pairs(network))
    whole = bound_of(network)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        row = np.eye(3)[i : i + 1] - np.eye(3)[j : j + 1]
        assert pairs[i][j] == pytest.approx(bound_of(network, row), rel=1e-3)
        assert pairs[i][j] < 2**0.5 * whole
