"""How do compiled and traced graphs run the very tensors that a certificate is about?

A graph contains one custom operator that compilers treat as opaque. At each call the operator
computes the tensors from the current parameters, by the same code that runs eagerly. If a compiler
fused T or the normalised rows of a head into the graph, it would round them differently, and the
graph would run a network that was not proved.
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
    """Return whether the present call is recorded into a graph by a compiler or tracer."""
    return torch.compiler.is_compiling() or is_traced() or _make_fx_runs()


def is_traced() -> bool:
    """Return whether torch.jit.trace records the present call."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def refuse_graphs(x: object) -> None:
    """Refuse to record a solve into a graph: its number of steps depends on values.

    Args:
        x: the input.

    Raises:
        ValueError: naming the tools that record and the ones that work.
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
    """Refuse an input that is no tensor, or that is a placeholder of symbolic tracing.

    Args:
        x: the input.

    Raises:
        TypeError: naming its type.
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
    """Refuse an input that is no floating-point tensor of a dtype that the layer runs in.

    Args:
        x: the input.
        own: the dtype of the layer; None for a layer that runs in the dtype of x.

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
    """A module whose tensors the operator computes; the operator finds it by its unique name.

    A compiled graph stores the name as a constant and is guarded by it. A copy of the module gets
    another name, so it gets another graph.
    """

    name_in_graphs: str

    def enter(self) -> None:
        """Give the module a new name and register it under this name."""
        self.name_in_graphs = uuid.uuid4().hex
        _owners[self.name_in_graphs] = self

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.enter()

    @abstractmethod
    def source(self) -> nn.Module:
        """Return the module that maps a compute dtype to the tensors that run.

        Its parameters and buffers are all that these tensors depend on.
        """

    @abstractmethod
    def allocate(self, like: Tensor) -> list[Tensor]:
        """Return empty tensors with the shapes and dtypes of the tensors that run.

        Args:
            like: a tensor of the layer, whose dtype and device they get.
        """

    def in_graph(self, compute_dtype: torch.dtype) -> list[Tensor]:
        """Return the tensors that run, as outputs of one operator of the graph.

        Args:
            compute_dtype: in which products run.
        """
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
    # A graph may run without the dispatch keys that resolve conjugated complex tensors.
    with (
        torch.autocast(values[0].device.type, enabled=False),
        _guard(_Key.Conjugate, False),
        _guard(_Key.Negative, False),
    ):
        tensors = dict(zip(names, values, strict=True))
        return tuple(functional_call(source, tensors, (getattr(torch, compute_dtype),)))


def _copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy that shares no memory with a parameter."""
    return tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "lben::running",
    mutates_args=(),
    schema="(Tensor[] values, str name, str compute_dtype) -> Tensor[]",
)
def _running(values: Sequence[Tensor], name: str, compute_dtype: str) -> list[Tensor]:
    return [_copy(t) for t in _compute(values, name, compute_dtype)]


@_running.register_fake
def _(values: Sequence[Tensor], name: str, compute_dtype: str) -> list[Tensor]:
    return _owners[name].allocate(values[0])


@torch.library.custom_op(
    "lben::running_backward",
    mutates_args=(),
    schema="(Tensor[] values, Tensor[] gradients, str name, str compute_dtype) -> Tensor[]",
)
def _running_backward(
    values: Sequence[Tensor], gradients: Sequence[Tensor], name: str, compute_dtype: str
) -> list[Tensor]:
    leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in values]
    # A custom operator runs below autograd, so autograd has to be enabled again here.
    with (
        torch.enable_grad(),
        _guard(_Key.AutogradFunctionality, False),
        _guard(_Key.ADInplaceOrView, False),
    ):
        pairs = zip(_compute(leaves, name, compute_dtype), gradients, strict=True)
        outputs, received = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
        found = torch.autograd.grad(outputs, leaves, received, allow_unused=True)
    return [
        torch.zeros_like(v, memory_format=torch.contiguous_format) if g is None else _copy(g)
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
