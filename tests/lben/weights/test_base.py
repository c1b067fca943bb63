"""Weights of every kind answer alike: products, rounding, rates, fingerprints."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from lben.weights import Weights, as_number, check_epsilon, check_gamma, convert, digest
from solvers import Sigmoid
from tests.lben.weights.kinds import (
    KINDS,
    crop,
    draw,
    exact_products,
    flat_inputs,
    matrices,
    placed,
)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_matrices(kind):
    w = KINDS[kind]()
    m = matrices(w)
    (x, z), near = draw(w), {"rtol": 1e-9, "atol": 1e-9}
    inputs, state = flat_inputs(w, x), crop(w, z)
    torch.testing.assert_close(crop(w, w.drive(x)), inputs @ m.U.T + m.b, **near)
    y = state @ m.C.T + m.b_y
    y = y if m.D is None else y + inputs @ m.D.T
    torch.testing.assert_close(w.readout(x, z).flatten(1), y, **near)
    torch.testing.assert_close(crop(w, w.operator().mv(z)), state @ m.W.T, **near)


@pytest.mark.parametrize("scale", [1.0, 2.0**-300, 2.0**300])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_bounded_in_rational_arithmetic(kind, scale):
    w = KINDS[kind]()
    x, z = draw(w, scale)
    bounds = w.rounding(x, z)
    drives, outputs = exact_products(w, x, z)
    Lambda = [Fraction(v) for v in matrices(w).Lambda.tolist()]
    v, y = crop(w, w.drive(x)).tolist(), w.readout(x, z).flatten(1).tolist()
    assert bounds.drive.dtype == bounds.output.dtype == torch.float64
    for i in range(len(x)):
        away = sum(
            weight * (Fraction(a) - c) ** 2
            for weight, a, c in zip(Lambda, v[i], drives[i], strict=True)
        )
        assert away <= Fraction(float(bounds.drive[i])) ** 2
        away = sum((Fraction(a) - c) ** 2 for a, c in zip(y[i], outputs[i], strict=True))
        assert away <= Fraction(float(bounds.output[i])) ** 2
    # Of ordinary numbers no bound is far above the rounding of sums of this size.
    for found, size in zip(bounds, (w.drive(x), w.readout(x, z)), strict=True):
        ordinary = 1e-12 * (1 + float(size[0].abs().max())) * size[0].numel()
        assert float(found[0]) <= ordinary * max(scale, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_rates_bound_what_an_input_and_a_state_can_do(kind):
    """Sizes and roundings grow at most so: attacked along singular vectors."""
    w, u = KINDS[kind](), torch.finfo(torch.float64).eps / 2
    rates, m = w.rates(2 * u), matrices(w)
    root = m.Lambda.sqrt()
    norm = float(torch.linalg.matrix_norm(root[:, None] * m.U, 2))
    assert norm <= rates.drive <= 20 * norm
    (x, z), _ = draw(w), None
    x, z = x[:1], z[:1]
    free = w.with_tensors({"b_y": torch.zeros_like(w.b_y)})
    names = free.tensors()
    if "b" in names:
        free = free.with_tensors({"b": torch.zeros_like(names["b"])})
    found, size = free.rounding(x, z), float(x.norm())
    in_metric = float((crop(w, z) * root).norm())
    tiny = 1e-290
    assert float(found.drive) <= 2 * rates.drive_rounding * size + tiny
    bound = 2 * (rates.readout * in_metric + rates.through * size) + tiny
    assert float(found.output) <= bound
    assert w.largest() >= max(float(t.abs().max()) for t in (m.U, m.C))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_replaced_by_name_and_fingerprinted(kind):
    w = KINDS[kind]()
    assert isinstance(w, Weights)
    seen = {w.fingerprint}
    for name, t in w.tensors().items():
        changed = w.with_tensors({name: 2 * t + 1})
        assert torch.equal(changed.tensors()[name], 2 * t + 1)
        seen.add(changed.fingerprint)
    assert len(seen) == 1 + len(w.tensors())
    assert w.with_tensors(w.tensors()).fingerprint == w.fingerprint
    assert w.apply(torch.clone).fingerprint == w.fingerprint
    assert w.to(torch.float32).fingerprint != w.fingerprint
    assert all(t.dtype == torch.float32 for t in w.to(torch.float32).tensors().values())
    assert dataclasses.replace(w, gamma=77.0).fingerprint != w.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_another_shape_are_refused(kind):
    w = KINDS[kind]()
    x, _ = draw(w)
    w.check_input(x)
    assert tuple(x.shape[1:]) == w.sample_shape
    for wrong in (x[..., :-1], x[:, :1], x.flatten()[: x.numel() - 1]):
        with pytest.raises(ValueError, match="expected"):
            w.check_input(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_states_beyond_the_image_stay_at_zero(kind):
    w = KINDS[kind]()
    z = draw(w)[1].clamp(-5, 5)
    values, geometry = w.restrict(Sigmoid())(z), placed(w)
    if geometry is None:
        assert torch.equal(values, Sigmoid()(z))
    else:
        inside = Sigmoid()(geometry.crop(z))
        torch.testing.assert_close(values, geometry.embed(inside), rtol=1e-14, atol=0)
        assert torch.equal(values != 0, geometry.embed(torch.ones_like(inside)) != 0)


def test_numbers_of_any_kind():
    assert as_number(torch.tensor(2)) == as_number(2) == 2.0
    assert as_number(True) is as_number("2") is as_number(torch.ones(1)) is None
    assert as_number(10**400) == math.inf
    assert check_gamma(None) is None
    for check, name in ((check_gamma, "gamma"), (check_epsilon, "epsilon")):
        assert check(torch.tensor(0.5)) == 0.5
        for wrong in (0.0, -1.0, math.inf, math.nan, "1", True):
            with pytest.raises(ValueError, match=f"{name} must be"):
                check(wrong)


def test_digests_know_names_shapes_kinds_and_bits():
    t = torch.zeros(2, 3)
    seen = {
        digest(*arguments)
        for arguments in (
            ("", {"a": t}), ("h", {"a": t}), ("", {"b": t}), ("", {"a": t.T}),
            ("", {"a": t.double()}), ("", {"a": -t}), ("", {}),
        )
    }  # fmt: skip
    assert len(seen) == 7
    assert digest("", {"a": t}) == digest("", {"a": t.clone().requires_grad_()})


def test_conversions_are_exact_and_cut_the_graph():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        t = torch.tensor([1 / 3, -1e-40, 65504.0], dtype=dtype).requires_grad_()
        wide = convert(t, torch.float64)
        assert not wide.requires_grad
        assert [Fraction(v) for v in wide.tolist()] == [Fraction(v) for v in t.tolist()]
