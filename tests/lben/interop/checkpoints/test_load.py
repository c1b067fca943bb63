"""The names of the tensors say which layout a checkpoint has."""

import pytest
import torch

from lben.interop import load_checkpoint
from lben.interop.checkpoints.equilibria import MODULE
from lben.interop.checkpoints.load import LAYOUTS
from tests.lben.interop.checkpoints import test_chains, test_equilibria, test_networks


def test_an_unknown_layout_says_what_was_seen_and_what_is_known():
    with pytest.raises(ValueError, match=r"has the tensors a, b.*from_torch") as error:
        load_checkpoint({"a": torch.ones(2), "b": torch.ones(2)})
    assert all(kind in str(error.value) for kind in LAYOUTS)


def test_a_kind_that_is_not_known_is_named():
    with pytest.raises(ValueError, match=r"kind must be one of lben, .*got 'lbem'"):
        load_checkpoint({"a": torch.ones(2)}, "lbem")


def test_an_option_that_a_layout_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"GLipSDP has the options .*got gamma"):
        load_checkpoint({"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)}, gamma=1.0)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_names_are_those_of_one_layout(kind):
    tensors = dict.fromkeys(LAYOUTS[kind].has, torch.ones(1))
    assert [k for k, layout in LAYOUTS.items() if layout.matches(tensors)] == [kind]


def test_a_network_without_constraints_is_refused_by_name():
    with pytest.raises(ValueError, match="without constraints"):
        load_checkpoint({MODULE + "Wp": torch.ones(2, 2), MODULE + "U.weight": torch.ones(2, 3)})


def layouts():
    """A checkpoint of every layout, and its options."""
    convolutional = test_equilibria.convolutional
    bound, small = {"gamma": 1.0}, {"task": test_equilibria.SMALL, "pool": 4}
    task = {"task": test_chains.SMALL}
    return {
        "lben": (test_equilibria.lben(), bound),
        "lben-unbounded": (test_equilibria.unbounded_lben(), {}),
        "lben-conv": (convolutional(output=MODULE + "Wout", metric=(1, 2, 1, 1)), bound | small),
        "lben-conv-unbounded": (convolutional(metric=(1, 2, 8, 8)), small),
        "mondeq": (test_equilibria.mondeq(), {}),
        "mondeq-conv": (convolutional(), small),
        "explicit": (test_equilibria.explicit(), {}),
        "glipsdp": (test_networks.digits("cnn3")[0], {}),
        "sll": (test_chains.sll(), task),
        "lbdn": (test_chains.lbdn_of_images(), bound | task),
        "1lipschitz": (test_chains.compared("SLL", blocks=3), task),
    }


def test_every_layout_is_recognised():
    found = layouts()
    assert set(found) == set(LAYOUTS)
    for kind, (state, options) in found.items():
        first, second = load_checkpoint(state, **options), load_checkpoint(state, kind, **options)
        assert type(first) is type(second)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_damaged_tensors_raise_value_errors_and_no_others(kind):
    state, options = layouts()[kind]
    others = [
        torch.ones(shape) for shape in ((), (0,), (1,), (2, 0), (3, 2), (2, 3, 4), (1, 2, 3, 4))
    ]
    for name, value in state.items():
        damaged = [value[..., :-1], value[:0], value.movedim(0, -1)] if value.ndim else []
        for other in (*others, *damaged, torch.zeros_like(value).long()):
            if other.shape == value.shape and other.is_floating_point():
                continue
            with pytest.raises(ValueError, match=r"."):
                load_checkpoint(state | {name: other}, kind, **options)
