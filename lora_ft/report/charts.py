"""Line charts as geometry: what charts.svg draws. Knows numbers, no run and no HTML."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 428, 12, 216
MOST_POINTS = 300  # of a line: more than a screen shows


@dataclass(frozen=True)
class Line:
    """points: (x, y). look: the CSS class: raw, mean, eval, base, or run-N. dots: whether its points are drawn, with values."""

    name: str
    points: Sequence[tuple[float, float]]
    look: str
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """source: what it shows, for whoever draws it otherwise; log, zero, log_x: its axes, as in `chart`.

    x_ticks, y_ticks: (position, label). lines: (name, look, path, dots as (x, y, what it says)).
    """

    title: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str, str, list[tuple[float, float, str]]]]
    source: list[Line]
    log: bool
    zero: bool
    log_x: bool


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str = "step",
    *,
    form: Callable[[float], str] = lambda y: f"{y:.4g}",
    x_form: Callable[[float], str] = lambda x: f"{x / 1e6:,.4g}M" if abs(x) >= 1e6 else f"{x:,.6g}",
    zero: bool = False,
    may_be_log: bool = False,
    log_x: bool = False,
) -> Chart | None:
    """A chart of `lines`; None where there is nothing to draw.

    Args:
        form: how a value of y is written; x_form: of x.
        zero: y begins at 0.
        may_be_log: y is logarithmic where it spans more than a factor of 20.
        log_x: x is logarithmic, where it is above 0.
    """
    lines = [Line(line.name, thinned(line.points), line.look, line.dots) for line in lines if line.points]
    xs, ys = ([point[axis] for line in lines for point in line.points] for axis in (0, 1))
    if not lines or len(set(xs)) < 2:
        return None
    log, log_x = may_be_log and min(ys) > 0 and max(ys) / min(ys) > 20, log_x and min(xs) > 0
    scaled, along = (math.log10 if is_log else float for is_log in (log, log_x))
    x0, x1 = along(min(xs)), along(max(xs))
    y0, y1 = scaled(0.0 if zero else min(ys)), scaled(max(ys))
    margin = (y1 - y0) * 0.06 or abs(y1) * 0.1 or 1.0
    y0, y1 = (y0 if zero else y0 - margin), y1 + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + (along(x) - x0) / (x1 - x0) * (RIGHT - LEFT), 1),
            round(BOTTOM - (scaled(y) - y0) / (y1 - y0) * (BOTTOM - TOP), 1),
        )

    x_values = log_ticks(x0, x1) if log_x else ticks(x0, x1, 5)
    y_values = log_ticks(y0, y1) if log else ticks(y0, y1, 5)
    drawn = []
    for line in lines:
        places = [at(*point) for point in line.points]
        dots = [
            (x, y, f"{line.name}: {form(point[1])} at {x_label} {x_form(point[0])}")
            for (x, y), point in zip(places, line.points, strict=True)
        ]
        path = "M" + "L".join(f"{x:g},{y:g}" for x, y in places)
        drawn.append((line.name, line.look, path, dots if line.dots else []))
    return Chart(
        title,
        x_label,
        [(at(x, 1.0 if log else y0)[0], x_form(x)) for x in x_values],
        [(at(min(xs), y)[1], form(y)) for y in y_values],
        drawn,
        lines,
        log,
        zero,
        log_x,
    )


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS: neighbours become their mean, the last stays the last."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
    return [*means[:-1], (points[-1][0], means[-1][1])]


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each point's mean with those around it, over a twentieth of the line; [] where the line is too short for it."""
    half = len(points) // 40
    if half < 1:
        return []
    means = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values within [low, high], about so many: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times each power of ten whose logarithm is within [low, high]; powers alone over more than three."""
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    values = [m * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    return [value for value in values if low <= math.log10(value) <= high]
