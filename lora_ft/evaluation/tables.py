"""How scores are shown: a table for each eval set, and what was written after its first prompt; all texts in a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_ft.core.messages import printable
from lora_ft.core.metrics import METRICS, TEXT_METRICS, format_metric, interval
from lora_ft.core.storage import write_file
from lora_ft.evaluation.references import Questions


@dataclass
class Result:
    """Of one eval set the metrics of each, base and adapter or a whole model, and what they wrote if they were asked."""

    name: str
    examples: int
    label_words: list[str]
    asked: Questions | None
    scores: dict[str, dict] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)

    def as_dict(self, several: bool) -> dict:
        """For machines; of several adapters, each under its name beside the base."""
        if not several:
            return {"examples": self.examples, **self.scores}
        adapters = {who: metrics for who, metrics in self.scores.items() if who != "base"}
        return {"examples": self.examples, "base": self.scores["base"], "adapters": adapters}


def show(result: Result) -> None:
    """Tables for people, on stdout, and what was written after the first prompt."""
    console = Console(highlight=False)
    console.print(Text(f"{f'{result.name}: ' if result.name else ''}{result.examples:,} examples"))
    names = [name for name in METRICS if name in next(iter(result.scores.values()))]
    if len(result.scores) > 2:  # a row each, so that any number of them fits a terminal
        for of_texts in (False, True):
            if shown := [name for name in names if (name in TEXT_METRICS) == of_texts]:
                rows = {who: [figure(name, metrics) for name in shown] for who, metrics in result.scores.items()}
                console.print(table([METRICS[name].title for name in shown], rows))
    else:
        rows = {METRICS[name].title: [figure(name, metrics) for metrics in result.scores.values()] for name in names}
        console.print(table(list(result.scores), rows))
    for who, metrics in result.scores.items():
        if "confusion" in metrics:
            console.print(Text(f"{printable(who)}: true label by row, answer by column"))
            counts = zip(result.label_words, metrics["confusion"], strict=True)
            rows = {word: list(map(str, row)) for word, row in counts}
            console.print(table(result.label_words, rows, no_wrap=False))
    if result.asked:
        show_first(result.asked, result.texts, console)


def table(headings: Sequence[str], rows: Mapping[str, Sequence[str]], no_wrap: bool = True) -> Table:
    """Rows by name, which is folded where room is short; figures on the right. no_wrap: they and headings stay whole."""
    made = Table()
    made.add_column("", overflow="fold")
    for heading in headings:
        made.add_column(Text(printable(heading)), justify="right", no_wrap=no_wrap)
    for name, cells in rows.items():
        made.add_row(Text(printable(name)), *cells)
    return made


def figure(name: str, metrics: dict) -> str:
    """A metric with its 95% interval, if it has one: `85.4% (81.3% to 88.7%)`."""
    value, ends = format_metric(name, metrics[name]), interval(name, metrics)
    return f"{value} ({' to '.join(format_metric(name, end) for end in ends)})" if ends else value


def show_first(asked: Questions, texts: dict[str, list[str]], console: Console) -> None:
    references = sum(map(len, asked.references))
    console.print(f"\n{len(asked.prompts):,} prompts with {references:,} references. The first:")
    shown = [("prompt", asked.prompts[0]), ("reference", asked.references[0][0])]
    for who, text in [*shown, *((who, texts[who][0]) for who in texts)]:
        console.print(Text(f"  {who:10} {printable(text.strip(), 1000)}"), soft_wrap=True)


def save_texts(path: Path, results: list[Result]) -> None:
    """A line for each prompt: the prompt, its references, and what each wrote."""
    lines = [
        {**({"set": result.name} if result.name else {}), "prompt": prompt, "references": references}
        | {who: texts[i] for who, texts in result.texts.items()}
        for result in results
        if result.asked
        for i, (prompt, references) in enumerate(zip(result.asked.prompts, result.asked.references, strict=True))
    ]
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
