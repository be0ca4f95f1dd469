"""What a panel shows, in words, for those who cannot see it. Next: `html.py`.

One idea: the words are made from the numbers that are drawn.
"""

from hybrid_opt.reports.content import Plot, Series, Timeline
from hybrid_opt.reports.wording import number

MOST = 12
"""Series that are told one by one."""


def described(panel: Plot | Timeline) -> str:
    """A sentence or two."""
    if isinstance(panel, Timeline):
        lanes = ", ".join(dict.fromkeys(lane.label for lane in panel.lanes))
        return f"{panel.title}, over steps, a lane each: {lanes}."
    told = "; ".join(_told(series, panel) for series in panel.series[:MOST])
    more = f"; and {len(panel.series) - MOST} more" if len(panel.series) > MOST else ""
    return f"{panel.title}. {told}{more}."


def _told(series: Series, panel: Plot) -> str:
    label = series.key.label
    if not series.x:
        return f"{label}: nothing"
    if panel.categories:
        return f"{label}: {panel.x_label} from {number(min(series.x))} to {number(max(series.x))}"
    if len(series.x) == 1:
        return f"{label}: {panel.y_label} {number(series.y[0])} at {number(series.x[0])} {panel.x_label}"
    return f"{label}: {panel.y_label} from {number(series.y[0])} to {number(series.y[-1])}"
