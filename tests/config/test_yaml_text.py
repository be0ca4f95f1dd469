"""YAML within bounds: what is refused, where, and how quickly."""

import os
import time

import pytest

from hybrid_opt.config.loading import load_run, parse_override
from hybrid_opt.config.yaml_text import MOST_BYTES, parse_yaml, read_yaml
from hybrid_opt.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-5", 3e-5),
        ("1e3", 1000.0),
        ("-2E+4", -2e4),
        ("+1.5e2", 150.0),
        ("2.e1", 20.0),
        (".5", 0.5),
        ("3.0e-5", 3e-5),
    ],
)
def test_numbers(tmp_path, text, value):
    (tmp_path / "a.yaml").write_text(f"a: {text}\nb: '{text}'\n")
    document = read_yaml(tmp_path / "a.yaml")
    assert (document["a"], type(document["a"])) == (value, float)
    assert document["b"] == text


def test_dates_are_texts_and_aliases_and_merges_work():
    text = "a: 2001-99-99\nb: '='\nc: &c {x: 1, y: [2]}\nd: {<<: *c, x: 3}\ne: *c\n"
    assert parse_yaml(text, "f") == {
        "a": "2001-99-99",
        "b": "=",
        "c": {"x": 1, "y": [2]},
        "d": {"x": 3, "y": [2]},
        "e": {"x": 1, "y": [2]},
    }


def doubled(first: str, again: str) -> str:
    """Twenty anchors, each of nine of the one before: 9^20 values."""
    lines = [f"a0: &a0 {first}", *(f"a{i}: &a{i} {again.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 20))]
    return "\n".join(lines)


BAD = {
    "laughs": (doubled("[x, x]", "[{}]"), "line 6, column 15: the document has more than 50,000 values"),
    "merged laughs": (doubled("{x: 1}", "{{<<: [{}]}}"), "line 6, column 20: the document has more than 50,000 values"),
    "recursive": ("a: &a [*a]", "line 1, column 8: an alias stands within what it stands for"),
    "deep list": ("[" * 100_000, "line 1, column 51: lists and mappings are nested more than 50 deep"),
    "deep mapping": (
        "".join(f"{' ' * i}a:\n" for i in range(900)),
        "line 50, column 50: lists and mappings are nested",
    ),
    "many digits": (f"a: {'9' * 5000}", "line 1, column 4: '99999999999999999999' is no int"),
    "64 bits": (f"a: {2**63}", "line 1, column 4: a whole number has more than 63 bits"),
    "object": ("a: !!python/object/apply:os.system [id]", "line 1, column 4: the tag 'tag:yaml.org,2002:python/object"),
    "binary": ("!!binary aGk=", "line 1, column 1: the tag 'tag:yaml.org,2002:binary' is not known here"),
    "timestamp": ("!!timestamp x", "line 1, column 1: the tag 'tag:yaml.org,2002:timestamp' is not known here"),
    "set": ("!!set {a}", "line 1, column 1: the tag 'tag:yaml.org,2002:set' is not known here"),
    "no int": ("a: !!int x", "line 1, column 4: 'x' is no int"),
    "no bool": ("a: !!bool x", "line 1, column 4: 'x' is no bool"),
    "no map": ("a: !!map x", "line 1, column 4: expected a mapping node"),
    "no digits": ("a: 0b_", "line 1, column 4: '0b_' is no int"),
    "NUL": ("a: b\0", "unacceptable character #x0000"),
    "escaped NUL": ('a: "b\\0"', "line 1, column 4: a text holds a NUL or half a character"),
    "surrogate": ('a: "\\ud800"', "line 1, column 4: a text holds a NUL or half a character"),
    "beyond Unicode": ('a: "\\Uffffffff"', "not YAML: "),
    "list as key": ("[1]: 2", "line 1, column 1: a key must be a text or a number, not [1]"),
    "twice": ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is written twice"),
    "unfinished": ("a: {b: [}", "line 1, column 9: "),
    "two documents": ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
    "a list": ("- a", "expected keys and values such as 'output: runs/one', found a list"),
    "a number": ("3", "expected keys and values such as 'output: runs/one', found a int"),
    "empty": ("", "expected keys and values such as 'output: runs/one', found nothing"),
    "large": (f"a: '{'x' * MOST_BYTES}'", "cannot be read: it is larger than 1,000,000 bytes"),
    "wide": ("a: [" + "1," * 60_000 + "]", "line 1, column 100003: the document has more than 50,000 values"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_refused_at_once_on_one_line(tmp_path, name):
    text, message = BAD[name]
    (tmp_path / "a.yaml").write_bytes(text.encode())
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_run(tmp_path / "a.yaml")
    assert time.monotonic() - began < 15
    assert str(caught.value).startswith(f"{tmp_path / 'a.yaml'}: {message}")
    assert "\n" not in str(caught.value)


def test_overrides_are_read_alike():
    with pytest.raises(
        UserError, match=r"^command line: 'data\.prompt=\"\\\\0\"': line 1, column 1: a text holds a NUL"
    ):
        parse_override('data.prompt="\\0"')


def test_what_is_no_ordinary_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "cannot be read: it is a pipe or a device, not an ordinary file"),
        (tmp_path, "cannot be read: it is a directory, not an ordinary file"),
        (tmp_path / ("x" * 300), "cannot be read: .*File name too long"),
        (tmp_path / "a\0b", "cannot be read: embedded null byte"),
        (tmp_path / "none", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_yaml(path)
