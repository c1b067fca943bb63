"""Which tensors are in a file, and is each of them what a layout says it is?

No code of a file is run: safetensors holds none, and torch reads pickles with weights_only=True.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lben.weights.base import convert

Source: TypeAlias = str | Path | Mapping[str, Tensor]
"""A file, or tensors by name."""

_INSIDE = ("state_dict", "model_state_dict", "model", "net")
"""Under which key a training script may keep the tensors."""

_PREFIXES = ("module.", "model.")
"""What wrappers of a model put before every name."""


def read_tensors(source: Source) -> dict[str, Tensor]:
    """Return the tensors of a file or a mapping by name, on the CPU.

    A state dict inside a checkpoint of a training script is found, and the prefixes "module."
    and "model." of wrappers are dropped.

    Args:
        source: a .safetensors file, a file of torch.save, or tensors by name.

    Returns:
        The tensors, as stored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or of another format, wants to run code, or holds no
            tensors by name.
    """
    if isinstance(source, Mapping):
        return _find_tensors(source, "the mapping")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _find_tensors(found, str(path))


def _read_safetensors(path: Path) -> object:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}): it is truncated or of another "
            "format; fetch it again, or give a file of torch.save another suffix"
        ) from error


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of protocols: what matters is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds for a damaged file
        named = re.search(r"GLOBAL:? ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and named:
            raise ValueError(
                f"{path} is a pickle that wants to call {named[1]}, and no code of a file is run "
                "here. Where you trust the file, load it with its own project and save the tensors "
                "alone: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a file of torch.save ({type(error).__name__}): it is "
            "truncated, of another format, or a pickle of more than tensors, and no code of a file "
            "is run here; fetch it again, or save the tensors alone as safetensors"
        ) from error


def _find_tensors(found: object, where: str) -> dict[str, Tensor]:
    """Return the tensors of a mapping, or of the one inside it."""
    if isinstance(found, Mapping):
        for key in _INSIDE:
            if isinstance(inside := found.get(key), Mapping):
                found = inside
                break
    wrong = [
        f"{name} is {type(value).__name__}"
        for name, value in (found.items() if isinstance(found, Mapping) else ())
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if not isinstance(found, Mapping) or not found or wrong:
        got = "; ".join(wrong[:3]) or f"{type(found).__name__} of {_count(found)}"
        raise ValueError(
            f"expected tensors by name (a state dict) in {where}, got {got}: save "
            "model.state_dict()"
        )
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return dict(found)


def _count(found: object) -> str:
    return f"{len(found)} entries" if hasattr(found, "__len__") else "no entries"


class Tensors:
    """The tensors of a checkpoint, taken one after the other; none may be left over.

    Args:
        tensors: by name.
        layout: what the file is read as, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layout: str) -> None:
        self._left, self._layout = dict(tensors), layout

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def indices(self) -> list[int]:
        """Return the numbers that names start with, as those of torch.nn.Sequential do."""
        starts = {name.split(".")[0] for name in self._left}
        return sorted(int(start) for start in starts if start.isdecimal())

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """Return the shape of a tensor that is not taken yet.

        Args:
            name: of the tensor.
            dimensions: that it must have; None for any number.

        Raises:
            ValueError: if it is missing, or has another number of dimensions.
        """
        shape = tuple(self._find(name).shape)
        if dimensions not in (None, len(shape)):
            raise ValueError(
                f"{name} of a checkpoint of {self._layout} must have {dimensions} dimensions, got "
                f"shape {shape}: the file is of another network"
            )
        return shape

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor in float64, after checking its shape and numbers.

        Args:
            name: of the tensor.
            shape: wanted; None for any size.

        Raises:
            ValueError: if it is missing or not real, has another shape, or has NaN or infinite
                entries.
        """
        value = self._find(name)
        del self._left[name]
        got = tuple(value.shape)
        fits = all(wanted in (None, size) for wanted, size in zip(shape, got, strict=False))
        if len(got) != len(shape) or not fits:
            wanted = " × ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(
                f"{name} of a checkpoint of {self._layout} must have shape {wanted or '()'}, got "
                f"{got}: the file is of another network"
            )
        if not value.numel():
            raise ValueError(f"{name} has shape {got}, and no numbers: the file is damaged")
        if not value.is_floating_point():
            raise ValueError(f"{name} must hold real floating-point numbers, got {value.dtype}")
        value = convert(value, torch.float64)
        if wrong := int((~torch.isfinite(value)).sum()):
            raise ValueError(
                f"{name} has {wrong} entries that are NaN or infinite, of {value.numel()}: the "
                "training has diverged, or the file is damaged"
            )
        return value

    def finish(self) -> None:
        """Refuse tensors that are left over.

        Raises:
            ValueError: naming them.
        """
        if self._left:
            raise ValueError(
                f"a checkpoint of {self._layout} has no {', '.join(sorted(self._left)[:5])}"
                f"{' …' if len(self._left) > 5 else ''}: the file is of another network; name its "
                "kind, or take its tensors apart with from_torch"
            )

    def _find(self, name: str) -> Tensor:
        if name not in self._left:
            raise ValueError(
                f"a checkpoint of {self._layout} needs a tensor {name}, and the file has "
                f"{', '.join(sorted(self._left)[:8]) or 'no others'}: it is incomplete or of "
                "another network"
            )
        return self._left[name]
