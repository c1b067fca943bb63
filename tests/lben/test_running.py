"""Certified radii are of the network as it runs: at every image of the ball, not only at x."""

import copy
import dataclasses
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from lben import (
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifierConfig,
    EquilibriumConv2d,
    EquilibriumLinear,
    InvertibleDownsampling,
    LipschitzSequential,
    Normalize,
    PooledEquilibriumConv2d,
    SLLLinear,
)
from lben.certificates import (
    CertificateError,
    Claim,
    certify,
    compose,
    sensitivity,
)
from lben.models import FeedforwardClassifierConfig
from lben.parameterizations import FixedWeights
from lben.radii.error_bounds import Affine
from lben.tightening import tighten_pooled
from lben.weights import DenseWeights
from solvers import Sigmoid, Softplus, Tanh

F64 = torch.float64


def slow(rho, dtype, tol, large=0.0):
    """One pixel; a state that is slow where the output does not look, and the bound 1.

    Unit 0 is read out; 1 and 2 see no input and make m small; 3 and 4 are large and solved at once,
    so that the residual of unit 0 weighs little.
    """
    W = torch.zeros(5, 5, dtype=F64)
    W[1, 2] = W[2, 1] = rho
    W[3, 4] = W[4, 3] = 1 - math.sqrt((1 - rho) * (1 + rho))
    C = torch.zeros(2, 5, dtype=F64)
    C[0, 0], C[1, 0] = -0.5, 0.5
    weights = DenseWeights(
        W=W, U=torch.tensor([[1.0], [0.0], [0.0], [large], [large]], dtype=F64),
        b=torch.zeros(5, dtype=F64), C=C, D=None, b_y=torch.tensor([0.25, -0.25], dtype=F64),
        Lambda=torch.ones(5, dtype=F64), gamma=None,
    )  # fmt: skip
    model = EquilibriumClassifierConfig(
        shape=(1, 1, 1), classes=2, mean=(0.0,), std=(1.0,), hidden=5, gamma=None,
        learn_metric=False, tol=tol,
    ).build().double()  # fmt: skip
    model.layer.parameterization.right_inverse(weights)
    model = model.to(dtype).eval().requires_grad_(False)
    Lambda = torch.tensor([1.0, 1e-9, 1e-9, 1e-9, 1e-9], dtype=F64)
    weights = model.layer.weights()
    pairs = certify(weights, {(0, 1): Claim(1.0 + 1e-3, Lambda)})
    before = model.certificate().layers[:-1]
    return model, compose([*before, certify(weights, Claim(2.0, Lambda))], pairs)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("tol", "large"), [(1e-2, 0.0), (1e-4, 100.0)])
@pytest.mark.filterwarnings("ignore:no radius is certified")
def test_the_label_holds_at_every_image_of_the_ball(dtype, tol, large):
    broken = {"running": 0, "exact": 0}
    for rho in (0.7, 0.9, 0.97, 0.99, 0.999):
        model, proof = slow(rho, dtype, tol, large)
        x = torch.zeros(1, 1, 1, 1, dtype=dtype)
        label = model(x).argmax(1)
        for promise in broken:
            radius = float(model.certified_radius(x, label, proof, promise=promise))
            shares = 1 - torch.logspace(-7, -0.6, 100, dtype=F64)
            near = (shares * radius).to(dtype)
            near = near[near.double() < radius].view(-1, 1, 1, 1)
            alone = torch.cat([model(one).argmax(1) for one in near.split(1)] + [label[:0]])
            broken[promise] += int((alone != label).sum() + (model(near).argmax(1) != label).sum())
    assert broken["running"] == 0
    assert broken["exact"] > 0  # what was taken off at x alone: this test can fail


