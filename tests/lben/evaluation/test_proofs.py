"""All proofs of a model side by side, and on the command line."""

import dataclasses
import json

import pytest

from lben import cli
from lben.data import load
from lben.evaluation.accuracy import EvaluationConfig
from lben.evaluation.proofs import (
    LOCAL,
    PIXELS,
    TEXTBOOK,
    CertificationConfig,
    evaluate_certificates,
)
from lben.evaluation.reports import certification_table, draw_certification
from lben.models import (
    ConvolutionalEquilibriumArchitecture,
    EquilibriumArchitecture,
    FeedforwardClassifierConfig,
)
from lben.training import checkpoints, train
from tests.lben.runs import equilibrium

CONFIG = CertificationConfig(radii=(0.1, 0.4), samples=60, attack_steps=10, attack_restarts=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(equilibrium(data="digits", out=str(folder), gamma=4.0, epochs=3, hidden=16))
    return folder


def test_every_proof_is_compared(run, tmp_path):
    certificate, report = evaluate_certificates(checkpoints.load_model(run), load("digits"), CONFIG)
    names = [m.name for m in report.methods]
    assert names == [
        TEXTBOOK,
        "promised",
        "scaled",
        "pairs",
        "diagonal",
        "diagonal pairs",
        LOCAL,
        PIXELS,
    ]
    shares = {m.name: m.certified for m in report.methods}
    assert report.violations == 0
    assert certificate.pairs is not None
    for i in range(2):
        assert shares["promised"][i] <= shares["scaled"][i] <= shares["pairs"][i]
        assert shares["pairs"][i] <= shares["diagonal pairs"][i] <= shares[LOCAL][i]
        assert shares[LOCAL][i] <= shares[PIXELS][i]
        assert report.best[i] == shares[PIXELS][i] <= report.attacked[i] <= report.clean_accuracy
    assert shares[LOCAL][1] > shares["promised"][1]
    largest = {m.name: m.certified for m in report.in_linf}
    assert list(largest) == ["l2 · √p", "intervals", "own"]
    assert all(a >= b for a, b in zip(largest["own"], largest["l2 · √p"], strict=True))
    assert sum(largest["own"]) > sum(largest["l2 · √p"])
    text = certification_table(report)
    assert all(name in text for name in (*names, *largest))
    draw_certification(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_networks_without_local_proofs_are_compared_too():
    model = FeedforwardClassifierConfig(
        shape=(1, 8, 8), classes=10, mean=(0.3,), std=(0.4,), channels=(4,), depths=(1,),
        conv_hidden=4, pool=2, dense_depth=1, dense_hidden=8,
    ).build()  # fmt: skip
    _, report = evaluate_certificates(model, load("digits"), CONFIG)
    assert [m.name for m in report.methods] == [TEXTBOOK, "promised"]
    assert [m.name for m in report.in_linf] == ["l2 · √p"]
    assert report.violations == 0


def test_a_bound_that_is_too_small_is_noticed(run, monkeypatch):
    model = checkpoints.load_model(run)
    honest = type(model).certificate

    def false(self, **bound):
        found = honest(self, **bound)
        pairs = None if found.pairs is None else found.pairs.scale(1 / 20)
        return dataclasses.replace(found, bound=found.bound / 20, pairs=pairs)

    monkeypatch.setattr(type(model), "certificate", false)
    assert evaluate_certificates(model, load("digits"), CONFIG)[1].violations > 0


def test_certify_on_the_command_line(run, capsys):
    words = ["certify", str(run), "--samples", "20", "--radii", "0.2", "--attack-steps", "5"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "diagonal pairs" in out
    assert "violations: 0" in out
    record = json.loads((run / "certification.json").read_text())
    assert record["samples"] == 20
    assert json.loads((run / "certificate.json").read_text())["pairs"]
    assert (run / "certification.png").exists()
    assert cli.main(["certify", str(run), "--radii", "-1"]) == 1
    assert "radii must be positive" in capsys.readouterr().err
    assert cli.main(["certify", str(run / "nothing")]) == 1


@pytest.mark.parametrize(
    "config",
    [
        CertificationConfig, EvaluationConfig, EquilibriumArchitecture,
        ConvolutionalEquilibriumArchitecture,
    ],
)  # fmt: skip
def test_a_tolerance_that_accepts_anything_is_refused(config):
    for tol in (1, 2.0):
        with pytest.raises(ValueError, match=r"tol must be below 1 \(it is relative"):
            config(tol=tol)
    assert config(tol=0.9).tol == 0.9


@pytest.mark.parametrize("field", ["samples", "tol", "attack_steps", "attack_restarts"])
def test_bad_configurations_are_named(field):
    with pytest.raises(ValueError, match=f"{field} must be positive, got 0"):
        CertificationConfig(**{field: 0})
