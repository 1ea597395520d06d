"""One base in memory with its adapters by name, and answers of theirs: what `generate` and its chat have in common."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lora_ft.commands.generate.prompts import Form, form_of
from lora_ft.config.load import parse_config
from lora_ft.core.errors import ConfigError, DataError, ModelError
from lora_ft.core.trust import Trust
from lora_ft.data.chat import Turn
from lora_ft.data.template import BadRow
from lora_ft.methods.lora.files import apply_adapter
from lora_ft.methods.lora.multi import check_names, mixed, use
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained, read_record
from lora_ft.model.device import prepare_device
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base, load_tokenizer

BASE = "base"  # the bare base's name, where an adapter's could stand
NO_DATA = {"train": "nothing", "text": "{text}"}  # for a config of which only the model and the device count


class Question(NamedTuple):
    """adapter: its name, None for the bare base. text, ids: the prompt as the model gets it. where: for messages."""

    adapter: str | None
    text: str
    ids: list[int]
    where: str


class Answer(NamedTuple):
    """tokens: how many were generated. ended: the model said that it was over; else the length's limit did."""

    text: str
    tokens: int
    ended: bool


@dataclass
class Served:
    """A model with adapters by name (none of them in use), and how each is asked; forms[None] is the bare base's."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    forms: dict[str | None, Form]

    @property
    def sampling(self) -> GenerationConfig:
        """How answers are generated. It is the model's own, for `generate` fills what another leaves open from there."""
        return self.model.generation_config

    @property
    def names(self) -> list[str]:
        return [name for name in self.forms if name is not None]

    def adapter(self, name: str | None) -> str | None:
        """The adapter that `name` means; "base" and None are the bare base. ModelError: there is none, but near ones."""
        if name is None or name == BASE:
            return None
        check_names(self.model, [name])
        return name

    def question(self, adapter: str | None, text: str, where: str, before: list[Turn] | None = None) -> Question:
        """A text as a question to an adapter, after the turns before it. DataError: its template takes no text."""
        try:
            found = Question(adapter, *self.forms[adapter].of_text(text, before), where)
        except BadRow as e:
            raise DataError(f"{where}: {e}.") from e
        self.check_fits(found)
        return found

    def check_fits(self, question: Question) -> None:
        """DataError: the prompt and what may be generated are more than the model has positions for."""
        positions, new = most_positions(self.model), self.sampling.max_new_tokens
        if positions and len(question.ids) + new > positions:
            raise DataError(
                f"{question.where}: {len(question.ids)} tokens of a prompt and {new} new ones are more than the model's "
                f"{positions} positions. Shorten it, or lower --max-new-tokens."
            )

    def answers(self, questions: Sequence[Question], show: Callable[[list[str]], None] | None = None) -> list[Answer]:
        """Answer the questions in one batch, each with its adapter. `show` gets all texts so far after every token."""
        used = list(dict.fromkeys(q.adapter for q in questions))
        if len(used) == 1:
            use(self.model, used[0])
            return self._generate(questions, show)
        with mixed(self.model, [q.adapter for q in questions]):
            return self._generate(questions, show)

    def _generate(self, questions: Sequence[Question], show: Callable[[list[str]], None] | None) -> list[Answer]:
        """Padding is on the left, and masked; which id it has doesn't matter."""
        longest = max(len(q.ids) for q in questions)
        pad = self.sampling.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(q.ids)) + q.ids for q in questions], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(q.ids)) + [1] * len(q.ids) for q in questions], device=ids.device)
        streamer = None if show is None else _Texts(lambda rows: show([self._answer(row).text for row in rows]))
        out = self.model.generate(input_ids=ids, attention_mask=mask, streamer=streamer)
        return [self._answer(row) for row in out[:, longest:].tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        """What was generated, up to the first token that ends it."""
        ends = self.sampling.eos_token_id
        stop = next((i for i, token in enumerate(ids) if token in ends), None)
        text = self.tokenizer.decode(ids[:stop], skip_special_tokens=True)
        return Answer(text, len(ids) if stop is None else stop + 1, stop is not None)


class _Texts(BaseStreamer):
    """transformers' hook for new tokens: hands on all that was generated so far, a list for each row."""

    def __init__(self, hand_on: Callable[[list[list[int]]], None]):
        self.hand_on = hand_on
        self.rows: list[list[int]] | None = None

    def put(self, value: torch.Tensor) -> None:
        if self.rows is None:  # the prompts come first
            self.rows = [[] for _ in value]
            return
        for row, token in zip(self.rows, value.tolist(), strict=True):
            row.append(token)
        self.hand_on(self.rows)

    def end(self) -> None:
        pass


def load(adapters: dict[str, Trained], base_name: str | None, *, raw: bool, trust: Trust) -> Served:
    """Load the base of the adapters (or `base_name`, which may be a complete model's folder) with all of them on it.

    Raises:
        ConfigError: no base is named.
        ModelError: an adapter that is not LoRA, or was trained on another base.
    """
    for trained in adapters.values():
        if trained.method != "lora":
            raise ModelError(
                f"{trained.folder}: of method {trained.method}; only LoRA adapters and complete models are served."
            )
    first = next(iter(adapters.values()), None)
    base_name = base_name or (first.base_name if first else None)
    if not base_name:
        raise ConfigError("no base: the adapter does not name one. Add --base NAME.")
    own = read_record(Path(base_name)) if Path(base_name).is_dir() else None  # a merged model has the record of its run
    settings = ((first.record if first else own) or {}).get("config") or {"model": {}, "data": NO_DATA}
    config = parse_config({**settings, "model": {**settings["model"], "name": base_name}})
    device = prepare_device(config.trainer.use_cpu)
    base = first.base(base_name, trust) if first else resolve(base_name, trust=trust)
    tokenizer = load_tokenizer(base)
    for name, trained in adapters.items():
        trained.check(base, tokenizer, trust.other_base, name)
    model = load_base(base, config.model.dtype, device)
    forms: dict[str | None, Form] = {
        name: form_of(trained.config.data if trained.config else None, tokenizer, raw)
        for name, trained in adapters.items()
    }
    forms[None] = form_of(parse_config(own["config"]).data if own and "config" in own else None, tokenizer, raw)
    for name, trained in adapters.items():
        apply_adapter(model, read_adapter(trained), name)
    model.generation_config = own_sampling(model, tokenizer, forms.values())
    return Served(model, tokenizer, forms)


def most_positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def own_sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, forms) -> GenerationConfig:
    """The model's own generation config, with every token that ends an answer, and an id to pad with (GPT-2 has none)."""
    config = copy.deepcopy(model.generation_config)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    closing = [tokenizer.convert_tokens_to_ids(token) for form in forms for token in form.ends()]
    config.eos_token_id = [i for i in dict.fromkeys([*ends, tokenizer.eos_token_id, *closing]) if i is not None]
    pads = [config.pad_token_id, tokenizer.pad_token_id, *config.eos_token_id, 0]
    config.pad_token_id = next(i for i in pads if i is not None)
    if config.max_new_tokens is None:
        config.max_new_tokens = min(256, (most_positions(model) or 512) // 2)
    config.max_length = None  # max_new_tokens counts
    return config


def override(config: GenerationConfig, *, greedy: bool, max_new_tokens: int | None, **sampled: float | None) -> None:
    """Change what the command line names: a sampling setting switches sampling on, `greedy` switches it off."""
    if max_new_tokens is not None:
        config.max_new_tokens = max_new_tokens
    given = {name: value for name, value in sampled.items() if value is not None}
    if greedy and given:
        raise ConfigError(f"--greedy and --{next(iter(given)).replace('_', '-')}: give one; greedy doesn't sample")
    if given:
        config.do_sample = True
        for name, value in given.items():
            setattr(config, name, value)
    if greedy or not config.do_sample:
        config.do_sample = False
        config.temperature = config.top_p = config.top_k = None
