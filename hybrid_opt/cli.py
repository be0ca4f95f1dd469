"""The command line: train | check | plan | ablate | report | schema | bench | verify. Next: `config/loading.py`, then `training/build.py`.

One idea: a command only reads its arguments and shows results. Mistakes are UserErrors: their message is printed, nothing
else, and the exit status is 2. What needs torch is imported inside the command that needs it.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from hybrid_opt.errors import UserError, error_line

app = typer.Typer(
    name="hybrid-opt",
    help="Fine-tune language models by mixing evolution strategies with backprop steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="[section.field=value ...]", help="Replace values of the run file.", show_default=False),
]
SchedulePath = Annotated[
    Optional[str],
    typer.Option("--schedule", help="Schedule file or shipped recipe in place of the run file's.", show_default=False),
]


@app.command()
def train(
    run: RunPath,
    overrides: Overrides = None,
    schedule: SchedulePath = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    display: Annotated[
        Literal["auto", "dashboard", "lines", "none"],
        typer.Option(help="How the run is shown; auto: as a dashboard on a terminal, by lines elsewhere."),
    ] = "auto",
) -> None:
    """Train a model as a run file says."""
    if resume and overwrite:
        raise UserError("command line: --resume goes on with a run, --overwrite replaces it; give one of them")
    config, source = _load(run, overrides, schedule)
    _quiet()
    from rich.console import Console

    from hybrid_opt.config import located
    from hybrid_opt.training.build import build
    from hybrid_opt.training.dashboard import display_for
    from hybrid_opt.training.progress import summary_table

    console = Console(quiet=_rank() > 0)
    with located(source):
        shown = display_for(display, console, config.training.budget)
        trainer = build(config, overwrite=overwrite, resume=resume, display=shown)
        summary = trainer.train()
    console.print(summary_table(summary))
    if summary.finished:
        output = Path(config.output)
        for what, name in (("picture", "curves.png"), ("metrics", "metrics.jsonl"), ("model", "model")):
            console.print(f"{what}: {output / name}", highlight=False, soft_wrap=True)


@app.command()
def check(run: RunPath, overrides: Overrides = None, schedule: SchedulePath = None) -> None:
    """Validate a run file without training, and show which estimators may move which parameters."""
    from hybrid_opt.checking import engine_notes, objective_lines, policy_tables
    from hybrid_opt.config import located
    from hybrid_opt.config.reporting import refuse_missing_packages
    from hybrid_opt.objectives.checking import check_data

    config, source = _load(run, overrides, schedule)
    with located(source):
        check_data(config)
        refuse_missing_packages(config.report_to)
        tables = [*policy_tables(config), *engine_notes(config), *objective_lines(config)]
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for table in tables:
        console.print(table, highlight=False, soft_wrap=not isinstance(table, Table))
    console.print(f"{run}: valid", highlight=False, soft_wrap=True)


@app.command()
def plan(
    run: RunPath,
    overrides: Overrides = None,
    schedule: SchedulePath = None,
    steps: Annotated[Optional[int], typer.Option("--steps", min=1, help="Steps to show; left out: all.")] = None,
) -> None:
    """Show which estimators act when and what each costs, without loading the model."""
    from rich.console import Console

    from hybrid_opt.checking import cost_table, timeline
    from hybrid_opt.config import located

    config, source = _load(run, overrides, schedule)
    if (steps := steps or config.training.steps) is None:
        raise UserError(f"{run}: training.steps: its budget decides how many steps there will be; say --steps 40")
    console = Console()
    for line in timeline(config, steps):
        console.print(line, highlight=False)
    with located(source):
        console.print(cost_table(config), highlight=False)


@app.command()
def ablate(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.", show_default=False)],
    overrides: Annotated[
        Optional[list[str]],
        typer.Argument(metavar="[field=value ...]", help="Replace values of the study file.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the arms and their runs.")] = False,
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
    _quiet()
    from hybrid_opt.studies.ablate import Ablation
    from hybrid_opt.studies.bench_table import StatusLine
    from hybrid_opt.studies.search import check_search

    check_search(plan.study.learning_rates)
    with StatusLine() as line:

        def say(text: str) -> None:
            line.show("")
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        ablation = Ablation(plan, say=say, show=line.show, overwrite=overwrite)
        complete = ablation.run()
    for table in result_tables(ablation.summaries, ablation.metric, plan.study.reference):
        console.print(table)
    for error, names in ablation.errors().items():
        say(f"failed: {'; '.join(names)}: {error}")
    output = Path(plan.study.output)
    say(f"results: {output / 'results.csv'}" if complete else f"{output}: interrupted; the same command goes on")


@app.command()
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


@app.command()
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
    _quiet()
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


@app.command()
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
) -> None:
    """Measure what theory says of the estimators, on this machine; exit status 1 if anything disagrees."""
    from hybrid_opt.config import located
    from hybrid_opt.studies.bench_plan import check_json
    from hybrid_opt.studies.verify.subject import subject

    check_json(json_file)
    options = {"model": model, "data": data, "prompt": prompt, "completion": completion, "text": text}
    chosen = subject(run, overrides or (), **options)
    _quiet()
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
                real = RealModel.load(chosen[0])  # whatever is wrong with it is said before anything is measured
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


@app.command()
def schema(
    kind: Annotated[Literal["run", "schedule", "study"], typer.Argument(help="Which file's schema.")] = "run",
) -> None:
    """Print the JSON schema of run files, schedule files or study files, for editors that complete YAML with it."""
    from hybrid_opt.config import RunFile, ScheduleFile, StudyFile

    model = {"run": RunFile, "schedule": ScheduleFile, "study": StudyFile}[kind]
    typer.echo(json.dumps(model.model_json_schema(), indent=2))


def _load(run: Path, overrides: list[str] | None, schedule: str | None):
    from hybrid_opt.config import load_run_and_source

    return load_run_and_source(run, overrides or (), schedule)


def _quiet() -> None:
    """Libraries' own chatter would tear the progress display; what they warn of is reported here in our words."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's store warns with stack traces when a rank ends
    warnings.formatwarning = lambda message, *where: f"warning: {message}\n"
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed calls old names
    if _rank():
        warnings.simplefilter("ignore")  # rank 0 says the same
    import torch

    if not torch.cuda.is_available():  # otherwise DeepSpeed, which transformers imports to save a model, warns of it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _rank() -> int:
    """This process's number among those that a launcher started."""
    return int(os.environ.get("RANK", 0))


def _take_local_rank(arguments: list[str]) -> None:
    """The deepspeed launcher writes `--local_rank=N` in front of all other arguments; torchrun sets a variable instead."""
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--local_rank", "--local-rank"):
            value = value if equals else "".join(arguments[i + 1 : i + 2])
            if not value.isdigit():
                raise UserError(
                    f"command line: {option} is followed by {value or 'nothing'!r}; write a number, as in {option}=0"
                )
            os.environ.setdefault("LOCAL_RANK", value)
            del arguments[i : i + (1 if equals else 2)]
            return


def main() -> None:
    """Entry point of `hybrid-opt` and `python -m hybrid_opt`."""
    try:
        _take_local_rank(sys.argv)
        app()
    except UserError as error:
        sys.stderr.write(error_line(error, _rank()) + "\n")  # at once, or another rank's line may come in between
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
