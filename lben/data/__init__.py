"""Where do images come from? Verified files to uint8 tensors; nothing is downloaded unasked.

The digits inside scikit-learn are the embedded default. MNIST is read from its IDX files, CIFAR-10
from its binary or its python batches. Every failure is one line: which file, what was expected,
how to get it. `Dataset.from_tensors` makes a data set of your own images.
"""

from lben.data.base import DataError, Dataset, pixels
from lben.data.files import fetch
from lben.data.loading import DatasetName, load
from lben.data.mnist import read_idx

__all__ = ["DataError", "Dataset", "DatasetName", "fetch", "load", "pixels", "read_idx"]
