"""Sample answers of base and adapter to a few eval rows, side by side in the report."""

import time
from contextlib import nullcontext

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.data.examples import Examples
from lora_ft.methods.interface import bare, virtual_ids
from lora_ft.model.generate import end_tokens, generate, position_limit, to_text

ROWS, MAX_TOKENS, MAX_CHARS = 4, 96, 4000
OPENING_TOKENS = 32  # of a plain text, given as the prompt


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    seconds: float,
    chat_template: str | None = None,
) -> list[dict]:
    """Greedy answers to rows spread over `examples`, within about `seconds` in all. Draws no random number.

    The prompt is a row up to its last supervised span (a completion, an assistant's turn), or the opening of a plain text;
    the rest of the span is the reference. Returns a dict per row: where, prompt, reference, base, adapter; and cut, which
    of "base" and "adapter" reached the limit of time or tokens. chat_template: the run's own, for `end_tokens`.
    """
    count, prefix = min(ROWS, len(examples.dataset)), virtual_ids(model)
    rows = [examples.dataset[i * len(examples.dataset) // count] for i in range(count)]
    spans = [_last_span(row["labels"]) for row in rows]
    limit = min(MAX_TOKENS, max(16, *(3 * (end - start) // 2 for start, end in spans)))
    ends = end_tokens(tokenizer, model.generation_config, chat_template)
    positions = position_limit(model) or 2**31
    samples, deadline = [], time.perf_counter() + seconds
    for i, (row, (start, end)) in enumerate(zip(rows, spans, strict=True)):
        ids = row["input_ids"]
        sample: dict = {"where": row["where"], "cut": []}
        sample |= {"prompt": _shortened(tokenizer, ids[:start]), "reference": _shortened(tokenizer, ids[start:end])}
        for j, (name, before) in enumerate((("base", []), ("adapter", prefix))):
            share = (deadline - time.perf_counter()) / (2 * (count - i) - j)  # time that others left unused is shared
            prompt = before + ids[:start]
            new = min(limit, max(1, positions - len(prompt)))  # GPT-2 has no further positions
            config = GenerationConfig(max_new_tokens=new, max_time=max(share, 0.1), do_sample=False)
            with bare(model) if name == "base" else nullcontext():
                (answer,) = generate(model, [prompt], config, ends)
            sample[name] = _shortened(tokenizer, answer.ids)
            if not answer.ended:
                sample["cut"].append(name)
        samples.append(sample)
    return samples


def _last_span(labels: list[int]) -> tuple[int, int]:
    """Start and end of the last supervised span; in a text that is supervised from its start, of what follows its opening."""
    end = max(i for i, label in enumerate(labels, 1) if label >= 0)
    start = max((i for i, label in enumerate(labels[:end], 1) if label < 0), default=0)
    return (start, end) if start > 1 else (max(1, min(OPENING_TOKENS, end // 2)), end)


def _shortened(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = to_text(tokenizer, ids)
    return text if len(text) <= MAX_CHARS else "..." + text[-MAX_CHARS:]
