"""The formulas of the direct parameterization, with convolutions; γ is the unit of y."""

import pytest
import torch

from lben import DenseWeights, certify
from lben.parameterizations import ConvolutionalParameterization, PooledParameterization

SKIPS = [0.0, 0.7, 2.0]


def scrambled(made):
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return made


def at_one_pixel(w):
    """The layer of one pixel on a torus: every kernel is the sum of its taps."""
    tensors = {name: t.sum((2, 3)) if t.ndim == 4 else t for name, t in w.tensors().items()}
    D = w.D if isinstance(w.D, float) or w.D is None else None
    if D is not None:
        tensors["D"] = D * torch.eye(w.C.shape[0], dtype=w.C.dtype)
    return DenseWeights(**{"D": None, **tensors}, gamma=w.gamma)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("learn_metric", [False, True])
def test_the_sums_of_the_taps_are_a_certified_dense_layer(skip, learn_metric):
    free = ConvolutionalParameterization(
        2, 3, 2, gamma=2.0, skip=skip, learn_metric=learn_metric, circular=True,
        dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        weights = at_one_pixel(scrambled(free)())
    assert certify(weights).bound == 2.0


@pytest.mark.parametrize("gamma", [0.5, 4.0])
def test_gamma_is_the_unit_of_y(gamma):
    with torch.no_grad():
        made = []
        for g in (1.0, gamma):
            torch.manual_seed(0)
            made.append(ConvolutionalParameterization(1, 2, 1, gamma=g, dtype=torch.float64)())
    torch.testing.assert_close(made[1].W, made[0].W)
    torch.testing.assert_close(made[1].C, gamma * made[0].C)


def test_a_pooled_readout_has_the_norm_of_its_matrix():
    free = PooledParameterization(1, (2, 3), 4, image=(8, 8), pool=4, dtype=torch.float64)
    weights = free()
    norms = [float(torch.linalg.matrix_norm(t.detach().flatten(1), 2)) for t in (weights.C, free.G)]
    assert norms[0] == pytest.approx(norms[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"skip": 3.0}, r"skip must lie in \[0, gamma\]"),
        ({"skip": 0.5, "gamma": None}, r"skip must lie in \[0, gamma\]"),
        ({"gamma": -1.0}, "gamma must be a positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ConvolutionalParameterization(2, 3, 2, **{"gamma": 2.0, **options})
