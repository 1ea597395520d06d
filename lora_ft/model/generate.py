"""What a model writes after each of many prompts: transformers' `generate`, in batches of prompts of like length.

A batch is padded on the left and masked, so that every prompt's last token stands where the new ones follow; transformers
takes positions from the mask. A row stops at its end-of-sequence token, a batch when all of its rows have.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    how: GenerationConfig,
    ends: Sequence[int],
    *,
    batch_size: int,
    seed: int = 0,
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The new ids after each prompt, without the one that ended them.

    `model` is in eval mode meanwhile. Nothing of its own generation config is used but its end-of-sequence tokens.

    Args:
        prompts: ids, of each at least one.
        how: beams, sampling and length; `max_new_tokens` is needed.
        ends: ids that end a text.
        batch_size: prompts at a time.
        seed: of samples; torch's random state is afterwards as it was.
        check: called before each token: the place to stop at.
    """
    own = model.generation_config.eos_token_id
    ends = sorted({*ends, *([own] if isinstance(own, int) else own or [])})
    how = copy.deepcopy(how)
    how.eos_token_id, how.pad_token_id = ends or None, ends[0] if ends else 0  # of padding no more is asked than a mask
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # what takes most memory first
    found: list[list[int]] = [[]] * len(prompts)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(prompts), desc="generating", unit="prompts", leave=False, delay=2, disable=None)
    with _generation_config(model, how), torch.random.fork_rng(_gpus(model)):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            rows = by_length[start : start + batch_size]
            written = _batch(model, [prompts[i] for i in rows], how, check)
            for i, ids in zip(rows, written.tolist(), strict=True):
                found[i] = ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]
            bar.update(len(rows))
    bar.close()
    model.train(was_training)
    return found


def _batch(
    model: PreTrainedModel, prompts: list[list[int]], how: GenerationConfig, check: Callable[[], None]
) -> Tensor:
    """(prompts, new tokens): what follows each, the end-of-sequence token and padding included."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), how.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1

    def watch(written: Tensor, scores: object, **_: object) -> Tensor:
        check()
        return torch.zeros(len(written), dtype=torch.bool, device=written.device)

    outputs = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), generation_config=how, stopping_criteria=[watch]
    )
    return outputs[:, longest:]


def _gpus(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what a config leaves open from the model's own: a repetition penalty, say."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own
