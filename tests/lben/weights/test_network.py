"""Networks as blocks of units: their values, their checks, their fingerprint."""

import numpy as np
import pytest
import scipy.sparse
import torch

from lben.weights.activation import IDENTITY, RELU
from lben.weights.network import AffineMap, Block, Network


def residual(sparse: bool = False, scale: float = 1.0) -> Network:
    """Return z₁ = σ(W₁x + b₁), z₂ = σ(W₂z₁ + Vx + b₂), y = Cz₂ + Dx + c."""
    numbers = np.random.default_rng(0)
    wrap = scipy.sparse.csr_array if sparse else np.asarray
    W1, W2, V, C, D = (
        wrap(scale * numbers.standard_normal(shape))
        for shape in ((4, 3), (5, 4), (5, 3), (2, 5), (2, 3))
    )
    return Network(
        input_shape=(3,),
        blocks=(
            Block(affine=AffineMap.of({0: W1}, numbers.standard_normal(4)), activation=RELU),
            Block(affine=AffineMap.of({0: V, 1: W2}, numbers.standard_normal(5)), activation=RELU),
        ),
        output=AffineMap.of({0: D, 2: C}, numbers.standard_normal(2)),
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_a_network_is_a_layer_with_a_block_triangular_W(sparse):
    network = residual(sparse)
    weights = network.dense()
    x = torch.randn(7, 3, dtype=torch.float64)
    z = torch.zeros(7, 9, dtype=torch.float64)
    for _ in network.blocks:
        z = torch.relu(z @ weights.W.T + weights.drive(x))
    np.testing.assert_allclose(network.evaluate(x.numpy()), weights.readout(x, z), atol=1e-12)


def test_a_fingerprint_knows_numbers_activations_and_shape():
    network = residual()
    first = network.blocks[0]
    others = [
        residual(scale=2.0),
        residual(sparse=True),
        Network(
            input_shape=(3,),
            blocks=(Block(affine=first.affine, activation=IDENTITY), network.blocks[1]),
            output=network.output,
        ),
        Network(input_shape=(1, 3), blocks=network.blocks, output=network.output),
    ]
    assert residual().fingerprint == network.fingerprint
    assert len({network.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_a_block_cannot_be_fed_by_itself_or_by_a_block_of_another_size():
    W = np.ones((2, 2))
    for j, matrix in ((1, W), (0, np.ones((2, 3)))):
        with pytest.raises(ValueError, match="block 1 reads"):
            Network(
                input_shape=(2,),
                blocks=(Block(affine=AffineMap.of({j: matrix}, np.zeros(2)), activation=RELU),),
                output=AffineMap.of({0: W}, np.zeros(2)),
            )


def test_rounded_products_enclose_the_exact_ones():
    W = np.array([[0.1, 0.2]])
    affine = AffineMap(
        matrices={0: W}, bias=np.zeros(1), sizes={0: W}, bias_size=np.zeros(1), operations=4,
        exact=False,
    )  # fmt: skip
    assert (affine.enclosure(0).radius >= 4 * 2.0**-53 * W).all()
    with pytest.raises(ValueError, match="rounded products"):
        Network(input_shape=(2,), blocks=(), output=affine).dense()


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="batch of"):
        residual().evaluate(np.zeros((2, 4)))
