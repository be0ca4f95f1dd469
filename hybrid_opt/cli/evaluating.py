"""The command that evaluates: evaluate. Next: `../studies/evaluate/subject.py`."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from hybrid_opt.cli.arguments import AllowCode, Overrides, quiet
from hybrid_opt.cli.starting import importing


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run's folder, or a model's alias, folder or hub id.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    run: Annotated[
        Optional[Path],
        typer.Option(
            metavar="RUN.yaml", help="For a MODEL: whose data and objective to evaluate by.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Optional[str],
        typer.Option(
            help="Other rows than the run's held-out ones: whatever data.train may be, or a YAML file with sections data and objective.",
            show_default=False,
        ),
    ] = None,
    forgetting: Annotated[
        Optional[str],
        typer.Option(
            metavar="DATA",
            help="A second set, on which the base may have been better; rows of plain text, or a YAML file.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Optional[str],
        typer.Option(metavar="COLUMN", help="Read rows as plain text, from this column.", show_default=False),
    ] = None,
    base: Annotated[
        Optional[str],
        typer.Option(
            metavar="MODEL",
            help="What to compare with; left out: what the run started from; none: nothing.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        Optional[int],
        typer.Option(min=2, help="Longest example, and length of a block of plain text.", show_default=False),
    ] = None,
    rows: Annotated[
        Optional[int], typer.Option(min=1, help="Of each set at most so many, at even distances.", show_default=False)
    ] = None,
    batch_size: Annotated[
        Optional[int], typer.Option(min=1, help="Examples in a forward pass.", show_default=False)
    ] = None,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write the measures there.", show_default=False)
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Measure loss, perplexity, accuracy or reward of a model, beside what it started from."""
    from hybrid_opt.config.foreign_code import refuse_code
    from hybrid_opt.studies.bench_plan import check_json
    from hybrid_opt.studies.evaluate.subject import subject

    check_json(json_file)
    chosen = subject(
        target, overrides or (), run=run, data=data, second=forgetting, text=text, base=base, max_tokens=max_tokens
    )
    refuse_code(chosen.code(), allow_code)
    with importing():
        quiet()
        from rich.console import Console

        from hybrid_opt.studies.bench import write_json
        from hybrid_opt.studies.bench_table import StatusLine
        from hybrid_opt.studies.evaluate.measuring import evaluated
        from hybrid_opt.studies.evaluate.table import evaluation_table, verdict

    with StatusLine() as line:
        found = list(evaluated(chosen, rows, batch_size, line.show))
    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width of its own
    console.print(evaluation_table(chosen, found))
    if told := verdict(found):
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if json_file:
        write_json(
            json_file, [{**measured.row(), **chosen.described(measured.set, measured.model)} for measured in found]
        )
