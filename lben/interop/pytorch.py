"""Which network is a torch.nn module? What its forward method does to a stand-in for the input.

The method runs once, on a tensor without numbers. Each function of PyTorch that it calls is looked
up here and carried out on an expression (lben/interop/expressions.py). So paddings, folded weights,
parametrizations and hooks act as PyTorch acts on them. A function that is not here is refused.

Note [Rearrangements]
A function that only moves entries (reshape, permute, indexing, padding with zeros, …) is called
itself: on a tensor of places, for a batch of three samples. Its result says where each entry comes
from. If this is not the same within each sample, the function mixes samples and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

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
from lben.interop.windows import adapt, count_padded, count_taps, slide
from lben.layers import EquilibriumLayer
from lben.rigorous import Array
from lben.weights import activation
from lben.weights.network import Network

_BATCH = 3
"""Samples of the stand-in; see Note [Rearrangements]."""


def from_torch(model: nn.Module, example_shape: Sequence[int], *, check: bool = True) -> Network:
    """Return the network that a torch.nn module computes, as blocks of units.

    The module may be of any class whose forward method uses the operations that README lists. Its
    parameters are taken as they are stored, so float32 numbers are exact. Afterwards the network
    and the module are evaluated at random inputs. A difference beyond the proved rounding refutes
    the conversion.

    Args:
        model: in eval mode, on any device.
        example_shape: of one sample, without the batch: (784,) or (3, 32, 32).
        check: whether the outputs are compared.

    Returns:
        The network; its input is the flattened sample, its output the flattened output.

    Raises:
        ConversionError: naming the module by class and path: for an operation that is not
            supported, a shape that does not fit, control flow that depends on data, a parameter
            that is not finite, or of another dtype than float32 and float64, or on the meta device;
            for batch normalisation or dropout in training mode; or if the outputs differ.
        TypeError: if the model is no torch.nn.Module, or the shape no sequence of integers.

    Example:
        >>> import torch
        >>> from lben import from_torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        ...     torch.nn.Linear(72, 5),
        ... )
        >>> network = from_torch(model.eval(), (1, 8, 8))
        >>> network.widths, network.out_features, network.output.exact
        ((64, 72), 5, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"from_torch takes a torch.nn.Module, got {type(model).__name__}")
    shape = _check_shape(example_shape)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    _check_model(model)
    trace = _Trace(model, shape)
    network = trace.run()
    if check:
        off = trace.builder.unit_error
        compare_outputs(model, network, widen=not trace.derived, unit_error=off)
    return network


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) else (None,)
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise TypeError(
            f"example_shape must be a sequence of integers, such as (784,), got {shape!r}"
        )
    if not sizes or min(sizes) < 1:
        raise ConversionError(f"example_shape must have positive sizes, got {sizes}")
    return sizes


_CHANGES_IN_TRAINING = (
    nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU,
    parametrizations._SpectralNorm,
)  # fmt: skip


