"""The ``dualpipe`` command: finding the subcommand, and turning errors into exit codes.

A subcommand's file is imported only when that subcommand runs: ``dualpipe schedule`` needs no torch
and starts at once, and one that cannot be imported does not take the others with it.

Exit codes: 0 done; 2 the input was wrong, with one line that says how; 1 the run failed, with the
failing rank's traceback where there is one; 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import typer

from dualpipe_ext import env
from dualpipe_ext.errors import CommTimeoutError, DualPipeError, WorkerFailedError

# name -> (module with a function `command`, or with a typer `app` of further subcommands;
#          help shown before that module is imported)
COMMANDS = {
    "train": ("dualpipe_ext.cli.train", "Train a small MoE language model on this machine."),
    "schedule": ("dualpipe_ext.cli.schedule", "Simulate, compare and draw pipeline schedules."),
    "profile": (
        "dualpipe_ext.cli.profile",
        "Measure in a profiler trace how much communication is hidden.",
    ),
    "eplb": ("dualpipe_ext.cli.eplb", "Plan where experts live; show balance, bound and cost."),
    "bench": ("dualpipe_ext.cli.bench", "Measure this package on this machine."),
    "doctor": ("dualpipe_ext.cli.doctor", "Say what this machine can do and what is missing."),
}

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

# typer keeps its copy of click to itself and its exceptions are reached through the one it exports.
_UsageError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def entry() -> None:
    """The console script."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's) and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    requested = next((arg for arg in args if not arg.startswith("-")), None)
    show_traceback = False
    try:
        show_traceback = env.read("DUALPIPE_TRACEBACK") == "1"
        run = typer.main.get_command(_build_app(requested))
        code = run.main(args=args, prog_name="dualpipe", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except (_UsageError, ValueError, OSError, DualPipeError) as error:
        if show_traceback:
            raise
        return _report(error)


def _build_app(requested: str | None) -> typer.Typer:
    """All subcommands by name; only the requested one is imported."""
    app = typer.Typer(
        help="DualPipe schedules, expert parallelism and expert placement for MoE training.",
        add_completion=False,
        rich_markup_mode=None,
    )
    app.callback(invoke_without_command=True)(_options)
    for name, (module, summary) in COMMANDS.items():
        if name != requested:
            app.command(name, help=summary)(_not_loaded)
            continue
        loaded = importlib.import_module(module)
        if hasattr(loaded, "app"):
            app.add_typer(loaded.app, name=name, help=summary)
        else:
            # It shows its own docstring.
            app.command(name)(loaded.command)
    return app


def _not_loaded() -> None:
    """Stands for a subcommand that was not asked for, so that ``--help`` lists it."""


def _options(
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    if version:
        from dualpipe_ext import __version__

        typer.echo(f"dualpipe_ext {__version__}")
        raise typer.Exit


def _report(error: Exception) -> int:
    if isinstance(error, WorkerFailedError):
        print(f"dualpipe: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    if isinstance(error, _UsageError):
        text = error.format_message()
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    print(f"dualpipe: error: {' '.join(text.split())}", file=sys.stderr)
    return EXIT_FAILED if isinstance(error, CommTimeoutError) else EXIT_BAD_INPUT
