"""Of which layout is a checkpoint? Its tensors' names say it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import Tensor

from lben.interop.checkpoints import chains, equilibria, networks
from lben.interop.checkpoints.equilibria import MODULE
from lben.interop.checkpoints.files import Source, Tensors, read_tensors
from lben.interop.checkpoints.networks import FlattenOrder
from lben.layers import LipschitzSequential
from lben.models import Classifier, ImageTask
from lben.weights.network import Network


class ReadOptions(TypedDict, total=False):
    """What a file does not say about its network; each layout has some of them."""

    task: ImageTask | None
    gamma: float | None
    m: float
    pool: int
    flatten_order: FlattenOrder
    standardised: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which a project saves its networks.

    Attributes:
        title: project and network, for messages.
        has: names that all files of the layout have; * stands for any characters.
        lacks: names that none of them has.
        read: makes the network of the tensors.
        options: those of `ReadOptions` that `read` takes.
    """

    title: str
    has: Collection[str]
    lacks: Collection[str] = ()
    read: Callable[..., Classifier | Network | LipschitzSequential]
    options: Collection[str] = ("task",)

    def matches(self, tensors: Mapping[str, Tensor]) -> bool:
        """Say whether the names are those of the layout."""
        has, lacks = (
            [any(fnmatchcase(name, pattern) for name in tensors) for pattern in patterns]
            for patterns in (self.has, self.lacks)
        )
        return all(has) and not any(lacks)


def _inside(*names: str) -> tuple[str, ...]:
    return tuple(MODULE + name for name in names)


LAYOUTS: dict[str, Layout] = {
    "lben": Layout(
        title="LBEN, fully connected, with a bound", read=equilibria.read_lben,
        has=_inside("B.weight", "V.weight", "S.weight", "G.weight"),
        options=("gamma", "m", "task"),
    ),
    "lben-unbounded": Layout(
        title="LBEN, fully connected, without a bound", read=equilibria.read_unbounded_lben,
        has=_inside("U.weight", "V.weight", "S.weight", "psi"), options=("m", "task"),
    ),
    "lben-conv-unbounded": Layout(
        title="LBEN, convolutional, without a bound", read=equilibria.read_convolutional_lben,
        has=(*_inside("U.weight", "A.weight", "B.weight", "psi"), "Wout.weight"),
        options=("m", "pool", "task"),
    ),
    "lben-conv": Layout(
        title="LBEN, convolutional, with a bound", read=equilibria.read_bounded_convolutional_lben,
        has=_inside("U.weight", "A.weight", "B.weight", "psi", "Wout.weight"),
        options=("gamma", "m", "pool", "task"),
    ),
    "mondeq": Layout(
        title="monDEQ, fully connected", read=equilibria.read_mondeq,
        has=(*_inside("U.weight", "A.weight", "B.weight"), "Wout.weight"),
        lacks=_inside("psi", "g"), options=("m", "task"),
    ),
    "mondeq-conv": Layout(
        title="monDEQ, convolutional", read=equilibria.read_convolutional_mondeq,
        has=(*_inside("U.weight", "A.weight", "B.weight", "g", "h"), "Wout.weight"),
        lacks=_inside("psi"), options=("m", "pool", "task"),
    ),
    "explicit": Layout(
        title="SemiMonDEQ or CRAFT (W, U, b, C, b_y)", read=equilibria.read_explicit,
        has=("W", "U", "C", "b", "b_y"),
    ),
    "glipsdp": Layout(
        title="GLipSDP", read=networks.read_glipsdp, has=("0.weight", "1.weight"),
        lacks=("*.alpha", "*.q"), options=("flatten_order", "standardised"),
    ),
    "sll": Layout(
        title="SLL", read=chains.read_sll, has=("*.kernel", "*.q"), lacks=("FirstConv.*",)
    ),
    "lbdn": Layout(
        title="LBDN (sandwich layers)", read=chains.read_lbdn, has=("*.alpha", "*.psi"),
        options=("gamma", "task"),
    ),
    "1lipschitz": Layout(
        title="1LipschitzLayersCompared", read=chains.read_compared, has=("FirstConv.*",),
    ),
}  # fmt: skip
"""By kind."""

