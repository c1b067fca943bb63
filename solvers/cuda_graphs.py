"""How are the launches of a computation saved that is the same at every call?

On a GPU small kernels cost less than their launches. A CUDA graph records them once and launches
them together, from and to memory that stays where it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.gradient import attach_gradient

Function = Callable[..., tuple[Tensor, ...]]


class GraphedCallable:
    """Calls a function of tensors by replaying its kernels as a CUDA graph, forward and backward.

    There is one graph per shape, dtype, device and need of a gradient of the arguments, per stream
    and per global setting that decides what runs (grad mode, autocast, precision, determinism);
    the first call of each captures it. Where there can be no graph the function is called as it is,
    and `status` says why.

    Arguments are copied into the graph's memory at every call and results out of it, so results and
    gradients of a call stay what they are, and forward passes may be followed by their backward
    passes in any order: one whose graph has been replayed since is computed forward again. A
    function that factors its weights does so at every replay: pass them as arguments, like
    everything that changes. Where a device does not let a factorization be captured, the inverse
    can be an argument (`fixed_step_equilibrium`). Whatever else the function uses is taken from
    where it lay in memory when it was captured, and must stay there.

    Args:
        function: from tensors to a tuple of tensors, which decides nothing by their numbers, such
            as one with `fixed_step_equilibrium`; called a few times per graph.
        limit: how many graphs are kept, with their memory; the one unused for longest goes first.

    Attributes:
        status: how the last call went: "replayed", or "not captured: " and the reason.
        replays: how many calls were answered by a graph.

    Raises:
        ValueError: if limit is below 1.
        TypeError: on a call, if the function returns anything but a tuple of tensors.
    """

    def __init__(self, function: Function, *, limit: int = 8) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.function, self.limit = function, limit
        self.status, self.replays = "not called yet", 0
        self._kept: OrderedDict[Hashable, Recording | str] = OrderedDict()

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Return what the function returns, in memory of its own."""
        found = _obstacle(arguments) or self._recording(arguments)
        if isinstance(found, str):
            self.status = f"not captured: {found}"
            return _checked(self.function(*arguments))
        self.status = "replayed"
        self.replays += 1
        return _Replay.apply(found, *arguments)  # type: ignore[no-untyped-call]

    def _recording(self, arguments: tuple[Tensor, ...]) -> Recording | str:
        """Return the graph of these arguments, captured if need be, or why there is none."""
        key = _key(arguments)
        with _CAPTURING:
            if key not in self._kept:
                self._kept[key] = _record(self.function, arguments)
            self._kept.move_to_end(key)
            if len(self._kept) > self.limit:
                self._kept.popitem(last=False)
            return self._kept[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


class Graph(Protocol):
    """Recorded kernels."""

    def replay(self) -> None:
        """Launch them."""


# Note [Who owns the memory of a graph]
# A replay reads and writes where the capture did. The forward graph leaves there what the backward
# graph reads, and the backward graph, captured into the same pool, writes over it. So the memory
# belongs to one call at a time: to the last that ran forward, until it has run backward.
@dataclass(eq=False, kw_only=True)
class Recording:
    """A captured function with the memory that it reads and writes.

    Attributes:
        arguments, results: of the function.
        cotangents: of the results that have a gradient, None for the others.
        gradients: of the arguments, None where there is none.
        forward, backward: the graphs; no backward one where nothing has a gradient.
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
        """Return the results, for a call that owns the memory from now on."""
        with self._lock:
            self._run(call, arguments)
            return tuple(result.clone() for result in self.results)

    def pull(
        self, call: object, arguments: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of a call's arguments."""
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
    """A call of a recording."""

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
            gradients = ctx.recording.pull(ctx.call, arguments, cotangents)
        if torch.is_grad_enabled():  # create_graph
            refusal = "a graphed function has no second derivative: call it as it is"
            gradients = tuple(
                None if g is None else attach_gradient(g, refusal, *cotangents, *arguments)
                for g in gradients
            )
        return None, *gradients


_CAPTURING = threading.RLock()
"""CUDA allows one capture at a time."""
_DEVICE = "cuda"
_BACKENDS: Any = torch.backends
_WARM_UPS = 3
"""Calls before the capture, in which libraries allocate and choose, as PyTorch's manual advises."""


def _obstacle(arguments: tuple[Tensor, ...]) -> str | None:
    """Say why a call with these arguments can be no replay."""
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


def _key(arguments: tuple[Tensor, ...]) -> Hashable:
    """Return all that decides which kernels run."""
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


def _checked(results: Any) -> tuple[Tensor, ...]:
    if isinstance(results, tuple) and all(isinstance(t, Tensor) for t in results):
        return results
    raise TypeError(
        f"a graphed function returns a tuple of tensors, got {type(results).__name__}"
        + (f" of {', '.join(type(t).__name__ for t in results)}" * isinstance(results, tuple))
    )


def _record(function: Function, arguments: tuple[Tensor, ...]) -> Recording | str:
    """Capture the function forward and backward, or say why that cannot be.

    See Note [The stream of a capture].

    Errors of the function itself are raised as they are: it runs a few times before the capture.
    """
    device, grad = arguments[0].device, torch.is_grad_enabled()
    own = tuple(t.detach().clone().requires_grad_(grad and t.requires_grad) for t in arguments)
    with torch.cuda.device(device):
        state = torch.cuda.get_rng_state(device)
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                results = _checked(function(*own))
                strays = _has_strays(results, own)
                _pull(results, tuple(torch.zeros_like(t) for t in results), own)
            del results
        current.wait_stream(side)
        if strays:
            return "a tensor that is no argument requires a gradient"
        if not torch.equal(torch.cuda.get_rng_state(device), state):
            torch.cuda.set_rng_state(state, device)
            return "the function draws random numbers"
        # A capture that fails leaves its own stream as the current one; this block does not.
        with torch.cuda.stream(current):
            try:
                return _captured(function, own, side)
            except Exception as error:  # the function ran before, so it is the capture's
                first: BaseException = error
                while first.__context__ is not None:
                    first = first.__context__
        with contextlib.suppress(RuntimeError):  # the capture's own error, told once more
            torch.cuda.synchronize(device)
        return f"the capture failed with {type(first).__name__}: {_line(first)}"


# Note [The stream of a capture]
# Libraries have a handle and a workspace per stream, made at their first use on it, and that is not
# allowed while the stream is captured: cuSOLVER's LU, cuBLASLt's products. So the calls that warm
# up and both captures run on one stream. After a capture that failed the device comes to rest
# before anything else is captured: what the failure left behind would fail the next one.
def _captured(function: Function, own: tuple[Tensor, ...], side: torch.cuda.Stream) -> Recording:
    forward, backward = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(forward, stream=side):
        results = _checked(function(*own))
    cotangents = tuple(torch.zeros_like(t) if t.requires_grad else None for t in results)
    gradients: tuple[Tensor | None, ...] = (None,) * len(own)
    if any(t.requires_grad for t in results):
        backward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(backward, pool=forward.pool(), stream=side):
            gradients = _pull(results, cotangents, own)
    return Recording(
        arguments=tuple(t.detach() for t in own),
        results=tuple(t.detach() for t in results),
        cotangents=cotangents,
        gradients=gradients,
        forward=forward,
        backward=backward,
    )


def _pull(
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


def _has_strays(results: tuple[Tensor, ...], arguments: tuple[Tensor, ...]) -> bool:
    """Say whether the results' graph reaches leaves that are no arguments: they'd be forgotten."""
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


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
