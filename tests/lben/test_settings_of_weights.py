"""Weights are made again whenever anything that a parametrization reads has changed."""

import argparse
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lben import (
    EquilibriumClassifierConfig,
    EquilibriumConv2d,
    EquilibriumLinear,
    SandwichLinear,
    SLLConv2d,
    SLLLinear,
)
from lben.certificates import CertificateError
from solvers import LeakyReLU, LinearSlope, Masked
from solvers.dependencies import collect_dependencies

FACTOR = 0.3


class Scaled(nn.Module):
    """Multiplies by what it finds in an object."""

    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, V):
        return V * self.held.scale


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, V):
        return self.function(V)


class WithoutRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = set()

    def forward(self, V):
        return V * torch.tensor([0.0 if i in self.rows else 1.0 for i in range(len(V))])[:, None]


class Chosen(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Scaled(types.SimpleNamespace(scale=1.0)), None
        self.other = Scaled(types.SimpleNamespace(scale=FACTOR))
        self.current = self.one

    def forward(self, V):
        return self.current(V)


class Slotted:
    __slots__ = ("__hidden", "scale")

    def __init__(self):
        self.scale = 1.0


class Equal:
    def __init__(self):
        self.scale = 1.0

    def __eq__(self, other):
        return self.scale == other.scale


class Bound:
    def __init__(self):
        self.scale = 1.0

    def times(self, V):
        return V * self.scale


def closure(scale):
    return lambda V: V * scale


def scale_of_all():
    return types.SimpleNamespace(scale=torch.ones(()))


def held(make):
    return lambda: Scaled(make()), lambda part: setattr(part.held, "scale", FACTOR)


def replaced(make):
    return lambda: Applied(make(1.0)), lambda part: setattr(part, "function", make(FACTOR))


def product(scale):
    return functools.partial(torch.mul, other=scale)


CHANGES = {
    "a namespace": held(lambda: types.SimpleNamespace(scale=1.0)),
    "arguments": held(lambda: argparse.Namespace(scale=1.0)),
    "slots": held(Slotted),
    "an object that compares by value": held(Equal),
    "a tensor in a namespace": (
        lambda: Scaled(scale_of_all()), lambda part: part.held.scale.fill_(FACTOR),
    ),
    "a set": (WithoutRows, lambda part: part.rows.add(1)),
    "a closure": replaced(closure),
    "a default": replaced(lambda scale: lambda V, s=scale: V * s),
    "a function": (
        lambda: Applied(lambda V: V), lambda part: setattr(part, "function", lambda V: FACTOR * V),
    ),
    "a partial function": replaced(product),
    "a tensor in a partial function": (
        lambda: Applied(product(torch.ones(()))),
        lambda part: part.function.keywords["other"].fill_(FACTOR),
    ),
    "the object of a method": (
        lambda: Applied(Bound().times),
        lambda part: setattr(part.function.__self__, "scale", FACTOR),
    ),
    "which of two modules": (Chosen, lambda part: setattr(part, "current", part.other)),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["SLL", "equilibrium"])
@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_seen_in_whatever_holds_them(change, kind, grad):
    make, alter = CHANGES[change]
    layer = SLLLinear(8, 6) if kind == "SLL" else EquilibriumLinear(8, 6, 3)
    part = make()
    parametrize.register_parametrization(layer.parameterization, "U", part)
    x = torch.randn(4, 8)
    with torch.set_grad_enabled(grad):
        before, old = layer(x).detach(), layer.certificate()
        alter(part)
        after = layer(x).detach()
        layer._kept = None
        torch.testing.assert_close(after, layer(x).detach(), rtol=0, atol=0)
    assert not torch.equal(before, after)
    with pytest.raises(CertificateError, match="other weights"):
        layer.check(old, x) if kind == "SLL" else layer.forward_with_error(x, old)


def test_a_global_number_of_a_function_is_seen(monkeypatch):
    layer = SLLLinear(8, 6)
    parametrize.register_parametrization(layer.parameterization, "U", Applied(lambda V: V * FACTOR))
    x = torch.randn(4, 8)
    with torch.no_grad():
        before = layer(x)
        monkeypatch.setitem(globals(), "FACTOR", 0.7)
        assert not torch.equal(layer(x), before)


def test_what_cannot_be_read_is_different_from_itself():
    part = Scaled(types.SimpleNamespace(scale=1.0))
    assert collect_dependencies(part)[1] == collect_dependencies(part)[1]
    part.generator = torch.Generator()
    assert collect_dependencies(part)[1] != collect_dependencies(part)[1]


LAYERS = {
    "SLL": lambda **o: SLLLinear(4, 3, **o),
    "SLL of images": lambda **o: SLLConv2d(2, 3, **o),
    "sandwich": lambda **o: SandwichLinear(4, 3, **o),
    "equilibrium": lambda **o: EquilibriumLinear(4, 3, 2, **o),
    "equilibrium of images": lambda **o: EquilibriumConv2d(1, 2, 1, image=(4, 4), **o),
}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool, "float32"], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_dtypes_of_other_numbers_are_refused_at_construction(kind, dtype):
    with pytest.raises(TypeError, match="real floating-point numbers"):
        LAYERS[kind](dtype=dtype)


