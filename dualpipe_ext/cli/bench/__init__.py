"""``dualpipe bench``: measure this package on this machine, against what there is without it.

What belongs here: a file per benchmark with its options and where its figures go, and
``options.py``, which they share. What is measured, and how, is in ``dualpipe_ext.bench``.
"""

from __future__ import annotations

import typer

from dualpipe_ext.cli.bench import ep, eplb, gemm, memory, pipeline

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.callback(invoke_without_command=True)
def benchmarks(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _module in (ep, eplb, memory, gemm, pipeline):
    app.command(_module.__name__.rpartition(".")[2])(_module.command)
