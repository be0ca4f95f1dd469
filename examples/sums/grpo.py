"""A baseline for reward training: supervised steps, then TRL's GRPO, in an environment of its own. Next: `grpo_run.py`.

    python examples/sums/grpo.py --seconds 300 --seed 0 --output runs/grpo

One idea: the script starts in the toolkit's environment, where it finds the model, and starts itself again in the environment
that has TRL, which the first call makes (some minutes, 2 GB; with CUDA more).
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "trl==1.16.0", "transformers", "peft")
"""Installed with the versions of `constraints.txt`."""
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo")
MARK = "installed.txt"


def options_parser() -> argparse.ArgumentParser:
    """The command line; defaults of GRPO are what the search in `README.md` found best."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("run").add_argument
    add("--model", default="smollm2-135m", help="alias or folder")
    add("--seconds", type=_positive, default=300.0, help="of training, supervised steps included, evaluation not")
    add("--seed", type=int, default=0, help="of batches and sampling")
    add("--output", type=Path, default=Path("runs/grpo"), help="folder for result.json")
    add("--overwrite", action="store_true", help="replace a result that is there")
    add("--environment", type=Path, default=Path(".venv-trl"), help="folder of the environment that has TRL")
    add = parser.add_argument_group("supervised steps").add_argument
    add("--warm-up-steps", type=_count, default=6, help="steps of AdamW on the answers before GRPO")
    add("--warm-up-batch-size", type=_whole, default=16, help="rows a step")
    add("--warm-up-learning-rate", type=_positive, default=5e-6, help="constant")
    add("--warm-up-cache", type=Path, help="folder that keeps the weights after these steps, for the next call")
    add = parser.add_argument_group("GRPO (the words are TRL's GRPOConfig's)").add_argument
    add("--learning-rate", type=_positive, default=1e-5, help="of AdamW, constant")
    add("--num-generations", type=_whole, default=16, help="completions of a prompt")
    add("--batch-size", type=_whole, default=32, help="completions of a forward and backward pass")
    add("--gradient-accumulation-steps", type=_whole, default=1, help="passes in an optimizer step")
    add("--num-iterations", type=_whole, default=1, help="optimizer steps on the same completions")
    add("--temperature", type=_positive, default=1.0, help="of sampling")
    add(
        "--beta",
        type=_not_negative,
        default=0.0,
        help="weight of the KL divergence from the start; 0: no reference model",
    )
    add("--loss-type", default="dapo", choices=LOSSES, help="how token losses become one")
    add("--scale-rewards", default="group", choices=["group", "batch", "none"], help="whose deviation is set to 1")
    add("--max-grad-norm", type=_positive, default=1.0, help="gradient clipping")
    add("--gradient-checkpointing", action=switch, default=False, help="less memory, more time")
    add("--bf16", action=switch, default=False, help="gradients under bfloat16 autocast; the weights stay float32")
    add("--lora", action=switch, default=False, help="train adapters on all linear layers instead of all weights")
    add("--lora-rank", type=_whole, default=16, help="of the adapters; alpha is twice the rank")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return value


def _whole(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a whole number from 1")
    return int(text)


def check(options: argparse.Namespace) -> None:
    """Refuse what could not run, before anything is installed.

    Raises:
        UserError: there is a result already, or the completions of a step are not whole groups.
    """
    from hybrid_opt.errors import UserError

    result = options.output / "result.json"
    if result.exists() and not options.overwrite:
        raise UserError(f"--output: {result} is there already; replace it by --overwrite, or choose another folder")
    completions = options.batch_size * options.gradient_accumulation_steps
    if options.num_generations < 2 or completions % options.num_generations:
        raise UserError(
            f"--num-generations: {options.num_generations} does not divide the {completions} completions of a step into "
            "groups of two or more; write a divisor of --batch-size times --gradient-accumulation-steps"
        )
    rows = sum(1 for _ in (ROOT / "examples/sums/sums_train.jsonl").open(encoding="utf-8"))
    if completions // options.num_generations > rows:
        raise UserError(
            f"--batch-size: a step would take {completions // options.num_generations} prompts, and there are {rows}; "
            "write a smaller batch, or a larger --num-generations"
        )


def installed(environment: Path) -> Path:
    """The environment's interpreter; the environment is made first if it is not there, or not whole.

    Raises:
        UserError: pip failed; what it said stands above.
    """
    from hybrid_opt.errors import UserError

    python = environment.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = "\n".join(PACKAGES) + "\n" + (ROOT / "constraints.txt").read_text(encoding="utf-8")
    mark = environment / MARK
    if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {', '.join(PACKAGES)} into {environment} (some minutes, once)", flush=True)
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *PACKAGES]
    for command in ([sys.executable, "-m", "venv", environment], install):
        if subprocess.run(command).returncode:
            raise UserError(f"--environment: {environment} could not be made; see above, then call again")
    mark.write_text(wanted, encoding="utf-8")  # last, so that an interrupted installation is taken up again
    return python


def _folder(model: str) -> Path:
    from hybrid_opt.errors import UserError
    from hybrid_opt.models.loading import ALIASES, model_folder  # torch: neither for --help nor for most mistakes

    folder = Path(model_folder(model))
    if not (folder / "config.json").exists():
        raise UserError(f"--model: {model!r} is no folder with a model; write one, or an alias ({', '.join(ALIASES)})")
    return folder


def main(arguments: list[str]) -> None:
    """In the toolkit's environment: check, find, install, start again. In TRL's: run."""
    options = options_parser().parse_args(arguments)
    if options.environment.exists() and options.environment.samefile(sys.prefix):
        from grpo_run import run  # here are torch and TRL

        return run(options)
    check(options)
    folder = _folder(options.model)
    python = installed(options.environment)
    command = [str(python), __file__, *arguments, "--model", str(folder)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    os.execve(python, command, {**os.environ, "PYTHONPATH": path})  # in this one's place: its memory is free again


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from hybrid_opt.errors import UserError

    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # no result is written; the same command begins anew
