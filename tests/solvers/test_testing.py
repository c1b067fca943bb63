"""Every law can fail: each is shown a fault that it finds."""

from dataclasses import dataclass, replace

import pytest
import torch

import solvers
from solvers import (
    Constants,
    DenseOperator,
    LinearOperator,
    Method,
    Outcome,
    PeacemanRachford,
    ReLU,
    Tanh,
)
from solvers.operators.matrix import DenseMap, DenseResolvent
from solvers.testing import (
    ActivationLaws,
    MethodLaws,
    OperatorLaws,
    check_activation,
    check_method,
    check_operator,
    check_solution,
    written_out,
)
from tests.problems import monotone_operator


@dataclass(frozen=True, eq=False)
class Product(LinearOperator):
    """W = AB by two products, with nothing overridden."""

    A: torch.Tensor
    B: torch.Tensor
    metric: torch.Tensor

    def mv(self, z):
        return (z @ self.B.T) @ self.A.T

    def rmv(self, z):
        return (z @ self.A) @ self.B


def product(**faults):
    """Return a sound operator of a class in which some methods are replaced."""
    kind = dataclass(frozen=True, eq=False)(type("Faulty", (Product,), faults))
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 5, 3, dtype=torch.float64, generator=g)
    return kind(0.3 * A, 0.3 * B.T, torch.linspace(0.8, 1.2, 5, dtype=torch.float64))


mv, rmv = Product.mv, Product.rmv


def with_constants(m=0.0, L=0.0):
    def constants(self):
        sound = LinearOperator.constants(self)
        return Constants(m=sound.m + m, L=sound.L + L)

    return constants


def faulty_resolvent(**faults):
    kind = type("Faulty", (DenseResolvent,), faults)

    def resolvent(self, step):
        found = LinearOperator.resolvent(self, step)
        return kind(found.inverse, found.step)

    return resolvent


def overwriting(self, x, shift, out):
    found = DenseMap.add(self, x, shift, out)
    x.zero_()
    return found


OPERATOR_FAULTS = {
    "products are linear": {"mv": lambda self, z: mv(self, z) + 0.1},
    "products are linear: affine": {"affine": lambda self, z, v: self.mv(z)},
    "transpose is the adjoint": {"rmv": lambda self, z: 1.01 * rmv(self, z)},
    "resolvent inverts": {"resolvent": faulty_resolvent(solve=lambda self, x: x)},
    "resolvent inverts: transpose": {"resolvent": faulty_resolvent(T=property(lambda self: self))},
    "reflection is twice the resolvent minus identity": {
        "resolvent": faulty_resolvent(reflection=lambda self: DenseMap(self.inverse))
    },
    "relaxation mixes with the identity": {
        "relax": lambda self, step: DenseMap(self.to_dense().T.contiguous())
    },
    "relaxation mixes with the identity: arguments": {
        "relax": lambda self, step: type("Map", (DenseMap,), {"add": overwriting})(
            LinearOperator.relax(self, step).matrix
        )
    },
    "constants hold: m": {"constants": with_constants(m=1e-3)},
    "constants hold: L": {"constants": with_constants(L=-1e-3)},
    "rounding bound holds": {"rounding": lambda self, z: z.double()[..., 0] * 0},
    "rounding bound holds: gain": {"rounding_gain": lambda self, dtype: 0.0},
    "magnitude is above the entries": {"magnitude": lambda self, z: mv(self, z).abs() * 0},
    "entries agree with products": {"diagonal": lambda self: self.metric * 0},
    "entries agree with products: submatrix": {
        "submatrix": lambda self, rows, columns: LinearOperator.submatrix(self, columns, rows)
    },
    "determinant agrees with products": {"log_determinant": lambda self: 1.0},
    "factors follow a write": {"_settle": lambda self: None},
    "rebuilt operators share factors": {
        "rebuild": lambda self, tensors: type(self)(tensors[0].clone(), tensors[1], self.metric)
    },
    "pullback is the gradient of a product": {
        "pullback": lambda self, u, z: tuple(2 * t for t in LinearOperator.pullback(self, u, z))
    },
    "pullback is the gradient of a product: second order": {
        "pullback": lambda self, u, z: tuple(
            t.detach() for t in LinearOperator.pullback(self, u, z)
        )
    },
    "other precisions are the same operator": {
        "to": lambda self, dtype: self if dtype == self.dtype else self._mapped(
            lambda t: t.to(dtype) * 1.01, lambda part: part
        )
    },
    "copies are the same operator": {"__deepcopy__": lambda self, memo: self},
    "equilibria are found and differentiated": {"is_monotone": lambda self: False},
}  # fmt: skip


