"""What a model is asked to write, and what people wrote there: distinct prompts, each with all of its references."""

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from lora_ft.data.chat import chat_format
from lora_ft.data.examples import Examples, column_array, sample_indices
from lora_ft.data.template import Template
from lora_ft.data.tokens import Ids, text_encoder


@dataclass(frozen=True)
class Questions:
    """Prompts as texts and as ids, the references of each, the ids that end an answer, and how many prompts were cut."""

    prompts: list[str]
    ids: list[Ids]
    references: list[list[str]]
    ends: list[int]
    cut: int

    def with_prefix(self, ids: Ids) -> "Questions":
        """The same prompts with `ids` (virtual tokens) before each one's own."""
        return replace(self, ids=[ids + row for row in self.ids])


def questions(
    examples: Examples,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    room: int,
    max_prompts: int | None = None,
    seed: int = 0,
) -> Questions:
    """The prompts of the examples in order, each once, with all the references that the whole set has for it.

    Rows with the same prompt are one prompt with several references. Of a chat the last assistant turn is the reference,
    and what stands before it the prompt.

    Args:
        room: tokens of a prompt at most; a longer one loses its start, as in training.
        max_prompts: a seeded sample of so many, each with all of its references.
    """
    encoder = text_encoder(tokenizer)
    ends = chat_format(tokenizer, template.chat_template).end_tokens if template.messages else frozenset()
    wanted = set(column_array(examples.dataset, "row").tolist())
    by_prompt: dict[str, list[str]] = {}
    asked_for: dict[str, None] = {}  # a set that keeps its order
    for row in examples.texts:
        prompt, reference = _pair(row, ends)
        by_prompt.setdefault(prompt, []).append(reference)
        if row["row"] in wanted:
            asked_for[prompt] = None
    prompts = list(asked_for)
    if max_prompts is not None and max_prompts < len(prompts):
        prompts = [prompts[i] for i in sample_indices(len(prompts), max_prompts, seed)]
    # a chat's special tokens are in its text already
    ids = [encoder.encode_bare(p) for p in prompts] if template.messages else encoder.encode_prompts(prompts)
    return Questions(
        prompts,
        [encoder.truncate_start(row, room) for row in ids],
        [by_prompt[prompt] for prompt in prompts],
        sorted({tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, ends)} - {None}),
        sum(len(row) > room for row in ids),
    )


def _pair(row: dict, ends: frozenset[str]) -> tuple[str, str]:
    """(prompt, reference) of a row's texts."""
    if not row["spans"]:
        return row["prompt"], row["completion"]
    start, end = row["spans"][-2:]
    chat, reference = row["completion"], row["completion"][start:end]
    closing = next((token for token in ends if reference.endswith(token)), "")
    return chat[:start], reference.removesuffix(closing)
