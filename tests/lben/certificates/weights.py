"""Weights of a layer away from where they start, and what they do."""

import torch

from lben.parameterizations import DirectParameterization


def random_weights(gamma=1.0, seed=0, dtype=torch.float64, sizes=(7, 6, 3), **options):
    torch.manual_seed(seed)
    parameterization = DirectParameterization(*sizes, dtype=dtype, gamma=gamma, **options)
    with torch.no_grad():
        for parameter in parameterization.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        return parameterization().apply(torch.Tensor.detach)
