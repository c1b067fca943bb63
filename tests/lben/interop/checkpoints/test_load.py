"""The names of the tensors say which layout a checkpoint has."""

import pytest
import torch

from lben.interop import load_checkpoint
from lben.interop.checkpoints.equilibria import MODULE
from lben.interop.checkpoints.load import LAYOUTS


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
