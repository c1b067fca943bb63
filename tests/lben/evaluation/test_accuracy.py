"""An evaluation: consistent, honest about violations, and of every kind of model."""

import dataclasses
import json

import pytest

from lben.data import load
from lben.evaluation.accuracy import EvaluationConfig, evaluate
from lben.evaluation.reports import draw, table
from lben.training import checkpoints, train
from tests.lben.runs import SHORT, config


def test_evaluation_is_consistent_and_finds_no_violation(digits_run):
    report = evaluate(checkpoints.load_model(digits_run), load("digits"), SHORT)
    assert report.violations == 0
    assert report.pairs == 205
    assert report.quotient <= report.bound <= report.promised_bound
    assert 1 <= report.tightness < 3
    assert report.certified_accuracy[0] == report.clean_accuracy > 0.6
    for certified, attacked in zip(report.certified_attacked, report.pgd_accuracy, strict=True):
        assert certified <= attacked
    last = json.loads((digits_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 100 * (1 - report.clean_accuracy) == pytest.approx(last["test_error_percent"], abs=0.6)
    assert json.dumps(report.to_dict())
    untightened = evaluate(
        checkpoints.load_model(digits_run),
        load("digits"),
        dataclasses.replace(SHORT, bound="promised"),
    )
    assert untightened.bound == report.promised_bound
    assert untightened.certified_accuracy[1] <= report.certified_accuracy[1]


def test_evaluation_counts_violations_of_a_false_bound(digits_run, monkeypatch):
    model = checkpoints.load_model(digits_run)
    honest = type(model).certificate

    def false(self, **bound):
        certificate = honest(self, **bound)
        return dataclasses.replace(certificate, bound=certificate.bound / 4)

    monkeypatch.setattr(type(model), "certificate", false)
    assert evaluate(model, load("digits"), SHORT).violations > 0


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_monotone_and_feedthrough_models_can_be_evaluated(tmp_path, gamma):
    model = train(
        config(tmp_path / "run", gamma=gamma, learn_metric=False, feedthrough=gamma is not None,
               epochs=1)
    )  # fmt: skip
    report = evaluate(model, load("digits"), SHORT)
    assert report.violations == 0
    assert report.quotient <= report.bound < float("inf")
    assert (report.promised_bound is None) == (gamma is None)
    draw(report, tmp_path / "picture.png")
    assert ("promised γ         none" in table(report)) == (gamma is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radii": ()}, "radii must be at least 0"),
        ({"radii": (-1.0,)}, "radii must be at least 0"),
        ({"pairs": 0}, "pairs must be positive, got 0"),
    ],
)
def test_bad_evaluation_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**changes)
