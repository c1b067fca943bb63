import dataclasses
import math

import pytest
import torch

from lben import (
    ConvolutionalEquilibriumClassifier,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifier,
    EquilibriumClassifierConfig,
    EquilibriumLinear,
    FeedforwardClassifierConfig,
    PooledEquilibriumConv2d,
)
from lben.evaluation.attacks import across_the_boundary
from lben.models import ImageTask
from lben.models.equilibrium import activation
from solvers import LeakyReLU, ReLU, Tanh

DATA = {"shape": (1, 4, 4), "classes": 3, "mean": (0.3,), "std": (0.25,)}
CONFIGS = {
    "dense": EquilibriumClassifierConfig(**DATA, hidden=9, gamma=0.5),
    "convolutional": ConvolutionalEquilibriumClassifierConfig(
        **DATA, channels=(4,), pool=2, gamma=0.5, tol=1e-4
    ),
    "stem": ConvolutionalEquilibriumClassifierConfig(
        **{**DATA, "shape": (1, 8, 8)}, channels=(4,), stem=2, pool=2, gamma=0.5
    ),
    "two scales": ConvolutionalEquilibriumClassifierConfig(
        **{**DATA, "shape": (1, 8, 8)}, channels=(2, 3), pool=4, gamma=0.5, activation="tanh"
    ),
    "circular": ConvolutionalEquilibriumClassifierConfig(
        **{**DATA, "shape": (1, 6, 6)}, channels=(3,), pool=2, gamma=0.5, circular=True
    ),
}
CONFIG = CONFIGS["dense"]


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def images(count=8, dtype=torch.float64, config=CONFIG):
    return torch.rand(count, *config.shape, dtype=dtype)


def test_bound_counts_the_normalization(config):
    model = config.build().double()
    certificate = model.certificate()
    assert certificate.bound == pytest.approx(0.5 / 0.25)
    assert certificate.bound >= 2.0
    for bound in model.bounds[1:]:
        assert model.certificate(bound=bound).bound <= certificate.bound
    assert ("diagonal" in model.bounds) == isinstance(config, EquilibriumClassifierConfig)
    with pytest.raises(ValueError, match=f"has the bounds {', '.join(model.bounds)}, not 'least'"):
        model.certificate(bound="least")


def test_pairs_certify_more_and_joint_pairs_most():
    model = CONFIGS["dense"].build().double().requires_grad_(False)
    x = images(100)
    labels = model(x).argmax(1)
    by = {bound: model.certificate(bound=bound) for bound in model.bounds}
    radii = {bound: model.certified_radius(x, labels, proof) for bound, proof in by.items()}
    for less, more in [("scaled", "pairs"), ("pairs", "diagonal pairs"), ("scaled", "diagonal")]:
        assert bool((radii[less] <= radii[more] * (1 + 1e-3)).all()), (less, more)
    assert radii["diagonal pairs"].mean() > 1.01 * radii["scaled"].mean()


def test_radius_holds_under_perturbation_and_pays_for_an_inexact_solve(config):
    model = config.build().double().requires_grad_(False)
    x = images(200, config=config)
    labels = model(x).argmax(1)
    model.layer.tol = 1e-10
    radius = model.certified_radius(x, labels)
    assert radius.max() > 0
    model.layer.tol = 1e-1
    assert (model.certified_radius(x, labels, promise="exact") <= radius + 1e-9).all()
    model.layer.tol = 1e-10
    direction = torch.randn_like(x)
    moved = x + 0.999 * radius[:, None, None, None] * direction / direction.flatten(1).norm(
        dim=1
    ).reshape(-1, 1, 1, 1)
    held = model(moved).argmax(1) == labels
    assert held[radius > 0].all()


def test_misclassified_samples_have_no_radius(config):
    model = config.build().double()
    x = images(config=config)
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 3
    assert (model.certified_radius(x, wrong) == 0).all()


def test_certified_logits_are_near_the_exact_ones(config):
    model = config.build().double().requires_grad_(False)
    x = images(50, config=config)
    model.layer.tol = 1e-13
    exact = model(x)
    for tol in (1e-2, 1e-6):
        model.layer.tol = tol
        result = model.forward_with_error(x, model.certificate())
        assert ((result.value - exact).norm(dim=1) <= result.error + 1e-11).all()


def test_logits_of_the_network_as_it_runs_are_bounded(config):
    """float32 and loosely solved, against the same weights in float64."""
    model = config.build().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    x = images(30, dtype=torch.float32, config=config)
    weights = model.layer.weights().to(torch.float64)
    exact = model.to_exact(1e-12)
    exact.layer.weights = lambda: weights
    mean, std = (t.double() for t in (model.normalize.mean, model.normalize.std))
    truth = (x.double() - mean) / std
    for stage in exact.stages[1:]:
        truth = stage(truth)
    for tol in (1e-1, 1e-3, 1e-6):
        model.layer.tol, model.layer.on_failure = tol, "warn"
        result = model.forward_with_error(x, model.certificate())
        assert result.value.dtype == torch.float32
        away = (result.value.double() - truth).norm(dim=1)
        assert bool((away <= result.error + 1e-11).all())
    assert float(result.error.max()) < 0.05


