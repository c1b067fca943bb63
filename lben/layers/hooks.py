"""Does a module return what it computes?

A forward hook may change the input and the output of a module. So may a method that was assigned to
one instance in place of its class's method. A proof sees weights alone, so such modules are
refused.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as every_module

from lben.certificates import CertificateError

_WITHIN_WEIGHTS = ("parameterization", "parametrizations")


def refuse_hooks(module: nn.Module) -> None:
    """Refuse a module with forward hooks, except hooks of the modules that compute its weights.

    Args:
        module: with all its submodules.

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
        if part._forward_hooks or part._forward_pre_hooks or _has_own_methods(part):
            where = f" ({name})" if name else ""
            raise CertificateError(
                f"{type(part).__name__}{where} has a forward hook, or a forward of its own: they "
                "may change what it returns, and no proof knows of them; remove them, or evaluate "
                "a copy without"
            )


def _has_own_methods(part: nn.Module) -> bool:
    """Return whether a method of the class was replaced on this instance."""
    return any(
        callable(value) and callable(getattr(type(part), name, None))
        for name, value in vars(part).items()
    )
