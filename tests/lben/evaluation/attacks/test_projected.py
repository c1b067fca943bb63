import copy
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lben import EquilibriumClassifierConfig, EquilibriumLinear, certified_radius
from lben.evaluation.attacks import (
    across_the_boundary,
    apgd_l2,
    ascend_quotient,
    auto_attack,
    corner_pairs,
    pgd_l2,
    quotients,
    random_pairs,
)

CONFIG = EquilibriumClassifierConfig(
    shape=(1, 4, 4), classes=3, mean=(0.5,), std=(0.5,), hidden=12, gamma=1.0, tol=1e-6
)


class Linear(nn.Module):
    """Two classes whose boundary is known in closed form."""

    def __init__(self):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(16, dtype=torch.float64))
        self.offset = 0.5 * float(self.direction.detach().sum())

    def forward(self, x):
        score = x.flatten(1) @ self.direction - self.offset
        return torch.stack([score, -score], 1)

    def distance(self, x):
        with torch.no_grad():
            return (self(x)[:, 0] / self.direction.norm()).abs()


def test_pgd_breaks_exactly_what_lies_within_reach_of_the_boundary():
    model, x = Linear(), 0.3 + 0.4 * torch.rand(50, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1)
    distance = model.distance(x)
    radius = float(distance.median())
    adversarial, broken = pgd_l2(model, x, labels, radius)
    assert torch.equal(broken, distance <= radius) or (
        (broken != (distance <= radius)).sum() <= 1  # the median itself lies on the boundary
    )
    moved = (adversarial - x).flatten(1).norm(dim=1)
    assert (moved <= radius).all()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(model(adversarial).argmax(1) != labels, broken)


def test_apgd_breaks_exactly_what_lies_within_reach_of_the_boundary():
    model, x = Linear(), 0.3 + 0.4 * torch.rand(50, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1)
    distance = model.distance(x)
    radius = float(distance.sort()[0][25:27].mean())
    adversarial, broken = apgd_l2(model, x, labels, radius, steps=30)
    assert torch.equal(broken, distance <= radius)
    assert bool(((adversarial - x).flatten(1).norm(dim=1) <= radius).all())
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1


def test_apgd_finds_no_less_than_pgd():
    torch.manual_seed(3)
    model = CONFIG.build().double()
    x = torch.rand(100, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1).detach()
    broken = [
        int(attack(model, x, labels, 0.25, steps=40, restarts=1)[1].sum())
        for attack in (pgd_l2, apgd_l2)
    ]
    assert 0 < broken[0] <= broken[1] + 1
    assert broken[1] < 100


def test_auto_attack_says_what_it_needs():
    model, x = CONFIG.build(), torch.rand(2, 1, 4, 4)
    with pytest.raises(ImportError, match="AutoAttack is not installed"):
        auto_attack(model, x, torch.tensor([0, 1]), 0.1)


def test_points_next_to_the_boundary_are_next_to_it():
    model = Linear()
    a, b = torch.rand(2, 60, 1, 4, 4, dtype=torch.float64)
    near, across = across_the_boundary(model, a, b, distance=1e-3)
    assert 10 < len(near) < 60
    assert bool((model(near).argmax(1) != model(across).argmax(1)).all())
    torch.testing.assert_close(model.distance(near), torch.full((len(near),), 1e-3).double())
    moved = (near - across).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, model.distance(near), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_corner_pairs_differ_and_stay_finite(dtype):
    x = torch.rand(10, 1, 4, 4, dtype=dtype)
    pairs = list(corner_pairs(x, torch.Generator().manual_seed(0)))
    distances = [float((a.double() - b.double()).abs().max()) for a, b in pairs]
    assert 0 < min(distances) < 1e-30
    assert max(distances) > 1e3
    assert all(bool(torch.isfinite(side).all()) for pair in pairs for side in pair)


