"""The prompts of an eval set for generation, each once, with all of its reference texts."""

import re
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import info
from lora_ft.data.chats.encode import cut_chat_prompt
from lora_ft.data.chats.format import ChatFormat
from lora_ft.data.cuts import LOST, LOST_OF_CHATS
from lora_ft.data.examples import Examples, column_array, sample_indices
from lora_ft.data.prepare import template_of
from lora_ft.data.template import Template
from lora_ft.data.texts import chat_format_of
from lora_ft.data.tokens import text_encoder
from lora_ft.methods.interface import virtual_ids
from lora_ft.model.generate import position_limit


@dataclass(frozen=True)
class EvalPrompts:
    """Parallel lists: prompts, their ids, the references of each. cut: how many prompts were truncated."""

    texts: list[str]
    ids: list[list[int]]
    references: list[list[str]]
    cut: int

    def with_prefix(self, ids: list[int]) -> "EvalPrompts":
        """The same prompts with `ids` (virtual tokens) before each one's own."""
        return replace(self, ids=[ids + row for row in self.ids])


def eval_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, config: Config
) -> EvalPrompts:
    """The prompts of one eval set as the config's `generation` section wants them.

    A prompt leaves room for virtual tokens and generation.max_new_tokens within the model's positions. Raises ConfigError if
    there is none for a prompt, or if rouge_l can't read any reference.
    """
    data, generation = config.data, config.generation
    max_tokens, positions = data.max_length, position_limit(model)
    if positions is not None:
        max_tokens = min(max_tokens, positions - generation.max_new_tokens - len(virtual_ids(model)))
    if max_tokens < 1:
        problem = f"{generation.max_new_tokens} leaves no room for a prompt in the model's {positions} positions."
        raise ConfigError(f"generation.max_new_tokens: {problem}")
    most, seed = generation.max_prompts, config.train.seed
    prompts = group_by_prompt(
        examples,
        template_of(data),
        tokenizer,
        max_tokens=max_tokens,
        truncate=data.truncate,
        max_prompts=most,
        seed=seed,
    )
    readable = any(re.search("[a-zA-Z0-9]", text) for several in prompts.references for text in several)
    if "rouge_l" in generation.metrics and not readable:
        raise ConfigError("generation.metrics: rouge_l reads the letters a to z and digits, and no reference has any.")
    if prompts.cut:
        longer = f"{prompts.cut:,} of {len(prompts.ids):,} prompts are longer than {max_tokens} tokens"
        info(f"generation: {longer}: {(LOST_OF_CHATS if data.messages else LOST)[data.truncate]}")
    return prompts


def group_by_prompt(
    examples: Examples,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    truncate: str = "start",
    max_prompts: int | None = None,
    seed: int = 0,
) -> EvalPrompts:
    """The distinct prompts of the examples in order, each with all the references that the complete set has for it.

    In a chat the last supervised turn is the reference, and the generation prompt before it the prompt. A prompt longer than
    `max_tokens` is cut as in training; that of a chat never loses its end. max_prompts: take a seeded sample of this size.
    """
    encoder = text_encoder(tokenizer)
    chat = chat_format_of(template, tokenizer) if template.messages else None
    sampled = set(column_array(examples.dataset, "row").tolist())
    references: dict[str, list[str]] = {}
    rows: dict[str, dict] = {}
    chosen: dict[str, None] = {}  # a set that keeps its order
    for row in examples.texts:
        prompt, reference = prompt_and_reference(row, chat)
        references.setdefault(prompt, []).append(reference)
        rows[prompt] = row
        if row["row"] in sampled:
            chosen[prompt] = None
    texts = list(chosen)
    if max_prompts is not None and max_prompts < len(texts):
        texts = [texts[i] for i in sample_indices(len(texts), max_prompts, seed)]
    # a chat's text contains its special tokens already
    ids = [encoder.encode_bare(text) for text in texts] if template.messages else [*encoder.encode_prompts(texts)]
    cut = sum(len(row) > max_tokens for row in ids)
    kept: list[list[int]] = []
    for row, text in zip(ids, texts, strict=True):
        if chat is None:
            row = encoder.cut_prompt(row, text, rows[text]["spans"], max_tokens, truncate)
        elif len(row) > max_tokens and truncate == "column":
            row = cut_chat_prompt(text, rows[text]["completion"], rows[text]["turns"], max_tokens, encoder)
        else:
            row = encoder.truncate_start(row, max_tokens)
        kept.append(row.tolist())
    return EvalPrompts(texts, kept, [references[text] for text in texts], cut)


def prompt_and_reference(row: dict, chat: ChatFormat | None) -> tuple[str, str]:
    """A row's texts; in a chat the last supervised turn without the marker that ends it."""
    if chat is None:
        return row["prompt"], row["completion"]
    start, end = row["spans"][-2:]
    reference = row["completion"][start:end]
    marker = max((marker for marker in chat.ends if reference.endswith(marker)), key=len, default="")
    return row["prompt"], reference.removesuffix(marker)
