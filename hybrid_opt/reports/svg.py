"""Panels as SVG that can stand in a page. Next: `html.py`.

One idea: text stays text, in the page's own font, and nothing in the SVG names a place outside it or an id that another panel has.
"""

import io
import re

import matplotlib
from matplotlib.figure import Figure

from hybrid_opt.reports.colours import STAND_INS, with_variables
from hybrid_opt.reports.content import Key, Plot, Timeline
from hybrid_opt.reports.drawing import STYLE, WIDTH, draw, draw_key, height_of


def panel_svg(panel: Plot | Timeline) -> str:
    """An `<svg>` element that follows the page's colours and width."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height_of(panel)), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure.subplots(), panel, STAND_INS)
        return _inline(figure, panel.name)


def key_svg(key: Key) -> str:
    """The sample of a legend's entry."""
    with matplotlib.rc_context(STYLE):
        return _inline(draw_key(key, STAND_INS), f"{key.colour}{key.marker}{key.dash}")


def _inline(figure: Figure, name: str) -> str:
    """What ids are made from is salted with the panel's name: the same panel gives the same text, two panels never share an id."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r"; font-family: [^;]*|; stroke-linecap: round| transform=\"rotate\(-0 [^)]*\)\"", "", svg)
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group()), svg)  # never in texts
    svg = re.sub(r"\s*\n\s*", " ", svg)
    return with_variables(svg)
