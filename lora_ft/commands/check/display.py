"""How `lora-ft check` prints its results: 80 columns, plain text where there is no colour."""

import itertools
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import yaml
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.core.messages import escape_controls, printable
from lora_ft.core.terminal import columns
from lora_ft.nn.expert_names import PATH, parameter_of
from lora_ft.nn.lora import ALL_ROWS, LoRALinear

WIDTH, BINS = 79, 8
SHOWN_START, SHOWN_END = 320, 160  # characters of a longer part of an example: its first and its last
SHOWN_LINES = 24  # of an example


def console() -> Console:
    """A console that breaks lines between words on a terminal, and not in a pipe."""
    piped = columns(sys.stdout) is None
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=piped, width=columns(sys.stdout))


def section(out: Console, title: str, lines: Iterable[str | Text] = ()) -> None:
    """Print a bold title after an empty line, and the lines below it."""
    out.print(f"\n{escape_controls(title)}", style="bold")
    for line in lines:
        out.print(escape_controls(line) if isinstance(line, str) else line)


def paragraph(out: Console, text: str, style: str = "") -> None:
    """Print text wrapped to the width, continuation lines indented."""
    lines = textwrap.wrap(
        escape_controls(text), WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    out.print("\n".join(lines), style=style)


def settings_lines(config: Config) -> list[str]:
    """The settings that the config gives, as YAML, and below them the defaults of all others, a paragraph per section."""
    everything = config.model_dump(mode="json")
    given = {name: value for name, value in config.model_dump(mode="json", exclude_unset=True).items() if value != {}}
    lines = [_yaml(given, default_flow_style=False), "defaults of the others"]
    for section, value in everything.items():
        own = given.get(section, {})
        rest = {k: v for k, v in value.items() if k not in own} if isinstance(value, dict) else value
        if rest != {} and (section not in given or isinstance(value, dict)):
            text = _yaml({section: rest}, default_flow_style=True, width=10_000).strip()[1:-1]
            lines += textwrap.wrap(f"  {text}", WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    return lines


def _yaml(settings: Mapping, **layout: object) -> str:
    options: dict = {"sort_keys": False, "allow_unicode": True, "width": WIDTH - 12, **layout}
    return textwrap.indent(yaml.safe_dump(settings, **options).rstrip(), "  ")


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


def highlight_supervised(
    example: Mapping, tokenizer: PreTrainedTokenizerBase, encoding: str, turns: Sequence[tuple[str, int]] = ()
) -> list[Text]:
    """An example after template, truncation and masking, shortened; supervised tokens are green and between marks.

    turns: the kind of each turn of a chat and where it starts in the text; each is shown below a line with its kind and, if
    it is supervised, the token that it ends in.
    """
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    runs = [
        (supervised, [i for i, _ in run]) for supervised, run in itertools.groupby(pairs, lambda pair: pair[1] >= 0)
    ]
    pieces = [(supervised, tokenizer.decode(ids), ids) for supervised, ids in runs]  # a character may be several tokens
    left, right = marks(encoding)
    starts = dict(zip((start for _, start in turns), turns, strict=True))
    lines, text, position = [], Text(), 0
    for supervised, piece, ids in pieces:
        inner = sorted(start for start in starts if position <= start < position + len(piece))
        cuts = sorted({position, *inner, position + len(piece)})
        for start, end in itertools.pairwise(cuts):
            if start in inner:
                lines += [text] if text else []
                text = Text()
                lines.append(Text(f"  {starts[start][0]}", style="bold"))
            part = piece[start - position : end - position]
            if not supervised:  # no blank lines between turns
                part = part.lstrip("\n") if start in starts else part
                part = part.rstrip("\n") if end in starts else part
            escaped = "\n".join(printable(line, 100_000) for line in shortened(part).split("\n"))
            style = "bold green" if supervised else ""
            text.append(f"{left}{escaped}{right}" if supervised and escaped else escaped, style=style)
        if supervised and turns:
            lines[-1].append(
                f", supervised, ends in {printable(tokenizer.convert_ids_to_tokens(ids[-1]))}", style="green"
            )
        position += len(piece)
    lines.append(text)
    if len(lines) > SHOWN_LINES:
        lines[SHOWN_LINES // 2 : -SHOWN_LINES // 2] = [Text(f"  ... {len(lines) - SHOWN_LINES} more lines ...")]
    return lines


def shortened(text: str) -> str:
    """A long text's start and end, broken between words, and how much is between them."""
    if len(text) <= SHOWN_START + SHOWN_END + 40:
        return text
    start, end = text[:SHOWN_START].rsplit(maxsplit=1)[0], text[-SHOWN_END:].split(maxsplit=1)[-1]
    return f"{start} [... {len(text) - len(start) - len(end):,} characters ...] {end}"


def target_lines(layers: Mapping[str, LoRALinear]) -> list[str]:
    """A line for the modules that are adapted in the same way in several layers: name, parts, shape, layers, parameters."""
    groups: dict[tuple, set[int]] = {}
    for path, layer in layers.items():
        *number, name = re.split(r"\.(\d+)\.", parameter_of(path), maxsplit=1)[-2:]
        parameters = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("base."))
        role = "" if list(layer.rows) == [ALL_ROWS] else f" ({'+'.join(layer.rows)})"
        role += " of each expert" if PATH.fullmatch(path) else ""
        what = f"{name}{role}, {layer.in_features} -> {layer.out_features}"
        groups.setdefault((what, parameters), set()).update(map(int, number))
    return [
        f"  {what}: {f'layers {spans(at)}' if at else 'outside the layers'}; {parameters:,} each"
        for (what, parameters), at in groups.items()
    ]


def spans(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    groups = itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[n for _, n in run] for _, run in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
