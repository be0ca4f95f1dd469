"""Where numbers beside points and line ends go, so that none hides another. Next: `drawing.py`.

One idea: the number of a point tries places around it and takes the first that is free; numbers of lines that end near one another
are stacked beside their ends, in the lines' order.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float]

DISTANCES = (9.0, 15.0, 21.0, 28.0, 36.0)
ANGLES = (0, 45, -45, 90, -90, 135, -135, 180)
HALF = (5.5, 5.0)
"""Half the width and height of a number of two digits, in points of type."""
GAP = 12.0
"""From the end of the longest of some lines to their numbers."""


def around_points(points: Sequence[Point], width: float, height: float) -> list[Point]:
    """An offset for each point's number.

    Args:
        points: in points of type, within a panel from (0, 0) to (width, height).
    """
    taken: list[Point] = []
    for point in points:
        offsets = [_offset(distance, angle) for distance in DISTANCES for angle in ANGLES]
        centres = [(point[0] + dx, point[1] + dy) for dx, dy in offsets]
        taken.append(min(centres, key=lambda centre: _crowding(centre, taken, points, width, height)))
    return [(x - px, y - py) for (x, y), (px, py) in zip(taken, points, strict=True)]


def _offset(distance: float, angle: float) -> Point:
    return distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))


def _crowding(centre: Point, labels: Sequence[Point], points: Sequence[Point], width: float, height: float) -> int:
    """How many labels and points a label there would hide, and whether it would leave the panel."""
    over_labels = sum(_near(centre, other, 2.0) for other in labels)
    over_points = sum(_near(centre, other, 1.4) for other in points)
    outside = not (-2 <= centre[0] <= width + 14 and 4 <= centre[1] <= height)
    return 3 * over_labels + over_points + 4 * outside


def _near(one: Point, other: Point, times: float) -> bool:
    return all(abs(a - b) < times * half for a, b, half in zip(one, other, HALF, strict=True))


def beside_ends(ends: Sequence[Point], height: float) -> list[Point]:
    """An offset for the number of each line that ends there; the panel reaches from 0 to `height`."""
    offsets = [(GAP, 0.0)] * len(ends)
    for stack in _stacks(ends):
        right = max(ends[i][0] for i in stack) + GAP
        for i, y in zip(stack, _spread([ends[i][1] for i in stack], height), strict=True):
            offsets[i] = (right - ends[i][0], y - ends[i][1])
    return offsets


def _stacks(ends: Sequence[Point]) -> list[list[int]]:
    """Lines that end less than two numbers' width from the next one, from the lowest end to the highest."""
    stacks: list[list[int]] = []
    for i in sorted(range(len(ends)), key=lambda i: ends[i][0]):
        if stacks and ends[i][0] - ends[stacks[-1][-1]][0] < 4 * HALF[0]:
            stacks[-1].append(i)
        else:
            stacks.append([i])
    return [sorted(stack, key=lambda i: ends[i][1]) for stack in stacks]


def _spread(heights: Sequence[float], most: float) -> list[float]:
    """Ascending heights moved apart: each neighbourhood that would overlap is stacked around its own middle."""
    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and _top(blocks[-2], most) + 2 * HALF[1] > _bottom(blocks[-1], most):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [_bottom(block, most) + 2 * HALF[1] * i for block in blocks for i in range(len(block))]


def _bottom(block: Sequence[float], most: float) -> float:
    tall = 2 * HALF[1] * (len(block) - 1)
    return max(HALF[1], min(sum(block) / len(block) - tall / 2, most - tall))


def _top(block: Sequence[float], most: float) -> float:
    return _bottom(block, most) + 2 * HALF[1] * (len(block) - 1)
