"""Norms of a network's maps hold, are near, and their product bounds every quotient."""

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from lben.certificates import network_norms as norms
from lben.certificates import product_bound
from lben.certificates.network_norms import map_norm_bound, network_norms
from lben.interop import from_torch
from lben.weights.network import AffineMap, to_dense


def matrices():
    numbers = np.random.default_rng(0)
    yield numbers.standard_normal((7, 4))
    yield 1e150 * numbers.standard_normal((3, 9))
    yield np.zeros((2, 3))
    yield scipy.sparse.random_array((40, 60), density=0.1, rng=numbers, format="csr")
    yield scipy.sparse.eye_array(5, format="csr")


@pytest.mark.parametrize("products", [0, 1e9])
@pytest.mark.parametrize("matrix", list(matrices()), ids=lambda m: f"{type(m).__name__}{m.shape}")
def test_the_norm_of_a_matrix_is_bounded(matrix, products):
    found = map_norm_bound(AffineMap.of({0: matrix}, np.zeros(matrix.shape[0])), 0, products)
    true = np.linalg.norm(to_dense(matrix), 2)
    assert true <= found <= true * (1.000001 if products else 2.5) + 1e-140


@pytest.mark.parametrize("matrix", list(matrices()), ids=lambda m: f"{type(m).__name__}{m.shape}")
def test_the_norm_of_a_sparse_matrix_is_bounded_by_its_gram_matrix(matrix):
    found = norms._gram_bound(scipy.sparse.csr_array(matrix), 1e9)
    true = np.linalg.norm(to_dense(matrix), 2)
    assert true <= found <= true * 1.6 + 1e-140


def test_the_norm_of_a_selection_is_exact():
    identity = scipy.sparse.eye_array(5000, format="csr")
    found = map_norm_bound(AffineMap.of({0: identity}, np.zeros(5000)), 0)
    assert 1 <= found < 1 + 1e-10


def test_rounded_numbers_are_covered():
    W = np.array([[1.0]])
    affine = AffineMap(
        matrices={0: W}, bias=np.zeros(1), sizes={0: 1e6 * W}, bias_size=np.zeros(1),
        operations=100, exact=False,
    )  # fmt: skip
    assert map_norm_bound(affine, 0) >= 1 + 1e6 * 100 * 2.0**-53


def test_the_product_of_a_chain_is_that_of_spectral_norms():
    model = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 3)).eval()
    expected = 0.25
    for layer in (model[0], model[2]):
        expected *= float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    found = product_bound(from_torch(model, (5,)))
    assert expected <= found <= expected * (1 + 1e-9)


def test_no_quotient_exceeds_the_bound_and_gains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(5, 3, 3)

        def forward(self, x):
            y = nn.functional.max_pool2d(torch.cat([x, self.one(x).abs()], 1), 2)
            return (self.two(y) + y[:, 2:, 1:-1, 1:-1]).flatten(1)

    network = from_torch(Net().eval(), (2, 8, 8))
    found = network_norms(network)
    x, d = torch.randn(2, 200, 128, dtype=torch.float64).numpy()
    quotients = np.linalg.norm(
        network.evaluate(x + 1e-3 * d) - network.evaluate(x), axis=1
    ) / np.linalg.norm(1e-3 * d, axis=1)
    assert 0 < quotients.max() <= found.bound == product_bound(network)
    pairs = norms.prove_product_pairs(network).tensor().numpy()
    moved = network.evaluate(x + 1e-3 * d) - network.evaluate(x)
    apart = np.abs(moved[:, :, None] - moved[:, None]) / np.linalg.norm(1e-3 * d, axis=1).reshape(
        -1, 1, 1
    )
    assert (apart <= pairs).all()
    assert pairs.max() <= np.sqrt(2) * found.bound * (1 + 1e-9)
    assert len(found.gains) == len(network.blocks) + 1
