"""The command line itself: finding subcommands, one-line errors, exit codes."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

from dualpipe_ext import __version__
from dualpipe_ext.cli import main as cli
from dualpipe_ext.errors import CheckpointError, CommTimeoutError, WorkerFailedError


@pytest.fixture
def run_raising(monkeypatch, capsys):
    """Run a subcommand that raises ``error``; returns the exit code and what stderr shows."""

    def run(error):
        def command() -> None:
            raise error

        module = ModuleType("stub_command")
        module.command = command
        monkeypatch.setitem(sys.modules, "stub_command", module)
        monkeypatch.setitem(cli.COMMANDS, "stub", ("stub_command", "Raises."))
        code = cli.main(["stub"])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("expected 2,\n  got 3"), 2, "dualpipe: error: expected 2, got 3\n"),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            2,
            "dualpipe: error: a.txt: No such file or directory\n",
        ),
        (OSError("disk on fire"), 2, "dualpipe: error: disk on fire\n"),
        (CheckpointError("torn file"), 2, "dualpipe: error: torn file\n"),
        (CommTimeoutError("rank 1 is late"), 1, "dualpipe: error: rank 1 is late\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_are_one_line_and_a_code(run_raising, error, code, line):
    assert run_raising(error) == (code, line)


def test_a_failed_worker_keeps_its_traceback(run_raising):
    code, text = run_raising(WorkerFailedError(2, "Traceback:\n  in f\nKeyError: 1"))
    assert code == 1
    assert text == "dualpipe: error: rank 2 failed\nTraceback:\n  in f\nKeyError: 1\n"


def test_a_bug_is_not_hidden(run_raising):
    with pytest.raises(KeyError):
        run_raising(KeyError("x"))


def test_traceback_on_request(run_raising, monkeypatch):
    monkeypatch.setenv("DUALPIPE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"):
        run_raising(ValueError("bad"))


def test_a_wrong_value_for_tracebacks_is_one_line(run_raising, monkeypatch):
    monkeypatch.setenv("DUALPIPE_TRACEBACK", "7")
    code, text = run_raising(ValueError("bad"))
    assert code == 2
    assert text == "dualpipe: error: expected DUALPIPE_TRACEBACK to be one of 0, 1, got '7'\n"


@pytest.mark.parametrize(
    ("argv", "word"),
    [(["nonsense"], "nonsense"), (["--nonsense"], "--nonsense"), (["doctor", "--no"], "--no")],
)
def test_usage_errors(argv, word, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("dualpipe: error: ")
    assert err.count("\n") == 1
    assert word in err


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_every_subcommand(argv, capsys):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_version_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dualpipe_ext", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"dualpipe_ext {__version__}\n")


@pytest.mark.parametrize("argv", [["--help"], ["schedule", "--help"]])
def test_starts_without_torch(argv):
    program = (
        "import sys; from dualpipe_ext.cli.main import main\n"
        f"code = main({argv!r})\n"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
