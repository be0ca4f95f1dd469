"""The palette of reports, and stand-ins for it in SVG. Next: `keys.py`, which deals the colours out.

One idea: a figure is drawn once, with colours that stand for roles; in HTML each becomes a CSS variable, so that the same figure
follows light, dark and print. The series' colours are Okabe and Ito's, which colour-blind readers can tell apart, darkened on light
ground and lightened on dark.
"""

LIGHT = {
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d5d9de",
    "paper": "#ffffff",
    "c0": "#0067a8",
    "c1": "#c24e00",
    "c2": "#007d5a",
    "c3": "#a8498a",
    "c4": "#8a6d00",
    "c5": "#2f8fc9",
    "c6": "#8c2d04",
    "c7": "#5b5ea6",
}
DARK = {
    "ink": "#e8eaed",
    "muted": "#a7afb8",
    "grid": "#3a4048",
    "paper": "#16191d",
    "c0": "#56b4e9",
    "c1": "#f0883e",
    "c2": "#3fc79a",
    "c3": "#e29ac6",
    "c4": "#e6c229",
    "c5": "#9ecff0",
    "c6": "#ffb59c",
    "c7": "#b3b6f2",
}
SERIES = tuple(name for name in LIGHT if name[0] == "c")
STAND_INS = {name: f"#{index + 1:02x}c0de" for index, name in enumerate(LIGHT)}
"""Colours that nobody would choose, to be found in the SVG and replaced."""


def with_variables(svg: str) -> str:
    """The SVG with a CSS variable in place of each stand-in."""
    for name, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
