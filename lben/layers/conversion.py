"""How does a stack of feed-forward layers become an equilibrium layer that is trained further?

Its weights are assembled into one set, and the complete parameterization takes them over.
Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from lben.layers.equilibrium import SolveOptions
from lben.layers.equilibrium_named import EquilibriumLinear
from lben.weights import ConvolutionalWeights, DenseWeights, stack


def from_weights(
    weights: DenseWeights | Sequence[DenseWeights], **options: Unpack[SolveOptions]
) -> EquilibriumLinear:
    """Return a trainable equilibrium layer with the function and the bound of explicit weights.

    A residual, sandwich, linear or equilibrium layer is one set of weights. Several layers are
    first assembled into one set, whose bound is the product of theirs. The complete
    parameterization takes it over, so that every later value of the free tensors keeps the bound.
    The idea is that of Havens, Araujo, Garg, Khorrami and Hu (2023), "Exploiting connections
    between Lipschitz structures for certifiably robust deep equilibrium models". A layer that only
    holds one set of weights is `EquilibriumLinear.from_weights`.

    Args:
        weights: of one layer, or of several, first to last; `layer.weights()` in float64.
        options: of `EquilibriumLayer`; the activation must be that of the feed-forward layers.

    Returns:
        The equilibrium layer, with its bound as `gamma`.

    Raises:
        ValueError: if the weights claim no bound or do not satisfy the certificate, do not fit
            each other, or have no hidden units.

    Example:
        >>> import torch
        >>> from lben import SLLLinear, from_weights
        >>> parts = [SLLLinear(4, 6, dtype=torch.float64) for _ in range(2)]
        >>> layer = from_weights([part.weights() for part in parts], tol=1e-9)
        >>> x = torch.randn(3, 4, dtype=torch.float64)
        >>> torch.allclose(layer(x), parts[1](parts[0](x)), atol=1e-5), round(layer.gamma, 4)
        (True, 1.0)
    """
    layers = [weights] if isinstance(weights, DenseWeights | ConvolutionalWeights) else weights
    if not layers or any(isinstance(layer, ConvolutionalWeights) for layer in layers):
        raise ValueError(
            "from_weights takes the matrices of at least one layer: of a convolution those of one "
            "image size, layer.weights().dense((height, width))"
        )
    whole = reduce(stack, [layer.apply(Tensor.double) for layer in layers])
    if whole.hidden_features == 0:
        raise ValueError("the weights have no hidden units: there is nothing to solve for")
    return EquilibriumLinear.from_weights(whole, trainable=True, **options)


def feedback(W: Float[Tensor, "n n"], sizes: Sequence[int]) -> Float[Tensor, ""]:
    """Return the squared Frobenius norm of W outside its strict block lower triangle.

    It is 0 for a stack of feed-forward layers with these numbers of units. As a penalty it keeps an
    equilibrium layer close to the stack that it was made from.

    Args:
        W: weights from state to state.
        sizes: units of each block, first to last.

    Returns:
        The sum of squares, with a gradient.

    Raises:
        ValueError: if the sizes do not add up to n.

    Example:
        >>> import torch
        >>> from lben import feedback
        >>> feedback(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), [1, 1])  # one layer after the other
        tensor(0.)
        >>> feedback(torch.tensor([[0.0, 2.0], [3.0, 0.0]]), [1, 1])
        tensor(4.)
    """
    if sum(sizes) != len(W):
        raise ValueError(f"sizes {tuple(sizes)} do not add up to the {len(W)} units of W")
    layer = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)], device=W.device)
    return (W * (layer[:, None] <= layer)).square().sum()
