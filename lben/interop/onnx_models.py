"""Which network is an ONNX model? What its operators do to an expression, node by node.

The file is read by onnx itself (`pip install 'lben[onnx]'`). Its numbers are taken as they are
stored. Operators that only move entries are carried out by onnx's reference evaluator, on places in
place of numbers (Note [Places in a batch], lben/interop/expressions.py). So are operators on
constants alone, such as the computation of shapes.

Reference: https://onnx.ai/onnx/operators
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from lben.interop import operations
from lben.interop.comparison import compare_outputs
from lben.interop.expressions import (
    Builder,
    Expression,
    broadcast_constant,
    join,
    number_places,
    read_places,
    within_a_sample,
)
from lben.interop.maps import ConversionError, Indices
from lben.interop.windows import count_padded, count_taps, slide
from lben.rigorous import Array
from lben.weights import activation
from lben.weights.network import Network

if TYPE_CHECKING:
    import onnx

_BATCH = 3
"""Samples of a batch whose size is left open."""
_UNIT_ERROR = {np.dtype(np.float64): 2.0**-46, np.dtype(np.float32): 2.0**-17}
"""What onnx's reference evaluator may lose in a unit besides: it computes log(1 + eᵛ) as such."""
_IN_FLOAT32 = ("Gelu", "HardSwish")
"""Operators whose √2 or 1/6 the reference evaluator rounds to float32."""


def from_onnx(
    source: str | PathLike[str] | bytes | onnx.ModelProto,
    example_shape: Sequence[int] | None = None,
    *,
    check: bool = True,
) -> Network:
    """Return the network that an ONNX model computes, as blocks of units.

    Afterwards the network and the model (by onnx's reference evaluator, in float64 if it can) are
    evaluated at random inputs. A difference beyond the proved rounding refutes the conversion.

    Args:
        source: a file, its bytes, or a model. One input, whose first dimension is the batch, and
            one output.
        example_shape: of one sample, where the model leaves sizes open.
        check: whether the outputs are compared.

    Returns:
        The network; its input is the flattened sample, its output the flattened output.

    Raises:
        ImportError: if onnx is not installed.
        ConversionError: if the file is damaged or no ONNX model; naming the node and its operator:
            if it is not supported, does not fit, or has numbers that are not finite or of another
            type than float32 and float64; or if the outputs differ.

    Example:
        >>> import numpy as np
        >>> from onnx import TensorProto, helper, numpy_helper
        >>> from lben import from_onnx
        >>> W = numpy_helper.from_array(np.ones((4, 3), dtype=np.float32), "W")
        >>> x, y = (
        ...     helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        ...     for name, size in (("x", 3), ("y", 4))
        ... )
        >>> nodes = [
        ...     helper.make_node("Gemm", ["x", "W"], ["v"], transB=1),
        ...     helper.make_node("Relu", ["v"], ["y"]),
        ... ]
        >>> model = helper.make_model(helper.make_graph(nodes, "relu", [x], [y], [W]))
        >>> network = from_onnx(model.SerializeToString())  # or the path of a file
        >>> network.widths, network.evaluate(np.ones((1, 3))).tolist()
        ((3, 4), [[3.0, 3.0, 3.0, 3.0]])
    """
    model = _load(source)
    graph = _Graph.of(model, example_shape)
    y = graph.run()
    network = graph.builder.finish(y)
    if check:
        narrow = any(node.op_type in _IN_FLOAT32 for node in model.graph.node)
        dtype = np.dtype(np.float32 if narrow else np.float64)
        run = _evaluator(model, dtype)
        compare_outputs(run, network, unit_error=_UNIT_ERROR[dtype])
    return network


