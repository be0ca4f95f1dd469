"""A report's numbers as strict JSON. Next: `markdown.py`.

One idea: a number that is not finite has no JSON, so it becomes null.
"""

import json
import math
from dataclasses import asdict
from typing import Any

from hybrid_opt.reports.content import Group, Plot, Report, Section, Table, Timeline


def as_json(report: Report) -> str:
    """The whole report; tables as rows of values, panels as the numbers drawn."""
    document = {
        "kind": report.kind,
        "title": report.title,
        "description": report.description,
        "facts": dict(report.facts),
        "remarks": report.remarks,
        "sections": [_section(section) for section in report.sections],
    }
    return json.dumps(_finite(document), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _section(section: Section) -> dict[str, Any]:
    return {
        "name": section.name,
        "title": section.title,
        "texts": section.texts,
        "tables": [_table(table) for table in section.tables],
        "groups": [_group(group) for group in section.groups],
        "code": section.code,
    }


def _table(table: Table) -> dict[str, Any]:
    columns = [{"key": column.key, "title": column.title} for column in table.columns]
    return {"name": table.name, "caption": table.caption, "columns": columns, "rows": table.rows, "notes": table.notes}


def _group(group: Group) -> dict[str, Any]:
    return {"title": group.title, "caption": group.caption, "panels": [_panel(panel) for panel in group.panels]}


def _panel(panel: Plot | Timeline) -> dict[str, Any]:
    if isinstance(panel, Timeline):
        lanes = [{"label": lane.label, "edges": lane.edges, "weights": lane.weights} for lane in panel.lanes]
        return {"name": panel.name, "title": panel.title, "x": panel.x_label, "lanes": lanes}
    series = [{**asdict(line), "key": None, "label": line.key.label} for line in panel.series]
    for line in series:
        del line["key"]
    labels = {"x": panel.x_label, "y": panel.y_label, "categories": panel.categories}
    return {"name": panel.name, "title": panel.title, **labels, "series": series}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