def _check_model(model: nn.Module) -> None:
    """Refuse what cannot be converted whatever forward does."""
    for path, part in model.named_modules():
        where = f"{type(part).__name__} ({path})" if path else type(part).__name__
        if isinstance(part, torch.jit.ScriptModule):
            raise ConversionError(
                f"{where} is a script: convert the module that it was made from, or export it to "
                "ONNX and take from_onnx"
            )
        if isinstance(part, EquilibriumLayer):
            raise ConversionError(
                f"{where} solves for its state and is no feed-forward network: it proves its own "
                "bound, certify(layer)"
            )
        if part.training and isinstance(part, _CHANGES_IN_TRAINING):
            raise ConversionError(
                f"{where} is in training mode, where it is no function of one input: call "
                "model.eval() first"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ConversionError(
                f"{name} is on the meta device and has no numbers: load the weights first"
            )
        if tensor.is_complex() or (
            tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64)
        ):
            raise ConversionError(
                f"{name} is {tensor.dtype}, and networks are proved in float32 and float64: "
                "convert the module by .float()"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ConversionError(
                f"{name} contains NaN or Inf: did training diverge, or is a file damaged?"
            )


class _Trace:
    """One run of a module on a stand-in."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        self.model, self.builder = model, Builder(shape)
        tensors = [*model.parameters(), *model.buffers()]
        self.stored = {t.untyped_storage().data_ptr() for t in tensors}
        self.like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
        self.derived = False
        self.path: list[str] = []

    def run(self) -> Network:
        """Return the network of the module."""
        with self._paths(), torch.enable_grad():
            try:
                y = self.model(self.wrap(self.builder.input()))
            except ConversionError:
                raise
            except Exception as error:
                raise ConversionError(
                    f"{self.where()} cannot be converted. Its forward method fails on a batch of "
                    f"samples of shape {self.builder.input_shape} (does example_shape fit?): "
                    f"{type(error).__name__}: {error}"
                ) from error
        if not isinstance(y, _Traced):
            raise ConversionError(
                f"the network must return one tensor that depends on its input, got "
                f"{type(y).__name__}"
            )
        return self.builder.finish(y.expression)

    def wrap(self, expression: Expression) -> _Traced:
        """Return the tensor that stands for an expression."""
        return _Traced(expression, self)

    def where(self) -> str:
        """Return the innermost module that runs, with its path."""
        return self.path[-1] if self.path else type(self.model).__name__

    def read(self, value: Tensor) -> Array:
        """Return the numbers of a constant in float64."""
        if value.is_complex() or value.is_meta:
            raise ConversionError(f"it uses a tensor of {value.dtype} on {value.device}")
        if value.is_floating_point() and value.untyped_storage().data_ptr() not in self.stored:
            self.derived = True
        numbers = value.detach().cpu().double().numpy()
        if not np.isfinite(numbers).all():
            raise ConversionError("it uses a tensor with NaN or Inf")
        return numbers

    @contextmanager
    def _paths(self) -> Iterator[None]:
        """Keep track of which module runs."""
        handles = []
        for path, part in self.model.named_modules():
            name = f"{type(part).__name__} ({path})" if path else type(part).__name__
            handles += [
                part.register_forward_pre_hook(self._enter(name), prepend=True),
                part.register_forward_hook(self._leave),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self.path.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.path.pop()


class _Traced(Tensor):
    """A tensor without numbers, whose functions act on an expression."""

    expression: Expression
    origin: _Trace

    @staticmethod
    def __new__(cls, expression: Expression, trace: _Trace) -> _Traced:
        like = trace.like
        made: _Traced = Tensor._make_wrapper_subclass(
            cls, (_BATCH, *expression.shape), dtype=like.dtype, device=like.device
        )
        made.expression, made.origin = expression, trace
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"stand-in of shape (batch, {', '.join(map(str, self.expression.shape))})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, given = _name_of(func), dict(kwargs or {})
        if name in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **given)
        trace = next(_find((*args, *given.values()))).origin
        try:
            return _call(trace, func, name, args, given)
        except _LocatedError:
            raise
        except ConversionError as error:
            raise _LocatedError(
                f"{name}, in {trace.where()}, cannot be converted: {error}"
            ) from error

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ConversionError(f"{func} runs outside of PyTorch's functions")


class _LocatedError(ConversionError):
    """A conversion error that says where it arose."""


def _name_of(func: Callable[..., Any]) -> str:
    """Return the plain name of a function, method, operator or property."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        name = func.__self__.__name__  # type: ignore[attr-defined]
    return name


def _find(values: Any) -> Iterator[_Traced]:
    """Yield the stand-ins within arguments."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, _Traced):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from _find(value)


def _replace(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return an argument with the tensors within it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        parts = [_replace(part, change) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def _call(
    trace: _Trace, func: Callable[..., Any], name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Carry out a function of PyTorch on stand-ins."""
    plain = name.strip("_")
    in_place = kwargs.pop("inplace", False) or name in _IN_PLACE
    in_place = in_place or (name.endswith("_") and not name.endswith("__"))
    if name.startswith("__") and plain in _NEEDS:  # float(x), and not x.float()
        raise ConversionError(_NEEDS[plain])
    plain = _SYNONYMS.get(plain, plain)
    if kwargs.pop("return_indices", False) or plain.endswith("_with_indices"):
        raise ConversionError("it returns places besides: return_indices must be False")
    if kwargs.get("out") is not None:
        raise ConversionError("it writes to out: return the result instead")
    nearest = plain == "interpolate" and kwargs.get("mode") in ("nearest", "nearest-exact")
    if plain in _REARRANGEMENTS or nearest:
        if in_place:
            raise ConversionError("it changes a shape in place: use the form without underscore")
        result = _rearrange(trace, func, args, kwargs, joins=plain in _JOINS)
    elif plain in _FILLED:
        return _replace_all(func, args, kwargs, trace)
    elif plain in _FUNCTIONS:

        def read(value: Tensor) -> Any:
            return value.expression if isinstance(value, _Traced) else trace.read(value)

        given = {key: _replace(value, read) for key, value in kwargs.items()}
        result = _FUNCTIONS[plain](*(_replace(value, read) for value in args), **given)
    else:
        raise ConversionError(_NEEDS.get(plain, _UNKNOWN))
    if isinstance(result, Expression):
        if in_place:
            changed = next(_find((*args, *kwargs.values())))
            changed.expression = result
            return changed
        return trace.wrap(result)
    return result


def _replace_all(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], trace: _Trace
) -> Any:
    """Return a tensor of constants, made in the shape or dtype of a stand-in."""

    def fill(value: Tensor) -> Tensor:
        if not isinstance(value, _Traced):
            return value
        return torch.zeros(value.shape, dtype=trace.like.dtype, device=trace.like.device)

    return func(*(_replace(value, fill) for value in args), **kwargs)


