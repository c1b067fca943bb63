"""What do the operations of networks do to an expression?

Every reader of networks ends here: torch.nn and ONNX have the same operations. Axes and shapes are
those of one sample, without the batch.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

from lben.interop.expressions import Expression
from lben.interop.maps import ConversionError, Indices, make_map
from lben.interop.windows import cover
from lben.rigorous import Array
from lben.weights.activation import (
    HARDSIGMOID,
    HARDSWISH,
    RELU,
    SIGMOID,
    SILU,
    make_hardtanh,
)


def apply_linear(x: Expression, weight: Array, bias: Array | None = None) -> Expression:
    """Return Wx + b of the last axis.

    Args:
        x: the expression.
        weight: W, outputs × inputs.
        bias: b, or None.

    Raises:
        ConversionError: if the last axis has another size.
    """
    outputs, inputs = weight.shape
    if not x.shape or x.shape[-1] != inputs:
        raise ConversionError(f"it takes {inputs} features, and gets the shape {x.shape}")
    rows = math.prod(x.shape[:-1])
    b = np.zeros(outputs) if bias is None else bias
    matrix = weight
    if rows != 1:
        matrix = scipy.sparse.kron(scipy.sparse.eye_array(rows), weight, format="csr")
    step = make_map(matrix, np.tile(b, rows), operations=inputs + 2)
    return x.then(step, (*x.shape[:-1], outputs))


def convolve(
    x: Expression, weight: Array, bias: Array | None, axes: Sequence[Indices], groups: int = 1
) -> Expression:
    """Return the convolution of an image of any number of axes, channels first.

    Args:
        x: the expression.
        weight: outputs × inputs per group × kernel.
        bias: one number per output channel, or None.
        axes: the windows along each axis, see `windows.slide`.
        groups: of channels.

    Raises:
        ConversionError: if the number of channels does not fit.
    """
    outputs, inputs = weight.shape[:2]
    _check_channels(x, inputs * groups, len(axes))
    matrix = _convolution_matrix(weight, axes, x.shape[1:], groups)
    taps = inputs * math.prod(weight.shape[2:])
    b = np.repeat(np.zeros(outputs) if bias is None else bias, matrix.shape[0] // outputs)
    step = make_map(matrix, b, operations=taps + 2)
    return x.then(step, (outputs, *(len(axis) for axis in axes)))


def convolve_transposed(
    x: Expression, weight: Array, bias: Array | None, axes: Sequence[Indices],
    sizes: Sequence[int], groups: int = 1,
) -> Expression:  # fmt: skip
    """Return the adjoint of a convolution.

    Args:
        x: the expression.
        weight: inputs × outputs per group × kernel.
        bias: one number per output channel, or None.
        axes: the windows of the convolution, along each axis of the result.
        sizes: of the axes of the result.
        groups: of channels.

    Raises:
        ConversionError: if the number of channels does not fit.
    """
    inputs, outputs = len(weight), weight.shape[1] * groups
    _check_channels(x, inputs, len(axes))
    matrix = _convolution_matrix(weight, axes, sizes, groups)
    b = np.repeat(np.zeros(outputs) if bias is None else bias, math.prod(sizes))
    taps = inputs * math.prod(weight.shape[2:])
    step = make_map(scipy.sparse.csr_array(matrix.T), b, operations=taps + 2)
    return x.then(step, (outputs, *sizes))


def _check_channels(x: Expression, channels: int, rank: int) -> None:
    if x.shape[0] != channels or len(x.shape) != rank + 1:
        raise ConversionError(
            f"it takes {channels} channels on {rank} axes, and gets the shape {x.shape}"
        )


def _convolution_matrix(
    weight: Array, axes: Sequence[Indices], sizes: Sequence[int], groups: int
) -> scipy.sparse.csr_array:
    """Return the matrix of a convolution of images of these sizes."""
    outputs, inputs = weight.shape[:2]
    places = cover(axes, sizes)
    positions, pixels = len(places), math.prod(sizes)
    position, tap = np.nonzero(places >= 0)
    # Axes of these arrays: output channel, input channel of the group, and (position, tap).
    out = np.arange(outputs)[:, None, None]
    first = out // (outputs // groups) * inputs
    source = (first + np.arange(inputs)[:, None]) * pixels + places[position, tap]
    values = weight.reshape(outputs, inputs, -1)[:, :, tap]
    target = np.broadcast_to(out * positions + position, values.shape)
    return scipy.sparse.csr_array(
        (values.ravel(), (target.ravel(), source.ravel())),
        shape=(outputs * positions, inputs * groups * pixels),
    )


def average(x: Expression, axes: Sequence[Indices], divisors: Array | None = None) -> Expression:
    """Return averages over windows of the last axes.

    Args:
        x: the expression.
        axes: the windows along each of the last axes.
        divisors: one number per position; the number of entries in the window when None.
    """
    rank = len(axes)
    sizes = x.shape[len(x.shape) - rank :]
    places = cover(axes, sizes)
    inside = places >= 0
    divisors = inside.sum(axis=1) if divisors is None else divisors
    # Of each position: the sum is evaluated first, and divided then.
    values = np.repeat(1.0 / divisors, inside.sum(axis=1))
    position, tap = np.nonzero(inside)
    one = scipy.sparse.csr_array(
        (values, (position, places[position, tap])), shape=(len(places), math.prod(sizes))
    )
    lead = math.prod(x.shape[: len(x.shape) - rank])
    matrix = scipy.sparse.kron(scipy.sparse.eye_array(lead), one, format="csr")
    powers = bool((np.frexp(divisors)[0] == 0.5).all())
    step = make_map(
        matrix, np.zeros(len(places) * lead), operations=places.shape[1] + 2,
        roundings=0 if powers else 2, exact=powers,
    )  # fmt: skip
    return x.then(step, (*x.shape[: len(x.shape) - rank], *(len(axis) for axis in axes)))


def sum_over(x: Expression, axes: Sequence[int], keepdim: bool, divide: bool) -> Expression:
    """Return sums, or means, over some axes.

    Args:
        x: the expression.
        axes: not negative.
        keepdim: whether they stay, with size 1.
        divide: whether means are wanted.
    """
    divisor = None if divide else np.ones(1)
    return reduce_axes(x, axes, keepdim, lambda moved, windows: average(moved, windows, divisor))


def reduce_axes(
    x: Expression,
    axes: Sequence[int],
    keepdim: bool,
    reduce: Callable[[Expression, list[Indices]], Expression],
) -> Expression:
    """Return what a function of windows makes of all entries along some axes.

    Args:
        x: the expression.
        axes: not negative.
        keepdim: whether they stay, with size 1.
        reduce: of the expression with these axes last, and one window along each of them.
    """
    others = [axis for axis in range(len(x.shape)) if axis not in axes]
    moved = x.select(np.transpose(x.places, (*others, *axes)))
    y = reduce(moved, [np.arange(x.shape[axis])[None] for axis in axes])
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return y.select(y.places.reshape(shape if keepdim else [x.shape[axis] for axis in others]))


def take_largest(x: Expression, axes: Sequence[Indices]) -> Expression:
    """Return the largest entries in windows of the last axes, one axis after the other.

    Each maximum of two is a ReLU unit. Where a window has fewer entries, one of them is taken
    twice.

    Args:
        x: the expression.
        axes: the windows along each of the last axes.
    """
    first = len(x.shape) - len(axes)
    for axis, places in enumerate(axes, start=first):
        if (places < 0).all(axis=1).any():
            raise ConversionError("a window lies in the padding, and has no largest entry")
        full = np.where(places < 0, places.max(axis=1, keepdims=True), places)
        parts = [
            x.select(np.take(x.places, full[:, tap], axis=axis)) for tap in range(full.shape[1])
        ]
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            rest = parts[-1:] if len(parts) % 2 else []
            parts = [a.maximum(b) for a, b in pairs] + rest
        x = parts[0]
    return x


def normalize(
    x: Expression,
    mean: Array,
    variance: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
) -> Expression:
    """Return (x − μ)/√(v + ε)·w + b per channel, batch normalisation as it is evaluated.

    Args:
        x: channels first.
        mean, variance: μ and v, as stored.
        weight, bias: w and b, or None.
        eps: ε.

    Raises:
        ConversionError: for another number of channels, or v + ε that is not positive.
    """
    if not x.shape or x.shape[0] != len(mean):
        raise ConversionError(f"it takes {len(mean)} channels, and gets the shape {x.shape}")
    if not (variance + eps > 0).all():
        raise ConversionError(f"its variance + eps must be positive, got {variance.min() + eps}")
    factors = 1 / np.sqrt(variance + eps) * (1.0 if weight is None else weight)
    shift = -mean * factors
    size = np.abs(shift)
    if bias is not None:
        shift, size = shift + bias, size + np.abs(bias)
    pixels = math.prod(x.shape[1:])
    matrix = scipy.sparse.diags_array(np.repeat(factors, pixels)).tocsr()
    # The factor has four roundings, the shift two more. PyTorch evaluates (x − μ)·factor + b or
    # x·factor + shift: three roundings.
    step = make_map(matrix, np.repeat(shift, pixels), operations=4, roundings=8, exact=False)
    sizes = np.repeat(size, pixels) * (1 + 2.0**-40)
    return x.then(type(step)(
        matrices=step.matrices, bias=step.bias, sizes=step.sizes, bias_size=sizes,
        operations=step.operations, exact=False,
    ), x.shape)  # fmt: skip


def multiply(x: Expression, factors: Array) -> Expression:
    """Return it times numbers that broadcast with its shape."""
    shape = np.broadcast_shapes(x.shape, factors.shape)
    return x.broadcast(shape).times(factors)


def divide(x: Expression, divisors: Array) -> Expression:
    """Return it divided by numbers that broadcast with its shape.

    Raises:
        ConversionError: if one is zero.
    """
    if not divisors.all():
        raise ConversionError("it divides by zero")
    powers = bool((np.abs(np.frexp(divisors)[0]) == 0.5).all())
    shape = np.broadcast_shapes(x.shape, divisors.shape)
    return x.broadcast(shape).times(
        np.asarray(1 / divisors), roundings=0 if powers else 2, exact=powers
    )


def gate(x: Expression, y: Expression) -> Expression:
    """Return the product of two expressions, if it is a function of one number: v·σ(v).

    Raises:
        ConversionError: if it is not known to be one.
    """
    for v, gated in ((x, y), (y, x)):
        for gate, whole in _GATES.items():
            if gated.is_activation_of(v, gate):
                return v.activate(whole)
    raise ConversionError(
        "both factors depend on the input: their product is no function of one number, and has no "
        "bounded slope (of such products x·sigmoid(x) and x·hardsigmoid(x) are known)"
    )


_GATES = {SIGMOID: SILU, HARDSIGMOID: HARDSWISH}


def add(x: Expression, y: Expression) -> Expression:
    """Return the sum, with broadcasting."""
    shape = np.broadcast_shapes(x.shape, y.shape)
    return x.broadcast(shape).plus(y.broadcast(shape))


def apply_prelu(x: Expression, slopes: Array) -> Expression:
    """Return v for v ≥ 0 and av for v < 0, with numbers a that broadcast: av + (1 − a)·ReLU(v)."""
    shape = np.broadcast_shapes(x.shape, slopes.shape)
    x = x.broadcast(shape)
    rest, exact = 1 - slopes, bool(((1 - (1 - slopes) == slopes) & (np.abs(slopes) <= 1)).all())
    linear = x.times(slopes)
    return linear.plus(x.activate(RELU).times(rest, roundings=0 if exact else 1, exact=exact))


def clamp(x: Expression, least: float | None, largest: float | None) -> Expression:
    """Return it cut off at two numbers; None for no limit."""
    low = -math.inf if least is None else float(least)
    high = math.inf if largest is None else float(largest)
    if math.isfinite(low) and math.isfinite(high):
        return x.activate(make_hardtanh(low, high))
    if math.isfinite(low):
        if low == 0:
            return x.activate(RELU)
        limit = x.constant(np.full(x.shape, low))
        return limit.plus(x.minus(limit).activate(RELU))
    if math.isfinite(high):
        limit = x.constant(np.full(x.shape, high))
        return limit.minus(limit.minus(x).activate(RELU))
    return x
