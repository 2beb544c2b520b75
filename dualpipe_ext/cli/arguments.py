"""Options of a command as the fields of a dataclass, for commands that have too many to be the
parameters of a function.

Typer reads options off a function's parameters: :func:`takes` gives a function such parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def takes(arguments: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose last parameter is one object with all options.

    Args:
        arguments: a dataclass. Each field is an option, declared as typer has it for a parameter:
            ``steps: Annotated[int, typer.Option(help="Steps.")] = 300``.

    The command's other parameters (a ``typer.Context``) and its docstring are the function's.
    """

    def made_command(function: Callable[..., None]) -> Callable[..., None]:
        *others, last = inspect.signature(function).parameters.values()
        parameters = [*_resolved(others, function), *_parameters(arguments)]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            given = arguments(**{field.name: values.pop(field.name) for field in fields(arguments)})
            function(**values, **{last.name: given})

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return made_command


def given_or(value: T | None, default: T) -> T:
    """The value, 0 too; the default if none was given.

    >>> given_or(0, 5), given_or(None, 5)
    (0, 5)
    """
    return default if value is None else value


def _parameters(arguments: type) -> list[inspect.Parameter]:
    """One per field, by keyword."""
    hints = get_type_hints(arguments, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(arguments)
    ]


def _resolved(
    parameters: Iterable[inspect.Parameter], function: Callable[..., None]
) -> list[inspect.Parameter]:
    """The same, by keyword, with types in place of what the source calls them."""
    hints = get_type_hints(function, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [each.replace(kind=kind, annotation=hints[each.name]) for each in parameters]