LAYERS = {
    "dense": lambda: EquilibriumLinear(7, 12, 4, gamma=2.0),
    "feed-through": lambda: EquilibriumLinear(7, 12, 4, gamma=2.0, feedthrough=True),
    "tanh": lambda: EquilibriumLinear(7, 12, 4, gamma=None, epsilon=0.1, activation=Tanh()),
    "sigmoid": lambda: EquilibriumLinear(7, 12, 4, gamma=1.0, activation=Sigmoid()),
    "softplus": lambda: EquilibriumLinear(7, 12, 4, gamma=1.0, activation=Softplus()),
    "convolution": lambda: EquilibriumConv2d(2, 3, 2, image=(5, 6), gamma=1.0),
    "residual": lambda: EquilibriumConv2d(2, 3, 2, image=(5, 6), gamma=1.0, skip=1.0),
    "states": lambda: EquilibriumConv2d(2, 3, image=(5, 6), gamma=1.0, circular=True),
    "pooled": lambda: PooledEquilibriumConv2d(2, 3, 4, image=(8, 8), gamma=2.0),
    "scales": lambda: PooledEquilibriumConv2d(2, (3, 2), 4, image=(8, 8), gamma=None),
}


def build(name, dtype):
    torch.manual_seed(3)
    layer = LAYERS[name]().to(dtype).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.15)
    shape = (7,) if isinstance(layer, EquilibriumLinear) else (2, *layer.image)
    return layer, torch.randn(6, *shape, dtype=dtype)


def read_exactly(layer, dtype):
    """The layer of the very weights that run, in float64 and solved to the end."""
    weights = layer.weights()
    exact = build(next(n for n, make in LAYERS.items() if make is layer.made), dtype)[0]
    exact.parameterization = FixedWeights(weights)
    exact = exact.double()
    exact.tol, exact.max_steps = 1e-13, 100_000
    return exact


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", LAYERS)
def test_the_error_is_bounded_all_over_the_ball(name, dtype):
    layer, x = build(name, dtype)
    layer.made = LAYERS[name]
    proof, exact = layer.certificate(), read_exactly(layer, dtype)
    assert proof.sensitivity is not None
    seen = 0.0
    for tol in (1e-2, 1e-3, 1e-5):
        layer.tol = tol
        found = layer.forward_with_error(x, proof)
        for rho in (0.0, 1e-3, 1.0, 30.0):
            direction = torch.randn(x.shape, dtype=F64)
            direction /= direction.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))
            moved = (x.double() + rho * (1 - 1e-6) * direction).to(dtype)
            away = (moved.double() - x.double()).flatten(1).norm(dim=1)
            error = (layer(moved).double() - exact(moved.double())).flatten(1).norm(dim=1)
            bound = found.uniform.at(away)
            assert bool((error <= bound + 1e-10 * (1 + rho)).all()), (tol, rho, error / bound)
            seen = max(seen, float((error / bound).max()))
    assert seen > 1e-4  # it is a bound of this error, not of anything


@pytest.mark.parametrize("name", LAYERS)
def test_gains_hold_for_every_pattern_of_slopes(name):
    layer, _ = build(name, F64)
    weights, proof = layer.weights(), layer.certificate()
    if hasattr(weights, "state"):
        dense = weights.dense()
    elif isinstance(weights, DenseWeights):
        dense = weights
    else:
        dense = weights.dense(weights.placed.grid)
    check_gains(dense, sensitivity(weights, proof))


def check_gains(w, gains):
    n, root = len(w.W), w.Lambda.sqrt()
    reached = dict.fromkeys(
        ("input_to_state", "drive_to_state", "drive_to_output", "residual_to_state",
         "residual_to_output", "state_to_output"), 0.0)  # fmt: skip
    for share in torch.linspace(0, 1, 25):
        slopes = (torch.rand(n) <= share).double()
        K = torch.linalg.solve(torch.eye(n, dtype=F64) - slopes[:, None] * w.W, slopes.diag())
        found = {
            "input_to_state": root[:, None] * (K @ w.U),
            "drive_to_state": root[:, None] * K / root,
            "drive_to_output": w.C @ K / root,
            "residual_to_state": root[:, None] * (K @ w.W) / root,
            "residual_to_output": w.C @ K @ w.W / root,
            "state_to_output": w.C / root,
        }
        for gain, matrix in found.items():
            quotient = float(torch.linalg.matrix_norm(matrix, 2)) / getattr(gains, gain)
            assert quotient <= 1, (gain, quotient)
            reached[gain] = max(reached[gain], quotient)
    assert all(quotient > 0.02 for quotient in reached.values()), reached


