"""The entry point of data/: from the config's data section to encoded examples, for training and for evaluation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.config.schema import CHAT_SETTINGS, DataConfig, eval_sets
from lora_ft.core.errors import ConfigError
from lora_ft.core.paths import refuse_special
from lora_ft.data.chats.format import ChatFormat, find_chat_format
from lora_ft.data.encode import load_examples
from lora_ft.data.examples import Examples
from lora_ft.data.files import file_format
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
    load, held_out = _loader(data, tokenizer, seed), tuple(_held_out(data).values())
    train_set = load(data.train, held_out=held_out, max_examples=data.max_train_examples)
    return train_set, prepare_eval_sets(data, tokenizer, seed) if data.eval is not None else {}


def prepare_eval_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Examples]:
    """The eval sets alone, by name, in the config's order. Raises as `prepare`; ConfigError too without eval data."""
    if data.eval is None:
        raise ConfigError("no eval data: the run had none (data.eval). Name some with --data FILE.")
    load, held_out, sets = _loader(data, tokenizer, seed), _held_out(data), {}
    for name, source in eval_sets(data.eval).items():
        if isinstance(source, tuple):
            sets[name] = load(source, max_examples=data.max_eval_examples)
        else:
            part, amounts = list(held_out).index(name), tuple(held_out.values())
            sets[name] = load(data.train, held_out=amounts, part=part, max_examples=data.max_eval_examples)
    return sets


def template_of(data: DataConfig) -> Template:
    """The template of a data section, with the text of its chat template's file (ConfigError if it cannot be read)."""
    chat_template = None
    if data.chat_template:
        try:
            refuse_special(Path(data.chat_template), ConfigError)
            chat_template = Path(data.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"data.chat_template: {data.chat_template} cannot be read ({e}).") from e
    names = ("prompt", "completion", "text", "messages", "label_names", *CHAT_SETTINGS)
    return Template(chat_template=chat_template, **{name: getattr(data, name) for name in names})


def find_chat(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """The chat template of a data section, or else the tokenizer's own, if there is one. Raises as `template_of`."""
    return find_chat_format(tokenizer, template_of(data).chat_template, data.chat_template_kwargs)


def _held_out(data: DataConfig) -> dict[str, int | float]:
    """The eval sets that are held out of train: the amount that each takes, by name."""
    return {name: amount for name, amount in eval_sets(data.eval).items() if isinstance(amount, int | float)}


def _loader(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Callable[..., Examples]:
    """`load_examples` with the settings that all sets of a run share."""
    names = ("max_length", "truncate", "long_text", "bad_rows")
    settings = {name: getattr(data, name) for name in names} | {"seed": seed, "format": file_format(data.format)}
    return partial(load_examples, template=template_of(data), tokenizer=tokenizer, **settings)