def test_a_sound_operator_keeps_all_laws():
    check_operator(product())
    check_operator(monotone_operator(6))


def test_every_law_of_operators_has_a_fault():
    laws = {name[5:].replace("_", " ") for name in OperatorLaws.names()}
    assert laws == {name.split(":")[0] for name in OPERATOR_FAULTS}


@pytest.mark.parametrize("name", OPERATOR_FAULTS)
def test_a_fault_of_an_operator_is_named(name):
    """By the law itself, though others may find it first."""

    class Faulty(OperatorLaws):
        def make_operator(self, dtype):
            return product(**OPERATOR_FAULTS[name])._mapped(lambda t: t.to(dtype).clone(), None)

    law = "test_" + name.split(":")[0].replace(" ", "_")
    with pytest.raises(AssertionError, match=r"."):
        getattr(Faulty(), law)()
    with pytest.raises(AssertionError, match=r"^[a-z ]+: "):
        Faulty().check()


@dataclass(frozen=True)
class Arctan(solvers.ProximalActivation):
    """σ(v) = atan(v), with nothing overridden."""

    def __call__(self, v):
        return torch.atan(v)

    def slope(self, z):
        return torch.cos(z).square()


def arctan(**faults):
    return type("Faulty", (Arctan,), faults)()


ACTIVATION_FAULTS = {
    "prox at step one is the activation": {"prox": lambda self, x, step: 0.5 * torch.atan(x)},
    "prox solves its optimality condition": {"prox": lambda self, x, step: self(x)},
    "prox is firmly non expansive": {"prox": lambda self, x, step: -self(x)},
    "prox takes one step per unit": {
        "prox": lambda self, x, step: Arctan.prox(
            self, x, step if isinstance(step, float) else float(step[0])
        )
    },
    "reflector is twice the prox minus identity": {"reflector": lambda self, step: torch.abs},
    "slope is the derivative in terms of the output": {"slope": lambda self, z: 1 - z * z / 4},
    "activation is monotone and non expansive": {"__call__": lambda self, v: torch.sin(v)},
    "activation is monotone and non expansive: steep": {"__call__": lambda self, v: 1.1 * v},
    "slope bounds enclose every chord": {
        "slope_bounds": lambda self, v, reach, error: (0 * v, self.slope(self(v)))
    },
    "lower lines stay below": {"lower_lines": lambda self, v, error: ((0.5, 0 * v),)},
    "values are within their ulps": {"ulps": 0.01},
}


def test_a_sound_activation_keeps_all_laws():
    check_activation(Arctan())
    check_activation(Tanh(), units=3)


def test_every_law_of_activations_has_a_fault():
    laws = {name[5:].replace("_", " ") for name in ActivationLaws.names()}
    assert laws == {name.split(":")[0] for name in ACTIVATION_FAULTS}


@pytest.mark.parametrize("name", ACTIVATION_FAULTS)
def test_a_fault_of_an_activation_is_named(name):
    class Faulty(ActivationLaws):
        def make_activation(self):
            return arctan(**ACTIVATION_FAULTS[name])

    with pytest.raises(AssertionError, match=r"."):
        getattr(Faulty(), "test_" + name.split(":")[0].replace(" ", "_"))()
    with pytest.raises(AssertionError, match=r"^[a-z ]+: "):
        check_activation(Faulty().make_activation())