def test_gains_of_a_bound_through_the_state():
    layer, _ = build("scales", F64)
    weights = layer.weights()
    proof = certify(weights, tighten_pooled(weights))
    check_gains(weights.dense(), sensitivity(weights, proof))


def test_a_tolerance_that_is_too_loose_certifies_nothing_and_says_so():
    model, proof = slow(0.999, F64, 1e-2)
    x = torch.zeros(1, 1, 1, 1, dtype=F64)
    with pytest.warns(UserWarning, match="tolerance is too loose .* smaller tol"):
        assert float(model.certified_radius(x, torch.tensor([0]), proof)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(model.certified_radius(x, torch.tensor([0]), proof, promise="exact")) > 0
        assert float(model.certified_radius(x, torch.tensor([0]), proof, sound=False)) > 0


def test_promises_are_ordered_and_named():
    torch.manual_seed(0)
    config = EquilibriumClassifierConfig(
        shape=(1, 3, 3), classes=3, mean=(0.5,), std=(0.5,), hidden=9
    )
    model, x = config.build().eval(), torch.rand(40, 1, 3, 3)
    labels = model(x).argmax(1)
    running, exact, textbook = (
        model.certified_radius(x, labels, promise=promise)
        for promise in ("running", "exact", "textbook")
    )
    assert bool(((running <= exact) & (exact <= textbook)).all())
    assert bool((running < exact).any())
    with pytest.raises(ValueError, match="promise must be one of running, exact, textbook"):
        model.certified_radius(x, labels, promise="true")


def test_a_bound_ends_where_numbers_may_overflow():
    layer = EquilibriumLinear(3, 4, 2).requires_grad_(False)
    x = torch.randn(2, 3)
    uniform = layer.forward_with_error(x, layer.certificate()).uniform
    limit = torch.as_tensor(uniform.limit)
    assert bool((limit > 1e20).all() and (limit < torch.finfo(torch.float32).max).all())
    assert bool(torch.isfinite(uniform.at(0.99 * limit)).all())
    assert bool(torch.isinf(uniform.at(1.01 * limit)).all())
    inner = Affine(torch.tensor([1.0, 100.0], dtype=F64), 2.0)
    outer = Affine(torch.zeros(2, dtype=F64), 1.0, torch.tensor([9.0, 9.0], dtype=F64))
    assert outer.after(inner).limit.tolist() == pytest.approx([4.0, -45.5])


EQUILIBRIUM = EquilibriumClassifierConfig(
    shape=(1, 4, 4), classes=4, mean=(0.5,), std=(1.0,), hidden=12, tol=1e-6
)

RESIDUAL = FeedforwardClassifierConfig(
    shape=(1, 4, 4), classes=4, mean=(0.5,), std=(1.0,), channels=(4,), depths=(1,), conv_hidden=3,
    pool=2, dense_depth=1, dense_hidden=8,
)  # fmt: skip


@pytest.mark.parametrize("config", [EQUILIBRIUM, RESIDUAL], ids=["equilibrium", "residual"])
@pytest.mark.parametrize("change", ["std", "mean", "std in place", "dtype", "weights", "shape"])
def test_a_certificate_names_everything_it_depends_on(config, change):
    torch.manual_seed(0)
    model = config.build().double().eval()
    x, labels = torch.rand(3, 1, 4, 4, dtype=F64), torch.tensor([0, 1, 2])
    proof = model.certificate()
    model.certified_radius(x, labels, proof)
    other = model
    if change in ("std", "mean"):
        other = dataclasses.replace(config, **{change: (0.1,)}).build().double().eval()
        other.load_state_dict(model.state_dict(), strict=False)
        other.normalize.load_state_dict(
            dataclasses.replace(config, **{change: (0.1,)}).build().normalize.state_dict()
        )
    elif change == "std in place":
        model.normalize.std.mul_(0.1)
    elif change == "dtype":
        other, x = model.float(), x.float()
    elif change == "weights":
        with torch.no_grad():
            next(model.parameters()).add_(1e-9)
    else:
        other.shape, x = (1, 4, 4, 1)[:3], x
        other.normalize.mean = other.normalize.mean.expand(1, 4, 1).clone()
    with pytest.raises(CertificateError, match="for another network"):
        other.certified_radius(x, labels, proof)
    with pytest.raises(CertificateError, match="for another network"):
        other.forward_with_error(x, proof)
    other.certified_radius(x, labels, other.certificate())


def test_the_order_of_layers_is_part_of_the_statement():
    torch.manual_seed(0)
    config = dataclasses.replace(RESIDUAL, dense_depth=2)
    model = config.build().double().eval()
    proof = model.certificate()
    dense = [i for i, layer in enumerate(model.features) if "Linear" in type(layer).__name__]
    first, second = dense
    model.features[first], model.features[second] = model.features[second], model.features[first]
    with pytest.raises(CertificateError, match="for another network"):
        model.certified_radius(torch.rand(1, 1, 4, 4, dtype=F64), torch.tensor([0]), proof)


def test_how_a_layer_is_solved_is_not_part_of_the_statement():
    model = EQUILIBRIUM.build().double().eval()
    proof = model.certificate()
    model.layer.tol, model.layer.max_steps = 1e-9, 77
    assert model.fingerprint == proof.network
    model.certified_radius(torch.rand(1, 1, 4, 4, dtype=F64), torch.tensor([0]), proof)
    model.layer.activation = Tanh()
    assert model.fingerprint != proof.network


def test_a_chain_composed_by_hand_has_to_cover_the_normalisation():
    model = EQUILIBRIUM.build().double().eval()
    x, label = torch.rand(1, 1, 4, 4, dtype=F64), torch.tensor([0])
    by_hand = compose(model.certificate().layers)
    assert by_hand.network is None
    assert float(model.certified_radius(x, label, by_hand)) == pytest.approx(
        float(model.certified_radius(x, label))
    )
    without = compose([stage.certificate() for stage in model.stages[1:]])
    with pytest.raises(CertificateError, match="of 2 modules one after the other, there are 3"):
        model.certified_radius(x, label, without)
    lesser = Normalize((0.5,), (2.0,)).double().certificate()
    with pytest.raises(CertificateError, match="for other weights"):
        model.certified_radius(x, label, compose([lesser, *by_hand.layers[1:]]))


def test_a_proof_for_another_torus_is_refused():
    small = EquilibriumConv2d(1, 2, 1, image=(5, 5), circular=True)
    large = EquilibriumConv2d(1, 2, 1, image=(9, 9), circular=True)
    large.load_state_dict(small.state_dict())
    x = torch.randn(2, 1, 9, 9)
    with pytest.raises(CertificateError, match=r"images of \(5, 5\), got images of \(9, 9\)"):
        large.forward_with_error(x, small.certificate())
    large.forward_with_error(x, large.certificate())


@pytest.fixture
def flushed():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps denormal numbers")
    yield
    torch.set_flush_denormal(False)


def one_unit(C, Lambda, u=1.0):
    weights = DenseWeights(
        W=torch.zeros(1, 1), U=torch.tensor([[u]]), b=torch.zeros(1), C=C, D=None,
        b_y=torch.zeros(2), Lambda=torch.tensor([Lambda]), gamma=None,
    )  # fmt: skip
    layer = EquilibriumLinear(1, 1, 2, gamma=None, tol=1e-6).requires_grad_(False)
    layer.parameterization = FixedWeights(weights)
    return layer


@pytest.mark.parametrize("Lambda", [1.0, 1e-30])
@pytest.mark.parametrize("c", [1e-15, 1e-25])
def test_what_underflows_in_the_output_counts_whatever_the_metric(Lambda, c):
    layer = one_unit(torch.tensor([[c], [-c]]), Lambda)
    known = layer.forward_with_error(torch.zeros(1, 1), layer.certificate()).uniform
    for size in range(1, 40):
        x = torch.tensor([[size * 0.37e-45 / c]])
        exact = torch.tensor([c, -c], dtype=torch.float32).double() * x.double()
        error = float((layer(x).double() - exact).norm())
        assert error <= float(known.at(float(x)))


@pytest.mark.parametrize("Lambda", [1.0, 1e-30])
def test_denormal_weights_count_where_the_processor_drops_them(flushed, Lambda):
    bits = torch.tensor([[714000], [714000 - 2**31]], dtype=torch.int32)  # ±1e-39
    layer, x = one_unit(bits.view(torch.float32), Lambda, u=1e20), torch.tensor([[1e10]])
    proof = layer.certificate()
    exact = 714000 * 2.0**-149 * float(x) * float(torch.tensor(1e20)) * math.sqrt(2)
    found = layer.forward_with_error(x, proof)
    assert float((found.value.double().norm() - exact).abs()) <= float(found.error)
    around = layer.forward_with_error(torch.zeros(1, 1), proof).uniform
    assert float((layer(x).double().norm() - exact).abs()) <= float(around.at(float(x)))


def with_hook(model):
    model.normalize.register_forward_hook(lambda module, inputs, output: 5 * output)


def with_hook_before(model):
    list(model.children())[-1].register_forward_pre_hook(lambda module, inputs: (5 * inputs[0],))


def with_another_forward(model):
    model.normalize.forward = lambda x: 50 * x


@pytest.mark.parametrize("change", [with_hook, with_hook_before, with_another_forward])
@pytest.mark.parametrize("config", [EQUILIBRIUM, RESIDUAL], ids=["equilibrium", "residual"])
def test_hooks_are_no_part_of_a_proof(config, change):
    model = config.build().eval()
    x, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    before = model.certificate()
    model.certified_radius(x, labels, before)
    change(model)
    for proof in (before, model.certificate()):
        with pytest.raises(CertificateError, match="forward hook, or a forward of its own"):
            model.certified_radius(x, labels, proof)


class _Louder(InvertibleDownsampling):
    def forward(self, x):
        return 10 * super().forward(x)


class _Wider(Normalize):
    def forward(self, x):
        return 10 * super().forward(x)


@pytest.mark.parametrize(("name", "other", "error", "message"), [
    ("stem", _Louder(1), CertificateError, "_Louder extends a map of lben"),
    ("stem", nn.Identity(), ValueError, "Identity has no proved Lipschitz bound"),
    ("normalize", _Wider((0.5,), (0.5,)), CertificateError, "_Wider extends Normalize"),
])  # fmt: skip
def test_maps_without_a_certificate_are_those_that_were_built(name, other, error, message):
    model = ConvolutionalEquilibriumClassifierConfig(
        shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.5,), channels=(2,), pool=2
    ).build().eval()  # fmt: skip
    x, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    named = model.certificate()
    by_hand = compose(named.layers)
    setattr(model, name, other)
    for call in (
        model.certificate,
        lambda: model.certified_radius(x, labels, by_hand),
    ):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises((CertificateError, ValueError), match=f"another network|{message}"):
        model.certified_radius(x, labels, named)