def _load(source: Any) -> onnx.ModelProto:
    """Return a model that onnx's checker accepts."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError("from_onnx needs onnx: pip install 'lben[onnx]'") from error
    what = "these bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, onnx.ModelProto):
            model, what = source, "the model"
        elif isinstance(source, bytes):
            model = onnx.load_model_from_string(source)
        else:
            model = onnx.load_model(source)
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ConversionError(
            f"{what} is no complete ONNX model (is the file truncated, or of another format?): "
            f"{error}"
        ) from error
    return model


def _evaluator(model: onnx.ModelProto, dtype: np.dtype[Any]) -> Callable[[Array], Any]:
    """Return the model as a function of a batch, in a dtype."""
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    wide = onnx.ModelProto()
    wide.CopyFrom(model)

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == onnx.TensorProto.FLOAT and dtype == np.float64:
            values = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in wide.graph.initializer:
        widen(tensor)
    for node in wide.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widen(attribute.t)
            if node.op_type == "Cast" and attribute.name == "to":
                same = attribute.i == onnx.TensorProto.FLOAT and dtype == np.float64
                attribute.i = onnx.TensorProto.DOUBLE if same else attribute.i
    session = ReferenceEvaluator(wide)

    def evaluate(name: str, part: Array) -> Any:
        found: Any = session.run(None, {name: part.astype(dtype)})
        return np.asarray(found[0])

    (value,) = _inputs(model)
    fixed = value.type.tensor_type.shape.dim[0].dim_value
    steps = fixed if fixed > 0 else None

    def run(x: Array) -> Any:
        parts = [x] if steps is None else np.split(x, range(steps, len(x), steps))
        whole = [p if steps in (None, len(p)) else np.repeat(p, steps, 0)[:steps] for p in parts]
        with np.errstate(all="ignore"):
            found = [evaluate(value.name, part) for part in whole]
        return np.concatenate([f[: len(p)] for f, p in zip(found, parts, strict=True)])

    return run


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    known = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in known]


@dataclass
class _Graph:
    """A model as it is converted.

    Attributes:
        model: as it was read.
        builder: of the network.
        values: expressions and constants by name.
        batch: samples of a batch.
    """

    model: onnx.ModelProto
    builder: Builder
    values: dict[str, Any]
    batch: int

    @classmethod
    def of(cls, model: onnx.ModelProto, example_shape: Sequence[int] | None) -> _Graph:
        """Return a graph with its input and its stored numbers."""
        from onnx import numpy_helper

        inputs = _inputs(model)
        if len(inputs) != 1 or len(model.graph.output) != 1:
            raise ConversionError(
                f"a network has one input and one output, the model has {len(inputs)} and "
                f"{len(model.graph.output)}"
            )
        dims = inputs[0].type.tensor_type.shape.dim
        sizes = [dim.dim_value for dim in dims]
        if len(sizes) < 2:
            raise ConversionError(
                f"the input {inputs[0].name} must have the batch as its first dimension, got "
                f"{len(sizes)} dimensions"
            )
        shape = tuple(sizes[1:])
        if example_shape is not None:
            given = tuple(example_shape)
            fits = len(given) == len(shape) and all(
                b in (0, a) for a, b in zip(given, shape, strict=True)
            )
            if not fits or min(given) < 1:
                raise ConversionError(
                    f"example_shape {given} does not fit the input of the model, {shape} (0: open)"
                )
            shape = given
        if min(shape) < 1:
            raise ConversionError(
                f"the model leaves sizes of its input open, {shape} (0: open): give example_shape"
            )
        builder = Builder(shape)
        values: dict[str, Any] = {"": None, inputs[0].name: builder.input()}
        for tensor in model.graph.initializer:
            values[tensor.name] = _check_numbers(numpy_helper.to_array(tensor), tensor.name)
        return cls(model, builder, values, sizes[0] if sizes[0] > 0 else _BATCH)

    def run(self) -> Expression:
        """Return the output."""
        for index, node in enumerate(self.model.graph.node):
            where = f"{node.op_type}, node {node.name or index}"
            try:
                found = self._convert(node)
            except ConversionError as error:
                raise ConversionError(f"{where}, cannot be converted: {error}") from error
            except Exception as error:
                raise ConversionError(
                    f"{where}, cannot be converted: {type(error).__name__}: {error}"
                ) from error
            self.values.update(zip(node.output, found, strict=False))
        y = self.values.get(self.model.graph.output[0].name)
        if not isinstance(y, Expression):
            raise ConversionError("the output of the model does not depend on its input")
        return y

    def _convert(self, node: onnx.NodeProto) -> Sequence[Any]:
        """Return the outputs of a node."""
        from onnx import helper

        name = node.op_type
        if node.domain not in ("", "ai.onnx"):
            raise ConversionError(f"operators of the domain {node.domain} are not known")
        arguments = [self._read(value) for value in node.input]
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        depends = [value for value in arguments if isinstance(value, Expression)]
        if name == "Shape" and depends:
            whole = (self.batch, *depends[0].shape)
            start, end = options.get("start", 0), options.get("end", len(whole))
            return [np.array(whole[start:end], dtype=np.int64)]
        if not depends:
            return self._fold(node, arguments)
        if name in _MOVES:
            return self._rearrange(node, arguments)
        if name not in _OPERATORS:
            raise ConversionError(_NEEDS.get(name, _UNKNOWN))
        return [_OPERATORS[name](*arguments, **options)]

    def _read(self, name: str) -> Any:
        if name not in self.values:
            raise ConversionError(f"it reads {name}, a second output of an operator")
        return self.values[name]

    def _fold(self, node: onnx.NodeProto, arguments: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs of a node of constants."""
        found = self._evaluate(node, arguments)
        rounds = any(np.issubdtype(np.asarray(v).dtype, np.floating) for v in found)
        if rounds and node.op_type not in (*_MOVES, "Constant", "ConstantOfShape"):
            raise ConversionError(
                "it computes a constant in floating point, which rounds: fold constants before "
                "export, or replace its result by an initializer"
            )
        return [_check_numbers(np.asarray(value), node.op_type) for value in found]

    def _rearrange(self, node: onnx.NodeProto, arguments: list[Any]) -> Sequence[Expression]:
        """Return the outputs of a node that only moves entries."""
        first = next(value for value in arguments if isinstance(value, Expression))
        if node.op_type == "Concat":
            arguments = [
                v if isinstance(v, Expression) else first.constant(within_a_sample(v))
                for v in arguments
            ]
        if node.op_type == "Pad" and _fills(node, arguments):
            raise ConversionError("it pads with a number other than 0")
        parts = [value for value in arguments if isinstance(value, Expression)]
        numbers = iter(number_places(parts, self.batch))
        found = self._evaluate(
            node, [next(numbers) if isinstance(v, Expression) else v for v in arguments]
        )
        whole, total = join(parts) if len(parts) > 1 else parts[0], sum(p.size for p in parts)
        return [
            whole.select(read_places(np.asarray(places, dtype=np.float64), total, self.batch))
            for places in found
        ]

    def _evaluate(self, node: onnx.NodeProto, arguments: Sequence[Any]) -> Sequence[Any]:
        """Return the outputs of one node by onnx's reference evaluator."""
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        named = {n: v for n, v in zip(node.input, arguments, strict=True) if n}
        graph = helper.make_graph(
            [node],
            "node",
            [helper.make_empty_tensor_value_info(n) for n in named],
            [helper.make_empty_tensor_value_info(n) for n in node.output],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import)
        found: Any = ReferenceEvaluator(model).run(None, named)
        return list(found)


