"""Does a network compute what it was made from? Both are evaluated at the same inputs.

They may differ by the proved rounding of both, and by nothing else. The proved rounding of a deep
network may be far larger than its rounding is. So no more is allowed than a millionth of the terms
of y (a thousandth where the model runs in float32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from lben.interop.maps import ConversionError
from lben.interop.rounding import RoundingModel
from lben.rigorous import Array, norms_up
from lben.weights.network import Network
from solvers.precision import use_full_precision


@dataclass(frozen=True)
class Comparison:
    """What a comparison of outputs has found.

    Attributes:
        difference: the largest l2 distance of two outputs.
        share: the largest distance as a part of what rounding explains; at most 1.
        samples: how many inputs were compared.

    Example:
        >>> Comparison(difference=1e-16, share=0.01, samples=8).samples
        8
    """

    difference: float
    share: float
    samples: int


def compare_outputs(
    model: nn.Module | Callable[[Array], ArrayLike],
    network: Network,
    inputs: Array | None = None,
    *,
    widen: bool = True,
    unit_error: float = 0.0,
) -> Comparison:
    """Compare the outputs of a network with those of what it was made from.

    Args:
        model: a module in eval mode; or a function of a batch in float64, such as a session of
            another runtime, which returns float64 if it runs in float64.
        network: made from it.
        inputs: batch × the input's shape, representable in the model's dtype; random ones of
            several sizes when None.
        widen: whether a module is evaluated with its parameters converted to float64, where
            rounding hides least. A module that computes its weights from other parameters has other
            weights then: it is evaluated in its own dtype.
        unit_error: what the model's activations may be off by besides, in every unit: torch's
            Softplus jumps by 2e-9 at its threshold.

    Returns:
        The largest difference.

    Raises:
        ConversionError: if two outputs differ by more than rounding explains, or in shape.

    Example:
        >>> import torch
        >>> from lben.interop import compare_outputs, from_torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).eval()
        >>> compare_outputs(model, from_torch(model, (3,))).share <= 1
        True
    """
    x = random_inputs(network.input_shape) if inputs is None else np.asarray(inputs)
    if isinstance(model, nn.Module):
        found, dtype = _evaluate(model, x, widen)
    else:
        found = np.asarray(model(x))
        dtype = torch.float64 if found.dtype == np.float64 else torch.float32
    expected = RoundingModel(network)
    own = theirs = expected.evaluate(x)
    if dtype != torch.float64 or unit_error:
        theirs = expected.evaluate(x, dtype, unit_error)
    if found.size != own.value.size:
        raise ConversionError(
            f"the network has outputs of shape {own.value.shape}, what it was made from has "
            f"{found.shape}"
        )
    apart = norms_up(found.reshape(len(x), -1).astype(np.float64) - own.value, 1)
    most = 2.0**-20 if dtype == torch.float64 else 2.0**-10
    allowed = np.minimum(own.error + theirs.error, most * own.size)
    share = np.where(apart > 0, apart / np.maximum(allowed, 1e-300), 0.0)
    if not (share <= 1).all():
        worst = int(np.argmax(np.where(np.isnan(share), np.inf, share)))
        raise ConversionError(
            "the network computes something else than what it was made from: outputs of norm "
            f"{norms_up(own.value, 1)[worst]:.3g} differ by {apart[worst]:.3g}, and rounding "
            f"explains {allowed[worst]:.3g}. Please report this conversion"
        )
    return Comparison(float(apart.max()), float(share.max()), len(x))


def random_inputs(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Return inputs of several sizes, exact in float32: zero, in [0, 1], and normal ones.

    Args:
        shape: of one sample.
        seed: of the random numbers.
    """
    numbers = np.random.default_rng(seed)
    normal = numbers.standard_normal((5, *shape)) * np.array([0.01, 0.3, 1, 3, 30]).reshape(
        5, *[1] * len(shape)
    )
    x = np.concatenate([np.zeros((1, *shape)), numbers.random((2, *shape)), normal])
    return x.astype(np.float32).astype(np.float64)


def _evaluate(model: nn.Module, x: Array, widen: bool) -> tuple[Array, torch.dtype]:
    """Return the outputs of a module, and the dtype in which it rounds."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = {k: t for k, t in tensors.items() if t.is_floating_point()}
    like = next(iter(floating.values()), torch.zeros(()))
    dtypes = {t.dtype for t in floating.values()} or {like.dtype}
    coarse = torch.float32 if torch.float32 in dtypes else torch.float64
    dtype = torch.float64 if widen else coarse
    # A copy: a module may write to its input.
    inputs = torch.tensor(x, device=like.device, dtype=dtype if widen else like.dtype)
    with torch.no_grad(), use_full_precision(like):
        if widen:
            wide = {k: t.double() for k, t in floating.items()}
            y = torch.func.functional_call(model, wide, (inputs,), tie_weights=True)
        else:
            y = model(inputs)
    return y.detach().double().cpu().numpy(), dtype
