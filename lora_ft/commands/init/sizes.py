"""Lengths in tokens of the suggested examples, and the settings that follow from the size of the data."""

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lora_ft.commands.init.suggest import Suggestion
from lora_ft.core.errors import ModelError
from lora_ft.core.names import is_local
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.chats.format import chat_format
from lora_ft.data.chats.render import render_chat
from lora_ft.data.template import BadRow, Template, pair_renderer, renderer
from lora_ft.data.tokens import text_encoder
from lora_ft.model.files import Base, resolve
from lora_ft.model.hub import snapshot
from lora_ft.model.load import load_model_config, load_tokenizer

MAX_CHATS = 1000  # rows measured of chats, whose template takes a while
LENGTHS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
MODEL_TEMPLATE_HINT = (
    "the model has no chat template, which chats need: name an instruct model, or set data.chat_template to a file."
)
SPLIT_LENGTH = 512  # of texts that are split
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


class BaseFacts(NamedTuple):
    """The tokenizer of the base, the number of its positions and roughly of its parameters; problem: why they are unknown."""

    tokenizer: PreTrainedTokenizerBase | None = None
    positions: int | None = None
    parameters: int | None = None
    problem: str = ""

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)


class Sizes(NamedTuple):
    """Settings with the reason for each: (value, comment)."""

    max_length: tuple[int, str]
    epochs: tuple[int, str]
    batch_size: tuple[int, str]
    learning_rate: tuple[str, str]


def examine_base(name: str, trust: Trust = NO_TRUST) -> BaseFacts:
    """The tokenizer of a base, downloaded without the weights if necessary."""
    try:
        if is_local(name):
            base = resolve(name, trust=trust)
        else:
            folder = snapshot(name, None, TOKENIZER_FILES)
            base = Base(name, folder, revision=folder.name, trusted_code=trust.remote_code)
        tokenizer = load_tokenizer(base)
        config = load_model_config(base) if base.gguf is None else None
    except ModelError as e:
        return BaseFacts(problem=str(e))
    if config is None:
        return BaseFacts(tokenizer)
    text = config.get_text_config()
    layers, width, words = (getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    parameters = 12 * layers * width**2 + words * width if layers and width and words else None
    return BaseFacts(tokenizer, getattr(text, "max_position_embeddings", None), parameters)


def sizes(suggestion: Suggestion, base: BaseFacts) -> Sizes:
    """max_length from the tokens of the examples, the rest from their number."""
    rows = suggestion.rows
    batch = 4 if rows < 200 else 8 if rows < 2000 else 16
    epochs = 5 if rows < 500 else 3 if rows < 2000 else 2 if rows < 10_000 else 1
    steps = -(-rows // batch) * epochs
    about = f"some {steps:,} steps" + (" or more" if suggestion.partial else "")
    return Sizes(
        _max_length(suggestion, base),
        (epochs, f"{about}; fewer if the loss on eval data rises again"),
        (batch, "examples per step; small data needs small batches for enough steps"),
        learning_rate_for(base.parameters),
    )


def learning_rate_for(parameters: int | None) -> tuple[str, str]:
    """The rate at which to begin with LoRA on all linear layers.

    Dettmers et al. 2023 (QLoRA, table 9) found 2e-4 for 7B and 13B and 1e-4 for 33B and 65B; docs/claims.md has 1e-3 as the
    best of three for 135M, whose scale is 5e-4 here: for data of any kind rather too little than too much.
    """
    jump = "half of it if the loss jumps"
    if parameters and parameters < 1e9:
        return "5.0e-4", f"usual for LoRA below 1B parameters; {jump}"
    if parameters and parameters > 2e10:
        return "1.0e-4", f"usual for LoRA above 20B parameters (QLoRA, table 9); {jump}"
    return "2.0e-4", f"usual for LoRA from 1B to 20B parameters (QLoRA, table 9); {jump}"


def _max_length(suggestion: Suggestion, base: BaseFacts) -> tuple[int, str]:
    if base.tokenizer is None:
        longest = max((_utf8_bytes(suggestion, row) for row in suggestion.examined), default=0)
        length = next((n for n in LENGTHS if n >= longest / 2), LENGTHS[-1])
        return length, "tokens; a guess, as the tokenizer could not be read: see check for the lengths"
    limit = min(base.positions or LENGTHS[-1], LENGTHS[-1])
    if suggestion.task == "text":
        return min(SPLIT_LENGTH, limit), "tokens of a piece; more context needs more memory"
    lengths = sorted(_lengths(suggestion, base.tokenizer))
    if not lengths:
        return min(SPLIT_LENGTH, limit), "tokens; no example could be measured"
    sampled = suggestion.partial or len(lengths) < len(suggestion.examined)
    longest = lengths[-1]
    wanted = longest * 5 // 4 if sampled else longest
    length = min(next((n for n in LENGTHS if n >= wanted), LENGTHS[-1]), limit)
    cut = sum(n > length for n in lengths)
    measured = f"the longest of {len(lengths):,} examples has {longest:,}"
    if not cut:
        return length, f"tokens; {measured}"
    why = "the model has no more positions" if limit < LENGTHS[-1] else "more needs more memory"
    return length, f"tokens; {cut:,} of {len(lengths):,} examples are longer and are cut ({why})"


def _lengths(suggestion: Suggestion, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of examples, with the template around them; bad rows are left out."""
    encoder, examples, is_chat = text_encoder(tokenizer), [], "messages" in suggestion.data.settings
    try:
        render = _renderer(suggestion, tokenizer)
    except ModelError:
        return []
    for row in suggestion.examined[: MAX_CHATS if is_chat else None]:
        try:
            examples.append(render(row))
        except BadRow:
            continue
    added = 0 if is_chat else len(encoder.before) + len(encoder.eos)
    parts = [encoder.bare.encode_batch_fast(list(texts)) for texts in zip(*examples, strict=True)]
    return [added + sum(len(encoding.ids) for encoding in example) for example in zip(*parts, strict=True)]


def _renderer(suggestion: Suggestion, tokenizer: PreTrainedTokenizerBase) -> Callable[[dict], tuple[str, ...]]:
    """A function from a row to its texts, which are encoded one by one; of a classification with the longest label."""
    known = ("prompt", "completion", "text", "messages", "label_names", "roles")
    template = Template(**{name: value for name, value in suggestion.data.settings.items() if name in known})
    if template.messages:
        chat = chat_format(tokenizer, None)
        return lambda row: (render_chat(row, template, chat).text,)
    if template.text:
        fill = renderer("text", template.text, {})
        return lambda row: (fill(row),)
    pair = pair_renderer(template)

    def longest(row: dict) -> tuple[str, str]:
        prompt, completion, choices, *_ = pair(row)
        return prompt, max([completion, *choices], key=len)

    return longest


def _utf8_bytes(suggestion: Suggestion, row: dict) -> int:
    return 40 + sum(
        len(str(row.get(column.partition("[")[0], "")).encode("utf-8", "replace")) for column in suggestion.data.columns
    )