@dataclass(frozen=True, kw_only=True, repr=False)
class Faulty(Method):
    """Peaceman–Rachford splitting whose outcome is changed."""

    change: object
    before: object = None

    def run(self, problem, request) -> Outcome:
        if self.before is not None:
            problem, request = self.before(problem, request)
        return self.change(PeacemanRachford().run(problem, request), problem, request)


def unchanged(outcome, problem, request):
    return outcome


def claims(outcome, problem, request):
    """Say that there is no residual after one step."""
    return replace(outcome, residual=outcome.residual * 0, worst=None)


def mixed(outcome, problem, request):
    """Take every sample for their mean."""
    value = outcome.value.mean(0, keepdim=True).expand_as(outcome.value).clone()
    return replace(outcome, value=value, residual=outcome.residual * 0, worst=None)


def wandering(outcome, problem, request):
    """Return something else every time."""
    value = outcome.value + torch.rand(())
    return replace(outcome, value=value, residual=outcome.residual * 0, worst=None)


def slow(outcome, problem, request):
    return replace(outcome, steps=outcome.steps * 3 + 9)


def slow_when_warm(outcome, problem, request):
    return outcome if request.z0 is None else replace(outcome, steps=outcome.steps + 1000)


def writing(problem, request):
    if request.z0 is not None:
        problem.bias.mul_(1.5)
    return problem, request


def of_slope(outcome, problem, request):
    """Be wrong for adjoint problems."""
    wrong = isinstance(problem.activation, solvers.LinearSlope)
    return replace(outcome, value=outcome.value * 1.1) if wrong else outcome


METHOD_FAULTS = {
    "tolerance is reached": Faulty(change=lambda o, p, r: replace(o, value=o.value * 1.01)),
    "error bound holds": Faulty(change=unchanged),
    "a step limit is observed and told": Faulty(change=slow),
    "a step limit is observed and told: claims": Faulty(change=claims),
    "samples do not depend on their batch": Faulty(change=mixed),
    "batches of every shape are solved": Faulty(change=wandering),
    "a warm start is used": Faulty(change=slow_when_warm),
    "arguments are left alone": Faulty(change=unchanged, before=writing),
    "gradients are those of the equilibrium": Faulty(change=of_slope),
}


def test_a_sound_method_keeps_all_laws():
    check_method(Faulty(change=unchanged))


def test_every_law_of_methods_has_a_fault():
    laws = {name[5:].replace("_", " ") for name in MethodLaws.names()}
    assert laws == {name.split(":")[0] for name in METHOD_FAULTS}


@pytest.mark.parametrize("name", METHOD_FAULTS)
def test_a_fault_of_a_method_is_named(name, monkeypatch):
    if name == "error bound holds":  # which no method computes
        bound = solvers.Inclusion.error_bound
        monkeypatch.setattr(solvers.Inclusion, "error_bound", lambda p, z: 1e-3 * bound(p, z))

    class Tested(MethodLaws):
        def make_method(self):
            return METHOD_FAULTS[name]

    with pytest.raises(AssertionError, match=r"."):
        getattr(Tested(), "test_" + name.split(":")[0].replace(" ", "_"))()
    with pytest.raises(AssertionError, match=r"^[a-z ]+: "):
        check_method(Tested().make_method())


def test_a_wrong_solution_is_named():
    W, v = DenseOperator(-torch.eye(3)), torch.ones(2, 3)
    solution = solvers.solve(solvers.Inclusion(W, v, ReLU()), tol=1e-5)
    check_solution(solution, W, v)
    wrong = replace(solution, value=solution.value * 1.1)
    with pytest.raises(AssertionError, match="a residual is"):
        check_solution(wrong, W, v)
    assert torch.equal(written_out(W), -torch.eye(3, dtype=torch.float64))
