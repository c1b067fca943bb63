"""How do compiled and traced graphs run the very tensors that a certificate is about?

By one operator that no compiler looks into: it computes them by the code that runs eagerly, from
the parameters as they are at each call. A compiler that fused T or the rows of a head into a graph
would round them otherwise, and the graph would be another network than the one that was proved.
"""

from __future__ import annotations

import sys
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.func import functional_call

from lben import precision
from solvers.precision import in_autocast

_Key, _guard = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard


def graph_is_made() -> bool:
    """Say whether a compiler or tracer makes a graph of what is called now."""
    return torch.compiler.is_compiling() or is_traced() or _make_fx_runs()


def is_traced() -> bool:
    """Say whether torch.jit.trace records what is called now."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def refuse_graphs(x: object) -> None:
    """Refuse a graph of a solve, which looks at numbers.

    Raises:
        ValueError: saying what makes one.
    """
    if isinstance(x, torch.fx.Proxy) or _make_fx_runs():
        raise ValueError(
            "an equilibrium is solved by steps that look at numbers, so there is no graph of it "
            "for torch.export, make_fx and symbolic_trace: call the layer itself, also behind "
            "torch.compile or torch.jit.trace"
        )


def _make_fx_runs() -> bool:
    tensors = sys.modules.get("torch.fx.experimental.proxy_tensor")  # heavy: not for everybody
    return tensors is not None and tensors.get_proxy_mode() is not None


def check_kind(x: object) -> None:
    """Refuse what is no tensor, or one that symbolic tracing makes up.

    Raises:
        TypeError: naming what was got.
    """
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "torch.fx.symbolic_trace runs without numbers, which the checks of this layer look at: "
            "take torch.export, or a Tracer whose is_leaf_module is true for it"
        )
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x must be a torch.Tensor, got {type(x).__name__}: torch.from_numpy or "
            "torch.as_tensor makes one"
        )


def check_numbers(x: object, own: torch.dtype | None = None) -> None:
    """Refuse what is no tensor of floating point, for a layer that would compute with it as it is.

    Args:
        x: the input.
        own: the dtype of the layer; none where it runs in that of x.

    Raises:
        TypeError: as `check_kind`.
        ValueError: for another dtype; autocast may give x a floating-point one of its own.
    """
    check_kind(x)
    assert isinstance(x, Tensor)
    if not x.is_floating_point():
        raise ValueError(
            f"x must hold floating-point numbers, got {x.dtype}: convert images with "
            "lben.data.pixels, and other numbers by x.to(torch.get_default_dtype())"
        )
    if own not in (None, x.dtype) and not in_autocast(x.device.type):
        raise ValueError(
            f"x is {x.dtype}, the layer is {own}: convert one of them, or use torch.autocast"
        )


class Owner(nn.Module):
    """A module whose tensors the operator computes, found by a name that is its own.

    A graph holds the name and is guarded by it: a copy of the module has another.
    """

    name_in_graphs: str

    def enter(self) -> None:
        """Take a new name."""
        self.name_in_graphs = uuid.uuid4().hex
        _owners[self.name_in_graphs] = self

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.enter()

    @abstractmethod
    def source(self) -> nn.Module:
        """Return the module that makes the tensors that run of a precision, and of all values."""

    @abstractmethod
    def blank(self, like: Tensor) -> list[Tensor]:
        """Return tensors of the shapes and dtypes of those that run, without numbers."""

    def in_graph(self, compute_dtype: torch.dtype) -> list[Tensor]:
        """Return the tensors that run, as one operator of the graph that is made."""
        values = [*self.parameters(), *self.buffers()]
        return torch.ops.lben.running(
            values, self.name_in_graphs, str(compute_dtype).removeprefix("torch.")
        )


_owners: WeakValueDictionary[str, Owner] = WeakValueDictionary()


def _compute(values: Sequence[Tensor], name: str, compute_dtype: str) -> tuple[Tensor, ...]:
    owner = _owners.get(name)
    if owner is None:
        raise RuntimeError(
            "the layer that this graph was made of is gone, or in another process: keep it as long "
            "as the graph, or make the graph again"
        )
    source = owner.source()
    names = [n for n, _ in (*source.named_parameters(), *source.named_buffers())]
    if compute_dtype == "float32":
        images = any(v.ndim > 2 for v in values)
        precision.refuse_reduced(values[0].device.type, convolution=images)
    # A graph may run without the keys that make conjugates of complex tensors what they say.
    with (
        torch.autocast(values[0].device.type, enabled=False),
        _guard(_Key.Conjugate, False),
        _guard(_Key.Negative, False),
    ):
        tensors = dict(zip(names, values, strict=True))
        return tuple(functional_call(source, tensors, (getattr(torch, compute_dtype),)))


def _own(tensor: Tensor) -> Tensor:
    """Return a copy that shares no memory with a parameter, in the order of its dimensions."""
    return tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "lben::running",
    mutates_args=(),
    schema="(Tensor[] values, str name, str compute_dtype) -> Tensor[]",
)
def _running(values: Sequence[Tensor], name: str, compute_dtype: str) -> list[Tensor]:
    return [_own(t) for t in _compute(values, name, compute_dtype)]


@_running.register_fake
def _(values: Sequence[Tensor], name: str, compute_dtype: str) -> list[Tensor]:
    return _owners[name].blank(values[0])


@torch.library.custom_op(
    "lben::running_backward",
    mutates_args=(),
    schema="(Tensor[] values, Tensor[] gradients, str name, str compute_dtype) -> Tensor[]",
)
def _running_backward(
    values: Sequence[Tensor], gradients: Sequence[Tensor], name: str, compute_dtype: str
) -> list[Tensor]:
    leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in values]
    # An operator runs below autograd, which has to be let in again.
    with (
        torch.enable_grad(),
        _guard(_Key.AutogradFunctionality, False),
        _guard(_Key.ADInplaceOrView, False),
    ):
        pairs = zip(_compute(leaves, name, compute_dtype), gradients, strict=True)
        outputs, received = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
        found = torch.autograd.grad(outputs, leaves, received, allow_unused=True)
    return [
        torch.zeros_like(v, memory_format=torch.contiguous_format) if g is None else _own(g)
        for v, g in zip(values, found, strict=True)
    ]


@_running_backward.register_fake
def _(
    values: Sequence[Tensor], gradients: Sequence[Tensor], name: str, compute_dtype: str
) -> list[Tensor]:
    return [torch.empty_like(v, memory_format=torch.contiguous_format) for v in values]


class _Context(FunctionCtx):
    name: str
    compute_dtype: str
    shapes: list[tuple[torch.Size, torch.dtype]]
    saved_tensors: tuple[Tensor, ...]


def _keep(ctx: _Context, inputs: tuple[Sequence[Tensor], str, str], output: list[Tensor]) -> None:
    values, ctx.name, ctx.compute_dtype = inputs
    ctx.save_for_backward(*values)
    ctx.shapes = [(t.shape, t.dtype) for t in output]


def _differentiate(
    ctx: _Context, gradients: list[Tensor | None]
) -> tuple[list[Tensor] | None, ...]:
    values = list(ctx.saved_tensors)
    full = [
        values[0].new_zeros(shape, dtype=dtype) if g is None else g
        for g, (shape, dtype) in zip(gradients, ctx.shapes, strict=True)
    ]
    return torch.ops.lben.running_backward(values, full, ctx.name, ctx.compute_dtype), None, None


def _refuse(ctx: _Context, *gradients: object) -> None:
    raise RuntimeError(
        "a graph has no second derivatives in the parameters of this layer: call the layer itself"
    )


_running.register_autograd(_differentiate, setup_context=_keep)
_running_backward.register_autograd(_refuse)
