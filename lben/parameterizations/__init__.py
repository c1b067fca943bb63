"""Free tensors to `ExplicitWeights`: maps whose range satisfies the certificate by construction."""

from lben.parameterizations.direct import DirectParameterization

__all__ = ["DirectParameterization"]
