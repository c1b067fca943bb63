"""A module that may return something else than it computes is refused, but for its weights."""

import pytest
import torch
from torch import nn

from lben import CertificateError, LipschitzSequential, OrthogonalLinear, SLLLinear
from lben.layers.hooks import refuse_hooks


def chain():
    return LipschitzSequential(SLLLinear(3, 4), OrthogonalLinear(3, 3))


def test_hooks_and_methods_of_an_instance_are_named_with_their_place():
    refuse_hooks(chain())
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        module = chain()
        handle = getattr(module[1], register)(lambda *a: None)
        with pytest.raises(CertificateError, match=r"OrthogonalLinear \(1\) has a forward hook"):
            refuse_hooks(module)
        handle.remove()
        refuse_hooks(module)
    module = chain()
    module[0].evaluate = lambda *a: a[0]
    with pytest.raises(CertificateError, match=r"SLLLinear \(0\).*a forward of its own"):
        refuse_hooks(module)
    module = chain()
    module.register_full_backward_hook(lambda *a: None)
    refuse_hooks(module)  # it changes no output


def test_what_makes_the_weights_may_have_hooks():
    module = chain()
    module[0].parameterization.register_forward_hook(lambda *a: None)
    refuse_hooks(module)
    module[0].extra = nn.Identity()
    module[0].extra.register_forward_hook(lambda *a: None)
    with pytest.raises(CertificateError, match=r"Identity \(0\.extra\)"):
        refuse_hooks(module)


def test_hooks_of_all_modules_are_refused():
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        with pytest.raises(CertificateError, match="hook of all modules"):
            refuse_hooks(torch.nn.Identity())
    finally:
        handle.remove()