def _fills(node: onnx.NodeProto, arguments: Sequence[Any]) -> bool:
    """Say whether a Pad node fills in a number other than 0."""
    values = [a.f for a in node.attribute if a.name == "value"]
    values += [float(np.asarray(v)) for v in arguments[2:3] if v is not None]
    return any(values)


def _check_numbers(values: Any, name: str) -> Any:
    """Return a constant in float64, or as integers, or refuse it."""
    if np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_:
        return values
    if values.dtype not in (np.float32, np.float64):
        raise ConversionError(
            f"{name} is {values.dtype}, and networks are proved in float32 and float64"
        )
    if not np.isfinite(values).all():
        raise ConversionError(f"{name} contains NaN or Inf: is the file damaged?")
    return values.astype(np.float64)


def _add(x: Any, y: Any, **options: Any) -> Expression:
    x, y = (x, y) if isinstance(x, Expression) else (y, x)
    if not isinstance(y, Expression):
        y = x.constant(broadcast_constant(x, y))
    elif len(x.shape) != len(y.shape):
        raise ConversionError(f"tensors of shapes {x.shape} and {y.shape} are added")
    return operations.add(x, y)


def _subtract(x: Any, y: Any, **options: Any) -> Expression:
    return _add(x, y.negate() if isinstance(y, Expression) else -np.asarray(y))


