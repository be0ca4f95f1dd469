"""Where numbers beside points and line ends go, so that none hides another. Next: `drawing.py`.

One idea: each number tries places around its point, nearest and right first, and takes the first that is free.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float]

DISTANCES = (9.0, 15.0, 21.0, 28.0, 36.0)
AROUND = (0, 45, -45, 90, -90, 135, -135, 180)
"""Angles to try around a point."""
AFTER = (0, 25, -25, 50, -50, 70, -70)
"""Angles to try at the end of a line, so that numbers stay off the line."""
HALF = (5.5, 5.0)
"""Half the width and height of a number of two digits, in points of type."""


def places(points: Sequence[Point], width: float, height: float, angles: Sequence[int] = AROUND) -> list[Point]:
    """An offset for each point's number.

    Args:
        points: in points of type, within a panel from (0, 0) to (width, height).
        angles: directions to try, in degrees.
    """
    taken: list[Point] = []
    for point in points:
        offsets = [_offset(distance, angle) for distance in DISTANCES for angle in angles]
        centres = [(point[0] + dx, point[1] + dy) for dx, dy in offsets]
        taken.append(min(centres, key=lambda centre: _crowding(centre, taken, points, width, height)))
    return [(x - px, y - py) for (x, y), (px, py) in zip(taken, points, strict=True)]


def _offset(distance: float, angle: float) -> Point:
    return distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))


def _crowding(centre: Point, labels: Sequence[Point], points: Sequence[Point], width: float, height: float) -> int:
    """How many labels and points a label there would hide, and whether it would leave the panel."""
    over_labels = sum(_near(centre, other, 2.0) for other in labels)
    over_points = sum(_near(centre, other, 1.4) for other in points)
    outside = not (-2 <= centre[0] <= width + 30 and 4 <= centre[1] <= height)
    return 3 * over_labels + over_points + 4 * outside


def _near(one: Point, other: Point, times: float) -> bool:
    return all(abs(a - b) < times * half for a, b, half in zip(one, other, HALF, strict=True))
