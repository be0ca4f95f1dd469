"""Names of the experiment trackers that a run may report to. Next: `../display/trackers.py`, which drives them.

One idea: the names and packages of transformers' integrations stand here a second time, so that a run file is checked without
importing transformers; a test holds the two together.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from hybrid_opt.errors import UserError, did_you_mean

INTEGRATIONS = {
    "azure_ml": {"azureml.core": "azureml-core"},
    "clearml": {"clearml": "clearml"},
    "codecarbon": {"codecarbon": "codecarbon"},
    "comet_ml": {"comet_ml": "comet-ml"},
    "dagshub": {"dagshub": "dagshub", "mlflow": "mlflow"},
    "dvclive": {"dvclive": "dvclive"},
    "flyte": {"flytekit": "flytekit"},
    "kubeflow": {},
    "mlflow": {"mlflow": "mlflow"},
    "neptune": {"neptune": "neptune"},
    "swanlab": {"swanlab": "swanlab"},
    "tensorboard": {"tensorboard": "tensorboard"},
    "trackio": {"trackio": "trackio"},
    "wandb": {"wandb": "wandb"},
}
"""For each integration the modules that it imports, and the packages that hold them."""


def reporters(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The names in a `report_to`, which is one of them, several, or `none`.

    Raises:
        UserError: a name is unknown, or written twice.
    """
    names = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    if names == ("none",):
        return ()
    for name in names:
        if name not in INTEGRATIONS:
            known = ", ".join(INTEGRATIONS)
            raise UserError(
                f"unknown tracker {name!r}{did_you_mean(name, INTEGRATIONS)}; write none, or some of {known}"
            )
    if len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: write each name once")
    return names


def refuse_missing_packages(report_to: str | Sequence[str]) -> None:
    """Whether the packages are there; nothing of theirs is imported.

    Raises:
        UserError: naming the package and how to install it.
    """
    for name in reporters(report_to):
        missing = [package for module, package in INTEGRATIONS[name].items() if not _is_installed(module)]
        if missing:
            packages = " ".join(missing)
            raise UserError(
                f"report_to: {name} needs {' and '.join(missing)}, not installed here: pip install {packages}, or write "
                "report_to: none"
            )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a part of a package that is not there
        return False
