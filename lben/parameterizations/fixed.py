"""What if the weights are given? A parameterization that returns them as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lben.parameterizations.equilibrium import W_, EquilibriumParameterization


class FixedWeights(EquilibriumParameterization[W_]):
    """Weights that are not computed from anything.

    Nothing holds by construction here: a certificate of the layer proves what the weights support.
    The tensors are buffers: they move with a layer and are part of its state, and no optimizer
    finds them.

    Args:
        weights: copied, in their own precision; they are not trained. γ is what they claim.

    Example:
        >>> import torch
        >>> from lben import EquilibriumLinear
        >>> from lben.layers import EquilibriumLayer
        >>> weights = EquilibriumLinear(4, 6, 2).weights()
        >>> layer = EquilibriumLayer(FixedWeights(weights))
        >>> layer.weights().fingerprint == weights.fingerprint
        True
    """

    def __init__(self, weights: W_) -> None:
        super().__init__()
        self.gamma = weights.gamma
        self._like = weights.apply(Tensor.detach)
        for name, tensor in weights.tensors().items():
            self.register_buffer(name, tensor.detach().clone())

    def forward(self) -> W_:
        """Return the weights, in memory of their own."""
        stored = dict(self.named_buffers())
        first = next(iter(stored.values()))

        def follow(t: Tensor) -> Tensor:
            return t if t.numel() else torch.empty_like(t, dtype=first.dtype, device=first.device)

        # Tensors without numbers are no part of `tensors()`; they move with the others.
        return self._like.apply(follow).with_tensors({k: t.clone() for k, t in stored.items()})
