"""Whether one of several runs or variants has won: its metric is better than every other's by more than chance explains."""

from collections.abc import Callable, Sequence

from lora_ft.core.messages import listed
from lora_ft.core.metrics import VS_BASE, format_difference, format_metric, metric_of
from lora_ft.report.confusion import shortened

Ends = Sequence[float]


def winner(
    key: str, values: Sequence[tuple[str, float]], difference: Callable[[int, int], Ends | None], basis: str
) -> dict[str, str]:
    """`sentence`, `detail`, `verdict` ("better" if there is a winner) and the name of the `best` in a comparison by a metric.

    values: (name, value) of each candidate. difference: of two candidates' places, the ends of the 95% interval of the first
    value minus the second, or None if it is unknown. basis: what the intervals are of, in words.

    The best must be better than each other one; this needs no correction for their number, as all have to be exceeded
    (an intersection-union test: Berger 1982, Technometrics 24:295).
    """
    title, lower = metric_of(key).title, metric_of(key).lower_is_better
    if len(values) < 2:
        return {"sentence": "No winner: there is nothing to compare yet.", "detail": "", "verdict": "", "best": ""}
    best = (min if lower else max)(range(len(values)), key=lambda i: values[i][1])
    full_name, value = values[best]
    values = [(shortened(name, 60), value) for name, value in values]
    name = values[best][0]
    others = [i for i in range(len(values)) if i != best]
    ends = {i: difference(best, i) for i in others}
    rivals = [i for i in others if not _excludes_zero(ends[i], lower)]
    closest = min(rivals or others, key=lambda i: abs(values[i][1] - value))
    known = ends[closest]
    compared = {f"{key}{VS_BASE}": {"difference": value - values[closest][1], "ci95": known or [0.0, 0.0]}}
    by, _, interval = format_difference(key, compared).partition(" (")
    shown = f" (95% interval {interval.removesuffix(')')}, {basis})" if known else f" ({basis})"
    detail = f"The closest is {values[closest][0]}: {by}{shown}."
    if not rivals:
        sentence, detail = (
            f"Winner: {name}, with {title} {format_metric(key, value)}.",
            f"It is better than every other. {detail}",
        )
        return {"sentence": sentence, "detail": detail, "verdict": "better", "best": full_name}
    names = listed([values[i][0] for i in rivals], 4)
    reason = "" if known else " Without an interval of the difference, it may be chance."
    sentence = f"No winner: {name} has the best {title}, {format_metric(key, value)}, but {names} may be as good."
    return {"sentence": sentence, "detail": detail + reason, "verdict": "", "best": full_name}


def _excludes_zero(ends: Ends | None, lower_is_better: bool) -> bool:
    """Whether a difference is certainly in favour of the first."""
    return ends is not None and (ends[1] < 0 if lower_is_better else ends[0] > 0)
