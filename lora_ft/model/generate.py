"""Text generation: the tokens a model writes after each of several prompts."""

import copy
import inspect
import itertools
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from lora_ft.core.errors import ModelError, is_out_of_memory
from lora_ft.core.messages import first_line, working
from lora_ft.model.device import random_states, set_random_states
from lora_ft.nn.adapted import eval_mode
from lora_ft.nn.attention import has_windows
from lora_ft.nn.rows import WORTHWHILE, shared_length

# What a model's own config may make generation return, in values of any type; only the ids are used
UNUSED = ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")


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
    begun: "Begun | None" = None,
) -> list[Generated]:
    """Continue a batch of prompts, at least one, with transformers' `generate`; the model's own generation config is not used.

    The batch is padded on the left and masked, so that new tokens directly follow every prompt; transformers takes
    positions from the mask. A row stops at its first end token (`ends`, see `end_tokens`).

    config: beams, sampling and limits; `max_new_tokens` is required. on_token: called after each step with all rows so far;
    not with beams, which may still change their start. check: called after each step; an exception in it stops all. begun:
    the beginning of all prompts, computed.

    Raises:
        ModelError: transformers can't use `config`, in which a model's own may have values of any type.
    """
    config = copy.deepcopy(config)
    config.eos_token_id, config.max_length = sorted(ends) or None, None
    for name in UNUSED:
        setattr(config, name, False)
    config.pad_token_id = 0  # any id that has an embedding will do: padding is masked
    longest, shared = max(map(len, prompts)), len(begun.ids) if begun else 0
    ids = torch.full((len(prompts), longest), config.pad_token_id)  # (prompts, longest)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # what is shared, padding, the rest
        for own, place in (
            (prompt[:shared], slice(shared)),
            (prompt[shared:], slice(longest - len(prompt) + shared, None)),
        ):
            ids[row, place] = torch.tensor(own, dtype=torch.long)
            mask[row, place] = 1

    def rows(ids: Tensor) -> list[Generated]:
        generated = []
        for row in ids[:, longest:].tolist():
            end = next((n for n, token in enumerate(row) if token in ends), None)
            generated.append(Generated(row[:end], end is not None))
        return generated

    started = False

    def after_step(ids: Tensor, scores: object, **_: object) -> Tensor:
        nonlocal started
        started = True
        if check:
            check()
        if on_token and (config.num_beams or 1) == 1:
            on_token(rows(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # (rows,): none is to stop

    ids, mask = ids.to(model.device), mask.to(model.device)
    inputs = {"attention_mask": mask, "generation_config": config, "stopping_criteria": [after_step]}
    if begun:
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # before 5.24
        inputs[name] = begun.cache_for(len(prompts))
    try:
        with _generating(model, config):
            return rows(model.generate(ids, **inputs))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as e:
        if started or is_out_of_memory(e) or not _raised_by_settings(e):
            raise
        raise ModelError(
            f"nothing can be generated with these settings ({first_line(e)}). Check the model's generation_config.json."
        ) from e


def logits_processors(
    model: PreTrainedModel, config: GenerationConfig, ends: Collection[int], length: int
) -> LogitsProcessorList:
    """What `generate` does to the logits of a prompt of `length` tokens before it chooses a token, in order.

    It is transformers' own selection, by a method that is not public: of penalties, temperature, top-k, top-p and the others
    of a generation config.
    """
    config = copy.deepcopy(config)
    config.eos_token_id, config.pad_token_id, config.num_beams, config.max_length = sorted(ends) or None, 0, 1, None
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=model.device)
    return model._get_logits_processor(config, input_ids_seq_length=length, device=model.device, model_kwargs={})


def _raised_by_settings(error: Exception) -> bool:
    """Whether transformers' generation raised an error itself, or torch for it: not the model, whose error is a bug."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    *_, last = (name for name in frames if name.partition(".")[0] != "torch")
    return last.startswith(("transformers.generation", "transformers.cache_utils"))


class Begun(NamedTuple):
    """A beginning of prompts that the model has read: its ids and the cache after it, of one row."""

    ids: list[int]
    cache: Cache

    def cache_for(self, rows: int) -> Cache:
        """A copy for a batch of so many rows."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache

    @classmethod
    @torch.no_grad()
    def read(cls, model: PreTrainedModel, prompts: Sequence[list[int]], before: "Begun | None") -> "Begun | None":
        """What all prompts begin with, or `before` if that is the same; None if reading it apart would gain nothing.

        That is so in models that measure distances in the row, by windows or without positions as an input: they count the
        padding between the beginning and the rest.
        """
        ids = min(prompts)[: shared_length(min(prompts), max(prompts))]
        ids = ids[: min(map(len, prompts)) - 1]  # a token is left to read
        takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        if (len(prompts) - 1) * len(ids) < WORTHWHILE or has_windows(model) or not takes_positions:
            return None
        if before and before.ids == ids:
            return before
        row = torch.tensor([ids], device=model.device)
        with eval_mode(model):
            output = model(row, use_cache=True, logits_to_keep=1)
        cache = output.cache if "cache" in output else output.past_key_values  # before 5.24
        plain = {type(layer) for layer in getattr(cache, "layers", [None])} == {DynamicLayer}  # not a recurrent state
        return cls(ids, cache) if plain else None


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
    with bar, working("generating"), _own_random_states():
        torch.manual_seed(seed)
        begun: Begun | None = None
        for start in range(0, len(prompts), batch_size):
            batch = longest_first[start : start + batch_size]
            own = [prompts[i] for i in batch]
            begun = Begun.read(model, own, begun) if (config.num_beams or 1) == 1 else None
            rows = generate(model, own, config, ends, check=check, begun=begun)
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
