"""Training: one seeded loop, its configuration, and what is on disk."""

from lben.training.loop import Interrupted, error_rate, resume, train

__all__ = ["Interrupted", "error_rate", "resume", "train"]
