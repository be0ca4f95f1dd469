"""YAML that does no harm, whoever wrote it. Next: `loading.py`.

One idea: a document says no more than JSON could (texts, numbers, truth values, nothing, lists, mappings), it is bounded in size however
often it repeats itself, and whatever is wrong with it is one kind of error.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from hybrid_opt.errors import UserError

MOST_BYTES = 1_000_000
"""Of a file; run files have thousands."""
MOST_VALUES = 50_000
"""In a document, an alias counting for all that it stands for: a few lines of aliases of aliases would fill the memory."""
DEEPEST = 50
"""Levels of lists and mappings."""
LARGEST = 2**63 - 1
"""Whole number; beyond it a number is a slip, and neither JSON's readers nor torch take it."""

YAML_12_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
"""Tag, form and first characters of numbers such as 3e-5, which YAML 1.1 takes for texts."""
TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Loader(yaml.SafeLoader):
    """Safe YAML within the bounds above that refuses a key written twice and reads `3e-5` as a number, as YAML 1.2 does."""

    # Dates and `=` are texts.
    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag in TAGS or tag.endswith(":merge")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0
        self.whole: dict[yaml.Node, int] = {}  # values in each finished node

    def compose_node(self, parent: Any, index: Any) -> Any:
        before = self.values
        self.depth += 1
        mark = self.peek_event().start_mark
        if self.depth > DEEPEST:
            raise _problem(f"lists and mappings are nested more than {DEEPEST} deep", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and node not in self.whole:
            raise _problem("an alias stands within what it stands for", mark)
        self.values += self.whole[node] if is_alias else 1
        if self.values > MOST_VALUES:
            raise _problem(f"the document has more than {MOST_VALUES:,} values, aliases counted in full", mark)
        self.whole.setdefault(node, self.values - before)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in TAGS:
            raise _problem(f"the tag {node.tag!r} is not known here; write a plain value", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError) as error:  # of `!!int x`, `!!bool x`, 0b_, or a number of 5000 digits
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"{node.value[:20]!r} is no {kind}", node.start_mark) from error

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        if re.search(r"[\0\ud800-\udfff]", text):
            raise _problem("a text holds a NUL or half a character (\\0, \\ud800)", node.start_mark)
        return text

    def construct_yaml_int(self, node: Any) -> Any:
        number = super().construct_yaml_int(node)
        if abs(number) > LARGEST:
            raise _problem("a whole number has more than 63 bits", node.start_mark)
        return number

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = None if key_node.tag.endswith(":merge") else self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, type(None))):
                raise _problem(f"a key must be a text or a number, not {key!r}", key_node.start_mark)
            if key in seen:
                raise _problem(f"key {key!r} is written twice", key_node.start_mark)
            seen |= set() if key_node.tag.endswith(":merge") else {key}
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(*YAML_12_FLOAT)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _problem(what: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says.

    Args:
        where: what to put in front of messages.

    Raises:
        UserError: it is not YAML, or beyond the bounds; with line and column.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}: {place}{getattr(error, 'problem', None) or str(error).splitlines()[0]}") from None
    except (
        ValueError,
        OverflowError,
    ) as error:  # PyYAML's scanner passes on what int() and chr() say, as of "\\Uffffffff"
        raise UserError(f"{where}: not YAML: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    document = parse_yaml(read_text(path), str(path))
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected keys and values such as 'output: runs/one', found {_kind(document)}")
    return document


def read_text(path: Path) -> str:
    """The text of a configuration file.

    Raises:
        UserError: the file is missing, unreadable, no ordinary file (a pipe may never end), or larger than MOST_BYTES.
    """
    try:
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "a pipe or a device"
            raise UserError(f"{path}: cannot be read: it is {kind}, not an ordinary file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(
                f"{path}: cannot be read: it is larger than {MOST_BYTES:,} bytes, so it is no configuration"
            )
        return content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError, and so are bytes that are not UTF-8
        raise UserError(f"{path}: cannot be read: {error}") from None


def _kind(value: Any) -> str:
    names = {type(None): "nothing", list: "a list", str: "a text", dict: "keys and values"}
    return names.get(type(value), f"a {type(value).__name__}")
