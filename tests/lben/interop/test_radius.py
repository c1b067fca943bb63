"""One line gives radii for every kind of model; no attack breaks a label within its radius."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lben import (
    CertificateError,
    ConversionError,
    ConvertedNetwork,
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifierConfig,
    EquilibriumLinear,
    FeedforwardClassifierConfig,
    Flatten,
    LipschitzSequential,
    NormalizedLinear,
    SLLLinear,
    certified_radius,
    from_torch,
)
from lben.certificates.relaxation import InputRegion
from lben.interop import RadiusCertifier
from lben.tightening.descent import find_smallest

SHAPE = (1, 4, 4)
TASK = {"shape": SHAPE, "classes": 3, "mean": (0.4,), "std": (0.5,)}


def images(count=6):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


def ordinary():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8), nn.Tanh(), nn.Linear(8, 3)
    ).eval()


def built(config):
    torch.manual_seed(0)
    return config.build().eval()


def chain():
    torch.manual_seed(0)
    return LipschitzSequential(Flatten(), SLLLinear(16, 8), NormalizedLinear(16, 3))


MODELS = {
    "torch.nn": ordinary,
    "network": lambda: from_torch(ordinary(), SHAPE),
    "converted": lambda: ConvertedNetwork(from_torch(ordinary(), SHAPE)),
    "equilibrium": lambda: built(EquilibriumClassifierConfig(**TASK, hidden=8)),
    "mondeq": lambda: built(
        EquilibriumClassifierConfig(**TASK, hidden=8, gamma=None, learn_metric=False)
    ),
    "leaky": lambda: built(EquilibriumClassifierConfig(**TASK, hidden=8, activation="leaky_relu")),
    "feedforward": lambda: built(
        FeedforwardClassifierConfig(
            **TASK, channels=(2,), depths=(1,), pool=2, dense_depth=1, dense_hidden=4
        )
    ),
    "convolutional": lambda: built(
        ConvolutionalEquilibriumClassifierConfig(**TASK, channels=(2,), pool=2)
    ),
    "chain": chain,
}


def logits(model, x):
    return ConvertedNetwork(model)(x) if not isinstance(model, nn.Module) else model(x)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_radii_that_random_changes_do_not_break(name, norm):
    model, x = MODELS[name](), images()
    with torch.no_grad():
        labels = logits(model, x).argmax(1)
    radii = certified_radius(model, x, labels, norm=norm, seconds=0)
    assert radii.dtype == torch.float64
    assert bool((radii > 0).all()), "all are classified correctly"
    wrong = certified_radius(model, x, (labels + 1) % 3, norm=norm, seconds=0)
    assert not wrong.any()
    change = torch.randn(200, *x.shape, generator=torch.Generator().manual_seed(2)).double()
    if norm == "linf":
        change = change.sign()
    size = change.flatten(2).norm(dim=2) if norm == "l2" else torch.ones(change.shape[:2])
    change = change * (0.999 * radii / size)[:, :, None, None, None]
    for moved in (x.double() + change).float():
        with torch.no_grad():
            assert torch.equal(logits(model, moved).argmax(1), labels)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("name", ["torch.nn", "equilibrium", "feedforward", "chain"])
def test_local_proofs_enlarge_radii_and_descent_breaks_none(name, norm):
    model, x = MODELS[name](), images()
    with torch.no_grad():
        labels = logits(model, x).argmax(1)
    plain = certified_radius(model, x, labels, norm=norm, local=False)
    radii = certified_radius(model, x, labels, norm=norm, seconds=0)
    assert bool((radii >= plain).all())
    if name in ("torch.nn", "feedforward") or norm == "linf":
        assert bool((radii > plain).any())
    certifier = RadiusCertifier.of(model, SHAPE)
    region = InputRegion.around(x.flatten(1), radii * 0.999, norm, None).to(torch.float32)
    for rival in (1, 2):
        rows = torch.eye(3)[labels] - torch.eye(3)[(labels + rival) % 3]
        assert bool((find_smallest(certifier.system.single, rows, region) > -1e-5).all())


def test_the_box_and_the_search_enlarge_radii():
    model, x = ordinary(), images()
    labels = model(x).argmax(1)
    free = certified_radius(model, x, labels, norm="l2", seconds=0)
    boxed = certified_radius(model, x, labels, norm="l2", box=(0, 1), seconds=0)
    searched = certified_radius(model, x[:2], labels[:2], norm="l2", seconds=2.0)
    assert bool((boxed >= free).all())
    assert bool((searched >= free[:2]).all())
    assert bool((searched > free[:2]).any())


def test_a_certificate_saves_the_proof_and_must_be_of_the_model():
    model, x = MODELS["equilibrium"](), images()
    labels = model(x).argmax(1)
    certificate = model.certificate(bound="diagonal pairs")
    radii = certified_radius(model, x, labels, certificate=certificate, local=False)
    assert bool((radii >= certified_radius(model, x, labels, local=False) * (1 - 1e-9)).all())
    with pytest.raises(CertificateError, match="another network"):
        certified_radius(
            model, x, labels, certificate=replace(certificate, network="0" * 64), local=False
        )
    with pytest.raises(ValueError, match="has no bound of its own"):
        certified_radius(ordinary(), x, labels, certificate=certificate)


def test_inputs_of_another_precision_are_certified_as_they_are():
    model, x = MODELS["equilibrium"](), images().double() + 1e-9
    labels = model(x.float()).argmax(1)
    radii = certified_radius(model, x, labels, local=False)
    near = certified_radius(model, x.float(), labels, local=False)
    torch.testing.assert_close(radii, near, rtol=1e-4, atol=1e-7)
    assert bool((radii < near).all()), "what rounding moves is subtracted"


def test_no_inputs_have_no_radii_and_progress_is_shown(capsys):
    model = ordinary()
    assert certified_radius(model, images(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    certified_radius(model, images(2), torch.tensor([0, 1]), seconds=0, progress=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": "l1"}, "norm must be l2 or linf, got 'l1'"),
        ({"box": (0.5, 1.0)}, r"inputs must lie in the box \[0.5, 1.0\]"),
        ({"seconds": -1}, "seconds must be a number of at least 0, got -1"),
        ({"labels": torch.tensor([0, 9])}, r"labels must lie in \[0, 3\)"),
        ({"labels": torch.tensor([0])}, "labels must be a Tensor of 2 integers"),
        ({"labels": [0, 1]}, "labels must be a Tensor of 2 integers, got list"),
        ({"x": torch.full((2, *SHAPE), math.nan)}, "x contains NaN"),
        ({"x": torch.zeros(2, *SHAPE, dtype=torch.uint8)}, "images of uint8 are scaled"),
        ({"x": torch.zeros(2, 5)}, "samples of 3 dimensions, channels first"),
        ({"model": from_torch(ordinary(), SHAPE), "x": torch.zeros(2, 16)}, "inputs of shape"),
        ({"model": nn.GRU(4, 4)}, "GRU"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(changed, message):
    given = {"model": ordinary(), "x": images(2), "labels": torch.tensor([0, 1]), **changed}
    with pytest.raises(ValueError, match=message):
        certified_radius(given.pop("model"), given.pop("x"), given.pop("labels"), **given)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module or a Network, got str"):
        certified_radius("model.pt", images(1), torch.tensor([0]))


def test_layers_alone_are_certified():
    layer, x = EquilibriumLinear(4, 6, 3), torch.randn(5, 4)
    labels = layer(x).argmax(1)
    assert bool((certified_radius(layer, x, labels, seconds=0) > 0).all())


def test_a_module_that_cannot_be_converted_is_named():
    with pytest.raises(ConversionError, match="Softmax"):
        certified_radius(
            nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), torch.rand(1, 4), torch.tensor([0])
        )
