"""The curves as a picture. The only room that knows matplotlib, and imported only to draw."""

import io
import math

from matplotlib.figure import Figure

from lora_ft.report.charts import Chart

COLOURS = {"raw": "#a9c6f5", "mean": "#1f6feb", "eval": "#c2410c", "base": "#6b7280"}  # as in style.css


def charts_png(charts: list[Chart]) -> bytes:
    """A PNG of charts (at least one), two in a row."""
    rows = math.ceil(len(charts) / 2)
    figure = Figure(figsize=(10, 3 * rows), dpi=100, layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis, chart in zip(axes, charts, strict=False):
        for line in chart.source:
            xs, ys = zip(*line.points, strict=True)
            style = {"marker": "o", "markersize": 4} if line.dots else {}
            dashes = "--" if line.look == "base" else "-"
            axis.plot(xs, ys, dashes, color=COLOURS[line.look], linewidth=1.5, label=line.name, **style)
        axis.set_title(chart.title, fontsize=10, loc="left", parse_math=False)
        axis.set_xlabel(chart.x_label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if chart.log:
            axis.set_yscale("log")
        if chart.log_x:
            axis.set_xscale("log")
        if chart.zero:
            axis.set_ylim(0, 1.05 * max(y for line in chart.source for _, y in line.points) or 1)
        if len(chart.source) > 1:
            for text in axis.legend(fontsize=8, frameon=False).get_texts():
                text.set_parse_math(False)
    for axis in axes[len(charts) :]:
        axis.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": "lora-ft"})
    return content.getvalue()