def _rearrange(
    trace: _Trace,
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    joins: bool,
) -> Any:
    """Carry out a function that moves entries, see Note [Rearrangements]."""
    parts: list[Expression] = []
    tags: list[Tensor] = []

    def collect(value: Tensor) -> Tensor:
        """Return a tag in place of a tensor whose entries move."""
        if isinstance(value, _Traced):
            parts.append(value.expression)
        elif joins and value.is_floating_point():
            first = next(_find((*args, *kwargs.values()))).expression
            parts.append(first.constant(within_a_sample(trace.read(value))))
        else:
            return value.cpu()
        tags.append(torch.empty(0))
        return tags[-1]

    tagged = [_replace(value, collect) for value in args]
    tagged_options = {key: _replace(value, collect) for key, value in kwargs.items()}
    places = dict(zip(map(id, tags), number_places(parts, _BATCH), strict=True))

    def number(value: Tensor) -> Tensor:
        return torch.from_numpy(places[id(value)]) if id(value) in places else value

    result = func(
        *(_replace(value, number) for value in tagged),
        **{key: _replace(value, number) for key, value in tagged_options.items()},
    )
    total = sum(part.size for part in parts)
    whole = join(parts) if len(parts) > 1 else parts[0]

    def gather(value: Tensor) -> _Traced:
        return trace.wrap(whole.select(read_places(value.detach().numpy(), total, _BATCH)))

    return _replace(result, gather)


