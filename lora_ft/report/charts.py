"""Line charts as geometry, which pages/pieces.html draws as SVG. Knows numbers only: no run, no HTML, no torch."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from lora_ft.report.labels import BOTTOM, CHARACTER, LEFT, RIGHT, TOP, Label, boxes_along, place_labels

WIDTH, HEIGHT = 440, 254
MAX_POINTS = 300  # per line: more than a screen resolves
RUN_COLOURS = ("#1f6feb", "#c2410c", "#15803d", "#9333ea", "#0e7490", "#be185d", "#a16207", "#4d5761")
# look -> colour on white paper; style.css has others for dark screens
COLOURS = {"raw": "#a9c6f5", "mean": "#1f6feb", "eval": "#c2410c", "base": "#6b7280"}
COLOURS |= {f"run-{i}": colour for i, colour in enumerate(RUN_COLOURS, 1)}


@dataclass(frozen=True)
class Line:
    """points: (x, y). look: a key of COLOURS. dots: whether each point is marked, with its value as a tooltip.

    intervals: x -> the ends of the interval of y there. named: the last point has the line's name beside it.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: str
    dots: bool = False
    intervals: Mapping[float, Sequence[float]] = field(default_factory=dict)
    named: bool = False


@dataclass(frozen=True)
class Drawn:
    """A line in pixels. dots: (x, y, tooltip). whiskers: (x, top, bottom). summary: in words. label: the name at its dot."""

    name: str
    look: str
    path: str
    dots: list[tuple[float, float, str]]
    whiskers: list[tuple[float, float, float]]
    summary: str
    label: Label | None = None


@dataclass(frozen=True)
class Chart:
    """Pixels. Ticks: (position, label). note: how the y axis differs from one that starts at 0."""

    title: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Drawn]
    note: str


def run_look(index: int) -> str:
    """The look of the run or variant at a place in a comparison."""
    return f"run-{index % len(RUN_COLOURS) + 1}"


def format_x(x: float) -> str:
    """`1,200`, `2.5M`."""
    return f"{x / 1e6:,.4g}M" if abs(x) >= 1e6 else f"{x:,.6g}"


def chart(
    title: str,
    lines: Sequence[Line],
    x_label: str = "step",
    *,
    y_format: Callable[[float], str] = "{:.4g}".format,
    x_format: Callable[[float], str] = format_x,
    full_scale: float | None = None,
    from_zero: bool = False,
    auto_log: bool = False,
    log_x: bool = False,
) -> Chart | None:
    """A chart of `lines`; None if there is nothing to draw: no line, or a single x.

    full_scale: the largest y that there can be. from_zero: y starts at 0 in any case. auto_log: y is logarithmic if it spans
    more than a factor of 20. log_x: x is if it is positive.
    """
    lines = [replace(line, points=downsample(line.points)) for line in lines if line.points]
    xs, ys = ([point[axis] for line in lines for point in line.points] for axis in (0, 1))
    if len(set(xs)) < 2:
        return None
    ys += [end for line in lines for ends in line.intervals.values() for end in ends]
    log_y, log_x = auto_log and min(ys) > 0 and max(ys) / min(ys) > 20, log_x and min(xs) > 0
    scale_x, scale_y = (math.log10 if log else float for log in (log_x, log_y))
    x0, x1 = scale_x(min(xs)), scale_x(max(xs))
    aside = (x1 - x0) * 0.06 if all(len(line.points) == 1 for line in lines) else 0.0  # dots keep off the edges
    x0, x1 = x0 - aside, x1 + aside
    if log_y:
        y0, y1 = math.log10(min(ys)), math.log10(max(ys))
        y0, y1 = y0 - (y1 - y0) * 0.06, y1 + (y1 - y0) * 0.06
    else:
        y0, y1 = y_range(min(ys), max(ys), full_scale, from_zero)

    def position(x: float, y: float) -> tuple[float, float]:
        right, up = (scale_x(x) - x0) / (x1 - x0), (scale_y(y) - y0) / (y1 - y0)
        return round(LEFT + right * (RIGHT - LEFT), 1), round(BOTTOM - up * (BOTTOM - TOP), 1)

    drawn, names, ends_of_lines = [], [], []
    for line in lines:
        positions = [position(*point) for point in line.points]
        texts = [_with_interval(y, line.intervals.get(x), y_format) for x, y in line.points]
        dots = [
            (x, y, f"{line.name}: {text} at {x_label} {x_format(at)}")
            for (x, y), (at, _), text in zip(positions, line.points, texts, strict=True)
        ]
        whiskers = [
            (position(x, low)[0], position(x, high)[1], position(x, low)[1])
            for x, (low, high) in line.intervals.items()
        ]
        path = "M" + "L".join(f"{x:g},{y:g}" for x, y in positions)
        first = f"{y_format(line.points[0][1])} to " if len(line.points) > 1 else ""
        summary = f"{line.name} {first}{texts[-1]}".strip()
        drawn.append(Drawn(line.name, line.look, path, dots if line.dots else [], whiskers, summary))
        names.append((line.name, *positions[-1]) if line.named else None)
        ends_of_lines += [(positions[-1], positions[-2])] if len(positions) > 1 else []
    covered = [(x - 1, top, x + 1, bottom) for line in drawn for x, top, bottom in line.whiskers]
    covered += [box for at in ends_of_lines for box in boxes_along(*at)]
    labels = place_labels(names, covered)
    drawn = [replace(line, label=label) for line, label in zip(drawn, labels, strict=True)]
    x_values, y_values = (log_ticks if log_x else ticks)(x0, x1), (log_ticks if log_y else ticks)(y0, y1)
    x_ticks = _apart([(position(x, ys[0])[0], x_format(x)) for x in x_values])
    y_ticks = [(position(xs[0], y)[1], without_zeros(y_format(y))) for y in y_values]
    note = "logarithmic" if log_y else f"axis from {without_zeros(y_format(y0))}" if y0 else ""
    return Chart(title, x_label, x_ticks, y_ticks, drawn, note)


