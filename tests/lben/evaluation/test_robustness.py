"""Certified shares of models from elsewhere: of a report that comes back, by proofs that hold."""

import json

import pytest
import torch
from torch import nn

from lben import (
    ConvolutionalEquilibriumClassifierConfig,
    EquilibriumClassifierConfig,
    certified_radius,
    from_torch,
)
from lben.evaluation import Robustness, RobustnessConfig, Samples, evaluate_robustness, read_samples
from lben.parallel import Processes

DIGITS = {"shape": (1, 8, 8), "classes": 10, "mean": (0.3,), "std": (0.4,)}


def ordinary():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
    ).eval()  # fmt: skip


def labelled(model, count=8):
    """Digits with the labels that the model gives them, but for the last one."""
    found = read_samples("digits", count=count)
    labels = model(found.inputs).argmax(1)
    labels[-1] = (labels[-1] + 1) % 10
    return Samples(name="digits", inputs=found.inputs, labels=labels, available=360)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_what_is_certified_at_a_radius_is_certified_by_the_radius(norm):
    model = ordinary()
    samples = labelled(model)
    radii = certified_radius(model, samples.inputs, samples.labels, norm=norm, seconds=0)
    middle = float(radii.median())
    config = RobustnessConfig(radii=(0.9 * middle, 1e-6, 50.0), norm=norm, seconds=0.0)
    report = evaluate_robustness(from_torch(model, (1, 8, 8)), samples, config)
    assert report.clean_accuracy == 7 / 8
    assert report.certified[1:] == (7 / 8, 0.0)
    assert 3 / 8 <= report.certified[0] <= 7 / 8
    assert all(a <= b for a, b in zip(report.certified_globally, report.certified, strict=True))
    assert report.largest[-1] == 0
    assert set(report.largest) <= {0.0, *report.radii}
    assert report.route is not None
    assert report.route.bound == report.bound
    assert report.local


def test_a_report_is_strict_json_and_comes_back():
    model = ordinary()
    config = RobustnessConfig(radii=(0.1,), box=(0, 1), seconds=0)
    report = evaluate_robustness(model, labelled(model, 3), config)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert Robustness.from_json(text) == report


@pytest.mark.parametrize(
    ("config", "local"),
    [
        (EquilibriumClassifierConfig(**DIGITS, hidden=6), True),
        (ConvolutionalEquilibriumClassifierConfig(**DIGITS, channels=(2,), pool=4), False),
    ],
)
def test_models_of_the_library_are_evaluated_too(config, local):
    torch.manual_seed(0)
    model = config.build().eval()
    samples = labelled(model, 4)
    report = evaluate_robustness(model, samples, RobustnessConfig(radii=(1e-4,), seconds=0))
    assert report.certified == (0.75,)
    assert report.local == local
    assert report.route is None
    alone = RobustnessConfig(radii=(1e-4,), seconds=0, local=False)
    assert not evaluate_robustness(model, samples, alone).local


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"radii": ()}, "radii must be positive and finite, got none"),
        ({"radii": (-0.1,)}, "radii must be positive and finite"),
        ({"norm": "l1"}, "norm must be one of l2, linf"),
        ({"box": (1, 0)}, r"box must be \(smallest, largest\)"),
        ({"seconds": -1.0}, "seconds must be at least 0"),
    ],
)
def test_a_configuration_says_what_is_wrong(changed, message):
    with pytest.raises(ValueError, match=message):
        RobustnessConfig(**{"radii": (0.1,), **changed})


def test_inputs_that_do_not_fit_are_refused():
    model, config = ordinary(), RobustnessConfig(radii=(0.1,), box=(0.5, 1))
    samples = labelled(model, 3)
    with pytest.raises(ValueError, match="inputs must lie in the box"):
        evaluate_robustness(model, samples, config)
    wrong = Samples(name="x", inputs=samples.inputs, labels=samples.labels + 9, available=3)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 10\)"):
        evaluate_robustness(model, wrong, RobustnessConfig(radii=(0.1,)))
    team = Processes(device=torch.device("cpu"), count=4)
    with pytest.raises(ValueError, match="samples = 3 cannot be shared by 4 processes"):
        evaluate_robustness(model, samples, RobustnessConfig(radii=(0.1,)), team)