def test_pgd_is_as_strong_as_foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated imports inside foolbox
        import foolbox
    torch.manual_seed(2)
    model = CONFIG.build().eval()
    with torch.no_grad():
        model.layer.parameterization.b_y.zero_()
    x = torch.rand(100, 1, 4, 4)
    labels = model(x).argmax(1).detach()
    reference = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    radius = 0.3
    _, _, theirs = foolbox.attacks.L2PGD(steps=40)(reference, x, labels, epsilons=radius)
    _, ours = pgd_l2(model, x, labels, radius, generator=torch.Generator().manual_seed(0))
    assert 0 < int(ours.sum()) < 100
    assert int(ours.sum()) >= int(theirs.sum()) - 1


def test_ascent_finds_the_constant_of_a_linear_map():
    model = Linear()
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    expected = float(model.direction.detach().norm()) * 2**0.5
    found = ascend_quotient(model, x, steps=20)
    assert float(found.quotient.max()) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(quotients(model, found.a, found.b), found.quotient)


def test_ascent_approaches_but_never_exceeds_the_bound():
    model = CONFIG.build().double()
    x = torch.rand(20, 1, 4, 4, dtype=torch.float64)
    found = ascend_quotient(model, x, steps=60)
    bound = model.certificate().bound
    assert found.quotient.max() <= bound
    assert found.quotient.max() > 0.5 * bound


def test_equal_points_have_quotient_zero():
    x = torch.rand(3, 1, 4, 4)
    assert quotients(CONFIG.build(), x, x).tolist() == [0, 0, 0]


def test_random_pairs_are_of_several_kinds_and_seeded():
    x = torch.rand(30, 1, 4, 4)
    batches = list(random_pairs(x, 20000, torch.Generator().manual_seed(0)))
    again = list(random_pairs(x, 20000, torch.Generator().manual_seed(0)))
    assert sum(len(a) for a, _ in batches) == 20000
    assert torch.equal(batches[3][1], again[3][1])
    distances = [(a - b).flatten(1).norm(dim=1).median() for a, b in batches]
    assert min(distances) < 0.01 < 1 < max(distances)


def test_frozen_restores_what_it_found():
    model = CONFIG.build()
    model.layer.parameterization.b.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), freeze(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before


def test_bad_arguments():
    model, x = CONFIG.build(), torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="radius must be at least 0, got -1"):
        pgd_l2(model, x, torch.tensor([0, 1]), -1.0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        pgd_l2(model, x, torch.tensor([0, 9]), 0.1)


# --- modes, threads, shapes, ranges, labels ---------------------------------------------------

ATTACKS = {
    "pgd_l2": lambda f, x, y: pgd_l2(f, x, y, 0.3, steps=3),
    "apgd_l2": lambda f, x, y: apgd_l2(f, x, y, 0.3, steps=6, restarts=2),
    "ascend_quotient": lambda f, x, y: ascend_quotient(f, x, steps=2),
    "across_the_boundary": lambda f, x, y: across_the_boundary(f, x, x.flip(0), steps=4),
    "quotients": lambda f, x, y: quotients(f, x, x.flip(0)),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_attacks_switch_gradients_on_for_themselves(attack, mode):
    built = CONFIG.build()
    with mode():
        born = CONFIG.build()  # in inference mode: of inference tensors
        x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
        for model in (built, born):
            attack(model, x, y)
    attack(born, x, y)


def test_pgd_in_inference_mode_finds_what_it_finds_outside():
    model, x, y = CONFIG.build(), torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    expected, _ = pgd_l2(model, x, y, 0.3, restarts=1)
    with torch.inference_mode():
        found, _ = pgd_l2(model, x.clone(), y.clone(), 0.3, restarts=1)
    assert torch.equal(expected, found)
    assert not found.is_inference()


def test_attacks_leave_the_model_as_it_is():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3))
    model[3].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    for attack in ATTACKS.values():
        attack(model, x.clone().requires_grad_(), y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [True] * 3 + [False]


def test_a_model_that_cannot_be_copied_is_attacked_in_eval_mode_or_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model.lock = threading.Lock()
    x, y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"cannot be copied .* call model\.eval"):
        pgd_l2(model, x, y, 0.3)
    pgd_l2(model.eval(), x, y, 0.3, steps=2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def at_once(*functions):
    errors = []

    def guarded(function):
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return errors


def test_attacks_in_threads_freeze_nothing():
    model = CONFIG.build()
    x, y, seen = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), []

    def attack():
        for _ in range(5):
            pgd_l2(model, x, y, 0.3, steps=2)

    def train():
        for _ in range(30):
            seen.append(all(p.requires_grad for p in model.parameters()))
            model(x).sum().backward()

    assert at_once(attack, attack, train) == []
    assert all(seen)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_blocks_may_overlap():
    model = nn.Linear(3, 3)
    first, second = freeze(model), freeze(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not model.weight.requires_grad
    second.__exit__(None, None, None)
    assert model.weight.requires_grad


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (2, 1, 3, 1)])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_samples_may_have_any_shape(attack, shape):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    attack(model, torch.rand(4, *shape), torch.tensor([0, 1, 2, 0]))
    list(corner_pairs(torch.rand(4, *shape), torch.Generator()))
    list(random_pairs(torch.rand(4, *shape), 12, torch.Generator()))


