"""Sample answers of base and adapter to a few eval rows, side by side in the report."""

import re
import time
from contextlib import nullcontext

import numpy as np
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.data.chats.format import ChatFormat, end_tokens
from lora_ft.data.examples import Examples, column_array
from lora_ft.data.tokens import text_encoder
from lora_ft.evaluation.references import prompt_and_reference
from lora_ft.methods.interface import bare, virtual_ids
from lora_ft.model.generate import generate, position_limit, to_text

ROWS, MAX_TOKENS, MAX_CHARS = 4, 256, 4000
OPENING_TOKENS, CONTINUATION_TOKENS = 32, 64  # of a plain text: given as the prompt, shown of what follows
SENTENCE_END = re.compile(r".*[.!?][\"')\]\u201d]*(?=\s|$)", re.DOTALL)


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    seconds: float,
    chat: ChatFormat | None = None,
    of_chats: bool = False,
) -> list[dict]:
    """Greedy answers to rows spread over `examples`, within about `seconds` in all: fewer where time is short.

    The prompt is a row up to its last supervised span (a completion, an assistant's turn), with the generation prompt in a
    chat, or the opening of a plain text; the span is the reference. Returns a dict per row: where, prompt, reference, base,
    adapter; and cut, which of these were cut at a limit of tokens or, of the first row only, of time. A plain text has no
    end, so that its continuations are shown up to the end of a sentence. chat: the chat format, if there is one. of_chats:
    the examples are chats. Draws no random number.
    """
    count, prefix = min(ROWS, len(examples.dataset)), virtual_ids(model)
    rows = [examples.dataset[i * len(examples.dataset) // count] for i in range(count)]
    spans = [_last_span(row["labels"]) for row in rows]
    plain = not any(label < 0 for label in rows[0]["labels"][1:]) if rows else False
    limit = CONTINUATION_TOKENS if plain else min(MAX_TOKENS, max(16, *(2 * (end - start) for start, end in spans)))
    ends = end_tokens(tokenizer, model.generation_config, chat)
    positions = position_limit(model) or 2**31
    encoder, row_numbers = text_encoder(tokenizer), column_array(examples.texts, "row")
    template = ""  # special tokens of a chat template are part of an answer
    samples, started, slowest = [], time.perf_counter(), 0.0
    for row, (start, end) in zip(rows, spans, strict=True):
        row_started = time.perf_counter()
        if row_started - started + slowest > seconds:
            break
        end = min(end, start + limit) if plain else end
        asked, expected = row["input_ids"][:start], row["input_ids"][start:end]
        prompt_text, reference = to_text(tokenizer, asked), to_text(tokenizer, expected)
        text = examples.texts[int(np.searchsorted(row_numbers, row["row"]))]
        if chat and of_chats and not row["truncated"]:
            prompt_text, reference = prompt_and_reference(text, chat)
            asked, template = encoder.encode_bare(prompt_text).tolist(), chat.template
        sample: dict = {"where": row["where"], "cut": []}
        sample |= {"prompt": _shortened(prompt_text), "reference": _shortened(reference)}
        for name, before in (("base", []), ("adapter", prefix)):
            prompt = before + asked
            new = min(limit, max(1, positions - len(prompt)))  # GPT-2 has no further positions
            config = GenerationConfig(max_new_tokens=new, max_time=max(seconds, 0.1), do_sample=False)
            with bare(model) if name == "base" else nullcontext():
                (answer,) = generate(model, [prompt], config, ends)
            sample[name] = _shortened(to_text(tokenizer, answer.ids, template))
            if not answer.ended:
                sample["cut"].append(name)
        if plain:
            sample |= {name: _to_sentence_end(sample[name]) for name in ("reference", "base", "adapter")}
            sample["cut"] = []
        samples.append(sample)
        slowest = max(slowest, time.perf_counter() - row_started)
    return samples


def _last_span(labels: list[int]) -> tuple[int, int]:
    """Start and end of the last supervised span; in a text that is supervised from its start, of what follows its opening."""
    end = max(i for i, label in enumerate(labels, 1) if label >= 0)
    start = max((i for i, label in enumerate(labels[:end], 1) if label < 0), default=0)
    return (start, end) if start > 1 else (max(1, min(OPENING_TOKENS, end // 2)), end)


def _to_sentence_end(text: str) -> str:
    """`text` up to the end of its last complete sentence, else marked as cut."""
    return found[0] if (found := SENTENCE_END.match(text)) else f"{text} \u2026"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARS else "..." + text[-MAX_CHARS:]
