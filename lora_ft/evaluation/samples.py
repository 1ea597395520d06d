"""A few answers of base and adapter to eval rows, side by side: what a person looks at first when a run has ended."""

import itertools
import time

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.data.examples import Examples
from lora_ft.methods.interface import bare

ROWS, MOST_TOKENS, SHOWN = 4, 96, 4000  # SHOWN: characters of a text that are kept
OPENING = 32  # tokens of a plain text that are given


def generate_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, seconds: float
) -> list[dict]:
    """Greedy answers to rows spread over `examples`, within about `seconds` in all.

    A row is asked up to its last supervised stretch (a completion, an assistant's turn), a plain text up to its opening;
    what follows there is the reference. Each sample: where, prompt, reference, base, adapter; and, where time or the limit
    of tokens cut an answer, cut: a list of "base", "adapter". Draws no random number.
    """
    count = min(ROWS, len(examples.dataset))
    rows = [examples.dataset[i * len(examples.dataset) // count] for i in range(count)]
    asked = [
        (row["input_ids"][:at], row["input_ids"][at:end]) for row in rows for at, end in [_answer_of(row["labels"])]
    ]
    limit = min(MOST_TOKENS, max(16, *(3 * len(reference) // 2 for _, reference in asked)))
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
    was_training, samples, until = model.training, [], time.perf_counter() + seconds
    model.eval()
    for i, (row, (prompt, reference)) in enumerate(zip(rows, asked, strict=True)):
        sample: dict = {"where": row.get("where") or f"row {row['row']}", "cut": []}
        sample |= {"prompt": _text(tokenizer, prompt), "reference": _text(tokenizer, reference)}
        for j, who in enumerate(("base", "adapter")):
            share = (until - time.perf_counter()) / (2 * (len(rows) - i) - j)  # what others didn't need is shared
            settings = GenerationConfig(
                max_new_tokens=limit,
                max_time=max(share, 0.1),
                do_sample=False,
                use_cache=True,
                eos_token_id=sorted(ends) or None,
                pad_token_id=next(iter(sorted(ends)), 0),
            )
            ids = torch.tensor([prompt], device=model.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if who == "base":
                with bare(model):
                    made = model.generate(**inputs, generation_config=settings)
            else:
                made = model.generate(**inputs, generation_config=settings)
            answer = made[0, len(prompt) :].tolist()
            if not (answer and answer[-1] in ends):
                sample["cut"].append(who)
            sample[who] = _text(tokenizer, answer)
        samples.append(sample)
    model.train(was_training)
    return samples


def _answer_of(labels: list[int]) -> tuple[int, int]:
    """Where the last supervised stretch begins and ends; of a text supervised throughout, where its opening ends."""
    stretches, at = [], 0
    for supervised, run in itertools.groupby(labels, key=lambda label: label >= 0):
        length = len(list(run))
        if supervised:
            stretches.append((at, at + length))
        at += length
    start, end = stretches[-1]
    return (start, end) if start > 1 else (max(1, min(OPENING, end // 2)), end)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if len(text) <= SHOWN else "..." + text[-SHOWN:]


def _listed(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
