"""Fixed maps are 1-Lipschitz, reach it, and say how they round."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from lben import (
    AOLConv2d,
    AOLLinear,
    AveragePooling,
    ChannelPadding,
    CPLLinear,
    Flatten,
    GroupSort,
    Householder,
    InvertibleDownsampling,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    NormPooling,
    OrthogonalConv2d,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
)
from solvers import ReLU

FIXED_MAPS = [
    Flatten(), ChannelPadding(9), InvertibleDownsampling(2), AveragePooling(2), NormPooling(2),
    GroupSort(), GroupSort(3), Householder(6, dtype=torch.float64),
]  # fmt: skip

ISOMETRIES = FIXED_MAPS[:3]


@pytest.mark.parametrize("fixed_map", FIXED_MAPS, ids=str)
@torch.no_grad()
def test_fixed_maps_are_1_lipschitz_and_reach_it(fixed_map):
    a = torch.randn(500, 6, 4, 4, dtype=torch.float64)
    near = a + 1e-3 * torch.randn_like(a)
    flat = a + 0.1  # differences that pooling keeps
    for b in (near, torch.randn_like(a), flat):
        change = (fixed_map(a) - fixed_map(b)).flatten(1).norm(dim=1)
        distance = (a - b).flatten(1).norm(dim=1)
        assert float((change / distance).max()) <= 1 + 1e-12
    stored = (fixed_map(a) - fixed_map(flat)).flatten(1).norm() / (a - flat).flatten(1).norm()
    assert float(stored) > (0.4 if isinstance(fixed_map, NormPooling) else 0.99)


@pytest.mark.parametrize("fixed_map", ISOMETRIES, ids=str)
def test_isometries_keep_every_norm(fixed_map):
    x = torch.randn(5, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(fixed_map(x).norm(), x.norm())


@pytest.mark.parametrize("fixed_map", FIXED_MAPS, ids=str)
def test_fixed_maps_are_differentiable(fixed_map):
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(fixed_map, (x,))


@pytest.mark.parametrize("fixed_map", FIXED_MAPS, ids=str)
def test_rounding_of_fixed_maps_is_bounded(fixed_map):
    x = torch.randn(50, 6, 4, 4)
    error = (fixed_map.float()(x).double() - fixed_map.double()(x.double())).flatten(1).norm(dim=1)
    assert (error <= fixed_map.float().rounding(x).double()).all()


def test_householder_reflects_beyond_its_line_only():
    layer = Householder(2, dtype=torch.float64)
    x = torch.tensor([[1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(y[1], x[1])
    torch.testing.assert_close(y[0], x[0].flip(0))  # θ = π/2 is MaxMin


def test_group_sort_sorts():
    x = torch.randn(3, 6)
    assert torch.equal(GroupSort(3)(x), x.unflatten(1, (2, 3)).sort(2).values.flatten(1))
    assert torch.equal(GroupSort(2)(x), x.unflatten(1, (3, 2)).sort(2).values.flatten(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelPadding(0), "channels must be at least 1"),
        (lambda: ChannelPadding(2)(torch.zeros(1, 3, 4, 4)), "at most 2 channels"),
        (lambda: InvertibleDownsampling(0), "stride must be at least 1"),
        (lambda: InvertibleDownsampling(2)(torch.zeros(1, 3, 5, 4)), "multiples of 2"),
        (lambda: AveragePooling(0), "size must be at least 1"),
        (lambda: AveragePooling(3)(torch.zeros(1, 3, 4, 4)), "multiples of 3"),
        (lambda: NormPooling(3)(torch.zeros(1, 3, 4, 4)), "multiples of 3"),
        (lambda: GroupSort(1), "group must be at least 2"),
        (lambda: GroupSort(2)(torch.zeros(1, 3, 4, 4)), "multiple of 2"),
        (lambda: Householder(3), "channels must be even"),
        (lambda: Householder(4)(torch.zeros(1, 6)), "expected 4 channels"),
        (lambda: NormalizedLinear(3, 4, kind="orthonormal"), "do not fit into 3 features"),
        (lambda: NormalizedLinear(3, 0), "sizes must be at least 1"),
        (lambda: NormalizedLinear(3, 2)(torch.zeros(1, 4)), "expected 3 features"),
        (lambda: LipschitzSequential(nn.Linear(2, 2)), "Linear has no proved Lipschitz bound"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_norms_of_pixels_neither_overflow_nor_vanish():
    for scale in (1e-30, 1e30):
        x = torch.full((1, 1, 2, 2), scale, requires_grad=True)
        y = NormPooling(2)(x)
        torch.testing.assert_close(y, 2 * x[:, :, :1, :1], rtol=1e-6, atol=0)
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, 0.5))
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    NormPooling(2)(x).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda n: SLLLinear(n, 3), "weight"),
        (lambda n: SLLLinear(3, n), "units"),
        (lambda n: SLLLinear(3, 3, squarings=n), "squarings"),
        (lambda n: CPLLinear(3, 3, squarings=n), "squarings"),
        (lambda n: AOLLinear(3, n), "weight"),
        (lambda n: SLLConv2d(3, 3, n), "weight"),
        (lambda n: SLLConv2d(3, 3, padding=n), "padding"),
        (lambda n: AOLConv2d(3, 3, stride=n), "stride"),
        (lambda n: NormalizedLinear(n, 3), "in_features"),
        (lambda n: NormalizedLinear(3, n), "out_features"),
        (lambda n: GroupSort(n), "group"),
        (lambda n: AveragePooling(n), "size"),
        (lambda n: NormPooling(n), "size"),
        (lambda n: InvertibleDownsampling(n), "stride"),
        (lambda n: ChannelPadding(n), "channels"),
        (lambda n: Householder(n), "channels"),
        (lambda n: OrthogonalConv2d(3, 3, image=(n, 4)), "height"),
    ],
)
@pytest.mark.parametrize("wrong", [2.0, True, "2", None, torch.tensor(2.5)], ids=str)
def test_sizes_are_integers(make, argument, wrong):
    if argument == "padding" and wrong is None:
        return
    with pytest.raises(TypeError, match=f"{argument}.* must be an integer"):
        make(wrong)
    make(np.int64(2) if argument != "height" else np.int64(4))


@pytest.mark.parametrize("wrong", [nn.ReLU(), ReLU, "relu", torch.relu, nn.ReLU], ids=str)
def test_activations_are_those_of_the_solvers(wrong):
    for make in (SLLLinear, CPLLinear, SandwichLinear):
        with pytest.raises(TypeError, match=r"must be a solvers\.ProximalActivation, got"):
            make(4, 3, activation=wrong)


@pytest.mark.parametrize("make", [
    lambda: SLLLinear(4, 3), lambda: SLLConv2d(4, 3), lambda: NormalizedLinear(4, 3),
    lambda: GroupSort(), lambda: NormPooling(2), lambda: Flatten(), lambda: Householder(4),
    lambda: ChannelPadding(4),
])  # fmt: skip
def test_inputs_are_tensors(make):
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got ndarray"):
        make()(np.ones((1, 4, 4, 4), dtype=np.float32))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float16, torch.bool])
def test_inputs_of_other_dtypes_are_named(dtype):
    for layer in (SLLLinear(4, 3), NormalizedLinear(4, 3)):
        with pytest.raises(ValueError, match=f"x is {dtype}, the layer is torch.float32"):
            layer(torch.ones(2, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_maps_of_images_take_no_bytes_for_pixels(dtype):
    maps = [Normalize((0.5,) * 4, (0.3,) * 4), Householder(4), *FIXED_MAPS[:-2]]
    for layer in maps:
        with pytest.raises(ValueError, match=f"got {dtype}: convert images with lben.data.pixels"):
            layer(torch.ones(2, 4, 4, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_maps_with_numbers_of_their_own_run_in_another_dtype_under_autocast_only(dtype):
    x = torch.rand(2, 4, 4, 4, dtype=dtype)
    for layer in (Normalize((0.5,) * 4, (0.3,) * 4), Householder(4)):
        with pytest.raises(ValueError, match=f"x is {dtype}, the layer is torch.float32"):
            layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(x), layer(x.float()), check_dtype=False)


def test_half_precision_proves_nothing():
    for claim in (SLLLinear(4, 3).bfloat16().certificate, AOLLinear(4, 3).half().weights):
        with pytest.raises(ValueError, match="parameters must be float32 or float64"):
            claim()
    with pytest.raises(ValueError, match="is neither"):
        SLLLinear(4, 3).weights(torch.float16)
