"""What if the weights are given? A parameterization that returns them as they are."""

from __future__ import annotations

from torch import Tensor, nn

from lben.weights import ConvolutionalWeights, DenseWeights, PooledWeights

Weights = DenseWeights | ConvolutionalWeights | PooledWeights


class FixedWeights(nn.Module):
    """Weights that are not computed from anything.

    Nothing holds by construction here: a certificate of the layer proves what the weights support.

    Args:
        weights: copied, in their own precision; they are not trained.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._like = weights.apply(Tensor.detach)
        for name, tensor in weights.tensors().items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone(), False))

    @property
    def gamma(self) -> float | None:
        """The bound that the weights claim."""
        return self._like.gamma

    def forward(self) -> Weights:
        """Return the weights."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        return self._like.with_tensors(tensors)
