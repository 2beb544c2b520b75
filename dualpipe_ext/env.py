"""Every environment variable that dualpipe_ext reads, in one table.

``dualpipe doctor`` shows those that are set; the documentation is written from the same table, and
a test keeps other names out of the code. Imports nothing, so that ``setup.py`` can load it too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """One environment variable: what it does and what it may be set to."""

    name: str
    meaning: str
    default: str
    choices: tuple[str, ...] = ()


VARIABLES: Sequence[Variable] = (
    Variable(
        name="DUALPIPE_CUDA",
        meaning="at install time: build the CUDA core (1: required, 0: never, auto: if a toolkit "
        "is there)",
        default="auto",
        choices=("auto", "0", "1"),
    ),
    Variable(
        name="DUALPIPE_TRANSPORT",
        meaning="which expert-parallel transport `auto` means",
        default="auto",
    ),
    Variable(
        name="DUALPIPE_TRACEBACK",
        meaning="1: the dualpipe command shows the traceback of every error, not one line",
        default="0",
        choices=("0", "1"),
    ),
    Variable(
        name="DUALPIPE_COMMIT",
        meaning="what benchmark rows call a tree that was copied without its history",
        default="",
    ),
)

_BY_NAME = {variable.name: variable for variable in VARIABLES}


def read(name: str) -> str:
    """The value of a variable of the table, or its default.

    Raises:
        ValueError: it is set to something that is not one of its choices.
    """
    variable = _BY_NAME[name]
    value = os.environ.get(name) or variable.default
    if variable.choices and value not in variable.choices:
        raise ValueError(
            f"expected {name} to be one of {', '.join(variable.choices)}, got {value!r}"
        )
    return value


def in_force() -> dict[str, str]:
    """The variables of the table that are set in this process, by name."""
    return {v.name: os.environ[v.name] for v in VARIABLES if v.name in os.environ}
