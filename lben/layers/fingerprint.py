"""What does a statement about a whole network depend on? One fingerprint of all of it."""

from __future__ import annotations

from dataclasses import is_dataclass

from torch import nn

from lben.weights import digest

_SOLVING = {
    "tol", "max_steps", "on_failure", "method", "gradient", "training", "config", "name_in_graphs",
}  # fmt: skip
"""How a layer is solved, what it was built from, and what graphs call it: no Lipschitz bound
depends on it, and a copy is the same network."""


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of a network: its modules in order, their settings, and all tensors.

    Settings are the plain values that the modules hold (sizes, kinds, γ, paddings, activations);
    tensors are parameters and buffers, those of the normalisation included, with names, shapes,
    dtypes and bytes. How equilibria are solved is left out.
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
