"""The page is well formed, needs nothing else, and takes nothing that users wrote for its own."""

import json
import re
from html.parser import HTMLParser

import pytest

from hybrid_opt.reports.writing import write_report
from tests.reports.folders import write_run, write_study

VOID = {"meta", "link", "br", "hr", "img", "input"}
ATTACK = '<script>alert("x")</script>'


class Strict(HTMLParser):
    """Raises where an element is not closed, or an id is used twice; keeps what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.headings, self.names = [], set(), [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names.append(tag)
        if "id" in attributes:
            assert attributes["id"] not in self.ids, attributes["id"]
            self.ids.add(attributes["id"])
        self.references += [attributes[name] for name in ("href", "src", "xlink:href", "action") if name in attributes]
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def parsed(text: str) -> Strict:
    page = Strict()
    page.feed(text)
    assert not page.open
    return page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return [write_report(write(folder / write.__name__)).read_text() for write in (write_run, write_study)]


def test_pages_are_well_formed_and_alone(pages):
    for text in pages:
        page = parsed(text)
        assert page.references
        assert all(reference.startswith("#") and reference[1:] in page.ids for reference in page.references)
        assert not {"script", "img", "iframe", "link"} & set(page.names)
        assert not re.search(r"https?://|url\((?!#)|@import", text)
        assert page.headings[0] == 1
        assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))


def test_colours_follow_the_page(pages):
    for text in pages:
        drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
        assert not re.search(r"#[0-9a-f]{6}\b", drawings.replace('"#', ""))
        assert "var(--c0)" in drawings


def test_the_same_folder_gives_the_same_page(tmp_path, pages):
    assert write_report(write_run(tmp_path / "write_run")).read_text() == pages[0]


def test_what_users_write_is_escaped(tmp_path):
    study = write_study(tmp_path / "study", seeds=(0,), steps=4, status=lambda arm, seed: "failed")
    index = json.loads((study / "study.json").read_text())
    index |= {"title": ATTACK, "description": ATTACK, "metric": ATTACK, "reference": ATTACK}
    index["arms"][0] = index["runs"][0]["arm"] = ATTACK
    index["runs"][0]["error"] = ATTACK
    (study / "study.json").write_text(json.dumps(index))
    (study / "study.yaml").write_text(f"description: '{ATTACK}'\n")
    page = parsed(write_report(study).read_text())
    assert "script" not in page.names
    markdown = write_report(study, "md").read_text().split("```")[0]
    assert "<script" not in markdown.replace(r"\<", "")