def test_a_hooked_layer_is_not_certified():
    layer = EquilibriumLinear(3, 4, 2).requires_grad_(False)
    chain = LipschitzSequential(SLLLinear(3, 4), layer)
    x, proof, proofs = torch.randn(2, 3), layer.certificate(), chain.certificate((3,))
    layer.register_forward_hook(lambda module, inputs, output: 5 * output)
    with pytest.raises(CertificateError, match="EquilibriumLinear has a forward hook"):
        layer.forward_with_error(x, proof)
    with pytest.raises(CertificateError, match=r"EquilibriumLinear \(1\) has a forward hook"):
        chain.forward_with_error(x, proofs)
    layer = EquilibriumLinear(3, 4, 2).requires_grad_(False)
    layer.parameterization.register_forward_hook(lambda module, inputs, output: None)
    layer.forward_with_error(x, layer.certificate())  # part of the making of weights


@pytest.mark.parametrize("config", [EQUILIBRIUM, RESIDUAL], ids=["equilibrium", "residual"])
def test_a_copy_is_the_same_network(config):
    model = config.build().eval()
    x, labels, proof = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2]), model.certificate()
    radius = model.certified_radius(x, labels, proof)
    for other in (copy.deepcopy(model), model.freeze(), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.certified_radius(x, labels, proof), radius)
    other = config.build().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.certified_radius(x, labels, proof), radius)