def test_vectors_of_a_layer_are_attacked():
    layer = EquilibriumLinear(6, 8, 3, dtype=torch.float64)
    x = torch.randn(30, 6, dtype=torch.float64)
    found = ascend_quotient(layer, x, steps=40)
    assert 0.5 < float(found.quotient.max()) <= layer.certificate().bound
    _, broken = pgd_l2(layer, x, layer(x).argmax(1), 1.0, bounds=None)
    assert 0 < int(broken.sum()) < 30


def test_images_on_another_scale_need_their_range():
    model, x = Linear(), 0.5 + torch.rand(10, 1, 4, 4, dtype=torch.float64)
    labels = model(x).argmax(1)
    for attack in (pgd_l2, apgd_l2):
        with pytest.raises(ValueError, match=r"images must lie within \(0\.0, 1\.0\), got values"):
            attack(model, x, labels, 0.3)
        inside, _ = attack(model, x, labels, 0.3, bounds=(0.5, 1.5))
        assert 0.5 <= float(inside.min()) <= float(inside.max()) <= 1.5
        low = torch.full((1, 4, 4), 0.5, dtype=torch.float64)  # one number per pixel
        again, _ = attack(model, x, labels, 0.3, bounds=(low, 1.5))
        assert torch.equal(inside, again)
        outside, _ = attack(model, x, labels, 0.3, bounds=None)
        assert float(outside.min()) < 0.5 or float(outside.max()) > 1.5
        assert bool(((outside - x).flatten(1).norm(dim=1) <= 0.3).all())
    with pytest.raises(ValueError, match="low below high"):
        pgd_l2(model, x, labels, 0.3, bounds=(1.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [0.0, 1e-30, 1e-6, 0.01, 0.3, 100.0])
def test_no_point_leaves_the_ball_by_a_rounding_error(dtype, radius):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).to(dtype)
    x, y = torch.rand(20, 1, 4, 4).to(dtype), torch.randint(3, (20,))
    for attack in (pgd_l2, apgd_l2):
        point, _ = attack(model, x, y, radius, steps=5, restarts=2)
        moved = [
            sum((int(p * 2**200) - int(q * 2**200)) ** 2 for p, q in zip(a, b, strict=True))
            for a, b in zip(
                point.double().flatten(1).tolist(), x.double().flatten(1).tolist(), strict=True
            )
        ]  # exact: numbers of all three types below 2 are integers times 2^-200
        assert max(moved) <= (int(radius * 2**200)) ** 2
        assert 0 <= float(point.min()) <= float(point.max()) <= 1


LABELS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64, torch.bool]


