"""A report as one HTML file that needs nothing else. Next: `template.html`, `style.css`.

One idea: the page is complete without scripts and without a network; the template escapes whatever a user wrote.
"""

import re
from functools import lru_cache
from itertools import count
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hybrid_opt.reports.colours import DARK, LIGHT
from hybrid_opt.reports.content import Key, Report
from hybrid_opt.reports.describing import described
from hybrid_opt.reports.svg import key_svg, panel_svg

HERE = Path(__file__).parent


def as_html(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawn"] = lambda panel: Markup(panel_svg(panel))
    numbers = count()
    environment.filters["sample"] = lambda key: Markup(_sample(key).replace("sample-", f"sample{next(numbers)}-"))
    environment.filters["described"] = described
    return environment.get_template("template.html").render(report=report, style=Markup(_style()))


@lru_cache(maxsize=64)
def _sample(key: Key) -> str:
    """The same sample stands in many legends, each time with ids of its own."""
    return re.sub(r'(id="|#)([mp][0-9a-f]{10})\b', r"\1sample-\2", key_svg(key))


def _style() -> str:
    light, dark = (" ".join(f"--{name}: {value};" for name, value in palette.items()) for palette in (LIGHT, DARK))
    sheet = (HERE / "style.css").read_text(encoding="utf-8")
    # Dark is for screens only, so that paper is always light.
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{sheet}"
