"""Commands for many runs: ablate | report. Next: `measuring.py`."""

import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from hybrid_opt.cli.arguments import AllowCode, quiet
from hybrid_opt.cli.starting import importing


def ablate(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False)],
    overrides: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[field=value ...]", help="Replace values of the study file.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the arms and their runs.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Compare ways of training at equal cost; the same command goes on with a study that was stopped."""
    from hybrid_opt.config import load_study
    from hybrid_opt.studies.arms import StudyPlan
    from hybrid_opt.studies.study_table import arms_table, count_line, result_tables

    plan = StudyPlan(load_study(study, overrides or ()), study)
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width of its own
    if dry_run:
        console.print(arms_table(plan))
        console.print(count_line(plan), highlight=False, soft_wrap=True)
        return
    with importing():
        quiet()
        from hybrid_opt.studies.ablate import Ablation
        from hybrid_opt.studies.bench_table import StatusLine
        from hybrid_opt.studies.search import check_search

    check_search(plan.study.learning_rates)
    with StatusLine() as line:

        def say(text: str) -> None:
            line.show("")
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        ablation = Ablation(plan, say=say, show=line.show, overwrite=overwrite, allow_code=allow_code)
        complete = ablation.run()
    for table in result_tables(ablation.summaries, ablation.metric, plan.study.reference):
        console.print(table)
    for error, names in ablation.errors().items():
        say(f"failed: {'; '.join(names)}: {error}")
    output = Path(plan.study.output)
    say(f"results: {output / 'results.csv'}" if complete else f"{output}: interrupted; the same command goes on")


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|STUDY", help="A run's or a study's folder.", show_default=False)
    ],
    kind: Annotated[
        Literal["html", "md", "json", "png"], typer.Option("--format", help="md also writes a picture beside it.")
    ] = "html",
    output: Annotated[
        Optional[Path],
        typer.Option(
            "--output", metavar="FILE", help="Left out: report.html and so on in the folder.", show_default=False
        ),
    ] = None,
) -> None:
    """Write a report on a run or a study, finished or not: one file, readable without a network."""
    from hybrid_opt.reports.writing import write_report

    typer.echo(write_report(folder, kind, output))