@pytest.mark.parametrize("kind", LAYERS)
def test_activations_of_other_slopes_are_refused_whenever_they_come(kind):
    slopes = LinearSlope(torch.tensor(0.5))
    for activation in (slopes, Masked(slopes, torch.ones(3) > 0)):
        with pytest.raises(ValueError, match="fixed slopes in"):
            LAYERS[kind](activation=activation)
    layer = LAYERS[kind]()
    for activation in (nn.GELU(), nn.LeakyReLU(5.0), torch.sin, "relu"):
        with pytest.raises(TypeError, match=r"must be a solvers\.ProximalActivation"):
            layer.activation = activation
    with pytest.raises(ValueError, match="fixed slopes in"):
        layer.activation = slopes
    layer.activation = LeakyReLU(0.2)


def test_a_slope_given_as_a_tensor_is_the_number_that_it_was():
    slope = torch.tensor(0.5)
    activation = LeakyReLU(slope)
    slope.fill_(8.0)
    assert activation.negative_slope == 0.5
    with pytest.raises(ValueError, match="must lie in"):
        LeakyReLU(slope)


@pytest.mark.parametrize("register", [
    nn.modules.module.register_module_forward_hook,
    nn.modules.module.register_module_forward_pre_hook,
])  # fmt: skip
def test_hooks_of_all_modules_are_no_part_of_a_proof(register):
    model, x, labels = classifier()
    proof = model.certificate()
    handle = register(lambda *a: None)
    try:
        with pytest.raises(CertificateError, match="hook of all modules"):
            model.certified_radius(x, labels, proof)
    finally:
        handle.remove()
    model.certified_radius(x, labels, proof)


@pytest.mark.parametrize(("part", "method"), [
    ("", "forward"), ("", "_check_images"), ("normalize", "forward"), ("layer", "forward"),
    ("layer", "readout"), ("layer", "weights"), ("layer", "forward_with_error"),
])  # fmt: skip
def test_methods_of_an_instance_are_no_part_of_a_proof(part, method):
    model, x, labels = classifier()
    module = model.get_submodule(part)
    proof, own = model.certificate(), getattr(module, method)
    setattr(module, method, lambda x, *rest: own(3 * x, *rest))
    with pytest.raises(CertificateError, match="a forward of its own"):
        model.certified_radius(x, labels, proof)


def test_the_stages_of_a_classifier_are_those_of_its_class():
    model, *_ = classifier()
    with pytest.raises(AttributeError):
        model.stages = model.stages[1:]


def classifier():
    model = EquilibriumClassifierConfig(
        shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.5,), hidden=5
    ).build().eval()  # fmt: skip
    return model, torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