def _axes(x: Expression, dim: Any) -> tuple[int, ...]:
    """Return the axes of one sample that a dim of a batch means."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim or ())
    rank = len(x.shape) + 1
    found = sorted(d % rank for d in dims)
    if not found or found[0] == 0:
        raise ConversionError("it reduces the batch: name the dimensions after the first one")
    return tuple(d - 1 for d in found)


def _add(x: Any, y: Any, alpha: float = 1) -> Expression:
    if not isinstance(x, Expression):
        if alpha != 1:
            raise ConversionError("alpha scales a tensor that depends on the input: scale it first")
        x, y = y, np.asarray(x)
    if isinstance(y, Expression):
        if len(x.shape) != len(y.shape):
            raise ConversionError(f"tensors of shapes {x.shape} and {y.shape} are added")
        return operations.add(x, y if alpha == 1 else operations.multiply(y, np.array(alpha)))
    return operations.add(x, x.constant(np.asarray(broadcast_constant(x, y) * alpha)))


def _subtract(x: Any, y: Any, alpha: float = 1) -> Expression:
    if isinstance(y, Expression):
        return _add(x, y.negate(), alpha)
    return _add(x, y, -alpha)


def _multiply(x: Any, y: Any) -> Expression:
    x, y = (x, y) if isinstance(x, Expression) else (y, x)
    if isinstance(y, Expression):
        return operations.gate(x, y)
    return operations.multiply(x, broadcast_constant(x, y))


def _divide(x: Any, y: Any, rounding_mode: None = None) -> Expression:
    if not isinstance(x, Expression) or rounding_mode is not None:
        raise ConversionError("a quotient is converted only if its divisor is a constant")
    return operations.divide(x, broadcast_constant(x, y))


def _constant_matrix(weight: Any) -> Array:
    if isinstance(weight, Expression) or np.ndim(weight) < 1:
        raise ConversionError(
            "both factors depend on the input, as in attention: their product has no bounded slope"
        )
    return np.asarray(weight)


def _linear(x: Any, weight: Any, bias: Any = None) -> Expression:
    weight = _constant_matrix(weight)
    if not isinstance(x, Expression):
        raise ConversionError("a weight depends on the input")
    if weight.ndim == 1:
        y = operations.apply_linear(x, weight[None], bias)
        return y.select(y.places[..., 0])
    return operations.apply_linear(x, weight, bias)


def _matmul(x: Any, y: Any) -> Expression:
    if isinstance(x, Expression):
        other = _constant_matrix(y)
        if other.ndim > 2:
            raise ConversionError("it multiplies by a batch of matrices")
        return _linear(x, other if other.ndim == 1 else other.T)
    weight = _constant_matrix(x)
    if weight.ndim != 2 or len(y.shape) < 2:
        raise ConversionError("it multiplies matrices of which one holds the batch")
    y = operations.apply_linear(y.select(np.swapaxes(y.places, -1, -2)), weight)
    return y.select(np.swapaxes(y.places, -1, -2))


def _many(value: Any, rank: int) -> tuple[Any, ...]:
    """Return one number per axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _image_axes(x: Expression, rank: int) -> tuple[int, ...]:
    if len(x.shape) != rank + 1:
        raise ConversionError(
            f"it takes samples of {rank + 1} dimensions, channels first, and gets the shape "
            f"{x.shape}"
        )
    return x.shape[1:]


