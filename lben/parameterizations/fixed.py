"""What if the weights are given? A parameterization that returns them as they are."""

from __future__ import annotations

from torch import Tensor, nn

from lben.parameterizations.equilibrium import W_, EquilibriumParameterization


class FixedWeights(EquilibriumParameterization[W_]):
    """Weights that are not computed from anything.

    Nothing holds by construction here: a certificate of the layer proves what the weights support.

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
            self.register_parameter(name, nn.Parameter(tensor.detach().clone(), False))

    def forward(self) -> W_:
        """Return the weights."""
        return self._like.with_tensors(dict(self.named_parameters()))
