"""Bounds of rounding that are derived from code: float32 against float64, and what is refused."""

from dataclasses import dataclass

import pytest
import torch

from solvers import LinearOperator
from solvers.operators import running_error

PRODUCTS = {
    "two products": lambda A, B, z: (z @ B.T) @ A.T,
    "the matrix first": lambda A, B, z: z @ (A @ B).T,
    "a difference that cancels": lambda A, B, z: z @ A.T - z @ (A + 2.0**-20 * B).T,
    "a sum by hand": lambda A, B, z: (z[..., None, :] * (A - 2 * B)).sum(-1),
    "from the other side": lambda A, B, z: 1 * z - (0.5 - z) + 0.5 - (A[0] * z),
    "einsum": lambda A, B, z: torch.einsum("ij,kj,bk->bi", A, B, z),
    "quotients": lambda A, B, z: (z / A.diagonal()) @ B.T / 3 - 0.1 * z,
    "gathered": lambda A, B, z: z[..., torch.arange(len(A)).flip(0)] * A[0] + z.roll(1, -1) * B[1],
    "scattered": lambda A, B, z: torch.zeros_like(z).index_add(
        -1, torch.tensor([0, 0, 1, 2, 0]), z * A[0]
    ),
    "constants": lambda A, B, z: z @ (A * torch.tensor([0.1, 1.0, 2.0, 0.7, 1.3]).to(A)).T,
    "parts": lambda A, B, z: torch.cat([z[..., 2:] @ A[2:, 2:].T, -z[..., :2]], -1),
    "one call": lambda A, B, z: torch.addmm(-z, z, A.T, beta=2.0, alpha=0.3),
    "a batch": lambda A, B, z: (
        torch.stack([A, B]).sum(0).expand(len(z), 5, 5).bmm(z[..., None]).squeeze(-1)
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Function(LinearOperator):
    """W as some sums of products of two matrices with z."""

    A: torch.Tensor
    B: torch.Tensor
    metric: torch.Tensor
    how: str

    def mv(self, z):
        return PRODUCTS[self.how](self.A, self.B, z)

    def rmv(self, z):
        raise NotImplementedError


def make(how):
    g = torch.Generator().manual_seed(7)
    A, B = torch.randn(2, 5, 5, generator=g)
    return Function(A, B, torch.ones(5), how)


@pytest.mark.parametrize("how", PRODUCTS)
def test_float32_is_within_the_bound_and_comes_near_it(how):
    W, eps = make(how), torch.finfo(torch.float32).eps
    exact = W.to(torch.float64)
    g, nearest = torch.Generator().manual_seed(1), 0.0
    for spread in (0, 3, 12):
        z = torch.randn(2000, 5, generator=g)
        z = z * 2.0 ** torch.randint(-spread, spread + 1, z.shape, generator=g)
        error = (W.mv(z).double() - exact.mv(z.double())).abs()
        bound = W.summands * eps * exact.magnitude(z.double().abs())
        assert bool((error <= bound + 1e-30).all())
        nearest = max(nearest, float((error / bound.clamp_min(1e-30)).max()))
    assert nearest > 0.01


@pytest.mark.parametrize("how", PRODUCTS)
@pytest.mark.parametrize("small", ["z", "A", "B", "all"])
def test_underflow_is_within_the_bound(how, small):
    tiny, W = torch.finfo(torch.float32).tiny, make(how)
    for factor in (tiny, 2.0**-20 * tiny, tiny**0.5):
        A = W.A * factor if small in ("A", "all") and how != "quotients" else W.A
        B = W.B * factor if small in ("B", "all") else W.B
        W_ = Function(A, B, W.metric, how)
        z = torch.randn(50, 5, generator=torch.Generator().manual_seed(2))
        z = z * factor if small in ("z", "all") else z
        exact = W_.to(torch.float64)
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            try:
                found = W_.mv(z)
            finally:
                torch.set_flush_denormal(False)
            size = z.double().abs()
            lost = tiny * (exact.losses() + exact.unread(size))
            bound = W.summands * 2.0**-23 * exact.magnitude(size) + lost
            assert bool(((found.double() - exact.mv(z.double())).abs() <= bound).all())


def test_minus_is_read_as_plus():
    W = make("a difference that cancels")
    z = torch.ones(1, 5)
    assert bool((W.magnitude(z) >= 2 * W.A.abs().sum(1)).all())


def test_chains_of_factors_add_and_those_of_summands_compete():
    def depth(function):
        return running_error.read(function(running_error.leaf(torch.ones(2, 3)))).depth

    assert depth(lambda z: z) == 0
    assert depth(lambda z: z * z) == 1
    assert depth(lambda z: (z * z) * (z * z)) == 3
    assert depth(lambda z: z * z + z) == 2
    assert depth(lambda z: z * z + z * z * z) == 3
    assert depth(lambda z: z @ z.T) == 3
    assert depth(lambda z: 0.5 * z) == 1
    assert depth(lambda z: 0.1 * z) == 2  # 0.1 is rounded itself


@pytest.mark.parametrize("function", [torch.sin, torch.fft.rfft, lambda z: z.relu(), torch.sqrt])
def test_what_is_not_understood_is_named_with_the_way_out(function):
    with pytest.raises(NotImplementedError, match=r"it calls aten\..*Define magnitude"):
        function(running_error.leaf(torch.ones(2, 3)))


def test_dividing_by_what_was_computed_is_refused():
    z = running_error.leaf(torch.ones(2, 3))
    with pytest.raises(NotImplementedError, match="divides by a number that it computed"):
        z / (z + z * z)


def test_numbers_that_are_read_as_zero_divide_to_infinity():
    z = running_error.leaf(torch.ones(2))
    small = running_error.leaf(torch.full((2,), torch.finfo(torch.float32).tiny / 2))
    assert bool((z / small).bound.isinf().all())
