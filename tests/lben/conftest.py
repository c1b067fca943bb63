"""What tests of several folders look at, made once."""

import pytest
import torch

from lben.training import train
from tests.lben.runs import config


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a trained classifier of the digits; it is not to be changed."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config(folder))
    return folder
