"""Names beside the dots of a chart, placed so that they cover neither each other nor a dot. Knows pixels only."""

from collections.abc import Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 52, 428, 12, 216  # of the plot area of a chart
CHARACTER, HEIGHT, GAP = 8.2, 16, 9  # pixels, of a phone's larger letters
MAX_NAME = 24
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Label:
    """text: the name, shortened. x, y: where it starts or, by `anchor`, ends. leader: the SVG path from a far dot, or ""."""

    text: str
    x: float
    y: float
    anchor: str
    leader: str


def place_labels(dots: Sequence[tuple[str, float, float] | None], covered: Sequence[Box] = ()) -> list[Label | None]:
    """A label for each (name, x, y); None for None. covered: what should stay visible besides the dots."""
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for dot in dots if dot for _, x, y in [dot]]
    placed: dict[int, Label] = {}
    for i in sorted((i for i, dot in enumerate(dots) if dot), key=lambda i: dots[i][2]):  # type: ignore[index]
        name, x, y = dots[i]  # type: ignore[misc]
        text = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
        label, box = min(
            (_at(text, x, y, *place) for place in _places()), key=lambda at: _badness(at[1], taken, covered, x, y)
        )
        taken.append(box)
        placed[i] = label
    return [placed.get(i) for i in range(len(dots))]


def boxes_along(
    end: tuple[float, float], before: tuple[float, float], count: int = 12, reach: float = 180.0
) -> list[Box]:
    """Small boxes over the last part of a straight line, as far as a name beside its end could cover it."""
    length = max(abs(end[0] - before[0]), abs(end[1] - before[1]), 1.0)
    steps = [i / count * min(1.0, reach / length) for i in range(1, count + 1)]
    points = [(end[0] + (before[0] - end[0]) * t, end[1] + (before[1] - end[1]) * t) for t in steps]
    return [(x - 6, y - 2, x + 6, y + 2) for x, y in points]


def _places() -> list[tuple[str, float]]:
    """(side, how far up or down) from the best to the last."""
    shifts = [0.0] + [sign * distance for distance in range(HEIGHT, 12 * HEIGHT, HEIGHT // 2) for sign in (1, -1)]
    return [(side, shift) for shift in shifts for side in ("start", "end", "middle")]


def _at(text: str, x: float, y: float, anchor: str, shift: float) -> tuple[Label, Box]:
    width = len(text) * CHARACTER
    right = {"start": x + GAP, "end": x - GAP, "middle": x}[anchor]
    left = right - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
    middle = y + shift
    leader = f"M{x:g},{y:g}L{right:g},{middle:g}" if abs(shift) > 2 * HEIGHT else ""
    box = (left, middle - HEIGHT / 2, left + width, middle + HEIGHT / 2)
    return Label(text, round(right, 1), round(middle + 4, 1), anchor, leader), box


def _badness(box: Box, taken: Sequence[Box], covered: Sequence[Box], x: float, y: float) -> float:
    """Square pixels of names and dots covered, ten times, and of the rest; what is outside of the plot; the distance."""
    outside = sum(max(0.0, excess) for excess in (LEFT - box[0], box[2] - RIGHT - 8, TOP - 8 - box[1], box[3] - BOTTOM))
    away = abs((box[1] + box[3]) / 2 - y) + abs((box[0] + box[2]) / 2 - x) / 100
    return 10 * _overlap(box, taken) + _overlap(box, covered) + 100 * outside + away


def _overlap(box: Box, others: Sequence[Box]) -> float:
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in others
    )
