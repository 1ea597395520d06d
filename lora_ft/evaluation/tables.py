"""Evaluation results as tables and JSON; all generated texts as a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_ft.core.messages import json_text, printable
from lora_ft.core.metrics import METRICS, TEXT_METRICS, VS_BASE, format_difference, format_metric, interval
from lora_ft.core.storage import write_file
from lora_ft.evaluation.references import EvalPrompts


@dataclass
class EvalResult:
    """One eval set's metrics and generated texts by model: "base", "adapter" or "model", or the folders of several adapters.

    name: of the set, "" for a single one. texts: one for each of `prompts`.
    """

    name: str
    examples: int
    label_words: list[str]
    prompts: EvalPrompts | None
    scores: dict[str, dict] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self, several: bool) -> dict:
        """The object of `eval --json`; several adapters are grouped beside the base."""
        if not several:
            return {"examples": self.examples, **self.scores}
        adapters = {model: metrics for model, metrics in self.scores.items() if model != "base"}
        return {"examples": self.examples, "base": self.scores["base"], "adapters": adapters}


def print_result(result: EvalResult) -> None:
    """Print a set's metrics, confusion tables and first generated texts on stdout."""
    console = Console(highlight=False)
    console.print(Text(f"{f'{result.name}: ' if result.name else ''}{result.examples:,} examples"))
    keys = [key for key in METRICS if key in next(iter(result.scores.values()))]
    if len(result.scores) > 2:  # a row per model, so that any number of them fits a terminal
        for of_texts in (False, True):
            if some := [key for key in keys if (key in TEXT_METRICS) == of_texts]:
                rows = {name: [with_interval(key, scores) for key in some] for name, scores in result.scores.items()}
                console.print(table([METRICS[key].title for key in some], rows))
    else:
        console.print(comparison(result, keys))
        for line in mended(result):
            console.print(Text(line))
    for model, metrics in result.scores.items():
        if "confusion" in metrics:
            console.print(Text(f"{printable(model)}, rows: true label, columns: predicted"))
            counts = [list(map(str, row)) for row in metrics["confusion"]]
            rows = dict(zip(result.label_words, counts, strict=True))
            console.print(table(result.label_words, rows, no_wrap=False))
    if prompts := result.prompts:
        references = sum(map(len, prompts.references))
        console.print(f"\n{len(prompts.texts):,} prompts with {references:,} references. The first:")
        first = {"prompt": prompts.texts[0], "reference": prompts.references[0][0]}
        for name, text in [*first.items(), *((model, texts[0]) for model, texts in result.texts.items())]:
            console.print(Text(f"  {printable(name):10} {printable(text.strip(), 1000)}"), soft_wrap=True)


def comparison(result: EvalResult, keys: Sequence[str]) -> Table:
    """The metrics of one model, or of base and adapter with their difference on the same rows."""
    *_, own = result.scores.values()
    if not any(key.endswith(VS_BASE) for key in own):
        rows = {METRICS[key].title: [with_interval(key, of) for of in result.scores.values()] for key in keys}
        return table(list(result.scores), rows)
    rows = {
        METRICS[key].title: [
            *(format_metric(key, of[key]) for of in result.scores.values()),
            format_difference(key, own),
        ]
        for key in keys
    }
    return table([*result.scores, "difference (95% interval)"], rows)


def mended(result: EvalResult) -> list[str]:
    """In words, how many rows only one of base and adapter has right."""
    *_, own = result.scores.values()
    return [
        f"{METRICS[key].title}: only the adapter is right on {entry['better']:,} rows, only the base on {entry['worse']:,} "
        f"(McNemar's exact test: p = {entry['p']:.2g})"
        for key in METRICS
        if (entry := own.get(f"{key}{VS_BASE}")) and "p" in entry
    ]


def table(headings: Sequence[str], rows: Mapping[str, Sequence[str]], no_wrap: bool = True) -> Table:
    """A table with a name before each row, right-aligned. no_wrap: cells and headings are never broken into lines."""
    made = Table()
    made.add_column("", overflow="fold")
    for heading in headings:
        made.add_column(Text(printable(heading)), justify="right", no_wrap=no_wrap)
    for name, cells in rows.items():
        made.add_row(Text(printable(name)), *cells)
    return made


def with_interval(key: str, metrics: dict) -> str:
    """A metric with its 95% interval, if it has one: `85.4% (81.3% to 88.7%)`."""
    value, ends = format_metric(key, metrics[key]), interval(key, metrics)
    return f"{value} ({' to '.join(format_metric(key, end) for end in ends)})" if ends else value


def save_texts(path: Path, results: Sequence[EvalResult]) -> None:
    """Write one JSON object per prompt: the prompt, its references, and each model's text."""
    lines = [
        {**({"set": result.name} if result.name else {}), "prompt": prompt, "references": references}
        | {model: texts[i] for model, texts in result.texts.items()}
        for result in results
        if result.prompts
        for i, (prompt, references) in enumerate(zip(result.prompts.texts, result.prompts.references, strict=True))
    ]
    write_file(path, "".join(json_text(line) + "\n" for line in lines))
