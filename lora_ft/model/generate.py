"""Text generation: the tokens a model writes after each of several prompts."""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.model.device import random_states, set_random_states
from lora_ft.nn.adapted import eval_mode


class Generated(NamedTuple):
    """ids: the new tokens, without the end token. ended: an end token came, not a limit of length or time."""

    ids: list[int]
    ended: bool


def position_limit(model: PreTrainedModel) -> int | None:
    """Return the number of positions in the model's config; None where it has no such limit (ALiBi)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def to_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], chat_template: str = "") -> str:
    """Decode generated ids exactly: "end ." stays as it is where a tokenizer would tidy it up.

    Special tokens are left out, except those that the chat template writes: around tool calls, between channels.
    """
    written = {i for i in set(ids) if chat_template and tokenizer.convert_ids_to_tokens(i) in chat_template}
    written &= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} if written else set()
    runs = (list(run) for _, run in itertools.groupby(ids, key=lambda i: i in written))
    exactly = {"clean_up_tokenization_spaces": False}
    return "".join(tokenizer.decode(run, skip_special_tokens=run[0] not in written, **exactly) for run in runs)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    ends: Collection[int],
    *,
    on_token: Callable[[list[Generated]], None] | None = None,
    check: Callable[[], None] | None = None,
) -> list[Generated]:
    """Continue a batch of prompts, at least one, with transformers' `generate`; the model's own generation config is not used.

    The batch is padded on the left and masked, so that new tokens directly follow every prompt; transformers takes
    positions from the mask. A row stops at its first end token (`ends`, see `end_tokens`).

    config: beams, sampling and limits; `max_new_tokens` is required. on_token: called after each step with all rows so far;
    not with beams, which may still change their start. check: called after each step; an exception in it stops all.
    """
    config = copy.deepcopy(config)
    config.eos_token_id, config.max_length = sorted(ends) or None, None
    config.pad_token_id = min(ends, default=0)  # any id will do: padding is masked
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), config.pad_token_id)  # (prompts, longest)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1

    def rows(ids: Tensor) -> list[Generated]:
        generated = []
        for row in ids[:, longest:].tolist():
            end = next((n for n, token in enumerate(row) if token in ends), None)
            generated.append(Generated(row[:end], end is not None))
        return generated

    def after_step(ids: Tensor, scores: object, **_: object) -> Tensor:
        if check:
            check()
        if on_token and (config.num_beams or 1) == 1:
            on_token(rows(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (rows,): none is to stop

    ids, mask = ids.to(model.device), mask.to(model.device)
    with _generating(model, config):
        return rows(model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[after_step]))


def generate_in_batches(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    ends: Collection[int],
    *,
    batch_size: int,
    seed: int = 0,
    check: Callable[[], None] | None = None,
) -> list[Generated]:
    """`generate` for any number of prompts, `batch_size` of similar length at a time. Leaves torch's random state as it was."""
    longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # running out of memory shows at once
    generated: dict[int, Generated] = {}
    bar = tqdm(total=len(prompts), desc="generating", unit="prompts", leave=False, delay=2, disable=None)
    with bar, _own_random_states():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = longest_first[start : start + batch_size]
            rows = generate(model, [prompts[i] for i in batch], config, ends, check=check)
            generated |= zip(batch, rows, strict=True)
            bar.update(len(batch))
    return [generated[i] for i in range(len(prompts))]


@contextmanager
def _own_random_states() -> Iterator[None]:
    """Within it, whatever is drawn does not change what is drawn after it."""
    before = random_states()
    try:
        yield
    finally:
        set_random_states(before)


@contextmanager
def _generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`model` in eval mode with `config` as its own: transformers fills what a config leaves open from the model's."""
    own = model.generation_config
    model.generation_config = config
    try:
        with eval_mode(model):
            yield
    finally:
        model.generation_config = own