def _multiply(x: Any, y: Any) -> Expression:
    x, y = (x, y) if isinstance(x, Expression) else (y, x)
    if isinstance(y, Expression):
        return operations.gate(x, y)
    return operations.multiply(x, broadcast_constant(x, y))


def _divide(x: Any, y: Any) -> Expression:
    if not isinstance(x, Expression):
        raise ConversionError("a quotient is converted only if its divisor is a constant")
    return operations.divide(x, broadcast_constant(x, y))


def _matrix(weight: Any) -> Array:
    if isinstance(weight, Expression) or np.ndim(weight) != 2:
        raise ConversionError("one factor must be a constant matrix, as in attention none is")
    return np.asarray(weight)


def _multiply_matrices(x: Any, y: Any) -> Expression:
    if isinstance(x, Expression):
        return operations.apply_linear(x, _matrix(y).T)
    if len(y.shape) < 2:
        raise ConversionError("it multiplies a matrix by the batch from the left")
    found = operations.apply_linear(y.select(np.swapaxes(y.places, -1, -2)), _matrix(x))
    return found.select(np.swapaxes(found.places, -1, -2))


def _gemm(
    x: Any, weight: Any, bias: Any = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
    transB: int = 0,
) -> Expression:  # fmt: skip
    if not isinstance(x, Expression) or transA or len(x.shape) != 1:
        raise ConversionError("its first factor must be the batch, not transposed")
    matrix = _matrix(weight) if transB else _matrix(weight).T
    if alpha == 1 and beta == 1:
        b = None if bias is None else broadcast_constant(x, bias)
        return operations.apply_linear(
            x, matrix, None if b is None else np.broadcast_to(b, len(matrix))
        )
    y = operations.apply_linear(x, matrix).times(np.array(alpha))
    if bias is None:
        return y
    shift = y.constant(np.broadcast_to(broadcast_constant(y, bias), y.shape))
    return y.plus(shift.times(np.array(beta)))


