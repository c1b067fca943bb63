"""What a folder gives back: dtypes, devices, certificates; and what is refused as foreign."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lben import EquilibriumLinear, IntervalClaim
from lben.certificates import (
    ChainCertificate,
    LayerCertificate,
    PairCertificate,
    certify,
)
from lben.models import EquilibriumClassifierConfig, FeedforwardClassifierConfig
from lben.tightening import tighten_pairs
from lben.training import checkpoints
from lben.training.checkpoints import CheckpointError
from lben.training.loop import resume, train
from tests.lben.runs import equilibrium

IMAGES = {"shape": (1, 4, 4), "classes": 3, "mean": (0.3,), "std": (0.4,)}
CONFIGS = {
    "equilibrium": EquilibriumClassifierConfig(**IMAGES, hidden=6),
    "residual": FeedforwardClassifierConfig(
        **IMAGES, channels=(4,), depths=(1,), conv_hidden=4, pool=2, dense_depth=1, dense_hidden=8
    ),
}


def saved(folder, model):
    checkpoints.save_config(folder, model.config, {})
    checkpoints.save_model(folder, model)
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_comes_back_in_the_precision_that_it_had(tmp_path, config, dtype):
    model = config.build()
    with torch.no_grad():
        for p in model.parameters():  # numbers that float32 does not hold
            p.data = (p.double() * (1 + 2.0**-40)).to(dtype)
    model = model.to(dtype)
    found = checkpoints.load_model(saved(tmp_path, model))
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
        assert found.state_dict()[name].dtype == value.dtype
    for (name, mine), (_, other) in zip(
        model.named_buffers(), found.named_buffers(), strict=True
    ):  # also those that no file holds
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine, other), name
    if dtype != torch.bfloat16:
        x = torch.rand(2, 1, 4, 4, dtype=dtype)
        assert torch.equal(model.eval()(x), found(x))
    assert not found.training


def test_a_model_of_mixed_precision_comes_back_mixed(tmp_path):
    model = CONFIGS["equilibrium"].build()
    model.layer.parameterization.b.data = model.layer.parameterization.b.data.double()
    found = checkpoints.load_model(saved(tmp_path, model), device="cpu")
    assert found.layer.parameterization.b.dtype == torch.float64
    assert found.layer.parameterization.U.dtype == torch.float32


def test_tensors_of_another_kind_are_refused(tmp_path):
    saved(tmp_path, CONFIGS["equilibrium"].build())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].int()}, path)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json: .* is torch\.int32"):
        checkpoints.load_model(tmp_path)
    save_file({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"does not fit its config\.json"):
        checkpoints.load_model(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(equilibrium(out=folder, hidden=5, epochs=1, batch_size=500))
    return folder


def copied(run, folder):
    for path in run.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.update(epoch="one"), "does not say which epoch"),
        (lambda t, m: m.pop("epoch"), "does not say which epoch"),
        (lambda t, m: m.update(format="x"), "has checkpoint format None"),
        (lambda t, m: t.update({"optimizer.0.exp_avg": torch.zeros(2)}), "another optimizer"),
        (lambda t, m: t.update({"optimizer.99.exp_avg": torch.zeros(2)}), "another optimizer"),
        (lambda t, m: t.update({"optimizer.x.exp_avg": torch.zeros(2)}), "another optimizer"),
        (lambda t, m: t.pop("model.layer.parameterization.U"), "does not fit its config"),
    ],
)
def test_a_foreign_state_of_training_is_refused(run, tmp_path, change, message):
    folder = copied(run, tmp_path)
    tensors, metadata = load_file(folder / "training.safetensors"), {"format": "3", "epoch": "1"}
    change(tensors, metadata)
    save_file(tensors, folder / "training.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        resume(folder)


def test_a_certificate_is_read_back_equal(run):
    text = (run / "certificate.json").read_text(encoding="utf-8")
    found = ChainCertificate.from_json(text)
    assert found.to_json() + "\n" == text
    assert ChainCertificate.from_json(found.to_json()) == found
    layer = found.layers[-1]
    assert type(layer).from_json(layer.to_json()) == layer
    unbounded = EquilibriumClassifierConfig(**IMAGES, hidden=6, gamma=None).build().certificate()
    assert json.loads(unbounded.to_json())["bound"] is None
    assert ChainCertificate.from_json(unbounded.to_json()) == unbounded
    with pytest.raises(ValueError, match="m must be a number"):
        type(layer).from_json(layer.to_json().replace(f'"m": {layer.m!r}', '"m": null'))


@pytest.mark.parametrize("bad", ["0.0", "-1.0", "NaN", "-Infinity"])
def test_a_certificate_whose_numbers_bound_nothing_is_refused_by_name(bad):
    found = EquilibriumClassifierConfig(**IMAGES, hidden=6).build().certificate(bound="pairs")
    for change, name in {
        lambda record: record.update(bound=bad): "ChainCertificate: bound must be positive",
        lambda record: record["layers"][0].update(bound=bad): (
            "LipschitzCertificate: bound must be positive"
        ),
        lambda record: record["pairs"]["bounds"][0].__setitem__(1, bad): (
            "PairCertificate: bounds must be positive"
        ),
    }.items():
        record = json.loads(found.to_json())
        change(record)
        text = json.dumps(record).replace(f'"{bad}"', bad)
        with pytest.raises(ValueError, match=f"this is no {name}"):
            ChainCertificate.from_json(text)
    layer = found.layers[-1]
    with pytest.raises(ValueError, match="this is no LayerCertificate: bound must be positive"):
        LayerCertificate.from_json(
            layer.to_json().replace(f'"bound": {layer.bound!r}', f'"bound": {bad}')
        )


def test_bounds_of_pairs_are_read_back_equal():
    torch.manual_seed(0)
    weights = EquilibriumLinear(6, 9, 3, gamma=2.0).weights()
    pairs = certify(weights, tighten_pairs(weights))
    for found in (pairs, certify(weights, IntervalClaim())):
        again = PairCertificate.from_json(found.to_json())
        assert again == found
        assert torch.equal(again.tensor(), found.tensor())
    text = pairs.to_json()
    for old, new, message in (
        ('"l2"', '"l3"', "norm must be l2 or linf"),
        (repr(pairs[0][1]), "-1.0", "bounds must be positive, got -1"),
        (repr(pairs[0][1]) + ",", "", "bounds must be a square table"),
    ):
        assert old in text
        with pytest.raises(ValueError, match=f"this is no PairCertificate: {message}"):
            PairCertificate.from_json(text.replace(old, new))


@pytest.mark.parametrize("less", [1e-12, 1e-3])
def test_bounds_that_rounding_moves_are_proved_anew_without_a_word(run, tmp_path, less):
    model = checkpoints.load_model(run)
    proved = model.certificate(bound="diagonal pairs")
    *first, layer = proved.layers
    claimed = replace(
        proved, bound=proved.bound * (1 - less),
        layers=(*first, replace(layer, bound=layer.bound * (1 - less))),
    )  # fmt: skip
    path = tmp_path / checkpoints.CERTIFICATE
    checkpoints.write_json(path, claimed)
    found, doubts = checkpoints.prove_again(tmp_path, model)
    assert (doubts is None) == (less < 1e-6)
    stored = ChainCertificate.from_json(path.read_text(encoding="utf-8"))
    assert stored.bound == (found.bound if less < 1e-6 else claimed.bound)
    assert bool(found.shortfall(claimed))
    assert bool(found.shortfall(claimed, 1e-6)) == (less > 1e-6)


def test_what_a_certificate_claims_beyond_a_proof_is_named(run, tmp_path):
    folder = copied(run, tmp_path)
    model = checkpoints.load_model(folder)
    best = model.certificate(bound="diagonal pairs")
    pairs = replace(best.pairs, bounds=tuple(tuple(0.01 * b for b in row) for row in best.pairs))
    *first, layer = best.layers
    for changes, name in (
        ({"bound": 1e-3}, "it claims 0.001 as the bound, and only"),
        ({"layers": (*first, replace(layer, bound=1e-9))}, "1e-09 as the bound of module 2, and"),
        ({"pairs": pairs}, "as the bound of the outputs 0 and 1, and only"),
    ):
        checkpoints.write_json(folder / "certificate.json", replace(best, **changes))
        proved, doubts = checkpoints.prove_again(folder, model)
        assert name in doubts
        assert proved == best  # the most expensive proof
        assert name in checkpoints.certificate_doubts(folder, best)
    larger = tuple((*row, 1.0) for row in (*best.pairs, best.pairs[0]))
    larger = replace(best.pairs, bounds=larger)
    checkpoints.write_json(folder / "certificate.json", replace(best, pairs=larger))
    assert "it is of 11 outputs, and there are 10" in checkpoints.prove_again(folder, model)[1]
    for bound in model.bounds:
        found = model.certificate(bound=bound)
        checkpoints.write_json(folder / "certificate.json", found)
        proved, doubts = checkpoints.prove_again(folder, model)
        assert doubts is None
        assert not proved.shortfall(found)


def test_a_certificate_is_checked_against_the_model_beside_it(run, tmp_path):
    folder = copied(run, tmp_path)
    model = checkpoints.load_model(folder)
    assert checkpoints.certificate_doubts(folder, model.certificate()) is None
    assert checkpoints.certificate_doubts(folder, model.certificate(bound="scaled")) is None
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer.parameterization.b[0] += 2.0**-10
    doubts = checkpoints.certificate_doubts(folder, other.certificate())
    assert "of another model: module 2 has fingerprint" in doubts
    doubts = checkpoints.certificate_doubts(folder, model.double().certificate())
    assert "module 0 has dtype" in doubts
    (folder / "certificate.json").write_text("{")
    assert "cannot be read" in checkpoints.certificate_doubts(folder, model.certificate())
    (folder / "certificate.json").unlink()
    assert "is missing" in checkpoints.certificate_doubts(folder, model.certificate())


@pytest.mark.parametrize("whole", [0, 1])  # files that the disk still takes
def test_a_failed_start_leaves_everything_as_it_was(tmp_path, monkeypatch, whole):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").write_text("x")
    before = sorted(tmp_path.rglob("*"))

    written = []

    def full(*_):
        written.append(1)
        if len(written) > whole:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    for folder in (tmp_path / "new" / "run", tmp_path / "here", tmp_path / "here" / "below"):
        written.clear()
        with pytest.raises(OSError, match="No space left on device"):
            train(equilibrium(out=folder, hidden=5, epochs=1))
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "changes",
    [{"tol": 1e-12}, {"device": "mps"}, {"data": "mnist"}, {"data": "mnist", "root": "nowhere"}],
)
def test_a_refused_run_makes_no_folder(tmp_path, changes):
    with pytest.raises(Exception, match=r"below what|device must be|mnist is read|no folder"):
        train(equilibrium(out=tmp_path / "run", hidden=5, epochs=1, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_trained_model_is_not_replaced_unasked(run, tmp_path):
    folder = copied(run, tmp_path)
    (folder / "training.safetensors").unlink()
    config = equilibrium(out=folder, hidden=5, epochs=1, batch_size=500, seed=1)
    with pytest.raises(CheckpointError, match="already holds a trained model"):
        train(config)
    train(config, overwrite=True)
    assert checkpoints.load_config(folder)[1]["seed"] == 1


def test_resuming_reaches_the_same_weights_bit_for_bit(tmp_path, monkeypatch):
    config = equilibrium(out=tmp_path / "a", hidden=5, epochs=2, batch_size=500)
    whole = train(config)
    original = checkpoints.append_json
    monkeypatch.setattr(
        checkpoints, "append_json",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt) if _[1]["epoch"] == 2 else None,
    )  # fmt: skip
    with pytest.raises(Exception, match="the last checkpoint is whole"):
        train(equilibrium(out=tmp_path / "b", hidden=5, epochs=2, batch_size=500))
    monkeypatch.setattr(checkpoints, "append_json", original)
    again = resume(tmp_path / "b")
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items()
    )


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 300])
def test_truncated_tensors_are_named(digits_run, tmp_path, name, keep):
    for path in digits_run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes((digits_run / name).read_bytes()[:keep])
    act = checkpoints.load_model if name.startswith("model") else resume
    with pytest.raises(CheckpointError, match=f"{name} is truncated or corrupt"):
        act(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        act(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format=2), "has checkpoint format 2, this version of lben reads"),
        (lambda c: c.pop("format"), "has checkpoint format None"),
        (lambda c: c["model"].update(kind="mystery"), "unknown kind of model 'mystery'"),
        (lambda c: c["model"].update(colour=1), "lacks a field or has one too many"),
        (lambda c: c["model"].pop("shape"), "lacks a field or has one too many"),
        (lambda c: c["model"].update(hidden=11), "does not fit its config"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(digits_run, tmp_path, change, message):
    content = json.loads((digits_run / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((digits_run / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_model(tmp_path)


def test_truncated_configuration_is_named(digits_run, tmp_path):
    (tmp_path / "config.json").write_text((digits_run / "config.json").read_text()[:50])
    with pytest.raises(CheckpointError, match=r"config\.json is truncated or corrupt"):
        checkpoints.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.load_model(tmp_path / "nowhere")


def test_atomic_writes_keep_the_old_content_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoints.write_atomically(path, b"old")
    monkeypatch.setattr(checkpoints.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        checkpoints.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
