"""Where layers may live: inference mode, other devices, replicas, autocast, other processes."""

import copy
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import get_args

import pytest
import torch
from torch import nn

from lben import (
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifierConfig,
    EquilibriumConv2d,
    EquilibriumLinear,
    FeedforwardClassifierConfig,
    Normalize,
    NormalizedLinear,
    PooledEquilibriumConv2d,
    SLLConv2d,
    SLLLinear,
)
from lben.data import Dataset
from lben.evaluation.accuracy import EvaluationConfig, evaluate
from lben.evaluation.attacks import (
    across_the_boundary,
    apgd_l2,
    ascend_quotient,
    corner_pairs,
    pgd_l2,
    quotients,
    random_pairs,
)
from lben.layers import Flatten, Householder, LipschitzSequential, NormPooling
from lben.layers.conversion import feedback
from lben.models.base import Promise
from lben.training.augmentation import Augmentation
from tests.lben.layers.test_cache import LAYERS, make

IMAGES = {"shape": (1, 8, 8), "classes": 3, "mean": (0.3,), "std": (0.4,)}
CONFIGS = {
    "equilibrium": EquilibriumClassifierConfig(**IMAGES, hidden=8),
    "convolutional": ConvolutionalEquilibriumClassifierConfig(**IMAGES, channels=(3, 4)),
    "residual": FeedforwardClassifierConfig(
        **IMAGES, channels=(4,), depths=(1,), dense_depth=1, dense_hidden=8, conv_hidden=3
    ),
    "sandwich": FeedforwardClassifierConfig(
        **IMAGES, channels=(4,), depths=(1,), dense_depth=1, dense_hidden=8, conv_hidden=3,
        block="sandwich",
    ),
}  # fmt: skip
EQUILIBRIA = ["equilibrium", "equilibrium of images", "pooled"]


def pixels(n=3):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", LAYERS)
def test_what_inference_mode_leaves_is_ordinary(kind):
    layer, x = make(kind)
    layer.eval().requires_grad_(False)
    expected = torch.autograd.grad(copy.deepcopy(layer)(z := x.clone().requires_grad_()).sum(), z)
    with torch.inference_mode():
        layer(x)
        layer.weights() if hasattr(layer, "weights") else None
    found = torch.autograd.grad(layer(z := x.clone().requires_grad_()).sum(), z)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", ["built", "loaded", "assigned", "converted"])
