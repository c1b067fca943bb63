"""Does a module return what it computes?

A forward hook may change what a module takes and returns, and so may a method that an instance was
given in place of its class's: what is proved knows of neither.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every_module

from lben.certificates import CertificateError

_WITHIN_WEIGHTS = ("parameterization", "parametrizations")


def refuse_hooks(module: nn.Module) -> None:
    """Refuse a module with forward hooks, but for those that take part in the making of weights.

    Raises:
        CertificateError: naming the module that has them, or saying that all modules have.
    """
    if every_module._global_forward_hooks or every_module._global_forward_pre_hooks:
        raise CertificateError(
            "a forward hook of all modules is registered (register_module_forward_hook or "
            "register_module_forward_pre_hook): it may change what a layer returns, and no proof "
            "knows of it; remove it"
        )
    for name, part in module.named_modules():
        if any(place in name.split(".") for place in _WITHIN_WEIGHTS):
            continue
        if part._forward_hooks or part._forward_pre_hooks or _own_methods(part):
            where = f" ({name})" if name else ""
            raise CertificateError(
                f"{type(part).__name__}{where} has a forward hook, or a forward of its own: they "
                "may change what it returns, and no proof knows of them; remove them, or evaluate "
                "a copy without"
            )


def _own_methods(part: nn.Module) -> bool:
    """Say whether an instance was given another method than its class has."""
    return any(
        callable(value) and callable(getattr(type(part), name, None))
        for name, value in vars(part).items()
    )
