import pytest

from hybrid_opt.errors import UserError
from hybrid_opt.objectives.template import Template

ROW = {"title": "Glass", "body": "{title} is {half} full", "stars": 4, "good": True, "gap": None}


def render(text: str) -> str:
    template = Template.parse(text, "data.prompt")
    template.check(ROW)
    return template.render(template.values(ROW, 0))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no column", "no column"),
        ("", ""),
        ("{title}", "Glass"),
        ("{title}{title}: {stars}/5\n", "GlassGlass: 4/5\n"),
        ("{{title}} {title} }}{{", "{title} Glass }{"),
        ("{{{stars}}}", "{4}"),
        ("{body}!", "{title} is {half} full!"),  # braces in a value are the value's own
        ("good: {good}", "good: True"),
    ],
)
def test_rendering(text, expected):
    assert render(text) == expected


def test_columns_are_named_once_in_order():
    assert Template.parse("{b} {{c}} {a} {b}", "k").columns == ["b", "a"]


def test_only_the_named_columns_are_taken():
    assert Template.parse("{stars} {title}", "k").values(ROW, 0) == {"stars": "4", "title": "Glass"}


@pytest.mark.parametrize("text", ["{", "}", "{title", "title}", "{a{b}}", "{title!}"])
def test_braces_that_do_not_match(text):
    with pytest.raises(UserError, match=r"^data\.prompt: .*write \{\{ and \}\} for braces themselves$"):
        Template.parse(text, "data.prompt")


@pytest.mark.parametrize("text", ["{}", "{ }", "{title!r}", "{stars:>3}", "{stars:{title}}"])
def test_anything_but_a_column_between_braces(text):
    with pytest.raises(UserError, match=r"^data\.prompt: only column names may stand between braces"):
        Template.parse(text, "data.prompt")


def test_an_unknown_column_gets_a_suggestion():
    with pytest.raises(UserError, match=r"^k: there is no column 'titel' \(did you mean 'title'\?\); columns: title, "):
        Template.parse("{titel}", "k").check(ROW)


def test_a_missing_value_names_row_and_column():
    with pytest.raises(UserError, match=r"^data\.prompt: row 8 has no value in column 'gap'"):
        Template.parse("{title} {gap}", "data.prompt").values(ROW, 8)
