"""From the config's data section to encoded examples, for training and for evaluation."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.config import DataConfig
from lora_ft.data.encode import Examples, Template, load_examples
from lora_ft.data.examples import Side
from lora_ft.errors import ConfigError


def prepare(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, Examples | None]:
    """Training and eval examples; what `data.eval` holds out of train is in one of them only."""
    train_set = _load(data, data.train, tokenizer, data.max_train_examples, seed)
    return train_set, evaluation_set(data, tokenizer, seed) if data.eval is not None else None


def evaluation_set(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples:
    """The eval examples alone.

    Raises:
        ConfigError: there is no eval data.
    """
    if data.eval is None:
        raise ConfigError("no eval data: the run had none (data.eval). Name some: --data FILE.")
    if isinstance(data.eval, int | float):
        return _load(data, data.train, tokenizer, data.max_eval_examples, seed, "held out")
    return _load(data, data.eval, tokenizer, data.max_eval_examples, seed)


def _load(
    data: DataConfig,
    sources: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    at_most: int | None,
    seed: int,
    side: Side = "rest",
) -> Examples:
    held_out = data.eval if isinstance(data.eval, int | float) else None
    return load_examples(
        list(sources),
        template_of(data),
        tokenizer,
        max_length=data.max_length,
        long_text=data.long_text,
        bad_rows=data.bad_rows,
        held_out=held_out,
        side=side,
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
