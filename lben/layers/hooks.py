"""Does a module return what it computes?

A forward hook may change what a module takes and returns, and a forward that an instance was given
is another one: what is proved knows of neither.
"""

from __future__ import annotations

from torch import nn

from lben.certificates import CertificateError

_WITHIN_WEIGHTS = ("parameterization", "parametrizations")


def refuse_hooks(module: nn.Module) -> None:
    """Refuse a module with forward hooks, but for those that take part in the making of weights.

    Raises:
        CertificateError: naming the module that has them.
    """
    for name, part in module.named_modules():
        if any(place in name.split(".") for place in _WITHIN_WEIGHTS):
            continue
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            where = f" ({name})" if name else ""
            raise CertificateError(
                f"{type(part).__name__}{where} has a forward hook, or a forward of its own: they "
                "may change what it returns, and no proof knows of them; remove them, or evaluate "
                "a copy without"
            )
