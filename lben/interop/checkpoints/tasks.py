"""Which images is a checkpoint for? Its sizes say it, and its project the normalisation."""

from __future__ import annotations

import math

from lben.models import ImageTask

MNIST = ImageTask(shape=(1, 28, 28), classes=10, mean=(0.1307,), std=(0.3081,))
CIFAR10 = ImageTask(
    shape=(3, 32, 32), classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)


def task_for(task: ImageTask | None, inputs: int, classes: int, *known: ImageTask) -> ImageTask:
    """Return the task that is given, or the known one with these sizes.

    Args:
        task: as the user gave it, or None.
        inputs: numbers of one image.
        classes: outputs of the checkpoint.
        known: tasks of the project that made the checkpoint.

    Returns:
        The task.

    Raises:
        ValueError: if the given task does not fit, or none is known with these sizes.
    """
    for candidate in known if task is None else (task,):
        if (math.prod(candidate.shape), candidate.classes) == (inputs, classes):
            return candidate
    if task is not None:
        raise ValueError(
            f"the checkpoint has {inputs} inputs and {classes} outputs, which does not fit images "
            f"of shape {task.shape} and {task.classes} classes"
        )
    raise ValueError(
        f"the checkpoint has {inputs} inputs and {classes} outputs, and no data set of its project "
        "has these sizes: say which images it is for, task=ImageTask(shape=…, classes=…, mean=…, "
        "std=…)"
    )
