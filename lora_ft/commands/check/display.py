"""How `lora-ft check` prints its results: 80 columns, plain text where there is no colour."""

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lora_ft.commands.check.memory import Memory
from lora_ft.core.messages import printable
from lora_ft.nn.lora import LoRALinear

WIDTH, BINS = 79, 8


def console() -> Console:
    """A console that leaves wrapping to the terminal, so that piped output stays as it is."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def heading(out: Console, text: str) -> None:
    """Print a bold line after an empty one."""
    out.print(f"\n{text}", style="bold")


def paragraph(out: Console, text: str, style: str = "") -> None:
    """Print text wrapped to the width, continuation lines indented."""
    lines = textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    out.print("\n".join(lines), style=style)


def histogram(lengths: np.ndarray, max_length: int) -> list[tuple[int, int | None, int]]:
    """(from, to, examples) by tokens before truncation: each bin up to max_length, then (max_length + 1, None, examples)."""
    top = min(int(lengths.max()), max_length)
    width = -(-top // BINS)
    edges = [(low, min(low + width - 1, top)) for low in range(1, top + 1, width)]
    counted = [(low, high, int(((lengths >= low) & (lengths <= high)).sum())) for low, high in edges]
    return [*counted, (max_length + 1, None, int((lengths > max_length).sum()))]


def histogram_lines(bins: Sequence[tuple[int, int | None, int]], encoding: str) -> list[str]:
    """One bar per bin, in characters that the encoding has."""
    most = max(count for _, _, count in bins)
    block = "█" if encoding.lower().startswith("utf") else "#"
    lines = []
    for low, high, count in bins:
        label = f"{low:,}-{high:,}" if high else f"over {low - 1:,}"
        lines.append(f"  {label:>15} {block * -(-count * 40 // most):<40} {count:,}".rstrip())
    return lines


def marks(encoding: str) -> tuple[str, str]:
    """The marks around supervised tokens."""
    return ("»", "«") if encoding.lower().startswith("utf") else (">>", "<<")


def highlight_supervised(example: Mapping, tokenizer: PreTrainedTokenizerBase, encoding: str) -> Text:
    """An example after template, truncation and masking; supervised tokens are green and between marks."""
    left, right = marks(encoding)
    text = Text()
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    for supervised, run in itertools.groupby(pairs, key=lambda pair: pair[1] >= 0):
        piece = tokenizer.decode([token for token, _ in run])  # run by run: a character may be several tokens
        escaped = "\n".join(printable(line, 100_000) for line in piece.split("\n"))
        text.append(f"{left}{escaped}{right}" if supervised else escaped, style="bold green" if supervised else "")
    return text


def target_lines(layers: Mapping[str, LoRALinear]) -> list[str]:
    """A line for the modules that are adapted in the same way in several layers: name, parts, shape, layers, parameters."""
    groups: dict[tuple, list[int | None]] = {}
    for path, layer in layers.items():
        number = re.search(r"\.(\d+)\.", path)
        name = path[number.end() :] if number else path
        numbers = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("base."))
        key = (name, "+".join(layer.rows), f"{layer.in_features} -> {layer.out_features}", numbers)
        groups.setdefault(key, []).append(int(number[1]) if number else None)
    lines = []
    for (name, parts, shape, numbers), where in groups.items():
        at = [n for n in where if n is not None]
        placed = f"layers {spans(at)}" if at else "outside the layers"
        role = "" if parts == "all" else f" ({parts})"
        lines.append(f"  {name}{role}, {shape}: {placed}; {numbers:,} each")
    return lines


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    groups = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[n for _, n in run] for _, run in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def memory_lines(memory: Memory) -> list[str]:
    """A line for each part of a memory estimate."""
    return [f"  {name:<12}{size(value):>12}" for name, value in memory.as_dict().items()]


def size(number: float) -> str:
    """Bytes in a readable unit: 1,234 MiB, 12.3 GiB."""
    if number >= 10 * 2**30:
        return f"{number / 2**30:,.1f} GiB"
    return f"{number / 2**20:,.0f} MiB" if number >= 100 * 2**20 else f"{number / 2**20:,.1f} MiB"