@pytest.mark.parametrize("dtype", LABELS)
def test_labels_are_integers_of_any_type(dtype):
    model, x, y = Linear(), torch.rand(5, 1, 4, 4).double(), torch.tensor([0, 1, 1, 0, 1])
    expected = [attack(model, x, y, 0.3, restarts=1)[0] for attack in (pgd_l2, apgd_l2)]
    found = [attack(model, x, y.to(dtype), 0.3, restarts=1)[0] for attack in (pgd_l2, apgd_l2)]
    assert all(map(torch.equal, expected, found))
    logits = model(x).detach()
    assert torch.equal(certified_radius(logits, y, 1.0), certified_radius(logits, y.to(dtype), 1.0))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"must be 2 integers, got \(2,\) torch\.float32"),
        (torch.tensor([0]), r"must be 2 integers, got \(1,\)"),
        (torch.tensor([[0], [1]]), r"must be 2 integers, got \(2, 1\)"),
        (torch.tensor([0, 2], dtype=torch.uint8), r"must lie in \[0, 2\), got values from 0 to 2"),
        (torch.tensor([-1, 0], dtype=torch.int8), r"got values from -1 to 0"),
        ([0, 1], "must be a Tensor of 2 integers, got a list"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    model, x = Linear(), torch.rand(2, 1, 4, 4).double()
    for call in (
        lambda: pgd_l2(model, x, labels, 0.1),
        lambda: apgd_l2(model, x, labels, 0.1),
        lambda: certified_radius(model(x), labels, 1.0),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("radius", "message"),
    [
        (float("nan"), "radius must be at least 0, got nan"),
        (float("inf"), "radius must be finite"),
        (-1e-300, "radius must be at least 0"),
        ("1", "radius must be a number, got '1'"),
        (True, "radius must be a number"),
    ],
)
def test_radii_that_are_none_are_refused(radius, message):
    for attack in (pgd_l2, apgd_l2):
        with pytest.raises(ValueError, match=message):
            attack(Linear(), torch.rand(2, 1, 4, 4).double(), torch.tensor([0, 1]), radius)


def test_numbers_of_numpy_and_torch_are_radii():
    model, x, y = Linear(), torch.rand(3, 1, 4, 4).double(), torch.tensor([0, 1, 0])
    expected, _ = pgd_l2(model, x, y, 0.25, restarts=1)
    for radius in (np.float32(0.25), torch.tensor(0.25)):
        assert torch.equal(pgd_l2(model, x, y, radius, restarts=1)[0], expected)


def test_no_images_are_no_trouble():
    model, x, y = CONFIG.build(), torch.rand(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64)
    for attack in (pgd_l2, apgd_l2):
        point, broken = attack(model, x, y, 0.3)
        assert point.shape == x.shape
        assert broken.tolist() == []
    assert ascend_quotient(model, x).quotient.tolist() == []
    assert [len(side) for side in across_the_boundary(model, x, x)] == [0, 0]
    assert list(corner_pairs(x, torch.Generator())) == []
    with pytest.raises(ValueError, match="random pairs need images"):
        list(random_pairs(x, 5, torch.Generator()))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), r"got torch\.uint8: scale bytes"),
        (np.zeros((2, 1, 4, 4)), "got ndarray"),
        (torch.full((2, 1, 4, 4), float("nan")), "images contain NaN or Inf"),
        (torch.rand(2), r"images must be \(batch, …\)"),
    ],
)
def test_what_is_no_image_is_refused(images, message):
    for call in (
        lambda: pgd_l2(CONFIG.build(), images, torch.tensor([0, 1]), 0.1),
        lambda: ascend_quotient(CONFIG.build(), images),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_same_seed_gives_the_same_points():
    model, x, y = CONFIG.build(), torch.rand(6, 1, 4, 4), torch.randint(3, (6,))
    g = torch.Generator()
    for attack in (pgd_l2, apgd_l2):
        first, second = (
            attack(model, x, y, 0.5, restarts=2, steps=3, generator=g.manual_seed(1))
            for _ in range(2)
        )
        assert torch.equal(first[0], second[0])
    found = [ascend_quotient(model, x, steps=2, generator=g.manual_seed(s)).a for s in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
