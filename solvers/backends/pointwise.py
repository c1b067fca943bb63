"""Which elementwise passes run as one on a CUDA device, forward and backward?

ρ(x) + s of a splitting, and σ(su + b)t of a layer without a solve, with its gradient: for ReLU and
LeakyReLU in float32 or float64, where Triton is installed. Where a kernel cannot be launched
PyTorch does the same (`solvers.backends.triton_launch`).
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from solvers.activations import PIECEWISE_LINEAR, LeakyReLU, ProximalActivation, ReLU, Step
from solvers.backends.step import coefficients, plain
from solvers.backends.triton_launch import has_triton, launch_or_fall_back
from solvers.dependencies import transforms_are_active
from solvers.inclusion import Inclusion

_TILE, _WIDEST = 1024, 256
"""Numbers of a tile, and the most columns: of a wider tile more stands empty at the right edge."""
_REPEAT, _MANY = 8, 4096
"""Tiles per program that sums, and from how many tiles on: below, all multiprocessors get some."""
_PLAIN = (Tensor, torch.nn.Parameter)


def serves(tensor: Tensor) -> bool:
    """Say whether kernels run on this tensor: plain, of a CUDA device, outside of transforms."""
    return (
        tensor.device.type == "cuda"
        and tensor.dtype in (torch.float32, torch.float64)
        and type(tensor) in _PLAIN
        and not torch.compiler.is_compiling()
        and not transforms_are_active()
        and has_triton()
    )


def reflect_sum(
    problem: Inclusion, alpha: Step, shift: Float[Tensor, "batch n"]
) -> Callable[[Tensor], Tensor] | None:
    """Return x ↦ ρ(x) + s in one pass, ρ the reflected prox; None where PyTorch has to do it.

    Args:
        problem: whose activation ρ belongs to.
        alpha: step size of the prox.
        shift: s, one row per sample, of the shape of every x.
    """
    if not serves(shift) or type(problem.activation) not in PIECEWISE_LINEAR or not shift.numel():
        return None
    v = plain(shift)
    slope, negative = coefficients(problem.activation)
    number, cut = constant(negative, v.dtype, v.device), _Cut.by_column(v.shape[0], v.shape[1])
    # A number is filled in on the device: one from the host would be waited for.
    alphas = alpha if isinstance(alpha, Tensor) else v.new_full((), float(alpha))
    alphas = alphas.to(v).expand(v.shape[1])
    reflect = problem.activation.reflector(alpha)

    def apply(x: Tensor) -> Tensor:
        out = torch.empty_like(v)
        reason = launch_or_fall_back(
            _kernels().reflected_sum, (cut.programs(),), plain(x), v, out, alphas,
            v if slope is None else slope, number, cut.rows, cut.columns, alphas.stride(0),
            SLOPES=slope is not None, ROWS=cut.tile[0], COLUMNS=cut.tile[1],
        )  # fmt: skip
        return out if reason is None else reflect(x).add_(shift)

    return apply


def activates(x: Tensor, activation: ProximalActivation | None) -> bool:
    """Say whether `activate` runs on what is made of x: ReLU, LeakyReLU or none, on CUDA."""
    return (
        (activation is None or isinstance(activation, (ReLU, LeakyReLU)))
        and x.numel() > 0
        and serves(x)
    )


def activate(
    u: Float[Tensor, "batch c *pixels"],
    bias: Float[Tensor, " c"] | None,
    scale: Float[Tensor, " c"],
    activation: ProximalActivation | None,
    *,
    inner: Float[Tensor, " c"] | None = None,
    overwrite: bool = False,
) -> Float[Tensor, "batch c *pixels"]:
    """Return σ(su + b)t with s, b and t by channel: one pass forward, one and a sum backward.

    Differentiable in all its tensors, any number of times; second derivatives, batched cotangents
    and those of which a kernel cannot be launched come from PyTorch's operations.

    Args:
        u: for which `activates` holds; channels last or in order, and copied if neither.
        bias: b; zeros when None.
        scale: t.
        activation: σ, ReLU or LeakyReLU; the identity when None.
        inner: s; ones when None.
        overwrite: whether the result may lie in the memory of u where nothing has a gradient.

    Returns:
        The result, in the layout of u.
    """
    tensors = (u, bias, scale, inner)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Activated.apply(*tensors, activation)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _forward(u, bias, scale, inner, activation, overwrite=overwrite)


class _Activated(torch.autograd.Function):
    """σ(su + b)t and its first derivative in one pass each; what is kept is u alone."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        inner: Tensor | None,
        activation: ProximalActivation | None,
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(u, bias, scale, inner)
        return _forward(u, bias, scale, inner, activation, overwrite=False)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, bias, scale, inner = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        again = torch.is_grad_enabled() or not serves(g)
        found = None if again or torch._C._functorch.is_legacy_batchedtensor(g) else (
            _backward(g, u, bias, scale, inner, ctx.activation, wanted)
        )  # fmt: skip
        if found is None:
            found = _pulled(g, u, bias, scale, inner, ctx.activation)
        return *(t if has else None for t, has in zip(found, wanted, strict=True)), None