def _convolution(rank: int) -> Callable[..., Expression]:
    def convolve(
        x: Expression, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Expression:  # fmt: skip
        weight = _constant_matrix(weight)
        sizes, kernel = _image_axes(x, rank), weight.shape[2:]
        dilations = _many(dilation, rank)
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
            pads = [(w // 2, w - w // 2) for w in whole]
        else:
            pads = [(p, p) for p in _many(0 if padding == "valid" else padding, rank)]
        parts = zip(sizes, kernel, _many(stride, rank), pads, dilations, strict=True)
        axes = [slide(n, k, stride=s, padding=p, dilation=d) for n, k, s, p, d in parts]
        return operations.convolve(x, weight, bias, axes, groups)

    return convolve


def _transposed_convolution(rank: int) -> Callable[..., Expression]:
    def convolve(
        x: Expression, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Expression:  # fmt: skip
        weight = _constant_matrix(weight)
        parts = list(zip(
            _image_axes(x, rank), weight.shape[2:], _many(stride, rank), _many(padding, rank),
            _many(output_padding, rank), _many(dilation, rank), strict=True,
        ))  # fmt: skip
        sizes = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, k, s, p, o, d in parts]
        axes = [
            slide(size, k, stride=s, padding=(p, p), dilation=d)[:n]
            for size, (n, k, s, p, _, d) in zip(sizes, parts, strict=True)
        ]
        return operations.convolve_transposed(x, weight, bias, axes, sizes, groups)

    return convolve


def _average_pool(rank: int) -> Callable[..., Expression]:
    def pool(
        x: Expression, kernel_size: Any, stride: Any = None, padding: Any = 0,
        ceil_mode: bool = False, count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Expression:  # fmt: skip
        sizes, kernel = _image_axes(x, rank), _many(kernel_size, rank)
        strides = _many(kernel_size if stride is None or stride == () else stride, rank)
        parts = list(zip(sizes, kernel, strides, _many(padding, rank), strict=True))
        axes = [slide(n, k, stride=s, padding=(p, p), ceil=ceil_mode) for n, k, s, p in parts]
        divisors = None
        if divisor_override is not None:
            divisors = np.full(math.prod(map(len, axes)), float(divisor_override))
        elif count_include_pad:
            divisors = count_padded([
                count_taps(n, k, len(axis), stride=s, padding=(p, p))
                for axis, (n, k, s, p) in zip(axes, parts, strict=True)
            ])  # fmt: skip
        return operations.average(x, axes, divisors)

    return pool


def _adaptive_axes(x: Expression, rank: int, output_size: Any) -> list[Indices]:
    sizes = _image_axes(x, rank)
    wanted = _many(output_size, rank)
    return [adapt(n, n if m is None else m) for n, m in zip(sizes, wanted, strict=True)]


def _adaptive_average(rank: int) -> Callable[..., Expression]:
    return lambda x, output_size: operations.average(x, _adaptive_axes(x, rank, output_size))


def _adaptive_max(rank: int) -> Callable[..., Expression]:
    def pool(x: Expression, output_size: Any) -> Expression:
        return operations.take_largest(x, _adaptive_axes(x, rank, output_size))

    return pool


def _max_pool(rank: int) -> Callable[..., Expression]:
    def pool(
        x: Expression, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Expression:  # fmt: skip
        sizes, kernel = _image_axes(x, rank), _many(kernel_size, rank)
        strides = _many(kernel_size if stride is None or stride == () else stride, rank)
        parts = zip(
            sizes, kernel, strides, _many(padding, rank), _many(dilation, rank), strict=True
        )
        axes = [
            slide(n, k, stride=s, padding=(p, p), dilation=d, ceil=ceil_mode)
            for n, k, s, p, d in parts
        ]
        return operations.take_largest(x, axes)

    return pool


def _batch_norm(
    x: Expression, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Expression:  # fmt: skip
    if training or running_mean is None or running_var is None:
        raise ConversionError(
            "it normalises by the statistics of a batch, and is no function of one input: call "
            "model.eval(), with track_running_stats=True"
        )
    return operations.normalize(x, running_mean, running_var, weight, bias, eps)


def _dropout(x: Expression, p: float = 0.5, training: bool = True) -> Expression:
    if training and p > 0:
        raise ConversionError("it drops numbers at random in training mode: call model.eval()")
    return x


def _reduce(divide: bool) -> Callable[..., Expression]:
    def reduce(x: Expression, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        return operations.sum_over(x, _axes(x, dim), keepdim, divide)

    return reduce


def _largest(x: Expression, dim: Any = (), keepdim: bool = False) -> Expression:
    return operations.reduce_axes(x, _axes(x, dim), keepdim, operations.take_largest)


def _of_two(larger: bool) -> Callable[..., Expression]:
    def choose(x: Any, y: Any = None, **others: Any) -> Expression:
        if others or y is None or isinstance(y, int) or isinstance(x, int):
            raise ConversionError("only the larger or smaller one of two tensors, or amax and amin")
        x, y = (x, y) if isinstance(x, Expression) else (y, x)
        if not isinstance(y, Expression):
            y = x.constant(broadcast_constant(x, y))
        shape = np.broadcast_shapes(x.shape, y.shape)
        x, y = x.broadcast(shape), y.broadcast(shape)
        return x.maximum(y) if larger else x.minimum(y)

    return choose


def _pad(
    x: Expression, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Any:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    rank = len(pad) // 2
    widths = [(0, 0)] * (len(x.shape) - rank) + [(pad[2 * k], pad[2 * k + 1]) for k in range(rank)][
        ::-1
    ]
    if rank > len(x.shape):
        raise ConversionError("it pads the batch")
    cut = tuple(slice(-min(a, 0), n + min(b, 0)) for (a, b), n in zip(widths, x.shape, strict=True))
    grown = [(max(a, 0), max(b, 0)) for a, b in widths]
    fill = {"constant_values": -1} if mode == "constant" else {}
    places = np.pad(x.places[cut], grown, mode=modes[mode], **fill)  # type: ignore[call-overload]
    y = x.select(places)
    return y.plus(y.constant(np.where(places < 0, float(value), 0.0))) if value else y


def _leaky(x: Expression, negative_slope: float = 0.01) -> Expression:
    return x.activate(activation.make_leaky_relu(float(negative_slope)))


def _rrelu(
    x: Expression, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> Expression:
    if training:
        raise ConversionError("its slope is random in training mode: call model.eval()")
    return _leaky(x, (lower + upper) / 2)


def _prelu(x: Expression, weight: Any) -> Expression:
    slopes = _constant_matrix(weight)
    if slopes.size == 1:
        return _leaky(x, float(slopes.ravel()[0]))
    if len(slopes) != x.shape[0]:
        raise ConversionError(f"it has {len(slopes)} slopes, and gets the shape {x.shape}")
    return operations.apply_prelu(x, slopes.reshape(-1, *[1] * (len(x.shape) - 1)))


def _softplus(x: Expression, beta: float = 1.0, threshold: float = 20.0) -> Expression:
    jump = math.log1p(math.exp(-threshold)) / beta
    if jump > 1e-6:
        raise ConversionError(
            f"above its threshold of {threshold} it jumps by {jump:.1e}, and has no bounded slope: "
            "take the default of 20"
        )
    x.builder.unit_error = max(x.builder.unit_error, 2 * jump)
    return x.activate(activation.make_softplus(beta))


def _gelu(x: Expression, approximate: str = "none") -> Expression:
    return x.activate(activation.GELU_TANH if approximate == "tanh" else activation.GELU)


def _convert(x: Expression, *options: Any, **others: Any) -> Expression:
    for value in (*options, *others.values()):
        if isinstance(value, torch.dtype) and value not in (torch.float32, torch.float64):
            raise ConversionError(f"it rounds to {value}: keep float32 or float64")
    return x


def _activations(given: activation.Activation) -> Callable[[Expression], Expression]:
    return lambda x: x.activate(given)


def _clamp(x: Expression, min: Any = None, max: Any = None) -> Expression:
    for limit in (min, max):
        if limit is not None and np.ndim(limit) > 0:
            raise ConversionError("its limits must be numbers")
    return operations.clamp(x, min, max)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": _activations(activation.ABS),
    "add": _add,
    "amax": _largest,
    "amin": lambda x, dim=(), keepdim=False: _largest(x.negate(), dim, keepdim).negate(),
    "batch_norm": _batch_norm,
    "celu": lambda x, alpha=1.0: x.activate(activation.make_celu(alpha)),
    "clamp": _clamp,
    "clamp_max": lambda x, max: _clamp(x, None, max),
    "clamp_min": lambda x, min: _clamp(x, min, None),
    "div": _divide,
    "dropout": _dropout,
    "elu": lambda x, alpha=1.0: x.activate(activation.make_elu(alpha)),
    "gelu": _gelu,
    "hardsigmoid": _activations(activation.HARDSIGMOID),
    "hardswish": _activations(activation.HARDSWISH),
    "hardtanh": lambda x, min_val=-1.0, max_val=1.0: operations.clamp(x, min_val, max_val),
    "leaky_relu": _leaky,
    "linear": _linear,
    "logsigmoid": _activations(activation.LOG_SIGMOID),
    "matmul": _matmul,
    "maximum": _of_two(True),
    "mean": _reduce(True),
    "minimum": _of_two(False),
    "mish": _activations(activation.MISH),
    "mul": _multiply,
    "neg": Expression.negate,
    "pad": _pad,
    "prelu": _prelu,
    "relu": _activations(activation.RELU),
    "relu6": _activations(activation.RELU6),
    "rrelu": _rrelu,
    "rsub": lambda x, y, alpha=1: _subtract(y, x, alpha),
    "selu": _activations(activation.SELU),
    "sigmoid": _activations(activation.SIGMOID),
    "silu": _activations(activation.SILU),
    "softplus": _softplus,
    "softshrink": lambda x, lambd=0.5: x.activate(activation.make_softshrink(lambd)),
    "softsign": _activations(activation.SOFTSIGN),
    "sub": _subtract,
    "sum": _reduce(False),
    "tanh": _activations(activation.TANH),
    "to": _convert,
    **{f"conv{rank}d": _convolution(rank) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _transposed_convolution(rank) for rank in (1, 2, 3)},
    **{f"avg_pool{rank}d": _average_pool(rank) for rank in (1, 2, 3)},
    **{f"max_pool{rank}d": _max_pool(rank) for rank in (1, 2, 3)},
    **{f"adaptive_avg_pool{rank}d": _adaptive_average(rank) for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{rank}d": _adaptive_max(rank) for rank in (1, 2, 3)},
}
_SYNONYMS = {
    **dict.fromkeys(("iadd", "radd"), "add"),
    **dict.fromkeys(("isub", "subtract"), "sub"),
    **dict.fromkeys(("imul", "rmul", "multiply"), "mul"),
    **dict.fromkeys(("itruediv", "truediv", "divide", "true_divide"), "div"),
    **dict.fromkeys(("absolute",), "abs"),
    **dict.fromkeys(("negative",), "neg"),
    **dict.fromkeys(("clip",), "clamp"),
    **dict.fromkeys(("max",), "maximum"),
    **dict.fromkeys(("min",), "minimum"),
    **dict.fromkeys(("log_sigmoid",), "logsigmoid"),
    **dict.fromkeys(("float", "double", "type", "type_as", "requires_grad", "cpu", "cuda"), "to"),
    **dict.fromkeys(
        ("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
         "feature_dropout"), "dropout",
    ),
}  # fmt: skip
_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__")
_JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"})
_REARRANGEMENTS = _JOINS | {
    "T", "alias", "channel_shuffle", "chunk", "clone", "contiguous", "data", "detach", "expand",
    "expand_as", "flatten", "flip", "getitem", "index_select", "mT", "moveaxis", "movedim",
    "narrow", "native_channel_shuffle", "permute", "pixel_shuffle", "pixel_unshuffle", "ravel",
    "repeat", "repeat_interleave", "reshape", "reshape_as", "roll", "select", "split", "squeeze",
    "swapaxes", "swapdims", "t", "tensor_split", "tile", "transpose", "unbind", "unflatten",
    "unfold", "unsqueeze", "view", "view_as",
}  # fmt: skip
_FILLED = frozenset({
    "full_like", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "ones_like",
    "zeros_like",
})  # fmt: skip
_ABOUT = frozenset({
    "__hash__", "__len__", "device", "dim", "dtype", "element_size", "get_device", "grad_fn",
    "is_complex", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point", "is_inference",
    "is_leaf", "is_meta", "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu", "layout",
    "names", "ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size",
})  # fmt: skip
"""What a tensor tells without its numbers."""
_UNKNOWN = (
    "it is not among the operations of networks that are known to lben (README lists them). A "
    "proof needs it as affine maps and functions of one number with bounded slope"
)
_CONTROL = (
    "control flow or a result depends on the numbers of the input: a network must do the same "
    "operations for every input"
)
_SPREADS = (
    "it divides by a statistic of its own input, which no bound of slopes of single units covers: "
    "replace it by batch normalisation, or fold it away"
)
_EXPONENTS = (
    "it is no function of single numbers, and no part of a Lipschitz bound of logits: leave it out "
    "and certify the logits"
)
_NEEDS: dict[str, str] = {
    **dict.fromkeys(
        ("bool", "item", "tolist", "float", "int", "index", "numpy", "nonzero", "contains", "any",
         "all", "equal", "allclose", "gt", "lt", "ge", "le", "eq", "ne", "where", "isnan",
         "argmax", "argmin"), _CONTROL,
    ),
    **dict.fromkeys(
        ("layer_norm", "group_norm", "instance_norm", "rms_norm", "normalize"), _SPREADS
    ),
    **dict.fromkeys(("softmax", "log_softmax", "logsumexp", "softmin"), _EXPONENTS),
    **dict.fromkeys(
        ("scaled_dot_product_attention", "multi_head_attention_forward", "bmm"),
        "attention multiplies functions of its input, and has no global Lipschitz bound",
    ),
    **dict.fromkeys(
        ("norm", "vector_norm", "linalg_norm", "linalg_vector_norm", "lp_pool2d", "lp_pool1d"),
        "an l2 norm of several numbers is no function of one number: certify a chain of lben's "
        "layers, whose NormPooling has the bound 1",
    ),
    **dict.fromkeys(
        ("fft_rfft2", "fft_fft2", "fft_irfft2"),
        "a layer that runs by Fourier transforms: convert the convolution of its kernel",
    ),
}  # fmt: skip