@dataclass(frozen=True)
class _Windows:
    """The windows of a convolution or of pooling."""

    axes: list[Indices]
    padded: Array

    @classmethod
    def of(
        cls, x: Expression, kernel: Sequence[int], *, auto_pad: bytes = b"NOTSET",
        strides: Sequence[int] | None = None, pads: Sequence[int] | None = None,
        dilations: Sequence[int] | None = None, ceil_mode: int = 0,
    ) -> _Windows:  # fmt: skip
        """Return the windows along the axes of an image."""
        rank, sizes = len(kernel), x.shape[1:]
        if len(sizes) != rank:
            raise ConversionError(
                f"it takes samples of {rank + 1} dimensions, channels first, and gets the shape "
                f"{x.shape}"
            )
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        pads = pads or [0] * 2 * rank
        parts = []
        for k, (n, taps, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
            padding = (pads[k], pads[rank + k])
            if auto_pad in (b"SAME_UPPER", b"SAME_LOWER"):
                whole = max((-(-n // s) - 1) * s + d * (taps - 1) + 1 - n, 0)
                less = whole // 2
                padding = (less, whole - less)
                padding = padding if auto_pad == b"SAME_UPPER" else padding[::-1]
            parts.append((n, taps, s, d, padding))
        axes = [
            slide(n, taps, stride=s, padding=p, dilation=d, ceil=bool(ceil_mode))
            for n, taps, s, d, p in parts
        ]
        counts = [
            count_taps(n, taps, len(axis), stride=s, padding=p)
            for axis, (n, taps, s, _, p) in zip(axes, parts, strict=True)
        ]
        return cls(axes, count_padded(counts))


def _convolve(
    x: Expression, weight: Any, bias: Any = None, group: int = 1, kernel_shape: Any = None,
    **options: Any,
) -> Expression:  # fmt: skip
    if isinstance(weight, Expression) or isinstance(bias, Expression):
        raise ConversionError("its weight depends on the input")
    windows = _Windows.of(x, weight.shape[2:], **options)
    return operations.convolve(x, weight, bias, windows.axes, group)


def _transpose_convolution(
    x: Expression, weight: Any, bias: Any = None, group: int = 1, kernel_shape: Any = None,
    strides: Any = None, pads: Any = None, dilations: Any = None, output_padding: Any = None,
    **options: Any,
) -> Expression:  # fmt: skip
    if options:
        raise ConversionError(f"it has {', '.join(sorted(options))}: give its pads instead")
    rank = weight.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads, more = pads or [0] * 2 * rank, output_padding or [0] * rank
    sizes, axes = [], []
    for k, n in enumerate(x.shape[1:]):
        padding = (pads[k], pads[rank + k])
        reach = dilations[k] * (weight.shape[2 + k] - 1) + 1
        sizes.append((n - 1) * strides[k] - sum(padding) + reach + more[k])
        axes.append(
            slide(
                sizes[-1], weight.shape[2 + k], stride=strides[k], padding=padding,
                dilation=dilations[k],
            )[:n]
        )  # fmt: skip
    return operations.convolve_transposed(x, weight, bias, axes, sizes, group)


def _normalize(
    x: Expression, scale: Array, bias: Array, mean: Array, variance: Array,
    epsilon: float = 9.999999747378752e-06, momentum: float = 0.9, training_mode: int = 0,
    spatial: int = 1,
) -> Expression:  # fmt: skip
    if training_mode or not spatial:
        raise ConversionError("it normalises by the statistics of a batch: export in eval mode")
    return operations.normalize(x, mean, variance, scale, bias, epsilon)


def _average(
    x: Expression, kernel_shape: Sequence[int], count_include_pad: int = 0, **options: Any
) -> Expression:
    windows = _Windows.of(x, kernel_shape, **options)
    return operations.average(x, windows.axes, windows.padded if count_include_pad else None)


def _largest(
    x: Expression, kernel_shape: Sequence[int], storage_order: int = 0, **options: Any
) -> Expression:
    return operations.take_largest(x, _Windows.of(x, kernel_shape, **options).axes)


def _whole(x: Expression) -> list[Indices]:
    return [np.arange(size)[None] for size in x.shape[1:]]


def _reduce(divide: bool) -> Callable[..., Expression]:
    def reduce(
        x: Expression, dims: Any = None, axes: Any = None, keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Expression:  # fmt: skip
        chosen = axes if dims is None else np.asarray(dims).tolist()
        rank = len(x.shape) + 1
        found = sorted(axis % rank for axis in chosen or range(rank))
        if found[0] == 0:
            raise ConversionError("it reduces the batch")
        return operations.sum_over(x, [axis - 1 for axis in found], bool(keepdims), divide)

    return reduce


def _clip(
    x: Expression, low: Any = None, high: Any = None, min: Any = None, max: Any = None
) -> Expression:
    limits = [
        float(np.asarray(value)) if value is not None else None
        for value in (min if low is None else low, max if high is None else high)
    ]
    return operations.clamp(x, *limits)


def _choose(larger: bool) -> Callable[..., Expression]:
    def choose(*values: Any) -> Expression:
        first = next(value for value in values if isinstance(value, Expression))
        parts = [
            v if isinstance(v, Expression) else first.constant(broadcast_constant(first, v))
            for v in values
        ]
        shape = np.broadcast_shapes(*(part.shape for part in parts))
        result, *others = [part.broadcast(shape) for part in parts]
        for other in others:
            result = result.maximum(other) if larger else result.minimum(other)
        return result

    return choose


def _sum(*values: Any) -> Expression:
    result, *others = sorted(values, key=lambda value: not isinstance(value, Expression))
    for other in others:
        result = _add(result, other)
    found: Expression = result
    return found


def _prelu(x: Expression, slope: Any) -> Expression:
    slopes = broadcast_constant(x, slope)
    if slopes.size == 1:
        return x.activate(activation.make_leaky_relu(float(slopes.ravel()[0])))
    return operations.apply_prelu(x, slopes)


def _selu(x: Expression, alpha: float | None = None, gamma: float | None = None) -> Expression:
    # The defaults of the operator are numbers of float32.
    a = 1.67326319217681884765625 if alpha is None else alpha
    g = 1.05070102214813232421875 if gamma is None else gamma
    return x.activate(activation.make_elu(a)).times(np.array(g))


def _gelu(x: Expression, approximate: bytes = b"none") -> Expression:
    return x.activate(activation.GELU_TANH if approximate == b"tanh" else activation.GELU)


def _hard_sigmoid(
    x: Expression, alpha: float = 0.20000000298023224, beta: float = 0.5
) -> Expression:
    y = x.times(np.array(alpha))
    y = y.plus(y.constant(np.full(y.shape, beta)))
    return operations.clamp(y, 0.0, 1.0)


def _dropout(x: Expression, ratio: Any = None, training: Any = None, **options: Any) -> Expression:
    if training is not None and bool(np.asarray(training)):
        raise ConversionError("it drops numbers at random: export in eval mode")
    return x


def _cast(x: Expression, to: int, saturate: int = 1, round_mode: bytes = b"up") -> Expression:
    import onnx

    if to not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        raise ConversionError("it rounds to a type other than float32 and float64")
    return x


def _activations(given: activation.Activation) -> Callable[[Expression], Expression]:
    return lambda x: x.activate(given)


_OPERATORS: Mapping[str, Callable[..., Expression]] = {
    "Abs": _activations(activation.ABS),
    "Add": _add,
    "AveragePool": _average,
    "BatchNormalization": _normalize,
    "Cast": _cast,
    "Celu": lambda x, alpha=1.0: x.activate(activation.make_celu(alpha)),
    "Clip": _clip,
    "Conv": _convolve,
    "ConvTranspose": _transpose_convolution,
    "Div": _divide,
    "Dropout": _dropout,
    "Elu": lambda x, alpha=1.0: x.activate(activation.make_elu(alpha)),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda x: operations.average(x, _whole(x)),
    "GlobalMaxPool": lambda x: operations.take_largest(x, _whole(x)),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _activations(activation.HARDSWISH),
    "LeakyRelu": lambda x, alpha=0.009999999776482582: x.activate(
        activation.make_leaky_relu(alpha)
    ),
    "MatMul": _multiply_matrices,
    "Max": _choose(True),
    "MaxPool": _largest,
    "Min": _choose(False),
    "Mish": _activations(activation.MISH),
    "Mul": _multiply,
    "Neg": Expression.negate,
    "PRelu": _prelu,
    "ReduceMean": _reduce(True),
    "ReduceSum": _reduce(False),
    "Relu": _activations(activation.RELU),
    "Selu": _selu,
    "Sigmoid": _activations(activation.SIGMOID),
    "Softplus": lambda x: x.activate(activation.make_softplus()),
    "Softsign": _activations(activation.SOFTSIGN),
    "Sub": _subtract,
    "Sum": _sum,
    "Tanh": _activations(activation.TANH),
}
_MOVES = (
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_UNKNOWN = (
    "this operator is not known to lben (README lists those that are). A proof needs it as affine "
    "maps and functions of one number with bounded slope"
)
_NEEDS = {
    **dict.fromkeys(
        ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization"),
        "it divides by a statistic of its own input: replace it by batch normalisation",
    ),
    **dict.fromkeys(
        ("Softmax", "LogSoftmax"),
        "it is no function of single numbers: leave it out and certify the logits",
    ),
    "Erf": "a GELU that is written out: export with opset 20 or later, where it is one operator",
    **dict.fromkeys(
        ("If", "Loop", "Scan", "Where", "Greater", "Less"),
        "control flow depends on the numbers of the input",
    ),
    "LpPool": "an l2 norm of several numbers is no function of one number",
}
