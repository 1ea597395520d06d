"""A base in memory with its adapters by name, and their answers to prompts: shared by `generate` and its chat."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.commands.generate.prompts import PromptFormat, prompt_format
from lora_ft.core.errors import ConfigError, DataError, ModelError
from lora_ft.core.names import nearest
from lora_ft.core.paths import local_path
from lora_ft.core.run_folder import read_record
from lora_ft.core.trust import Trust
from lora_ft.data.chats.format import end_tokens
from lora_ft.data.chats.turns import Turn
from lora_ft.data.template import BadRow
from lora_ft.methods.interface import METHODS, bare, virtual_ids
from lora_ft.methods.lora.files import apply_adapter
from lora_ft.methods.lora.multi import check_names, mixed, use
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained, run_config
from lora_ft.model.device import prepare_device
from lora_ft.model.files import Base, resolve
from lora_ft.model.generate import Generated, generate, position_limit, to_text
from lora_ft.model.load import load_base, load_tokenizer

BASE = "base"  # the bare base's name among the adapters'


class Prompt(NamedTuple):
    """adapter: its name, None for the bare base. text, ids: the input, without virtual tokens. where: for messages."""

    adapter: str | None
    text: str
    ids: list[int]
    where: str


class Answer(NamedTuple):
    """tokens: number of generated tokens, the end token included. ended: an end token came before the length limit."""

    text: str
    tokens: int
    ended: bool


@dataclass
class Served:
    """A model with adapters by name, and the prompt format of each; formats[None] is the bare base's.

    by_name: the adapters are LoRA's, of which a batch may mix several; else there is at most one, which can't share a base.
    columns: values of the templates' columns for every prompt that has none of its own.
    """

    base: Base
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    formats: dict[str | None, PromptFormat]
    by_name: bool = True
    columns: dict[str, str] = field(default_factory=dict)

    @cached_property
    def sampling(self) -> GenerationConfig:
        """How answers are generated: as the model's own generation config says. `override` may change it."""
        config = copy.deepcopy(self.model.generation_config)
        if config.max_new_tokens is None:
            config.max_new_tokens = min(256, (position_limit(self.model) or 512) // 2)
        return config

    @cached_property
    def ends(self) -> set[int]:
        """Ids that end an answer, of the base or any adapter."""
        return {token for adapter in self.formats for token in self.ends_of(adapter)}

    def ends_of(self, adapter: str | None) -> set[int]:
        """Ids that end an answer of one adapter."""
        return end_tokens(self.tokenizer, self.model.generation_config, self.formats[adapter].chat)

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return [name for name in self.formats if name is not None]

    def find_adapter(self, name: str | None) -> str | None:
        """Return the adapter's name; None for "base" or None. A ModelError names the nearest if there is no such adapter."""
        if name is None or name == BASE:
            return None
        check_names(self.names, [name])
        return name

    def set_column(self, text: str, option: str) -> None:
        """Set a column from NAME=TEXT, where \\n is a line end; a ConfigError, about `option`, if no template has it."""
        name, equals, value = text.partition("=")
        name, known = name.strip(), list(dict.fromkeys(c for form in self.formats.values() for c in form.columns))
        if not equals or name not in known:
            near = nearest(name, known)
            has = f"the templates have {', '.join(known)}" if known else "no template here has columns"
            hint = (
                f"Did you mean {near}?"
                if near and equals
                else f"Give NAME=TEXT, as in {option} {(known or ['input'])[0]}=..."
            )
            raise ConfigError(f"{option} {text}: {has}. {hint}")
        self.columns[name] = value.strip().replace("\\n", "\n")

    def _format(
        self, adapter: str | None, content: str | dict[str, Any], turns: Sequence[Turn]
    ) -> tuple[str, list[int]]:
        """The text and ids of `prompt`. The base takes a row that is not in its own format in the first that takes it."""
        if isinstance(content, str):
            return self.formats[adapter].from_text(content, turns, self.columns)
        forms = [self.formats[adapter], *(self.formats.values() if adapter is None else ())]
        form = next((form for form in forms if form.takes(content, self.columns)), forms[0])
        return form.from_row(content, self.columns)

    def prompt(
        self, adapter: str | None, content: str | dict[str, Any], where: str, turns: Sequence[Turn] = ()
    ) -> Prompt:
        """Put a text, after the chat's previous `turns`, or a row's columns into an adapter's prompt format.

        Raises:
            DataError: the format does not take it, or prompt and answer do not fit into the model's positions.
        """
        try:
            text, ids = self._format(adapter, content, turns)
        except BadRow as e:
            raise DataError(f"{where}: {e}.") from e
        positions, new = position_limit(self.model), self.sampling.max_new_tokens
        length = len(self.prefix(adapter)) + len(ids)
        if positions and length + new > positions:
            raise DataError(
                f"{where}: the prompt's {length} tokens and {new} new ones exceed the model's {positions} positions. "
                "Shorten the prompt, or lower --max-new-tokens."
            )
        return Prompt(adapter, text, ids, where)

    def answer(self, prompts: Sequence[Prompt], on_text: Callable[[list[str]], None] | None = None) -> list[Answer]:
        """Generate the answers to a batch of prompts, each by its adapter. on_text: called after every token with all texts."""
        adapters = [prompt.adapter for prompt in prompts]
        generated = [Generated([], False)] * len(prompts)

        def texts() -> list[str]:
            templates = (self.formats[adapter].written_markers for adapter in adapters)
            return [to_text(self.tokenizer, row.ids, t) for row, t in zip(generated, templates, strict=True)]

        def generate_rows(indices: Sequence[int]) -> None:
            def keep(rows: list[Generated]) -> None:
                for i, row in zip(indices, rows, strict=True):
                    generated[i] = row

            def on_token(rows: list[Generated]) -> None:
                keep(rows)
                assert on_text
                on_text(texts())

            ids = [self.prefix(adapters[i]) + prompts[i].ids for i in indices]
            with self.computing([adapters[i] for i in indices]):
                keep(generate(self.model, ids, self.sampling, self.ends, on_token=on_token if on_text else None))

        if self.by_name:
            generate_rows(range(len(prompts)))
        else:  # base and adapter one after the other: such layers compute one of them for all rows of a batch
            for adapter in dict.fromkeys(adapters):
                generate_rows([i for i, name in enumerate(adapters) if name == adapter])
        return [Answer(t, len(row.ids) + row.ended, row.ended) for t, row in zip(texts(), generated, strict=True)]

    def prefix(self, adapter: str | None) -> list[int]:
        """The ids before a prompt's own: the virtual tokens of prompt tuning."""
        return virtual_ids(self.model) if adapter is not None else []

    @contextmanager
    def computing(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Within it row i of a batch is computed with `adapters[i]`."""
        if len(set(adapters)) > 1:
            with mixed(self.model, adapters):
                yield
        elif adapters[0] is None:
            with bare(self.model):
                yield
        else:
            if self.by_name:
                use(self.model, adapters[0])
            yield


def load(adapters: dict[str, Trained], base_name: str | None, *, raw: bool, trust: Trust) -> Served:
    """Load the base of the adapters (or `base_name`, which may be a complete model's folder) with all of them on it.

    Raises:
        ConfigError: no base is named.
        ModelError: several adapters that are not all LoRA, or one that was trained on another base.
    """
    other = next((trained for trained in adapters.values() if trained.alone), None)
    if other and len(adapters) > 1:
        problem = f"{other.alone}; only LoRA adapters share a base. Give this one alone."
        raise ModelError(f"{other.folder}: {problem}")
    first = next(iter(adapters.values()), None)
    base_name = base_name or (first.base_name if first else None)
    if not base_name:
        raise ConfigError("no base: the adapter does not name one. Add --base NAME.")
    folder = local_path(base_name)
    own_config = run_config(folder, read_record(folder) or {})  # a merged model has the record of its run
    config = first.config if first else own_config
    device = prepare_device(config.trainer.use_cpu if config else False)
    base = first.base(base_name, trust) if first else resolve(base_name, trust=trust)
    tokenizer = load_tokenizer(base)
    for name, trained in adapters.items():
        trained.check(base, tokenizer, trust.other_base, name if len(adapters) > 1 else None)
        trained.note_form(config.model.quantization if config else None)
    model = load_base(base, *(config.model.dtype, device, config.model.quantization) if config else ("auto", device))
    formats: dict[str | None, PromptFormat] = {None: prompt_format(own_config, tokenizer, raw)}
    for name, trained in adapters.items():
        formats[name] = prompt_format(trained.config, tokenizer, raw, formats[None])
        if other:
            METHODS[other.method].load(model, other)
        else:
            apply_adapter(model, read_adapter(trained), name)
    return Served(base, model, tokenizer, formats, by_name=other is None)


def override(config: GenerationConfig, greedy: bool, max_new_tokens: int | None, **sampling: float | None) -> None:
    """Apply the command line's options: any sampling setting switches sampling on, `greedy` off; both are a ConfigError."""
    if max_new_tokens is not None:
        config.max_new_tokens = max_new_tokens
    given = {name: value for name, value in sampling.items() if value is not None}
    if greedy and given:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--greedy and --{option}: give only one; greedy does not sample")
    config.do_sample = not greedy and (config.do_sample or bool(given))
    for name, value in given.items():
        setattr(config, name, value)
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = None
