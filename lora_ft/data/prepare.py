"""From the config's data section to encoded examples, for training and for evaluation."""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.config.load import DataConfig, eval_sets
from lora_ft.core.errors import ConfigError
from lora_ft.data.encode import Examples, Template, load_examples


def prepare(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, dict[str, Examples]]:
    """Training examples, and the eval sets by name (one without a name is ""; none: {}).

    What `data.eval` holds out of train is in one of them only; of several such sets each takes from what the one before
    has left.
    """
    train_set = _load(data, data.train, tokenizer, data.max_train_examples, seed, _amounts(data))
    return train_set, evaluation_sets(data, tokenizer, seed) if data.eval is not None else {}


def evaluation_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Examples]:
    """The eval sets alone, in the config's order.

    Raises:
        ConfigError: there is no eval data.
    """
    if data.eval is None:
        raise ConfigError("no eval data: the run had none (data.eval). Name some: --data FILE.")
    amounts, found = _amounts(data), {}
    for name, source in eval_sets(data.eval).items():
        if isinstance(source, tuple):
            found[name] = _load(data, source, tokenizer, data.max_eval_examples, seed)
        else:
            part = list(amounts).index(name)
            found[name] = _load(data, data.train, tokenizer, data.max_eval_examples, seed, amounts, part)
    return found


def _amounts(data: DataConfig) -> dict[str, int | float]:
    """The eval sets that are held out of train: how much of it each takes."""
    return {name: amount for name, amount in eval_sets(data.eval).items() if isinstance(amount, int | float)}


def _load(
    data: DataConfig,
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    at_most: int | None,
    seed: int,
    amounts: Mapping[str, int | float] | None = None,
    part: int | None = None,
) -> Examples:
    return load_examples(
        list(sources),
        template_of(data),
        tokenizer,
        max_length=data.max_length,
        long_text=data.long_text,
        bad_rows=data.bad_rows,
        held_out=tuple((amounts or {}).values()),
        part=part,
        max_examples=at_most,
        seed=seed,
    )


def template_of(data: DataConfig) -> Template:
    chat_template = None
    if data.chat_template:
        try:
            chat_template = Path(data.chat_template).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"data.chat_template: {data.chat_template} can't be read ({e}).") from e
    return Template(
        prompt=data.prompt,
        completion=data.completion,
        text=data.text,
        messages=data.messages,
        chat_template=chat_template,
        label_names=data.label_names,
    )
