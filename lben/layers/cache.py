"""When may weights that a layer computed from its parameters be used again?

They may be used as long as every tensor that they depend on still has its value. The cache compares
values with a snapshot, as the cache of operators does: see `solvers.dependencies`, Note [Values
decide].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from lben.layers.lasting import Lasting, make_lasting
from lben.weights import Weights
from solvers import LinearOperator, LinearSlope, Masked, ProximalActivation
from solvers.activations import check_activation
from solvers.dependencies import Snapshot, collect_dependencies, leave_modes
from solvers.precision import use_full_precision

T_ = TypeVar("T_")
M_ = TypeVar("M_", bound=nn.Module)
N_ = TypeVar("N_", bound=nn.Module)
W_ = TypeVar("W_", bound=Weights)


class Cache:
    """Everything that was computed from one state of a parameterization: weights, factors, tensors.

    A layer whose parameters have changed makes a new cache. A thread that still works with the old
    cache keeps all of it. Everything is computed by a twin of the parameterization, on the copies
    of the parameters in the snapshot. Therefore the cached values fit each other even if another
    thread writes to the parameters meanwhile, they stay valid after the parameters change, and the
    parameterization itself is never touched.

    Attributes:
        snapshot: of the parameterization.
        parameters: the copies of its parameters by name.
        twin: the parameterization on them.
    """

    def __init__(
        self, parameterization: nn.Module, tensors: tuple[Tensor, ...], settings: object
    ) -> None:
        self.snapshot = Snapshot.take(tensors, settings)
        copies = {id(t): c for t, c in zip(tensors, self.snapshot.copies, strict=True)}
        names = parameterization.named_parameters()
        self.parameters = {name: copies[id(p)] for name, p in names}
        self.twin = twin(parameterization, self.parameters)
        self._values: dict[Hashable, Any] = {}

    def get(
        self, key: Hashable, build: Callable[[], T_], fits: Callable[[T_], bool] | None = None
    ) -> T_:
        """Return the cached value of a key; build it if there is none or if it does not fit."""
        value: T_ | None = self._values.get(key)
        if value is None or (fits is not None and not fits(value)):
            device = self.snapshot.copies[0].device.type
            with leave_modes(device):
                value = build()
            self._values[key] = value
        return value


class CachedWeights(Generic[W_]):
    """Weights that were handed out, with a check that no caller has written to them since."""

    def __init__(self, weights: W_) -> None:
        self.weights = weights.apply(Tensor.detach)
        self._snapshot = Snapshot.take(self._tensors())

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.weights.tensors().values())

    def is_untouched(self) -> bool:
        """Return whether the tensors still have the values that they were made with."""
        return self._snapshot.fits(self._tensors())


class Running:
    """The tensors with which a layer runs, with their graph back to copies of the parameters.

    Args:
        cache: of the parameters.
        compute_dtype: in which products run.
        tracked: of each parameter whether it has a gradient; none without a graph.
    """

    def __init__(self, cache: Cache, compute_dtype: torch.dtype, tracked: tuple[bool, ...]) -> None:
        self.compute_dtype, self.tracked, self.twin = compute_dtype, tracked, cache.twin
        # The graph of the cache saves its tensors by hooks of its own, so that a checkpointed block
        # does not count them as its own. Saved tensors are detached: a node that held its own
        # result would never be freed.
        with (
            torch.set_grad_enabled(any(tracked)),
            torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _unpack),
        ):
            wanted = tracked or (False,) * len(cache.parameters)
            self.leaves = {
                name: copy.detach().requires_grad_(has)
                for (name, copy), has in zip(cache.parameters.items(), wanted, strict=True)
            }
            self.outputs = tuple(twin(self.twin, self.leaves)(compute_dtype))
        self.values = tuple(t.detach() for t in self.outputs)

    def attach(self, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the values as functions of the parameters."""
        return _Attach.apply(self, *parameters)  # type: ignore[no-untyped-call]

    def pull(self, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Return the gradients of the parameters from those of the values."""
        return _pull(self.outputs, gradients, tuple(self.leaves.values()), again=False)

    def pull_again(
        self, parameters: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of `pull` as functions of the parameters and of the gradients."""
        outputs = twin(self.twin, dict(zip(self.leaves, parameters, strict=True)))(
            self.compute_dtype
        )
        return _pull(outputs, gradients, parameters, again=True)


def _pull(
    outputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    *,
    again: bool,
) -> tuple[Tensor | None, ...]:
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
    roots, received = zip(*pairs, strict=True)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(
        torch.autograd.grad(
            roots, wanted, received, retain_graph=True, create_graph=again, allow_unused=True
        )
    )
    return tuple(next(found) if t.requires_grad else None for t in inputs)


class _AttachContext(FunctionCtx):
    running: Running
    saved_tensors: tuple[Tensor, ...]


class _Attach(torch.autograd.Function):
    """Return values computed before, with the gradient of the graph that computed them.

    The leaves of that graph are copies of the parameters. A gradient that is to be differentiated
    again (create_graph) is computed from the parameters themselves, with a graph of its own.
    """

    @staticmethod
    def forward(ctx: _AttachContext, running: Running, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.running = running
        ctx.save_for_backward(*parameters)
        return tuple(v.view_as(v) for v in running.values)

    @staticmethod
    def backward(ctx: _AttachContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with use_full_precision(gradients[0]):
            if torch.is_grad_enabled():
                return None, *ctx.running.pull_again(ctx.saved_tensors, gradients)
            return None, *ctx.running.pull(gradients)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def twin(module: M_, parameters: Mapping[str, Tensor]) -> M_:
    """Return a module that shares everything with another one except its parameters.

    torch.func.functional_call would put these parameters into the module itself for the time of the
    call, where other threads would find them.

    Args:
        module: the original, which is not changed.
        parameters: by name, as `named_parameters` has them.
    """
    names = {id(p): name for name, p in module.named_parameters()}

    def copy(original: N_) -> N_:
        result = original.__new__(type(original))
        result.__dict__ = {
            **original.__dict__,
            "_parameters": {
                name: None if p is None else parameters[names[id(p)]]
                for name, p in original._parameters.items()
            },
            "_modules": {
                name: None if m is None else copy(m) for name, m in original._modules.items()
            },
        }
        return result

    return copy(module)


class CachingLayer(Lasting):
    """A layer that computes its weights once per change of what they depend on.

    Args:
        parameterization: of the weights.
    """

    def __init__(self, parameterization: nn.Module) -> None:
        super().__init__()
        self.parameterization = parameterization
        make_lasting(self)
        self._cached: Cache | None = None
        self._last: LinearOperator | None = None  # the last operator, for its factors

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute; an activation whose slopes are not known to lie in [0, 1] is refused.

        Raises:
            TypeError: for an activation that is no `ProximalActivation`.
            ValueError: for one whose slopes are numbers in a tensor, which may be written to.
        """
        if name == "activation":
            value = _sector(value)
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def _is_tracked(self) -> bool:
        """Return whether the weights get a gradient now."""
        return torch.is_grad_enabled() and (
            any(p.requires_grad for p in self.parameterization.parameters())
            or any(t.requires_grad for t in collect_dependencies(self.parameterization)[0])
        )

    def _cache(self) -> Cache:
        """Return the cache of the parameterization as it is now."""
        tensors, settings = collect_dependencies(self.parameterization)
        cache = self._cached  # another thread may drop it meanwhile
        if cache is None or not cache.snapshot.fits(tensors, settings):
            cache = Cache(self.parameterization, tensors, settings)
            self._cached = cache
        return cache

    def _reference(self) -> Tensor:
        """Return a tensor whose dtype and device are those of the layer."""
        first = next(self.parameters(), None)  # a replica has none, but has their copies
        if first is None:
            tensors = collect_dependencies(self.parameterization)[0]
            return next(t for t in tensors if t.is_floating_point())
        return first

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cached": None, "_last": None}


def _sector(activation: object) -> ProximalActivation:
    """Return the σ of an activation; refuse slopes outside [0, 1], for which no bound holds."""
    try:
        check_activation(activation)
    except TypeError as error:
        words = str(error).replace("a ProximalActivation", "a solvers.ProximalActivation")
        raise TypeError(f"the bound is for slopes in [0, 1]: the {words}") from None
    inner = activation.activation if isinstance(activation, Masked) else activation
    if isinstance(inner, LinearSlope):
        raise ValueError(
            "LinearSlope is the σ of adjoint problems, whose slopes may be written to: a layer "
            "takes an activation of fixed slopes in [0, 1], such as solvers.LeakyReLU(0.1)"
        )
    assert isinstance(activation, ProximalActivation)
    return activation
