"""What does a statement about a whole network depend on? One fingerprint names all of it."""

from __future__ import annotations

from dataclasses import is_dataclass

from torch import nn

from lben.weights import digest

_SOLVING = {
    "tol", "max_steps", "on_failure", "method", "gradient", "training", "config", "name_in_graphs",
}  # fmt: skip
"""Settings that the fingerprint leaves out: how a layer is solved, what it was built from, its name
in graphs. No Lipschitz bound depends on them, so a copy of a network has the same fingerprint."""


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of a network: its modules in order, their settings, and all tensors.

    Settings are the plain values that the modules hold: sizes, kinds, γ, paddings, activations.
    Tensors are all parameters and buffers, with names, shapes, dtypes and bytes. The settings of
    the equilibrium solves are left out.

    Args:
        network: any module.

    Returns:
        64 hexadecimal digits.
    """
    modules = [
        f"{name}:{type(module).__qualname__}{_settings(module)}"
        for name, module in network.named_modules(remove_duplicate=False)
    ]
    tensors = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    return digest("\n".join(modules), tensors)


def _settings(module: nn.Module) -> str:
    plain = {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in _SOLVING and _is_plain(value)
    }
    return repr(plain)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str) or is_dataclass(value)
