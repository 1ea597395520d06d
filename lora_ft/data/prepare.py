"""The entry point of data/: from the config's data section to encoded examples, for training and for evaluation."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.config.load import DataConfig, eval_sets
from lora_ft.core.errors import ConfigError
from lora_ft.data.encode import load_examples
from lora_ft.data.examples import Examples
from lora_ft.data.template import Template


def prepare(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, dict[str, Examples]]:
    """The training set and the eval sets by name (an unnamed one is ""; {} without data.eval).

    What `data.eval` holds out of train is in exactly one of them; if several sets are held out, each takes its amount
    from what the ones before it have left.

    Raises:
        ConfigError: the template or the chat template's file is invalid.
        DataError: data that cannot be read or encoded.
        ModelError: chats without a chat template.
    """
    train_set = _load(data, data.train, tokenizer, data.max_train_examples, seed, tuple(_held_out(data).values()))
    return train_set, prepare_eval_sets(data, tokenizer, seed) if data.eval is not None else {}


def prepare_eval_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Examples]:
    """The eval sets alone, by name, in the config's order.

    Raises:
        ConfigError: there is no eval data; or as `prepare`.
        DataError, ModelError: as `prepare`.
    """
    if data.eval is None:
        raise ConfigError("no eval data: the run had none (data.eval). Name some with --data FILE.")
    held_out = _held_out(data)
    amounts, names = tuple(held_out.values()), list(held_out)
    sets = {}
    for name, source in eval_sets(data.eval).items():
        if isinstance(source, tuple):
            sets[name] = _load(data, source, tokenizer, data.max_eval_examples, seed)
        else:
            part = names.index(name)
            sets[name] = _load(data, data.train, tokenizer, data.max_eval_examples, seed, amounts, part)
    return sets


def template_of(data: DataConfig) -> Template:
    """The template of a data section, with the text of its chat template's file.

    Raises:
        ConfigError: the file cannot be read.
    """
    chat_template = None
    if data.chat_template:
        try:
            chat_template = Path(data.chat_template).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"data.chat_template: {data.chat_template} cannot be read ({e}).") from e
    return Template(data.prompt, data.completion, data.text, data.messages, chat_template, data.label_names)


def _held_out(data: DataConfig) -> dict[str, int | float]:
    """The eval sets that are held out of train: the amount that each takes, by name."""
    return {name: amount for name, amount in eval_sets(data.eval).items() if isinstance(amount, int | float)}


def _load(
    data: DataConfig,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_examples: int | None,
    seed: int,
    held_out: Sequence[int | float] = (),
    part: int | None = None,
) -> Examples:
    return load_examples(
        list(sources),
        template_of(data),
        tokenizer,
        max_length=data.max_length,
        long_text=data.long_text,
        bad_rows=data.bad_rows,
        held_out=held_out,
        part=part,
        max_examples=max_examples,
        seed=seed,
    )
