"""Commands that measure: bench | verify. Next: `../config/loading.py`."""

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from hybrid_opt.cli.arguments import AllowCode, Overrides, quiet
from hybrid_opt.cli.starting import importing


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Alias, folder or hub id.", show_default=False)],
    members: Annotated[list[int], typer.Option(help="Population size; repeatable.")] = (32,),
    batch: Annotated[list[int], typer.Option(help="Examples that each member sees; repeatable.")] = (1,),
    tokens: Annotated[list[int], typer.Option(help="Tokens of an example; repeatable.")] = (32,),
    new_tokens: Annotated[list[int], typer.Option(help="Tokens written in rows with generate; repeatable.")] = (16,),
    dtype: Annotated[list[str], typer.Option(help="float32, bfloat16 or float16; repeatable.")] = ("float32",),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    rows: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Only this row, beside the one that it is compared with; repeatable. Rewards of what members write are measured "
            "when named: es_generate, es_generate_shared, es_generate_common.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps of each row, in turns.")] = 5,
    members_per_forward: Annotated[
        Optional[int], typer.Option(help="Of low rank ES; left out: its own choice.", show_default=False)
    ] = None,
    master_weights: Annotated[
        Optional[str], typer.Option(help="As in a run file's section engine.", show_default=False)
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Instead: a population on several ranks against the same on one.")
    ] = False,
    ranks: Annotated[int, typer.Option(help="Ranks for --distributed.")] = 2,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory, a process a row.")] = True,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write the rows there.", show_default=False)
    ] = None,
) -> None:
    """Measure steps of ES, of MeZO and of backprop against plain inference on the same tokens."""
    from hybrid_opt.studies import bench_plan

    cases = bench_plan.plan_cases(
        model, dtype, members, batch, tokens,
        device=device, members_per_forward=members_per_forward, master_weights=master_weights,
        new_tokens=new_tokens,
    )  # fmt: skip
    names, notes = bench_plan.plan_rows(rows or ())
    bench_plan.check_repeats(repeats)
    bench_plan.check_json(json_file)
    if distributed:
        bench_plan.check_ranks(ranks, rows or ())
    with importing():
        quiet()
        from rich.console import Console

        from hybrid_opt.studies.bench import measure_case, ready_cases, write_json
        from hybrid_opt.studies.bench_distributed import measure_distributed
        from hybrid_opt.studies.bench_table import StatusLine, case_table, distributed_table, header_of, remarks

    console, found = Console(width=None if sys.stdout.isatty() else 110), []  # a pipe has no width of its own
    for case in ready_cases(cases, () if distributed else names):
        with StatusLine() as status:
            if distributed:
                measured = measure_distributed(case, ranks, repeats=repeats, memory=memory, say=status.show)
            else:
                measured = measure_case(case, names, repeats=repeats, memory=memory, say=status.show)
        found += measured
        if json_file:
            write_json(json_file, found)
        if distributed:
            console.print(f"{case.model}: {case.title}", markup=False, highlight=False, soft_wrap=True)
            console.print(distributed_table(measured))
            continue
        console.print(header_of(measured), markup=False, highlight=False, soft_wrap=True)
        console.print(case_table(measured))
        for line in (*remarks(measured), *notes):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def verify(
    run: Annotated[
        Optional[Path],
        typer.Argument(metavar="[RUN.yaml]", help="Measure on its model and data too.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        Optional[str],
        typer.Option(help="Instead of a run file: alias, folder or hub id; with --data.", show_default=False),
    ] = None,
    data: Annotated[Optional[str], typer.Option(help="Rows, as data.train in a run file.", show_default=False)] = None,
    prompt: Annotated[Optional[str], typer.Option(help="As data.prompt.", show_default=False)] = None,
    completion: Annotated[Optional[str], typer.Option(help="As data.completion.", show_default=False)] = None,
    text: Annotated[Optional[str], typer.Option(help="As data.text: the column of text.", show_default=False)] = None,
    directions: Annotated[
        int,
        typer.Option(min=128, help="On a real model, of each estimator in all its estimates; 16 estimates at least."),
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Decides all noise of the measurements on known losses.")] = 0,
    json_file: Annotated[
        Optional[Path], typer.Option("--json", metavar="FILE", help="Write the rows there.", show_default=False)
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Measure what theory says of the estimators, on this machine; exit status 1 if anything disagrees."""
    from hybrid_opt.config import located
    from hybrid_opt.studies.bench_plan import check_json
    from hybrid_opt.studies.verify.subject import subject

    check_json(json_file)
    options = {"model": model, "data": data, "prompt": prompt, "completion": completion, "text": text}
    chosen = subject(run, overrides or (), **options)
    with importing():
        quiet()
        from rich.console import Console

        from hybrid_opt.studies.bench import write_json
        from hybrid_opt.studies.bench_table import StatusLine
        from hybrid_opt.studies.verify.real_model import RealModel
        from hybrid_opt.studies.verify.registry import measured
        from hybrid_opt.studies.verify.sampling import Trials
        from hybrid_opt.studies.verify.writing import KNOWN, REAL, verdict, verify_table

    console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width of its own
    with StatusLine() as line:
        if chosen:
            with located(chosen[1]):
                real = RealModel.load(
                    chosen[0], allow_code
                )  # whatever is wrong with it is said before anything is measured
        known = list(measured(Trials(seed), line.show))
        line.show("")
        console.print(verify_table(known, "losses with known gradients", KNOWN))
        found = list(real.measured(directions, line.show)) if chosen else []
    if found:
        console.print(verify_table(found, f"{chosen[0].model.name or 'model'} on {chosen[0].data.train}", REAL))
    rows = [*known, *found]
    console.print(verdict(rows), markup=False, highlight=False, soft_wrap=True)
    if json_file:
        write_json(json_file, [row.row() for row in rows])
    if any(row.passed is False for row in rows):
        raise typer.Exit(1)
