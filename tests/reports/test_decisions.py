"""What a schedule decided, in the report."""

import json

from hybrid_opt.reports.decisions import decision_sections
from hybrid_opt.reports.reading import read_run
from hybrid_opt.reports.writing import write_report
from tests.reports.folders import jsonl, step, write_run


def decided(folder, number=12):
    write_run(folder)
    rows = [step(n, ("es",)) for n in range(number)]
    for n in range(0, number, 3):
        rows[n]["decision"] = f"es, with the highest index, {n}"
        if n:
            rows[n]["account"] = {"es": {"rate": 0.5 * n, "index": 1.0 * n}}
        if n > 3:
            rows[n]["account"]["backprop"] = {"rate": -0.25 * n, "index": 0.0}
    jsonl(folder / "metrics.jsonl", rows)
    return folder


def test_panels_and_table_have_what_was_weighed(tmp_path):
    (section,) = decision_sections(read_run(decided(tmp_path / "run")))
    rate, index = section.groups[0].panels
    lines = {series.key.label: (series.x, series.y) for series in rate.series}
    assert lines == {"es": ((4, 7, 10), (1.5, 3.0, 4.5)), "backprop": ((7, 10), (-1.5, -2.25))}
    assert {series.key.label: series.y for series in index.series} == {"es": (3.0, 6.0, 9.0), "backprop": (0.0, 0.0)}
    assert section.tables[0].texts()[1] == ["3", "es, with the highest index, 3"]
    assert len(section.tables[0].rows) == 4


def test_only_the_latest_of_many_are_listed(tmp_path):
    (section,) = decision_sections(read_run(decided(tmp_path / "run", 300)))
    assert len(section.tables[0].rows) == 60
    assert section.tables[0].rows[-1]["step"] == 297
    assert section.tables[0].notes == ("The latest 60 of 100.",)


def test_every_format_shows_them_and_a_run_without_has_no_section(tmp_path):
    folder = decided(tmp_path / "run")
    for kind in ("html", "md"):
        assert "es, with the highest index, 9" in write_report(folder, kind, None).read_text()
    document = json.loads(write_report(folder, "json", None).read_text())
    assert "decisions_rate" in json.dumps(document)
    assert not list(decision_sections(read_run(write_run(tmp_path / "without"))))
