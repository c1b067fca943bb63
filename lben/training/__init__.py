"""Training: one seeded loop, its configuration, and what is on disk."""

from lben.training.loop import Interrupted, error_rate, resume, train
from lben.training.recipes import TrainingConfig

__all__ = ["Interrupted", "TrainingConfig", "error_rate", "resume", "train"]
