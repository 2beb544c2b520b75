"""Commands whose options are the fields of a dataclass, and the size of commands."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from dualpipe_ext import cli
from dualpipe_ext.cli.arguments import takes

MOST_LINES = 60
FILES = sorted(
    path for name in ("*.py", "bench/*.py") for path in Path(cli.__file__).parent.glob(name)
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    out: Annotated[Path, typer.Argument(help="Where to.")]
    steps: Annotated[int, typer.Option(help="Steps.")] = 3
    name: Annotated[str | None, typer.Option("--called", help="Name.")] = None
    quick: Annotated[bool, typer.Option(help="Fewer.")] = False


def app_of(function: Any) -> typer.Typer:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command()(function)
    return app


def by_parameters(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Where to.")],
    steps: Annotated[int, typer.Option(help="Steps.")] = 3,
    name: Annotated[str | None, typer.Option("--called", help="Name.")] = None,
    quick: Annotated[bool, typer.Option(help="Fewer.")] = False,
) -> None:
    """Do it."""
    given = Arguments(out=out, steps=steps, name=name, quick=quick)
    typer.echo(f"{given} {context.get_parameter_source('steps').name}")


@takes(Arguments)
def by_dataclass(context: typer.Context, given: Arguments) -> None:
    """Do it."""
    typer.echo(f"{given} {context.get_parameter_source('steps').name}")


@takes(Arguments)
def without_context(given: Arguments) -> None:
    """Do it."""
    typer.echo(f"{given} DEFAULT")


@pytest.mark.parametrize(
    "args",
    [["--help"], ["x"], ["x", "--quick"], ["x", "--steps", "5", "--called", "me"], ["--steps"], []],
)
def test_a_dataclass_is_as_good_as_parameters(args: list[str]) -> None:
    # Both are shown as the same program.
    results = [
        CliRunner().invoke(app_of(function), args, prog_name="do", env={"COLUMNS": "80"})
        for function in (by_parameters, by_dataclass)
    ]
    assert results[0].output == results[1].output
    assert results[0].exit_code == results[1].exit_code


def test_a_command_needs_no_context() -> None:
    done = CliRunner().invoke(app_of(without_context), ["x", "--quick"])
    assert done.output.strip() == f"{Arguments(out=Path('x'), quick=True)} DEFAULT"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_commands_are_short(path: Path) -> None:
    """Options count as lines, which is why they are fields."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    lines = {each.name: each.end_lineno - each.lineno + 1 for each in functions}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