def y_range(low: float, high: float, full_scale: float | None = None, from_zero: bool = False) -> tuple[float, float]:
    """Ends of an axis that doesn't exaggerate: from 0, unless the values would be squeezed into its upper part.

    Even then it spans a quarter of the full scale, else of the largest value, so that noise looks like noise. The ends
    are round.
    """
    size = full_scale or max(abs(low), abs(high)) or 1.0
    span = max((high - low) * 1.1, size / 4)
    start = (low + high - span) / 2
    if low >= 0 and (from_zero or start < 0.6 * high):
        start, span = 0.0, max(high * 1.04, size / 4)
    elif full_scale and start + span > full_scale:
        start = full_scale - span
    end = start + span
    for _ in range(2):  # round ends may make room for other ticks, which the ends are to be among
        first, second, *_ = ticks(start, end)
        step = second - first
        start, end = math.floor(start / step + 1e-9) * step, math.ceil(end / step - 1e-9) * step
    return round(start, 12) + 0.0, full_scale if full_scale and low >= 0 and end > full_scale else round(end, 12)


def _apart(labels: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The labels of a horizontal axis without those that would touch the one before."""
    kept: list[tuple[float, str]] = []
    for x, text in labels:
        if not kept or x - kept[-1][0] > (len(text) + len(kept[-1][1]) + 1) * CHARACTER / 2:
            kept.append((x, text))
    return kept


def _with_interval(value: float, ends: Sequence[float] | None, y_format: Callable[[float], str]) -> str:
    return y_format(value) + (f" ({' to '.join(map(y_format, ends))})" if ends else "")


def without_zeros(label: str) -> str:
    """`0.8000` as `0.8`, `90.0%` as `90%`."""
    return re.sub(r"(\.\d*?)0+(?=%?$)", r"\1", label).replace(".%", "%").rstrip(".")


def downsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points: neighbours are averaged; the last x stays."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], fmean(y for _, y in group)) for group in groups]


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each point averaged with its neighbours, over a twentieth of the line; [] if the line is too short for that."""
    half = len(points) // 40
    near = [points[max(0, i - half) : i + half + 1] for i in range(len(points))] if half else []
    return [(x, fmean(y for _, y in some)) for (x, _), some in zip(points, near, strict=False)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values whose log10 is within [low, high]: 1, 2 and 5 times powers of ten; powers alone over more than three decades.

    If fewer than two of these are within, round values.
    """
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    values = [m * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    values = [value for value in values if low <= math.log10(value) <= high]
    return values if len(values) > 1 else ticks(10**low, 10**high)
