"""From the config's data section to encoded examples, for training and for evaluation."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.config import DataConfig, eval_sets
from lora_ft.data.encode import Examples, Template, hold_out, load_examples, sample
from lora_ft.errors import ConfigError


def prepare(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Examples, dict[str, Examples]]:
    """Training examples, and the eval sets by name (one without a name is ""; none: {}).

    What `data.eval` holds out of train is in one of them only; of several such sets each takes from what the one before
    has left.
    """
    amounts = {name: amount for name, amount in eval_sets(data.eval).items() if isinstance(amount, int | float)}
    train_set = _load(data, data.train, tokenizer, None if amounts else data.max_train_examples, seed)
    held = {}
    for name, amount in amounts.items():
        train_set, rows = hold_out(train_set, amount, seed)
        held[name] = sample(rows, data.max_eval_examples, seed)
    return sample(train_set, data.max_train_examples, seed), _eval_sets(data, held, tokenizer, seed)


def evaluation_sets(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Examples]:
    """The eval sets alone; train is read only where something is held out of it.

    Raises:
        ConfigError: there is no eval data.
    """
    if data.eval is None:
        raise ConfigError("no eval data: the run had none (data.eval). Name some: --data FILE.")
    if any(isinstance(source, int | float) for source in eval_sets(data.eval).values()):
        return prepare(data, tokenizer, seed)[1]
    return _eval_sets(data, {}, tokenizer, seed)


def _eval_sets(
    data: DataConfig, held: dict[str, Examples], tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, Examples]:
    """The sets in the config's order, what is not held out of train from its own sources."""
    return {
        name: _load(data, source, tokenizer, data.max_eval_examples, seed) if isinstance(source, tuple) else held[name]
        for name, source in eval_sets(data.eval).items()
    }


def _load(
    data: DataConfig, sources: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, at_most: int | None, seed: int
) -> Examples:
    return load_examples(
        list(sources),
        template_of(data),
        tokenizer,
        max_length=data.max_length,
        long_text=data.long_text,
        bad_rows=data.bad_rows,
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