def _forward(
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
    *,
    overwrite: bool,
) -> Tensor:
    u, cut = _Cut.of(u)
    out = u if overwrite else torch.empty_like(u)
    given, flags = _given(u, bias, scale, inner, activation)
    reason = cut.obstacle() or launch_or_fall_back(
        _kernels().activate, (cut.programs(),), u, out, *given, cut.rows, cut.columns, cut.channels,
        **flags, BY_COLUMN=cut.is_by_column, ROWS=cut.tile[0], COLUMNS=cut.tile[1],
    )  # fmt: skip
    return out if reason is None else _composed(u, bias, scale, inner, activation)


def _backward(
    g: Tensor,
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """Return the cotangents of u, b, t and s, without those not wanted; None if no kernel runs."""
    u, cut = _Cut.of(u)
    g = _in_layout(to_plain_values(g), u)
    sums, flow = any(wanted[1:]), wanted[0]
    repeat = cut.repeat() if sums else 1
    parts = cut.parts(repeat)
    terms = 1 + (bias is not None) + (inner is not None)
    given, flags = _given(u, bias, scale, inner, activation)
    u_flow = torch.empty_like(u) if flow else u
    part_sums = u.new_empty(terms, parts, cut.width) if sums else u
    reason = cut.obstacle() or launch_or_fall_back(
        _kernels().activate_backward, (cut.programs(repeat),), g, u, *given, u_flow, part_sums,
        cut.rows, cut.columns, cut.channels, parts, **flags, BY_COLUMN=cut.is_by_column, FLOW=flow,
        SUMS=sums, ROWS=cut.tile[0], COLUMNS=cut.tile[1], REPEAT=repeat,
    )  # fmt: skip
    if reason is not None:
        return None
    if not sums:
        return u_flow, None, None, None
    totals = iter(part_sums.view(terms, -1, cut.channels).sum(1))
    scale_sum = next(totals)
    bias_sum = None if bias is None else next(totals)
    return u_flow if flow else None, bias_sum, scale_sum, None if inner is None else next(totals)


def _given(
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
    """Return the tensors per channel that kernels are given, and which of them mean something."""
    negative, t = _negative(activation), plain(scale)
    b, s = t if bias is None else plain(bias), t if inner is None else plain(inner)
    flags = {"BIASED": bias is not None, "INNER": inner is not None, "RECTIFIED": negative == 0}
    return (b, t, s, constant(negative, u.dtype, u.device)), flags


def _negative(activation: ProximalActivation | None) -> float:
    """Return a of σ(v) = max(v, av)."""
    return 1.0 if activation is None else coefficients(activation)[1]


def _composed(
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
) -> Tensor:
    """Return σ(su + b)t by PyTorch's operations."""
    return _hidden(u, bias, inner, activation)[1] * _spread(scale, u)


def _pulled(
    g: Tensor,
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of u, b, t and s by PyTorch's operations, differentiable again."""
    v, h = _hidden(u, bias, inner, activation)
    flow, negative = (
        g * _spread(scale, u),
        1.0 if activation is None else coefficients(activation)[1],
    )
    v_flow = (
        torch.where(v > 0, flow, flow * negative) if negative else torch.where(v <= 0, 0.0, flow)
    )
    dims = [d for d in range(u.ndim) if d != 1]
    return (
        v_flow if inner is None else v_flow * _spread(inner, u),
        None if bias is None else v_flow.sum(dims),
        (g * h).sum(dims),
        None if inner is None else (v_flow * u).sum(dims),
    )


def _hidden(
    u: Tensor, bias: Tensor | None, inner: Tensor | None, activation: ProximalActivation | None
) -> tuple[Tensor, Tensor]:
    """Return v = su + b and σ(v)."""
    v = u if inner is None else u * _spread(inner, u)
    v = v if bias is None else v + _spread(bias, u)
    return v, v if activation is None else activation(v)


def _spread(vector: Tensor, u: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (u.ndim - 2))


@functools.cache
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number in the memory of a device, made once: bringing one there is waited for."""
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=dtype, device=device)


@dataclass(frozen=True)
class _Cut:
    """A tensor as a matrix, and how programs share it.

    Attributes:
        rows, columns: of the matrix.
        channels: numbers per unit or channel.
        is_by_column: whether a column belongs to a channel; else a row does, modulo channels.
        tile: rows and columns of a tile, powers of two.
    """

    rows: int
    columns: int
    channels: int
    is_by_column: bool
    tile: tuple[int, int]

    @staticmethod
    def by_column(rows: int, columns: int) -> _Cut:
        return _Cut(rows, columns, columns, True, _tile(columns))

    @staticmethod
    def of(u: Tensor) -> tuple[Tensor, _Cut]:
        """Return samples × channels × pixels in an order that has a matrix, and the matrix."""
        u, channels = to_plain_values(u), u.shape[1]
        if u.ndim == 4 and u.is_contiguous(memory_format=torch.channels_last):
            return u, _Cut.by_column(u.numel() // channels, channels)
        u = u.contiguous()
        pixels = math.prod(u.shape[2:])
        if pixels == 1:
            return u, _Cut.by_column(u.shape[0], channels)
        return u, _Cut(u.shape[0] * channels, pixels, channels, False, _tile(pixels))

    @property
    def width(self) -> int:
        """Sums that one part of the matrix has."""
        return self.columns if self.is_by_column else self.rows

    def programs(self, repeat: int = 1) -> int:
        """Return how many programs there are, with some tiles each."""
        rows, columns = self._blocks(repeat)
        return rows * columns

    def parts(self, repeat: int) -> int:
        """Return in how many parts each sum comes."""
        return self._blocks(repeat)[0 if self.is_by_column else 1]

    def repeat(self) -> int:
        """Return how many tiles a program that sums has."""
        along = self._blocks(1)[0 if self.is_by_column else 1]
        return _REPEAT if self.programs() >= _MANY and along >= _REPEAT else 1

    def obstacle(self) -> str | None:
        """Return why kernels cannot number these rows or programs, or None."""
        if self.programs() >= 2**31 or not (self.is_by_column or self.rows < 2**31 - _TILE):
            return f"{self.rows} × {self.columns} numbers are too many"
        return None

    def _blocks(self, repeat: int) -> tuple[int, int]:
        rows, columns = self.tile
        if self.is_by_column:
            rows *= repeat
        else:
            columns *= repeat
        return -(-self.rows // rows), -(-self.columns // columns)


def _tile(columns: int) -> tuple[int, int]:
    wide = min(_WIDEST, 1 << (columns - 1).bit_length())
    return max(1, _TILE // wide), wide


def to_plain_values(tensor: Tensor) -> Tensor:
    """Return a tensor without a graph and with no negation pending."""
    return tensor.detach().resolve_neg()


def _in_layout(g: Tensor, u: Tensor) -> Tensor:
    """Return a tensor of u's shape in the order of u in memory."""
    return g if g.stride() == u.stride() else torch.empty_like(u).copy_(g)


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("solvers.backends.pointwise_kernels")
