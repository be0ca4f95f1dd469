"""From a folder to a file of the report. Next: `reading.py`, then `content.py`.

One idea: folder -> records -> content -> format; each step knows only the one before it.
"""

from pathlib import Path

from hybrid_opt.errors import UserError
from hybrid_opt.reports.as_json import as_json
from hybrid_opt.reports.content import Report
from hybrid_opt.reports.html import as_html
from hybrid_opt.reports.markdown import as_markdown
from hybrid_opt.reports.picture import write_picture
from hybrid_opt.reports.reading import read_folder
from hybrid_opt.reports.records import Run
from hybrid_opt.reports.run_sections import report_of_run
from hybrid_opt.reports.study_sections import report_of_study


def write_report(folder: str | Path, kind: str = "html", output: str | Path | None = None) -> Path:
    """Write a report on the run or the study in a folder, and say where.

    Args:
        kind: html, md (with a picture beside it), json or png.
        output: the file; None: `report.<kind>` in the folder.

    Raises:
        UserError: the folder holds neither, a file in it is damaged, or the output cannot be written.
    """
    path = Path(folder) / f"report.{kind}" if output is None else Path(output)
    report = read_report(folder)
    try:
        _write(report, kind, path)
    except OSError as error:
        hint = "" if path.parent.is_dir() else "; make its folder first"
        raise UserError(
            f"{path}: cannot be written: {error.strerror}{hint}, or choose another file with --output"
        ) from None
    return path


def read_report(folder: str | Path) -> Report:
    """The content of a report, in no format yet."""
    found = read_folder(Path(folder))
    return report_of_run(found) if isinstance(found, Run) else report_of_study(found)


def _write(report: Report, kind: str, path: Path) -> None:
    if kind == "png":
        write_picture(report, path)
    elif kind == "md":
        picture = path.with_suffix(".png")
        path.write_text(as_markdown(report, picture.name), encoding="utf-8")
        write_picture(report, picture)
    else:
        path.write_text({"html": as_html, "json": as_json}[kind](report), encoding="utf-8")
