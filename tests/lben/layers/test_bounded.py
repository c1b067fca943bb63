"""Whatever has two methods takes part in chains, and its errors are those of the chain."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from lben import (
    AveragePooling,
    CertificateError,
    EquilibriumConv2d,
    EquilibriumLinear,
    Flatten,
    LipschitzSequential,
    Normalize,
    NormalizedLinear,
    PooledEquilibriumConv2d,
    SLLConv2d,
    SLLLinear,
    certify,
)
from lben.layers import BoundedModule
from lben.layers.bounded import height_and_width, refuse_other_image, with_roundoff
from lben.weights.growth import Growth, norms_up
from tests.lben.layers.foreign import Certain, Louder, Silent, Stretch, Unbounded

F64 = torch.float64


def test_every_module_is_one_and_torch_ones_are_not():
    for module in (
        SLLLinear(3, 2), NormalizedLinear(3, 2), EquilibriumLinear(3, 2, 2), Flatten(),
        Normalize((0.0,), (1.0,)), LipschitzSequential(), Stretch(2.0),
    ):  # fmt: skip
        assert isinstance(module, BoundedModule)
    for module in (nn.Linear(2, 2), nn.ReLU(), Unbounded()):
        assert not isinstance(module, BoundedModule)


@torch.no_grad()
def test_a_module_of_a_users_own_is_a_link_of_a_chain():
    head = NormalizedLinear(6, 4)
    chain = LipschitzSequential(SLLLinear(6, 5), Stretch(3.0), head)
    certificate, x = chain.certificate((6,)), torch.randn(20, 6)
    parts = [m.certificate() for m in chain]
    assert list(certificate.layers) == parts
    exact = Fraction(1)
    for part in parts:
        exact *= Fraction(part.bound)
    assert exact <= Fraction(certificate.bound) <= exact * (1 + Fraction(1, 10**14))
    assert certificate.pairs[0][1] == pytest.approx(3 * head.pair_certificate()[0][1], rel=1e-5)
    found = chain.forward_with_error(x, certificate)
    assert torch.equal(found.value, chain(x))
    wide = x.double()
    for layer in (chain[0], head):
        w = layer.weights()
        wide = torch.relu(wide @ w.U.T + w.b) @ w.C.T + wide @ w.D.T + w.b_y
        wide = 3 * wide if layer is chain[0] else wide
    assert ((found.value.double() - wide).norm(dim=1) <= found.error).all()
    assert (found.error < 1e-3).all()


@torch.no_grad()
def test_it_nests():
    inner = LipschitzSequential(Stretch(0.5), LipschitzSequential(Stretch(4.0), SLLLinear(6, 5)))
    chain, x = LipschitzSequential(SLLLinear(6, 3), inner), torch.randn(9, 6, dtype=F64)
    chain = chain.double()
    certificate = chain.certificate((6,))
    assert certificate.bound == pytest.approx(2.0, rel=1e-5)
    assert [leaf.bound for leaf in certificate.leaves()[1:3]] == [0.5, 4.0]
    found = chain.forward_with_error(x, certificate)
    assert torch.equal(found.value, chain(x))
    assert (found.error < 1e-12).all()
    quotient = (chain(x) - chain(x.flip(0))).norm(dim=1) / (x - x.flip(0)).norm(dim=1)
    assert float(quotient.nan_to_num().max()) <= certificate.bound
    inner[0].factor = 8.0
    with pytest.raises(CertificateError, match="for other weights"):
        chain.forward_with_error(x, certificate)


def test_what_has_no_certificate_is_refused_by_name():
    for module in (nn.Linear(2, 2), Unbounded()):
        name = type(module).__name__
        with pytest.raises(ValueError, match=f"{name} has no proved .* two methods of"):
            LipschitzSequential(module)
        with pytest.raises(ValueError, match=f"{name} has no proved"):
            LipschitzSequential(LipschitzSequential(SLLLinear(2, 2))).append(module).certificate(
                (2,)
            )


def test_classes_that_extend_one_need_a_certificate_of_their_own():
    class Wider(Normalize):
        def forward(self, x):
            return 10 * super().forward(x)

    with pytest.raises(CertificateError, match=r"Louder extends a map of lben.*of its own"):
        LipschitzSequential(SLLLinear(6, 4), Louder()).certificate((6,))
    with pytest.raises(CertificateError, match=r"Wider extends Normalize.*of its own"):
        certify(Wider((0.5,), (1.0,)))
    x, own = torch.randn(5, 6), LipschitzSequential(Certain())
    assert certify(own, image=(6,)).bound == 10.0
    assert torch.equal(own.forward_with_error(x, own.certificate((6,))).value, Certain()(x))
    with pytest.raises(CertificateError, match="for other weights"):
        own.forward_with_error(x, LipschitzSequential(Stretch(2.0)).certificate((6,)))


MODULES = {
    "map": (lambda: AveragePooling(2), (2, 4, 4)),
    "normalisation": (lambda: Normalize((0.5, 0.2), (0.3, 0.1)), (2, 4, 4)),
    "explicit": (lambda: SLLLinear(6, 9), (6,)),
    "explicit images": (lambda: SLLConv2d(2, 3), (2, 4, 4)),
    "head": (lambda: NormalizedLinear(6, 3), (6,)),
    "equilibrium": (lambda: EquilibriumLinear(6, 9, 3, gamma=2.0), (6,)),
    "equilibrium of images": (
        lambda: EquilibriumConv2d(2, 3, 2, image=(4, 4), skip=0.5), (2, 4, 4)
    ),
    "pooled": (lambda: PooledEquilibriumConv2d(2, 3, 3, image=(4, 4)), (2, 4, 4)),
    "own": (lambda: Stretch(2.5), (6,)),
    "chain": (
        lambda: LipschitzSequential(SLLConv2d(2, 3), Flatten(), Stretch(2.0), SLLLinear(32, 5)),
        (2, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("error_in", [1e-3, 0.5, "each"])
@pytest.mark.parametrize("kind", MODULES)
@torch.no_grad()
def test_an_error_of_the_input_passes_by_the_bound(kind, error_in):
    """Attacked along the singular directions of the layer, with the largest error allowed."""
    make, shape = MODULES[kind]
    layer = make().double()
    for part in layer.modules():
        if hasattr(part, "tol"):
            part.tol = 1e-12
    x, certificate = torch.randn(8, *shape, dtype=F64), certify(layer, image=shape)
    if error_in == "each":
        error_in = torch.linspace(0, 2, 8, dtype=F64)
    found = layer.forward_with_error(x, certificate, error_in)
    own = layer.forward_with_error(x, certificate)
    assert torch.equal(found.value, own.value)
    assert found.uniform == own.uniform or torch.equal(found.uniform.at(1.0), own.uniform.at(1.0))
    sizes = torch.as_tensor(error_in, dtype=F64).expand(8)
    for whole, rest, size in zip(found.error, own.error, sizes, strict=True):
        exact = Fraction(certificate.bound) * Fraction(float(size)) + Fraction(float(rest))
        assert exact <= Fraction(float(whole)) <= exact * (1 + Fraction(1, 10**9))
    J = torch.func.vmap(torch.func.jacrev(layer))(x) if kind == "head" else None
    best = 0.0
    for attempt in range(20):
        direction = torch.randn_like(x)
        if J is not None and attempt == 0:
            direction = torch.linalg.svd(J).Vh[:, 0]
        length = direction.flatten(1).norm(dim=1)
        scale = (sizes * (1 - 1e-12) / length).view(-1, *[1] * len(shape))
        there = layer.forward_with_error(x + scale * direction, certificate)
        away = (found.value - there.value).flatten(1).norm(dim=1)
        assert (away <= found.error + there.error).all()
        best = max(best, float((away / found.error).max()))
    assert best > (0.999 if kind in ("head", "own") else 0.05)


def test_sizes_come_with_channels_or_alone():
    assert height_and_width(None) is None
    assert height_and_width((7,)) is None
    assert height_and_width((3, 4, 5)) == height_and_width((4, 5)) == (4, 5)
    for wrong in ("44", 4, (1, 2, 3, 4), (2.0, 4)):
        with pytest.raises(TypeError, match=r"pair \(height, width\)|must be an integer"):
            height_and_width(wrong)
    with pytest.raises(ValueError, match="at least 1"):
        height_and_width((0, 4))
    refuse_other_image((2, 4, 5), (2, 4, 5), "it")
    with pytest.raises(ValueError, match=r"it was made for images of \(4, 5\), got \(5, 4\)"):
        refuse_other_image((5, 4), (2, 4, 5), "it")


def test_roundoff_holds_at_x_and_around_it():
    growth, x = Growth(0.5, 0.25, 10.0), torch.tensor([[3.0, 4.0], [9.0, 9.0]])
    found = with_roundoff(x, norms_up(x, 1), growth)
    assert float(found.error[0]) == pytest.approx(0.5 + 0.25 * 5)
    assert float(found.error[1]) == float("inf")  # beyond where numbers may overflow
    assert float(found.uniform.at(2.0)[0]) == pytest.approx(0.5 + 0.25 * 7)
    assert float(found.uniform.at(5.1)[0]) == float("inf")


def test_a_module_that_knows_nothing_around_x_has_no_bound_there():
    chain, x = LipschitzSequential(Silent(2.0), SLLLinear(6, 3)), torch.randn(4, 6)
    found = chain.forward_with_error(x, chain.certificate((6,)))
    assert found.error.isfinite().all()
    assert found.uniform.at(0.0).isinf().all()
