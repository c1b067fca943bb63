"""How far is an equilibrium layer from the stack of layers that it was made from?

`EquilibriumLinear.from_weights` makes it. Symbols: docs/glossary.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


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
