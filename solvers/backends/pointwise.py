"""Which elementwise operations run in one pass on a CUDA device, forward and backward?

ρ(x) + s of a splitting, and σ(su + b)t of a layer without a solve, with its gradient. They run for
ReLU and LeakyReLU in float32 and float64 if Triton is installed. If a kernel cannot be launched,
PyTorch computes the same (`solvers.backends.triton_launch`).
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
from solvers.backends.step import materialize, slope_coefficients
from solvers.backends.triton_launch import has_triton, try_launch
from solvers.dependencies import transforms_are_active
from solvers.inclusion import Inclusion

_TILE, _WIDEST = 1024, 256
"""Numbers per tile, and the most columns: of a wider tile more is empty at the right edge."""
_REPEAT, _MANY = 8, 4096
"""Tiles per program that sums, if there are at least this many tiles; with fewer, every program has
one, so that all multiprocessors have work."""
_PLAIN = (Tensor, torch.nn.Parameter)


def serves(tensor: Tensor) -> bool:
    """Say whether kernels run on this tensor.

    It must be an ordinary float32 or float64 tensor on a CUDA device, outside of transforms and
    compilation, and Triton must be installed.
    """
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
    """Return x ↦ ρ(x) + s in one pass, with the reflected prox ρ(x) = 2 prox_{αf}(x) − x.

    Args:
        problem: its activation gives ρ.
        alpha: step size of the prox.
        shift: s, one row per sample; every x has its shape.

    Returns:
        The function, or None if no kernel runs on `shift` for this activation.
    """
    if not serves(shift) or type(problem.activation) not in PIECEWISE_LINEAR or not shift.numel():
        return None
    v = materialize(shift)
    slope, negative = slope_coefficients(problem.activation)
    number, cut = constant(negative, v.dtype, v.device), _Cut.by_column(v.shape[0], v.shape[1])
    # A number is filled in on the device: copying one from the host would wait.
    alphas = alpha if isinstance(alpha, Tensor) else v.new_full((), float(alpha))
    alphas = alphas.to(v).expand(v.shape[1])
    reflect = problem.activation.reflector(alpha)

    def apply(x: Tensor) -> Tensor:
        out = torch.empty_like(v)
        reason = try_launch(
            _kernels().reflect_sum, (cut.programs(),), materialize(x), v, out, alphas,
            v if slope is None else slope, number, cut.rows, cut.columns, alphas.stride(0),
            SLOPES=slope is not None, ROWS=cut.tile[0], COLUMNS=cut.tile[1],
        )  # fmt: skip
        return out if reason is None else reflect(x).add_(shift)

    return apply


def activates(x: Tensor, activation: ProximalActivation | None) -> bool:
    """Say whether `activate` runs on tensors like x with this activation (None: the identity)."""
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
    """Return σ(su + b)t with one number of s, b and t per channel.

    The forward pass is one pass over memory, the backward pass is one pass and a sum. It is
    differentiable in all its tensors to any order. Second derivatives, batched cotangents, and
    gradients whose kernel cannot be launched are computed by PyTorch's operations.

    Args:
        u: a tensor for which `activates` holds, contiguous or channels last; else it is copied.
        bias: b; zeros when None.
        scale: t.
        activation: σ, ReLU or LeakyReLU; the identity when None.
        inner: s; ones when None.
        overwrite: whether the result may overwrite u if nothing has a gradient.

    Returns:
        The result, of the shape and layout of u.
    """
    tensors = (u, bias, scale, inner)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Activation.apply(*tensors, activation)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return _forward(u, bias, scale, inner, activation, overwrite=overwrite)


class _Activation(torch.autograd.Function):
    """Compute σ(su + b)t and its first derivative in one pass each, and save u alone."""

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
            found = _pull_back(g, u, bias, scale, inner, ctx.activation)
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
    given, flags = _kernel_arguments(u, bias, scale, inner, activation)
    reason = cut.obstacle() or try_launch(
        _kernels().activate, (cut.programs(),), u, out, *given, cut.rows, cut.columns, cut.channels,
        **flags, BY_COLUMN=cut.is_by_column, ROWS=cut.tile[0], COLUMNS=cut.tile[1],
    )  # fmt: skip
    return out if reason is None else _compose(u, bias, scale, inner, activation)


def _backward(
    g: Tensor,
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """Return the wanted cotangents of u, b, t and s, or None if no kernel runs."""
    u, cut = _Cut.of(u)
    g = _match_layout(detach_values(g), u)
    sums, flow = any(wanted[1:]), wanted[0]
    repeat = cut.repeat() if sums else 1
    parts = cut.parts(repeat)
    terms = 1 + (bias is not None) + (inner is not None)
    given, flags = _kernel_arguments(u, bias, scale, inner, activation)
    u_flow = torch.empty_like(u) if flow else u
    part_sums = u.new_empty(terms, parts, cut.width) if sums else u
    reason = cut.obstacle() or try_launch(
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


def _kernel_arguments(
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
) -> tuple[tuple[Tensor, ...], dict[str, bool]]:
    """Return the tensors per channel that kernels take, and flags of which ones they read."""
    negative, t = _negative_slope(activation), materialize(scale)
    b, s = t if bias is None else materialize(bias), t if inner is None else materialize(inner)
    flags = {"BIASED": bias is not None, "INNER": inner is not None, "RECTIFIED": negative == 0}
    return (b, t, s, constant(negative, u.dtype, u.device)), flags


def _negative_slope(activation: ProximalActivation | None) -> float:
    """Return a of σ(v) = max(v, av)."""
    return 1.0 if activation is None else slope_coefficients(activation)[1]


def _compose(
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
) -> Tensor:
    """Return σ(su + b)t by PyTorch's operations."""
    return _preactivation(u, bias, inner, activation)[1] * _broadcast(scale, u)


