"""Problems are cut to what a device can hold, and parts of matrices sum up to them."""

import pytest
import torch

from solvers import DouglasRachford, LeakyReLU, PeacemanRachford
from solvers.backends import triton_tiles as tiles
from tests.problems import random_inclusion

pytest.importorskip("triton")

CUT = tiles.choose_cut


@pytest.mark.parametrize(("n", "capability", "resident"), [
    (80, (8, 9), True), (80, (10, 0), False), (81, (8, 9), False), (81, (9, 4), False),
    (128, (8, 0), True), (129, (8, 0), False), (256, (9, 0), True), (257, (9, 0), False),
])  # fmt: skip
def test_what_stays_on_the_chip_depends_on_the_chip(n, capability, resident):
    found = CUT(n, torch.float32, tiles.most_resident(capability))
    assert found.resident == resident
    assert found.width >= n
    assert CUT(n, torch.float64).resident == (n <= 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 16, 80, 81, 129, 257, 600])
def test_tiles_cover_all_units_with_powers_of_two(n, dtype):
    cut = CUT(n, dtype)
    assert cut.width >= n
    assert all(block & (block - 1) == 0 for block in (*cut.blocks, cut.rows, cut.depth, cut.warps))
    assert cut.held == 0 or cut.resident


def test_three_numbers_of_bfloat16_make_one_of_float32():
    matrix = torch.randn(7, 7)
    parts = tiles._split_bfloat16(matrix, 3)
    assert torch.equal(sum(part.double() for part in parts), matrix.double())
    assert torch.equal(parts[0].float(), matrix.bfloat16().float())
    assert (parts[1].abs() <= 2.0**-8 * matrix.abs()).all()


def test_numbers_are_made_once_and_in_the_order_of_the_kernels():
    problem = random_inclusion(5, dtype=torch.float32, activation=LeakyReLU(0.25))
    iteration = DouglasRachford(relaxation=0.5).iteration(problem)
    loop = tiles.Loop.prepare(problem, iteration)
    numbers = loop.numbers(0.125)
    assert loop.numbers(0.125) is numbers
    named = dict(zip(tiles.kernels().NUMBERS, numbers.tolist(), strict=True))
    assert (named["negative"], named["theta"], named["tol"]) == (0.25, 0.5, 0.125)
    assert named["own"] == 16 * torch.finfo(torch.float32).eps


def test_padding_adds_units_that_do_nothing():
    problem = random_inclusion(5, dtype=torch.float64)
    prepared = tiles.Loop.prepare(problem, PeacemanRachford().iteration(problem)).prepared
    W, size = problem.operator.W, prepared.weights.shape[-1]
    assert size > 5
    assert torch.equal(prepared.weights[:5, :5], W.T)
    assert not prepared.weights[5:].any()
    assert not prepared.map[:, 5:].any()
    assert (prepared.alpha[5:] == 1).all()
    assert not prepared.root[5:].any()
