"""Tasks: how a question is asked and how a response to it is graded.

A task has ``load(path) -> list[Question]`` and ``grade(text, gold) -> bool | None``; a new one is a file here and a
line in `TASKS`.
"""

from pathlib import Path
from typing import Protocol

from jaxopd.errors import InputError
from jaxopd.tasks.boolq import BoolQ
from jaxopd.tasks.math import Math
from jaxopd.tasks.mmlu import MMLU
from jaxopd.tasks.toy import Toy
from jaxopd.types import Question


class Task(Protocol):
    """What the pipelines need of a task."""

    name: str

    def load(self, path: str | Path) -> list[Question]:
        """Read the questions of a file or folder; InputError names what is wrong with it."""
        ...

    def grade(self, text: str, gold: str) -> bool | None:
        """True, False, or None where the text states no answer."""
        ...


TASKS: dict[str, Task] = {task.name: task for task in (BoolQ(), MMLU(), Math(), Toy())}


def find_task(name: str) -> Task:
    """Return a task by its name; InputError lists the known ones."""
    if name not in TASKS:
        raise InputError(f"task: found {name!r}, expected one of {', '.join(TASKS)}")
    return TASKS[name]


def grade(task: str, text: str, gold: str) -> bool | None:
    """Grade a response: the last stated answer counts, text inside `<think>` does not.

    Args:
        task: a name in `TASKS`.
        text: the response, untrusted.
        gold: the gold answer as `Question.gold` holds it.

    Returns:
        True or False, or None where no answer was found.

    Raises:
        InputError: an unknown task, or a gold answer that the task cannot hold.
    """
    return find_task(task).grade(text, gold)
