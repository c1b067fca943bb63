"""Which smaller bound do the weights support? Proposals of (Λ, γ), for `certify` to prove.

From cheap to dear: Λ kept up to a factor, for all outputs or for each pair of them; Λ optimised,
for all outputs or for each pair.
"""

from lben.tightening.joint import tighten_jointly, tighten_pairs
from lben.tightening.kept import tighten, tighten_pooled
from lben.tightening.largest import tighten_largest

__all__ = ["tighten", "tighten_jointly", "tighten_largest", "tighten_pairs", "tighten_pooled"]
