"""What runs without scikit-learn, tyro and tqdm, and what the rest says where they are missing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OPTIONAL = ("sklearn", "tyro", "tqdm", "matplotlib", "tensorboard", "docstring_parser")


def python(code, missing=OPTIONAL):
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in missing)
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{blocked}\n{code}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_solvers_and_layers_need_no_optional_package():
    code = """
import torch, solvers, lben
from lben.data import Dataset
from lben.models import EquilibriumArchitecture
layer = lben.EquilibriumLinear(4, 5, 3, gamma=1.0)
layer(torch.rand(2, 4)).sum().backward()
images, labels = torch.arange(32, dtype=torch.uint8).reshape(2, 1, 4, 4), torch.tensor([0, 1])
data = Dataset.from_tensors(images, labels, images, labels)
print(EquilibriumArchitecture(hidden=5).for_data(data).build().certificate().bound > 0)
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "True\n"


@pytest.mark.parametrize(
    ("code", "missing", "said"),
    [
        ("from lben.data import load; load('digits')", "sklearn", "scikit-learn, which is not"),
        ("import lben.training", "tqdm", "tqdm, which is not installed"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_installs_it(code, missing, said):
    last = python(code, (missing,)).stderr.splitlines()[-1]
    assert said in last
    assert "pip install 'lben[cli]'" in last


@pytest.mark.parametrize("missing", ["tyro", "tqdm"])
def test_the_command_line_says_in_one_line_what_it_needs(missing):
    ended = python("from lben.__main__ import main\nsys.exit(main())", (missing,))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"lben: the command line needs {missing}, which is not installed: pip install 'lben[cli]'\n"
    )
