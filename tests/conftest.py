"""Every test runs seeded, deterministic, on one thread, with warnings as errors (pyproject)."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import tests.annotations

hypothesis.settings.register_profile("lben", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("lben")


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for the device run here, slowly
if "LBEN_CHECK_ANNOTATIONS" in os.environ:
    tests.annotations.install()  # before any module of the packages is imported
torch.set_num_threads(1)  # the problems are small: a second thread only waits


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
