"""Which smaller bound do the weights support? Proposals of (Λ, γ), for `certify` to prove.

From cheap to expensive: the weights' own Λ times a factor, for all outputs or for each pair of
them; Λ optimised, for all outputs or for each pair, of layers and of feed-forward networks.
Symbols: docs/glossary.md.
"""

from lben.tightening.diagonal import tighten_diagonal, tighten_pairs
from lben.tightening.linf import tighten_linf
from lben.tightening.network import tighten_network, tighten_network_pairs
from lben.tightening.scaled import tighten_pooled, tighten_scaled

__all__ = [
    "tighten_diagonal",
    "tighten_linf",
    "tighten_network",
    "tighten_network_pairs",
    "tighten_pairs",
    "tighten_pooled",
    "tighten_scaled",
]
