"""Which data sets have a name."""

import pytest

from lben.data import DataError, load


def test_data_from_files_needs_a_folder():
    with pytest.raises(DataError, match="mnist is read from files: give the folder"):
        load("mnist")
    with pytest.raises(DataError, match="must be digits, mnist or cifar10, got 'svhn'"):
        load("svhn", ".")