@pytest.mark.parametrize("config", CONFIGS)
def test_models_made_in_inference_mode_can_be_attacked(config, how):
    x, labels = pixels(), torch.tensor([0, 1, 2])
    model = CONFIGS[config].build()
    with torch.inference_mode():
        if how == "built":
            model = CONFIGS[config].build()
        elif how == "converted":
            model.double().float()
        else:
            state = {k: v.clone() for k, v in CONFIGS[config].build().state_dict().items()}
            model.load_state_dict(state, assign=how == "assigned")
        model.eval()(x)
    pgd_l2(model, x, labels, 0.3, steps=2)
    assert all(p.requires_grad for p in model.parameters())
    model(x).sum().backward()
    assert model.certificate().bound > 0


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_models_come_back_from_the_meta_device(config, assign):
    reference, x = CONFIGS[config].build().eval(), pixels()
    with torch.device("meta"):
        model = CONFIGS[config].build()
    if not assign:
        model.to_empty(device="cpu")
        for buffer in model.buffers():  # what lay in that memory
            if buffer.is_floating_point() and buffer.numel() > 1:
                buffer.fill_(3.0)
    model.load_state_dict(reference.state_dict(), assign=assign)
    torch.testing.assert_close(model.eval()(x), reference(x))
    assert model.certificate().bound == pytest.approx(reference.certificate().bound, rel=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_come_back_from_the_meta_device(kind):
    reference, x = make(kind)
    with torch.device("meta"):
        layer, _ = make(kind)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu").load_state_dict(reference.state_dict())
    torch.testing.assert_close(layer(x), reference(x))
    skipped = copy.deepcopy(reference).to_empty(device="cpu")
    skipped.load_state_dict(reference.state_dict())
    torch.testing.assert_close(skipped(x), reference(x))


def test_normalization_keeps_its_values_where_it_is_emptied():
    normalize = Normalize((0.25, 0.5), (0.5, 2.0))
    x = torch.rand(1, 2, 3, 3)
    expected = normalize(x)
    torch.testing.assert_close(normalize.to_empty(device="cpu")(x), expected)
    normalize.mean.add_(0.25)  # a change of one's own survives a move
    shifted = normalize(x)
    torch.testing.assert_close(normalize.double().float()(x), shifted)
    with torch.device("meta"):
        other = Normalize((0.25, 0.5), (0.5, 2.0))
    torch.testing.assert_close(other.to_empty(device="cpu")(x), expected)
    assert normalize.state_dict() == {}


@pytest.mark.parametrize("kind", [SLLLinear, EquilibriumLinear, NormalizedLinear])
def test_skip_init_finds_the_device(kind):
    sizes = (6, 8, 4) if kind is EquilibriumLinear else (6, 4)
    layer = nn.utils.skip_init(kind, *sizes, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    layer.load_state_dict(kind(*sizes, dtype=torch.float64).state_dict())
    assert bool(layer(torch.ones(2, 6, dtype=torch.float64)).isfinite().all())


def test_a_default_device_is_not_asked_where_another_is_named():
    torch.set_default_device("meta")
    try:
        x = torch.rand(2, 3, 8, 8, device="cpu")
        for layer in (
            EquilibriumConv2d(3, 4, 2, image=(8, 8), device="cpu"),
            EquilibriumConv2d(3, 4, 2, image=(8, 8), circular=True, device="cpu"),
            PooledEquilibriumConv2d(3, (4, 5), 2, image=(8, 8), device="cpu"),
        ):
            y = layer(x)
            y.square().sum().backward()
            assert y.device.type == "cpu"
            assert layer.certificate().bound > 0
        weights = SLLLinear(4, 5, device="cpu").weights()
        assert weights.U.device.type == "cpu"
    finally:
        torch.set_default_device(None)


def measured(model, x):
    """Return the numbers of every kind of pair."""
    generator = torch.Generator("cpu").manual_seed(0)
    best = ascend_quotient(model, x, steps=3, generator=generator).quotient
    pairs = [*random_pairs(x, 7, generator), *corner_pairs(x, generator)]
    return [best, *(quotients(model, a, b) for a, b in pairs)]


@pytest.mark.parametrize("config", CONFIGS)
def test_models_are_certified_and_attacked_whatever_the_default_device(config):
    model, x, labels = CONFIGS[config].build().eval(), pixels(), torch.tensor([0, 1, 2])
    data = Dataset(
        name="digits", train_images=(255 * x).byte(), train_labels=labels,
        test_images=(255 * x).byte(), test_labels=labels, mean=(0.3,), std=(0.4,), classes=3,
    )  # fmt: skip
    options = EvaluationConfig(
        radii=(0.0, 0.3), attack_samples=3, pgd_steps=2, pairs=4, ascent_pairs=2, ascent_steps=2
    )
    augmentation = Augmentation(shift=1, flip=True, brightness=0.1)

    def everything():
        generator = torch.Generator("cpu").manual_seed(0)
        proof = model.certificate()
        report = evaluate(model, data, options)
        return [
            torch.tensor([proof.bound, report.quotient], device="cpu"),
            *(model.certified_radius(x, labels, proof, promise=p) for p in get_args(Promise)),
            *pgd_l2(model, x, labels, 0.3, steps=3, restarts=2, generator=generator),
            *apgd_l2(model, x, labels, 0.3, steps=3, bounds=None, generator=generator),
            *across_the_boundary(model, x, x.flip(0), distance=0.1),
            *measured(model, x),
            augmentation(data.train_images, generator),
        ]

    expected = everything()
    with torch.device("meta"):
        found = everything()
    torch.testing.assert_close(found, expected)


def test_layers_are_certified_whatever_the_default_device():
    conv = SLLConv2d(1, 2)
    chain = LipschitzSequential(
        conv, NormPooling(2), Flatten(), EquilibriumLinear(16, 5, 4), NormalizedLinear(4, 3)
    )
    explicit, x = LipschitzSequential(conv, Flatten(), NormalizedLinear(64, 3)), pixels()
    W = torch.randn(5, 5)

    def everything():
        with torch.no_grad():
            found = chain.forward_with_error(x, chain.certificate(tuple(x.shape[1:])))
            apart = explicit.forward_with_error(x, explicit.certificate(tuple(x.shape[1:])))
        around = found.uniform.at(0.5), found.uniform.at(found.error), found.uniform.limit
        return [
            found.value,
            found.error,
            *around,
            apart.error,
            *measured(chain, x),
            feedback(W, [2, 3]),
        ]

    expected = everything()
    with torch.device("meta"):
        found = everything()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("core", [0, 3])
def test_a_residual_model_is_built_without_numbers(core):
    config = replace(CONFIGS["residual"], core=core)
    with torch.device("meta"):
        model = config.build()
    assert all(p.is_meta for p in model.parameters())
    reference = config.build()
    model.to_empty(device="cpu").load_state_dict(reference.state_dict())
    torch.testing.assert_close(model(pixels()), reference(pixels()))


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_tell_the_shape_of_their_output_without_numbers(kind):
    layer, x = make(kind)
    shape = layer(x).shape
    y = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert y.is_meta
    assert y.shape == shape


def replica(module):
    """Return what torch.nn.parallel.replicate makes of a module on each device."""
    twin = module._replicate_for_data_parallel()
    for name, p in module._parameters.items():
        if p is not None:
            setattr(twin, name, p.clone())
    for name, child in module._modules.items():
        if child is not None:
            setattr(twin, name, replica(child))
    return twin


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "kind", [k for k in LAYERS if k not in ("orthogonal", "sandwich", "orthonormal head")]
)
def test_replicas_of_data_parallel_give_the_output(kind, grad):
    layer, x = make(kind)
    with torch.set_grad_enabled(grad):
        y = replica(layer)(x)
        torch.testing.assert_close(y, layer(x))
    if grad:
        found = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", EQUILIBRIA)
def test_equilibria_leave_autocast_in_both_directions(kind):
    layer, x = make(kind)
    layer, x = layer.float(), x.float()
    layer.tol = 1e-6
    parameters = list(layer.parameters())
    y = layer(x)
    expected = torch.autograd.grad(y.square().sum(), parameters)
    weights, bound = layer.weights().fingerprint, layer.certificate()
    with torch.autocast("cpu", torch.bfloat16):
        within = layer(x)
        assert within.dtype == torch.float32
        torch.testing.assert_close(within, y, rtol=0, atol=0)
        found = torch.autograd.grad(within.square().sum(), parameters)
        assert layer.weights().fingerprint == weights
        assert layer.certificate().bound == bound.bound
        assert layer(x.bfloat16()).dtype == torch.float32
        torch.testing.assert_close(layer(x.bfloat16()), layer(x.bfloat16().float()))
        assert layer.equilibrium(x.bfloat16()).value.dtype == torch.float32
        with torch.no_grad():
            layer(x)
            torch.testing.assert_close(layer.forward_with_error(x, bound).value, y.detach())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), copy.deepcopy(layer)(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        g = torch.autograd.grad(layer(x).square().sum(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in g), parameters, allow_unused=True)
    g = torch.autograd.grad(layer(x).square().sum(), parameters, create_graph=True)
    plain = torch.autograd.grad(sum(t.square().sum() for t in g), parameters, allow_unused=True)
    for a, b in zip(second, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_classifier_and_a_chain_leave_autocast():
    model = CONFIGS["equilibrium"].build()
    chain = LipschitzSequential(SLLLinear(6, 9), EquilibriumLinear(6, 8, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(pixels()).dtype == torch.float32
        assert chain(torch.randn(3, 6)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", EQUILIBRIA)
def test_half_precision_is_refused_by_name(kind, dtype):
    layer, x = make(kind)
    layer = layer.to(dtype)
    for call in (lambda: layer(x.to(dtype)), layer.certificate, layer.weights):
        with pytest.raises(ValueError, match=f"in float32 or float64, the parameters are {dtype}"):
            call()


def test_autocast_does_not_excuse_another_type():
    layer, _ = make("equilibrium")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"x is torch\.float32, the layer is torch\.float64"),
    ):
        layer(torch.zeros(2, 5))


SENDERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "to a process": lambda o: pickle.loads(bytes(ForkingPickler.dumps(o))),
}


@pytest.mark.parametrize("how", SENDERS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_can_be_sent_at_any_time(kind, how):
    layer, x = make(kind)
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(SENDERS[how](layer)(x), y)
    with torch.no_grad():
        layer.eval()(x)
    received = SENDERS[how](layer)
    torch.testing.assert_close(received(x), y)
    assert list(received.state_dict()) == list(layer.state_dict())
    received(x).sum().backward()
    if hasattr(layer, "weights"):
        weights = layer.weights()
        assert SENDERS[how](weights).fingerprint == weights.fingerprint
    if hasattr(layer, "equilibrium"):
        solution = SENDERS[how](layer.equilibrium(x))
        assert float(solution.error_bound.max()) < 1e-6


@pytest.mark.parametrize("how", SENDERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_models_and_their_proofs_can_be_sent(config, how):
    send, model, x = SENDERS[how], CONFIGS[config].build().eval(), pixels()
    proof = model.certificate()
    other, other_proof = send((model, proof))
    assert send(CONFIGS[config]) == CONFIGS[config]
    labels = model(x).argmax(1)
    radius = other.certified_radius(x, labels, other_proof)
    torch.testing.assert_close(radius, model.certified_radius(x, labels, proof))


def test_a_reflection_made_in_inference_mode_has_a_gradient():
    with torch.inference_mode():
        reflection = Householder(4)
    x = torch.randn(2, 4, requires_grad=True)
    reflection(x).sum().backward()
    assert reflection.theta.grad is not None