def test_half_precision_has_no_bounded_logits():
    model, x = CONFIG.build(), images(dtype=torch.float32)
    certificate = model.certificate()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="float32 and float64 without autocast"),
    ):
        model.forward_with_error(x, certificate)


def test_the_textbook_radius_is_larger_and_wrong_where_ours_is_not():
    """Next to the boundary of the exact network, at a loose tolerance."""
    model = CONFIG.build().double().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    exact = model.to_exact(1e-12)
    a, b = images(200), images(200)
    near, across = across_the_boundary(exact, a, b, distance=1e-3)
    assert len(near) > 20
    distance = (near - across).flatten(1).norm(dim=1)
    beyond = exact(across).argmax(1)
    wrong = {}
    for tol in (1e-1, 1e-2, 1e-5):
        model.layer.tol, model.layer.on_failure = tol, "warn"
        labels, proof = model(near).argmax(1), model.certificate(bound="diagonal")
        for sound in (True, False):
            radius = model.certified_radius(near, labels, proof, sound=sound)
            wrong[tol, sound] = int(((radius >= distance) & (labels != beyond)).sum())
    assert not any(wrong[tol, True] for tol in (1e-1, 1e-2, 1e-5)), wrong
    assert wrong[1e-1, False] > 0, wrong


@pytest.mark.parametrize("shape", [(8, 16), (8, 1, 4, 5), (1, 4, 4)])
def test_wrong_image_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"expected images of shape \(batch, 1, 4, 4\)"):
        CONFIG.build()(torch.zeros(shape))


def test_labels_out_of_range_are_named():
    model = CONFIG.build().double()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        model.certified_radius(images(2), torch.tensor([0, 3]))


def test_activations_by_name():
    assert (activation("relu"), activation("tanh")) == (ReLU(), Tanh())
    assert activation("leaky_relu") == LeakyReLU()
    with pytest.raises(ValueError, match="activation must be one of relu, leaky_relu, tanh"):
        activation("gelu")


def test_a_convolution_without_a_bound_is_bounded_afterwards():
    config = dataclasses.replace(CONFIGS["convolutional"], gamma=None, epsilon=0.1)
    model = config.build().double().requires_grad_(False)
    assert model.bounds == ("promised", "scaled")
    assert model.certificate().bound == math.inf
    certificate = model.certificate(bound="scaled")
    x = images(100, config=config)
    y = x + 0.1 * torch.randn_like(x)
    quotient = (model(x) - model(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert quotient.max() <= certificate.bound < 100 * quotient.max()


def test_a_chain_with_an_equilibrium_core():
    config = FeedforwardClassifierConfig(
        shape=(3, 8, 8), classes=4, mean=(0.5,) * 3, std=(1.0,) * 3, channels=(6,), depths=(1,),
        conv_hidden=3, pool=4, dense_depth=1, dense_hidden=8, core=5,
    )  # fmt: skip
    model = config.build().to_exact(1e-9)
    x = torch.rand(10, 3, 8, 8, dtype=torch.float64)
    result = model.forward_with_error(x, model.certificate())
    assert result.steps > 0
    torch.testing.assert_close(result.value, model(x))
    with pytest.raises(ValueError, match="core must be at least 0"):
        dataclasses.replace(config, core=-1)


@pytest.mark.parametrize("kind", ["dense", "pooled"])
def test_a_classifier_of_given_weights_is_that_of_its_layer(kind):
    task = ImageTask(shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,))
    if kind == "dense":
        weights = EquilibriumLinear(16, 8, 3, dtype=torch.float64).weights()
        model = EquilibriumClassifier.from_weights(weights, task, tol=1e-5)
    else:
        weights = PooledEquilibriumConv2d(
            1, 2, 3, image=(4, 4), pool=2, dtype=torch.float64
        ).weights()
        model = ConvolutionalEquilibriumClassifier.from_weights(weights, task, tol=1e-5)
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    inner = (x - 0.5) / 0.25
    torch.testing.assert_close(
        model(x), model.layer(inner.flatten(1) if kind == "dense" else inner)
    )
    assert model.dtype == torch.float64
    certificate = model.certificate()
    assert certificate.bound == pytest.approx(4.0)
    labels = model(x).argmax(1)
    assert bool((model.certified_radius(x, labels, certificate) > 0).any())
    assert model.float().certificate().bound == pytest.approx(4.0)
    assert model(x.float()).dtype == torch.float32
    again = model.to_exact(1e-8)
    assert again.layer.weights().fingerprint == model.double().layer.weights().fingerprint


def test_a_classifier_of_given_weights_refuses_another_task():
    task = ImageTask(shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.25,))
    with pytest.raises(ValueError, match="16 inputs and 3 outputs, got 9 and 3"):
        EquilibriumClassifier.from_weights(EquilibriumLinear(9, 8, 3).weights(), task)
    weights = PooledEquilibriumConv2d(1, 2, 5, image=(4, 4)).weights()
    with pytest.raises(ValueError, match="do not fit weights"):
        ConvolutionalEquilibriumClassifier.from_weights(weights, task)
