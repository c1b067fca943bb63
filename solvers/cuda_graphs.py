"""How does a computation that is the same at every call save its kernel launches?

On a GPU a small kernel takes less time than its launch. A CUDA graph records the kernels once and
launches them together. It reads and writes the memory of the recording, so arguments are copied in
and results are copied out.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from solvers.gradient import forbid_differentiation

Function = Callable[..., tuple[Tensor, ...]]


class GraphedCallable:
    """Call a function of tensors by replaying its kernels as a CUDA graph, forward and backward.

    The first call with new kinds of arguments captures a graph. A kind is given by the shapes,
    dtypes, device and need of a gradient of the arguments, by the stream, and by the global
    settings that decide which kernels run (grad mode, autocast, precision, determinism). If there
    can be no graph, the function itself is called, and `status` says why.

    Arguments are copied into the graph's memory at every call and results out of it. So the results
    and gradients of a call never change afterwards, and backward passes may follow in any order; if
    the graph was replayed between a forward pass and its backward pass, the forward pass is
    computed again.

    Everything that changes must be an argument, also weights: a function that factors them does so
    at every replay. If a device cannot capture a factorization, pass the inverse as an argument
    (`fixed_step_equilibrium`). All other tensors that the function uses are read at the address
    that they had at the capture, so they must stay there.

    Args:
        function: maps tensors to a tuple of tensors, and takes no decision by their numbers; such
            as one with `fixed_step_equilibrium`. It is called a few times per graph.
        limit: how many graphs are cached with their memory, at least 1; the least recently used one
            is dropped first.

    Attributes:
        status: how the last call went: "replayed", or "not captured: " and the reason.
        replays: how many calls were answered by a graph.

    Raises:
        ValueError: if limit is below 1.
        TypeError: on a call, if the function returns anything but a tuple of tensors.

    Example:
        >>> from solvers import ReLU, fixed_step_equilibrium
        >>> @GraphedCallable
        ... def equilibrium(W, v):
        ...     return fixed_step_equilibrium(W, v, ReLU(), step_size=1.0, steps=30)
        >>> W, v = torch.tensor([[0.0, -0.5], [0.5, 0.0]]), torch.ones(1, 2)
        >>> z, residual = equilibrium(W, v)
        >>> z
        tensor([[0.4000, 1.2000]])
        >>> equilibrium.status  # on a CPU
        'not captured: tensors are on cpu'
    """

    def __init__(self, function: Function, *, limit: int = 8) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.function, self.limit = function, limit
        self.status, self.replays = "not called yet", 0
        self._recordings: OrderedDict[Hashable, Recording | str] = OrderedDict()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return the results of the function, in new memory."""
        found = _find_obstacle(arguments) or self._recording(arguments)
        if isinstance(found, str):
            self.status = f"not captured: {found}"
            return _check_results(self.function(*arguments))
        self.status = "replayed"
        self.replays += 1
        return _Replay.apply(found, *arguments)  # type: ignore[no-untyped-call]

    def _recording(self, arguments: tuple[Tensor, ...]) -> Recording | str:
        """Return the cached or newly captured graph of these arguments, or why there is none."""
        key = _make_key(arguments)
        with _CAPTURING:
            if key not in self._recordings:
                self._recordings[key] = _record(self.function, arguments)
            self._recordings.move_to_end(key)
            if len(self._recordings) > self.limit:
                self._recordings.popitem(last=False)
            return self._recordings[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recordings": OrderedDict()}


@runtime_checkable
class Graph(Protocol):
    """Hold recorded kernels."""

    def replay(self) -> None:
        """Launch the recorded kernels."""


# Note [Who owns the memory of a graph]
# A replay reads and writes the memory of the capture. There the forward graph leaves the values
# that the backward graph reads, and the backward graph, captured into the same pool, overwrites
# them. So the memory belongs to one call at a time: to the last that ran forward, until it has run
# backward.
@dataclass(eq=False, kw_only=True)
class Recording:
    """Hold a captured function with the memory that it reads and writes.

    Attributes:
        arguments, results: of the function.
        cotangents: of the results that have a gradient, None for the others.
        gradients: of the arguments, None for those that have none.
        forward, backward: the graphs; backward is None if no result has a gradient.
    """

    arguments: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    cotangents: tuple[Tensor | None, ...]
    gradients: tuple[Tensor | None, ...]
    forward: Graph
    backward: Graph | None
    _owner: object = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, call: object, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Replay the forward graph for a call, which owns the memory from now on.

        Returns:
            Copies of the results.
        """
        with self._lock:
            self._run(call, arguments)
            return tuple(result.clone() for result in self.results)

    def backpropagate(
        self, call: object, arguments: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Replay the backward graph for a call, after the forward one if it lost the memory.

        Returns:
            Copies of the gradients of the arguments, None for those that have none.
        """
        assert self.backward is not None
        with self._lock:
            if self._owner is not call:
                self._run(call, arguments)
            for own, given in zip(self.cotangents, cotangents, strict=True):
                if own is not None:
                    own.copy_(given)
            self.backward.replay()
            self._owner = None
            return tuple(None if g is None else g.clone() for g in self.gradients)

    def _run(self, call: object, arguments: tuple[Tensor, ...]) -> None:
        for own, given in zip(self.arguments, arguments, strict=True):
            own.copy_(given)
        self.forward.replay()
        self._owner = call


class _Replay(torch.autograd.Function):
    """Give a replay a gradient: the replay of the backward graph."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, *arguments: Tensor) -> tuple[Tensor, ...]:
        ctx.recording, ctx.call = recording, object()
        ctx.save_for_backward(*arguments)
        results = recording.run(ctx.call, arguments)
        pairs = zip(results, recording.cotangents, strict=True)
        ctx.mark_non_differentiable(*(result for result, own in pairs if own is None))
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        arguments = ctx.saved_tensors
        with torch.no_grad():
            gradients = ctx.recording.backpropagate(ctx.call, arguments, cotangents)
        if torch.is_grad_enabled():  # create_graph
            refusal = "a graphed function has no second derivative: call it as it is"
            gradients = tuple(
                None if g is None else forbid_differentiation(g, refusal, *cotangents, *arguments)
                for g in gradients
            )
        return None, *gradients


_CAPTURING = threading.RLock()
"""CUDA allows one capture at a time."""
_DEVICE = "cuda"
_BACKENDS: Any = torch.backends
_WARM_UPS = 3
"""Calls before a capture, in which libraries allocate memory and choose algorithms; PyTorch's
manual advises three."""


def _find_obstacle(arguments: tuple[Tensor, ...]) -> str | None:
    """Return why a call with these arguments cannot be a replay, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch._C._are_functorch_transforms_active():
        return "a function transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives are active"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if not arguments:
        return "there are no arguments"
    for i, t in enumerate(arguments):
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided:
            return f"argument {i} is no plain tensor ({type(t).__name__})"
    devices = list(dict.fromkeys(str(t.device) for t in arguments))
    if len(devices) > 1 or arguments[0].device.type != _DEVICE:
        return f"tensors are on {' and '.join(devices)}"
    if torch.cuda.is_current_stream_capturing():
        return "the stream is being captured already"
    return None


def _make_key(arguments: tuple[Tensor, ...]) -> Hashable:
    """Return everything that decides which kernels run, as a key of the cache."""
    device, grad, backends = arguments[0].device, torch.is_grad_enabled(), _BACKENDS
    return (
        tuple((t.shape, t.dtype, t.device, grad and t.requires_grad) for t in arguments),
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None,
        grad,
        torch.is_inference_mode_enabled(),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
        tuple(b.fp32_precision for b in (backends, backends.cuda.matmul, backends.cudnn.conv)),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


def _check_results(results: Any) -> tuple[Tensor, ...]:
    if isinstance(results, tuple) and all(isinstance(t, Tensor) for t in results):
        return results
    raise TypeError(
        f"a graphed function returns a tuple of tensors, got {type(results).__name__}"
        + (f" of {', '.join(type(t).__name__ for t in results)}" * isinstance(results, tuple))
    )


def _record(function: Function, arguments: tuple[Tensor, ...]) -> Recording | str:
    """Capture the function forward and backward, or return why that is not possible.

    Errors of the function itself are raised, because it runs a few times before the capture. See
    Note [The stream of a capture].
    """
    device, grad = arguments[0].device, torch.is_grad_enabled()
    own = tuple(t.detach().clone().requires_grad_(grad and t.requires_grad) for t in arguments)
    with torch.cuda.device(device):
        state = torch.cuda.get_rng_state(device)
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                results = _check_results(function(*own))
                reaches_others = _reaches_other_leaves(results, own)
                _differentiate(results, tuple(torch.zeros_like(t) for t in results), own)
            del results
        current.wait_stream(side)
        if reaches_others:
            return "a tensor that is no argument requires a gradient"
        if not torch.equal(torch.cuda.get_rng_state(device), state):
            torch.cuda.set_rng_state(state, device)
            return "the function draws random numbers"
        # A capture that fails leaves its own stream as the current one; this block does not.
        with torch.cuda.stream(current):
            try:
                return _capture(function, own, side)
            except Exception as error:  # the function ran before, so the capture failed
                first: BaseException = error
                while first.__context__ is not None:
                    first = first.__context__
        with contextlib.suppress(RuntimeError):  # the same error of the capture once more
            torch.cuda.synchronize(device)
        return f"the capture failed with {type(first).__name__}: {_first_line(first)}"


# Note [The stream of a capture]
# cuSOLVER (LU) and cuBLASLt (products) allocate a handle and a workspace at their first use on a
# stream, which is not allowed while the stream is captured. So the warm-up calls and both captures
# run on the same stream. After a capture that failed the host waits for the device, because work
# that is still queued would make the next capture fail too.
def _capture(function: Function, own: tuple[Tensor, ...], side: torch.cuda.Stream) -> Recording:
    forward, backward = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(forward, stream=side):
        results = _check_results(function(*own))
    cotangents = tuple(torch.zeros_like(t) if t.requires_grad else None for t in results)
    gradients: tuple[Tensor | None, ...] = (None,) * len(own)
    if any(t.requires_grad for t in results):
        backward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(backward, pool=forward.pool(), stream=side):
            gradients = _differentiate(results, cotangents, own)
    return Recording(
        arguments=tuple(t.detach() for t in own),
        results=tuple(t.detach() for t in results),
        cotangents=cotangents,
        gradients=gradients,
        forward=forward,
        backward=backward,
    )


def _differentiate(
    results: tuple[Tensor, ...],
    cotangents: tuple[Tensor | None, ...],
    arguments: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments, None where there is none."""
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    wanted = [t for t in arguments if t.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(arguments)
    roots, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, wanted, seeds, allow_unused=True))
    return tuple(next(found) if t.requires_grad else None for t in arguments)


def _reaches_other_leaves(results: tuple[Tensor, ...], arguments: tuple[Tensor, ...]) -> bool:
    """Say whether results depend on leaves that are no arguments and would get no gradient."""
    own = {id(t) for t in arguments}
    if any(t.requires_grad and t.grad_fn is None and id(t) not in own for t in results):
        return True
    nodes, seen = [t.grad_fn for t in results], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaf = node.variable  # type: ignore[attr-defined]
            if id(leaf) not in own:
                return True
        nodes += [parent for parent, _ in node.next_functions]
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
