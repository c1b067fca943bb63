"""What all attacks share: models stay as they are, in any mode, thread and shape."""

import copy
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lben.evaluation.attacks import (
    across_the_boundary,
    apgd_l2,
    ascend_quotient,
    corner_pairs,
    freeze,
    pgd_l2,
    pgd_linf,
    quotients,
    random_pairs,
)
from tests.lben.evaluation.attacks.models import CONFIG

ATTACKS = {
    "pgd_l2": lambda f, x, y: pgd_l2(f, x, y, 0.3, steps=3),
    "pgd_linf": lambda f, x, y: pgd_linf(f, x, y, 0.1, steps=3),
    "apgd_l2": lambda f, x, y: apgd_l2(f, x, y, 0.3, steps=6, restarts=2),
    "ascend_quotient": lambda f, x, y: ascend_quotient(f, x, steps=2),
    "across_the_boundary": lambda f, x, y: across_the_boundary(f, x, x.flip(0), steps=4),
    "quotients": lambda f, x, y: quotients(f, x, x.flip(0)),
}


def test_frozen_restores_what_it_found():
    model = CONFIG.build()
    model.layer.parameterization.b.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), freeze(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before


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
    assert attack(model, torch.rand(4, *shape), torch.tensor([0, 1, 2, 0])) is not None
    x = torch.rand(4, *shape)
    for pairs in (corner_pairs(x, torch.Generator()), random_pairs(x, 12, torch.Generator())):
        assert all(a.shape[1:] == b.shape[1:] == shape for a, b in pairs)


def test_no_images_are_no_trouble():
    model, x, y = CONFIG.build(), torch.rand(0, 1, 4, 4), torch.zeros(0, dtype=torch.int64)
    for attack in (pgd_l2, pgd_linf, apgd_l2):
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
