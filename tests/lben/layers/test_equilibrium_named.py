"""Equilibria of images: gradients, matrices, errors and the bound under attack."""

import copy
import dataclasses
import io
import math

import pytest
import torch

from lben import (
    CertificateError,
    EquilibriumConv2d,
    EquilibriumLinear,
    LipschitzSequential,
    PooledEquilibriumConv2d,
    SLLConv2d,
    SLLLinear,
    certify,
    tighten_diagonal,
)
from lben.parameterizations.polyphase import Polyphase, phases
from solvers import PeacemanRachford, SemismoothNewton
from tests.lben.layers.images import DOUBLE, IMAGE, LAYERS, conv, dense, moved, pooled


def draw(layer, samples=3):
    return torch.randn(samples, layer.in_channels, *layer.image, dtype=torch.float64)


def placed(layer):
    weights = layer.weights()
    return weights.placed if isinstance(layer, EquilibriumConv2d) else weights.state.placed


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_layer_of_its_matrices(name):
    layer = moved(name)
    x = draw(layer)
    solution = layer.equilibrium(x)
    state = placed(layer).crop(solution.value)
    w, z = dense(layer), state.flatten(1)
    inputs = torch.nn.functional.pixel_unshuffle(x, placed(layer).stride).flatten(1)
    again = layer.activation(z @ w.W.T + inputs @ w.U.T + w.b)
    torch.testing.assert_close(z, again, rtol=1e-9, atol=1e-10)
    y = z @ w.C.T + w.b_y + (0 if w.D is None else inputs @ w.D.T)
    torch.testing.assert_close(layer(x).flatten(1), y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_every_parameter_and_the_input(name):
    layer = moved(name)
    names = [n for n, _ in layer.named_parameters()]
    values = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    x = draw(layer, 1).requires_grad_()

    def f(x, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(f, (x, *values), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_an_inexact_solve_is_covered(name):
    layer = moved(name)
    x, proof = draw(layer), layer.certificate()
    exact = layer(x)
    layer.tol = 1e-3
    found = layer.forward_with_error(x, proof)
    y, error, steps = found.value, found.error, found.steps
    found = (y - exact).flatten(1).norm(dim=1)
    assert (found <= error).all()
    assert (error <= 1e4 * found + 1e-8).all()
    assert steps > 0


def test_nothing_beats_the_bound_and_it_is_approached():
    layer = pooled(gamma=1.0)
    assert layer.certificate().bound == 1.0
    x = draw(layer, 64)
    direction = torch.randn_like(x)
    best = 0.0
    for _ in range(60):
        direction = 1e-3 * direction / direction.flatten(1).norm(dim=1)[:, None, None, None]
        moved = (x + direction).requires_grad_()
        change = (layer(moved) - layer(x).detach()).norm(dim=1)
        best = max(best, float(change.detach().max()) / 1e-3)
        (direction,) = torch.autograd.grad(change.sum(), moved)
    assert 0.1 < best <= 1 + 1e-6


def test_translations_pass_through_a_circular_layer():
    layer = EquilibriumConv2d(2, 3, 2, image=(5, 6), circular=True, **DOUBLE)
    x = draw(layer)
    torch.testing.assert_close(layer(x.roll((1, 2), (2, 3))), layer(x).roll((1, 2), (2, 3)))


def test_float32_weights_are_proved_as_they_run():
    for build in (LAYERS["pooled"], LAYERS["residual"], LAYERS["two scales"]):
        layer = build().float()
        proof = layer.certificate()
        assert proof.dtype == "float32"
        assert proof.margin > 0
        layer.tol = 1e-5
        assert layer(draw(layer).float()).isfinite().all()


def test_in_a_chain_with_explicit_layers():
    chain = LipschitzSequential(
        SLLConv2d(2, 3, 3, dtype=torch.float64), conv(2, 4, 2, skip=1.0), pooled()
    )
    x = draw(chain[1])
    proofs = chain.certificate((2, *IMAGE))
    found = chain.forward_with_error(x, proofs)
    y, error = found.value, found.error
    assert len(proofs.layers) == 3
    assert (error < 1e-7).all()
    assert y.shape == (3, 3)


@pytest.mark.parametrize(("to", "of"), [(1, 1), (2, 2), (4, 4), (1, 2), (2, 4)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_phases_of_a_strided_convolution(to, of, k):
    kernel = torch.randn(3, 2, k, k)
    x = torch.randn(2, 2, 5 * of, 6 * of)
    expected = torch.nn.functional.conv2d(x, kernel, padding=k // 2, stride=of // to)
    coarse = phases(kernel, to, of)
    actual = torch.nn.functional.conv2d(
        torch.nn.functional.pixel_unshuffle(x, of), coarse, padding=k // 2
    )
    actual = torch.nn.functional.pixel_shuffle(actual, to)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_channels_of_the_coarsest_grid():
    layout = Polyphase(3, (2, 5), 3)
    assert layout.factors == (2, 1)
    values = layout.spread(torch.arange(7.0))
    assert values.tolist() == [0.0] * 4 + [1.0] * 4 + [2.0, 3, 4, 5, 6]


def test_bad_input_is_refused_by_name():
    layer, x = conv(), torch.randn(2, 2, *IMAGE, dtype=torch.float64)
    for wrong in (x[:, :1], x[:, :, :3], x[0]):
        with pytest.raises(ValueError, match=r"expected images of shape \(batch, 2, 4, 6\)"):
            layer(wrong)
    with pytest.raises(ValueError, match=r"x is torch\.float32"):
        layer(x.float())
    x[1, 0, 2, 3] = math.nan
    with pytest.raises(ValueError, match=r"NaN or Inf in 1 of 2 samples \(first at sample 1"):
        layer(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 7}, "smaller than the kernel"),
        ({"circular": True}, "smaller than the kernel"),
        ({"kernel_size": 2}, "must be odd"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"skip": 2.0}, "skip must lie in"),
        ({"skip": 0.5, "gamma": None}, "skip must lie in"),
        ({"skip": 0.5, "stride": 2}, "stride 1"),
        ({"stride": 4}, "do not divide"),
        ({"stride": 0}, "stride must be"),
        ({"epsilon": 0.0}, "epsilon must be"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        conv(**options)
    if "skip" not in options and "stride" not in options and "circular" not in options:
        with pytest.raises(ValueError, match=message):
            pooled(**options)


def test_bad_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match="as many output channels"):
        conv(2, 3, 4, skip=0.5)
    with pytest.raises(ValueError, match="windows of 3"):
        pooled(pool=3)
    with pytest.raises(ValueError, match="multiple of the coarsest pixel"):
        PooledEquilibriumConv2d(2, (2, 2), 3, image=(6, 6), pool=3)
    with pytest.raises(ValueError, match="at least 1"):
        conv(0, 3, 2)


def test_another_method_solves_the_same_problem_or_is_refused():
    layer = conv(circular=True, kernel_size=1, method=SemismoothNewton())
    x = draw(layer)
    y = layer(x)
    layer.method = PeacemanRachford()
    torch.testing.assert_close(y, layer(x))
    with pytest.raises(ValueError, match=r"Masked\(activation=ReLU\(\)\): use PeacemanRachford"):
        layer = conv(method=SemismoothNewton())
        layer(draw(layer))


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="sums are plain without it")
def test_rounding_is_not_bounded_where_other_sums_may_run():
    layer = EquilibriumConv2d(2, 3, 2, image=(6, 6)).requires_grad_(False)
    x, proof = torch.randn(2, 2, 6, 6), layer.certificate()
    layer.forward_with_error(x, proof)
    with torch.backends.mkldnn.flags(enabled=False):
        with pytest.raises(ValueError, match="round"):
            layer.forward_with_error(x, proof)
        double = layer.double()
        double.forward_with_error(x.double(), double.certificate())


MADE = {
    "dense": lambda: EquilibriumLinear(5, 6, 3, gamma=2.0, feedthrough=True),
    "images": lambda: EquilibriumConv2d(2, 3, 2, image=(6, 8), stride=2),
    "pooled": lambda: PooledEquilibriumConv2d(2, 3, 4, image=(4, 6), pool=2),
}


def holding(name):
    """A layer, and the one that holds its weights."""
    layer = MADE[name]()
    weights = layer.weights().apply(torch.Tensor.detach)
    return layer, type(layer).from_weights(weights, tol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_a_frozen_layer_holds_the_weights_bit_by_bit_and_proves_their_bound(name):
    layer, frozen = holding(name)
    assert type(frozen) is type(layer)
    assert frozen.extra_repr().split("gamma")[0] == layer.extra_repr().split("gamma")[0]
    assert frozen.weights().fingerprint == layer.weights().fingerprint
    assert frozen.certificate().bound == layer.gamma
    assert not list(frozen.parameters())
    frozen.requires_grad_(True)
    x = torch.randn(2, *layer.sample_shape, requires_grad=True)
    y = frozen(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-3, atol=1e-3)
    y.sum().backward()
    assert bool(x.grad.any())


@pytest.mark.parametrize("name", MADE)
def test_a_frozen_layer_is_saved_moved_copied_and_pickled(name):
    _, frozen = holding(name)
    _, other = holding(name)
    before = other.weights()
    other.load_state_dict(frozen.state_dict())
    assert other.weights().fingerprint == frozen.weights().fingerprint
    assert before.fingerprint != frozen.weights().fingerprint  # what was handed out has not changed
    assert copy.deepcopy(frozen).weights().fingerprint == frozen.weights().fingerprint
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.weights().fingerprint == frozen.weights().fingerprint
    again.double()
    assert {t.dtype for t in again.weights().tensors().values()} == {torch.float64}
    assert again.certificate().bound == frozen.gamma
    x = torch.randn(2, *frozen.sample_shape)
    torch.testing.assert_close(again(x.double()).float(), frozen(x), rtol=1e-3, atol=1e-3)


def test_a_claim_of_given_weights_is_not_believed():
    weights = MADE["dense"]().weights()
    liar = dataclasses.replace(weights, gamma=1e-3)
    with pytest.raises(CertificateError, match="could not be proved"):
        EquilibriumLinear.from_weights(liar).certificate()
    with pytest.raises(ValueError, match=r"tighten_diagonal|must be below gamma"):
        EquilibriumLinear.from_weights(liar, trainable=True)
    with pytest.raises(ValueError, match="tighten_diagonal"):
        EquilibriumLinear.from_weights(dataclasses.replace(weights, gamma=None), trainable=True)


def test_weights_without_a_claim_are_well_posed_and_have_the_bound_of_a_tightening():
    weights = MADE["dense"]().weights()
    layer = EquilibriumLinear.from_weights(dataclasses.replace(weights, gamma=None))
    assert layer.certificate().bound == math.inf
    bound = certify(layer.weights(), tighten_diagonal(layer.weights())).bound
    assert bound <= 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trainable_layer_keeps_the_bound_while_it_moves(dtype):
    layer = MADE["dense"]().to(dtype)
    trained = EquilibriumLinear.from_weights(layer.weights(), trainable=True, tol=1e-5)
    x = torch.randn(4, 5, dtype=dtype)
    torch.testing.assert_close(trained(x), layer(x), rtol=1e-2, atol=1e-2)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        trained(x).square().sum().backward()
        optimizer.step()
    assert bool(trained(x).norm() < layer(x).norm())
    assert trained.weights().W.dtype == dtype
    assert trained.certificate().bound == 2.0


def test_weights_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="holds DenseWeights"):
        EquilibriumLinear.from_weights(MADE["images"]().weights())
    with pytest.raises(ValueError, match="holds ConvolutionalWeights"):
        EquilibriumConv2d.from_weights(MADE["dense"]().weights())
    with pytest.raises(ValueError, match="holds PooledWeights"):
        PooledEquilibriumConv2d.from_weights(MADE["dense"]().weights())
    with pytest.raises(ValueError, match="at least one layer"):
        EquilibriumLinear.from_weights([])
    with pytest.raises(ValueError, match="of no image size"):
        EquilibriumConv2d.from_weights(SLLConv2d(2, 3).weights())


@pytest.mark.parametrize("trainable", [False, True])
def test_weights_with_nan_are_refused(trainable):
    weights = MADE["dense"]().weights()
    broken = weights.U.clone()
    broken[1, 2], broken[0, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="U has 2 entries that are NaN or infinite, of 30"):
        EquilibriumLinear.from_weights(dataclasses.replace(weights, U=broken), trainable=trainable)


@pytest.mark.parametrize("name", ["images", "pooled"])
def test_weights_of_images_with_nan_are_refused(name):
    layer = MADE[name]()
    weights = layer.weights()
    broken = weights.with_tensors({"b_y": torch.full_like(weights.b_y, math.nan)})
    with pytest.raises(ValueError, match=r"b_y has \d entries that are NaN"):
        type(layer).from_weights(broken)


def test_several_frozen_layers_are_one():
    parts = [SLLLinear(4, n, dtype=torch.float64) for n in (3, 5)]
    layer = EquilibriumLinear.from_weights([part.weights() for part in parts], tol=1e-12)
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), parts[1](parts[0](x)))
    assert layer.hidden_features == 8
    assert not list(layer.parameters())
    assert layer.certificate().bound == layer.gamma