def _pull_back(
    g: Tensor,
    u: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    inner: Tensor | None,
    activation: ProximalActivation | None,
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of u, b, t and s by PyTorch's operations, with derivatives."""
    v, h = _preactivation(u, bias, inner, activation)
    flow, negative = (
        g * _broadcast(scale, u),
        1.0 if activation is None else slope_coefficients(activation)[1],
    )
    v_flow = (
        torch.where(v > 0, flow, flow * negative) if negative else torch.where(v <= 0, 0.0, flow)
    )
    dims = [d for d in range(u.ndim) if d != 1]
    return (
        v_flow if inner is None else v_flow * _broadcast(inner, u),
        None if bias is None else v_flow.sum(dims),
        (g * h).sum(dims),
        None if inner is None else (v_flow * u).sum(dims),
    )


def _preactivation(
    u: Tensor, bias: Tensor | None, inner: Tensor | None, activation: ProximalActivation | None
) -> tuple[Tensor, Tensor]:
    """Return v = su + b and σ(v)."""
    v = u if inner is None else u * _broadcast(inner, u)
    v = v if bias is None else v + _broadcast(bias, u)
    return v, v if activation is None else activation(v)


def _broadcast(vector: Tensor, u: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (u.ndim - 2))


@functools.cache
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a number in the memory of a device, cached: copying it there waits for the device."""
    with torch.inference_mode(False):
        return torch.tensor([value], dtype=dtype, device=device)


@dataclass(frozen=True)
class _Cut:
    """Hold how a tensor is seen as a matrix and cut into tiles.

    Attributes:
        rows, columns: of the matrix.
        channels: number of channels.
        is_by_column: whether each column belongs to a channel; else row i belongs to channel
            i modulo `channels`.
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
        """Return samples × channels × pixels in an order that is a matrix, and its cut."""
        u, channels = detach_values(u), u.shape[1]
        if u.ndim == 4 and u.is_contiguous(memory_format=torch.channels_last):
            return u, _Cut.by_column(u.numel() // channels, channels)
        u = u.contiguous()
        pixels = math.prod(u.shape[2:])
        if pixels == 1:
            return u, _Cut.by_column(u.shape[0], channels)
        return u, _Cut(u.shape[0] * channels, pixels, channels, False, _tile(pixels))

    @property
    def width(self) -> int:
        """Return how many sums one part of the matrix has."""
        return self.columns if self.is_by_column else self.rows

    def programs(self, repeat: int = 1) -> int:
        """Return how many programs there are, with `repeat` tiles each."""
        rows, columns = self._blocks(repeat)
        return rows * columns

    def parts(self, repeat: int) -> int:
        """Return in how many parts each sum is computed."""
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


def detach_values(tensor: Tensor) -> Tensor:
    """Return a tensor cut from the graph, with no negation pending."""
    return tensor.detach().resolve_neg()


def _match_layout(g: Tensor, u: Tensor) -> Tensor:
    """Return g in the memory layout of u, whose shape it has."""
    return g if g.stride() == u.stride() else torch.empty_like(u).copy_(g)


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("solvers.backends.pointwise_kernels")
