"""When may weights that a layer computed from its parameters be used again?

As long as everything that they depend on still has its value: see `solvers.dependencies`, Note
[Values decide], whose snapshots this cache and that of operators have in common.
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
    """What was computed from a parameterization as it was: weights, factors, the tensors that run.

    A layer that finds other values makes a new cache, and a thread that is still at work with the
    old one has all of it. Everything is computed by a twin of the parameterization on the copies of
    the snapshot: so the values fit each other, whatever another thread writes meanwhile, they
    outlive what the parameters become, and the parameterization is not touched.

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
        """Return what `build` returned on the last call with this key, built anew if it misfits."""
        value: T_ | None = self._values.get(key)
        if value is None or (fits is not None and not fits(value)):
            device = self.snapshot.copies[0].device.type
            with leave_modes(device):
                value = build()
            self._values[key] = value
        return value


class CachedWeights(Generic[W_]):
    """Weights, and whether somebody to whom they were given has written to them."""

    def __init__(self, weights: W_) -> None:
        self.weights = weights.apply(Tensor.detach)
        self._snapshot = Snapshot.take(self._tensors())

    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.weights.tensors().values())

    def is_untouched(self) -> bool:
        """Say whether the tensors are as they were made."""
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
        # What is cached is no part of what a checkpointed block saves. Saved results are detached:
        # a node that held its own result would never be freed.
        with (
            torch.set_grad_enabled(any(tracked)),
            torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same),
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
        """Return the same as functions of the parameters and of the gradients of the values."""
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
    """Values computed before, with the gradient of the graph that computed them.

    Its leaves are copies. A gradient that is to be differentiated again (create_graph) is computed
    from the parameters themselves, with a graph of its own.
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


def _same(tensor: Tensor) -> Tensor:
    return tensor


def twin(module: M_, parameters: Mapping[str, Tensor]) -> M_:
    """Return a module that shares everything with another but its parameters.

    torch.func.functional_call puts the other parameters into the module itself meanwhile, where
    threads find them.

    Args:
        parameters: by name, as `named_parameters` has them.
    """
    names = {id(p): name for name, p in module.named_parameters()}

    def copied(original: N_) -> N_:
        result = original.__new__(type(original))
        result.__dict__ = {
            **original.__dict__,
            "_parameters": {
                name: None if p is None else parameters[names[id(p)]]
                for name, p in original._parameters.items()
            },
            "_modules": {
                name: None if m is None else copied(m) for name, m in original._modules.items()
            },
        }
        return result

    return copied(module)


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
        """Say whether the weights get a gradient now."""
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
        """Return a tensor that says in which precision and where the layer is."""
        first = next(self.parameters(), None)  # a replica has none, but has their copies
        if first is None:
            tensors = collect_dependencies(self.parameterization)[0]
            return next(t for t in tensors if t.is_floating_point())
        return first

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cached": None, "_last": None}


def _sector(activation: object) -> ProximalActivation:
    """Return σ of slopes in [0, 1], which is what every bound is for."""
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
