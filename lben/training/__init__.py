"""How is a classifier trained? One seeded loop, its configuration, and the files of a run."""

from lben.training.loop import Interrupted, error_rate, resume, train
from lben.training.recipes import TrainingConfig

__all__ = ["Interrupted", "TrainingConfig", "error_rate", "resume", "train"]