_REFUSED = {
    MODULE + "A0.0.weight": (
        "monDEQ, multi-tier: its scales are coupled by convolutions of stride 2 on a torus with a "
        "border, which PooledParameterization has only without a border"
    ),
    MODULE
    + "Wp": "LBEN's network without constraints: its W supports no bound of any Λ in general",
}
"""What is known and not read, by the name of a tensor that only it has."""


def load_checkpoint(
    source: Source, kind: str | None = None, **options: Unpack[ReadOptions]
) -> Classifier | Network | LipschitzSequential:
    """Return the network of a public checkpoint, in float64.

    A classifier takes pixels in [0, 1]: the normalisation of its project is part of it. Its layers
    hold the weights, frozen, and claim what their project promised. The claim counts once
    `certificate` has proved it.

    Args:
        source: a .safetensors file, a file of torch.save, or tensors by name. A pickle is read with
            weights_only=True: no code of a file is run.
        kind: of the layout, such as "lben", "mondeq" or "glipsdp"; recognised when omitted.
        options: what the file does not say. task: the images, where they are neither MNIST nor
            CIFAR-10. gamma: γ of LBEN and LBDN; taken from the name of LBEN's files when omitted
            ("lip0.5"). m: the monotonicity m; 1, or 0.1 for convolutional LBEN, when omitted. pool:
            size of the windows that states of images are averaged over, where several sizes fit.
            flatten_order (GLipSDP): of images before a matrix, "channels_first" when omitted, or
            "channels_last", column after column, to which the published figures belong.
            standardised (GLipSDP): whether the input is standardised already (default) or raw.

    Returns:
        A classifier; for GLipSDP a `Network`; for LBDN without a task a `LipschitzSequential`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, wants to run code, or is of no known layout; if a
            tensor is missing, superfluous, of another shape, or not finite; for an option that the
            layout does not have.

    Example:
        >>> import torch
        >>> from lben.interop import load_checkpoint
        >>> _ = torch.manual_seed(0)
        >>> inside = "mon.linear_module."
        >>> model = load_checkpoint({  # monDEQ of MNIST with 5 units
        ...     inside + "U.weight": torch.randn(5, 784) / 28, inside + "U.bias": torch.randn(5),
        ...     inside + "A.weight": torch.randn(5, 5), inside + "B.weight": torch.randn(5, 5),
        ...     "Wout.weight": torch.randn(10, 5), "Wout.bias": torch.randn(10),
        ... })
        >>> model(torch.rand(2, 1, 28, 28, dtype=torch.float64)).shape
        torch.Size([2, 10])
        >>> model.certificate(bound="diagonal").bound < 1000
        True
    """
    found = read_tensors(source)
    layout = _recognise(found) if kind is None else _named(kind)
    if unknown := sorted(set(options) - set(layout.options)):
        raise ValueError(
            f"a checkpoint of {layout.title} has the options {', '.join(layout.options)}, got "
            f"{', '.join(unknown)}"
        )
    values: dict[str, Any] = dict(options)
    if "gamma" in layout.options and not isinstance(source, Mapping):
        values.setdefault("gamma", equilibria.gamma_in(Path(source).name))
    return layout.read(Tensors(found, layout.title), **values)


def _named(kind: str) -> Layout:
    if kind not in LAYOUTS:
        raise ValueError(f"kind must be one of {', '.join(LAYOUTS)}, got {kind!r}")
    return LAYOUTS[kind]


def _recognise(tensors: Mapping[str, Tensor]) -> Layout:
    for name, what in _REFUSED.items():
        if name in tensors:
            raise ValueError(f"this is a checkpoint of {what}: it is not read")
    for layout in LAYOUTS.values():
        if layout.matches(tensors):
            return layout
    known = "; ".join(f"{kind}: {layout.title}" for kind, layout in LAYOUTS.items())
    raise ValueError(
        f"no known layout has the tensors {', '.join(sorted(tensors)[:8])}"
        f"{' …' if len(tensors) > 8 else ''}. Known are {known}. For a network of torch.nn, build "
        "it and take from_torch"
    )
