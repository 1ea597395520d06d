"""A request on its way through the engine: what it asks, its choices so far, and the pieces of text that it is told."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from lora_ft.model.generate import logits_processors

LOWEST = -9999.0  # log-probability of what is impossible
STOP, LENGTH = "stop", "length"  # how an answer ends: by an end token or a stop text, or by its limit


class Limits(NamedTuple):
    """rows: answers that are computed at once. tokens: that the cache may hold. queue: requests that may wait."""

    rows: int = 16
    tokens: int = 16_384
    queue: int = 64


class Full(Exception):
    """The queue is full."""


class TokenScore(NamedTuple):
    """A token's log-probability, None for a prompt's first, and the most likely tokens with theirs."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    """More of a choice. number: which. finish: STOP or LENGTH with its last piece. tokens: how many it has so far."""

    number: int
    text: str
    scores: list[TokenScore]
    finish: str | None
    tokens: int


class PromptScores(NamedTuple):
    """The scores of a prompt's tokens, told once before the first piece."""

    scores: list[TokenScore]


class Failed(NamedTuple):
    """A request that ends without an answer. status: of HTTP."""

    status: int
    message: str


class Finished(NamedTuple):
    """All choices are complete."""


Event = Piece | PromptScores | Failed | Finished


@dataclass
class Choice:
    """One of the answers to a request. processors: how its logits are changed before a token is chosen, as in `generate`."""

    index: int
    processors: LogitsProcessorList
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    told: int = 0  # characters


@dataclass(eq=False)
class Job:
    """A request. ids: its prompt, at least one token. ends: tokens that end an answer. text_of: decodes its tokens.

    logprobs: how many likely tokens to tell with each score; None for no scores. score_prompt: tell those of the prompt too.
    deadline: on time.monotonic's clock. tell: called by the engine's thread.
    """

    adapter: str | None
    ids: list[int]
    config: GenerationConfig
    ends: set[int]
    text_of: Callable[[Sequence[int]], str]
    tell: Callable[[Event], None]
    stop: list[str] = field(default_factory=list)
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    score_prompt: bool = False
    streamed: bool = False
    deadline: float = math.inf
    gone: bool = False  # nobody waits for it any more
    arrived: float = field(default_factory=time.monotonic)
    choices: list[Choice] = field(default_factory=list)
    open: int = 0  # choices that are not complete

    @property
    def longest(self) -> int:
        """The most tokens that a row of it has."""
        return len(self.ids) + self.config.max_new_tokens

    def begin(self, model: PreTrainedModel) -> None:
        """Make its choices."""
        for index in range(self.n):
            generator = torch.Generator(model.device)
            if self.seed is None:
                generator.seed()
            else:
                generator.manual_seed((self.seed + index) % 2**63)
            processors = logits_processors(model, self.config, self.ends, len(self.ids))
            self.choices.append(Choice(index, processors, generator))
        self.open = self.n

    def tell_no_answers(self) -> None:
        """End a request for no tokens."""
        for choice in self.choices:
            self.tell(Piece(choice.index, "", [], LENGTH, 0))
        self.tell(Finished())

    def choose(self, choice: Choice, logits: Tensor, likeliest: int) -> bool:
        """Take the next token of a choice by its logits (1, vocabulary) in float32; returns whether the choice is complete.

        likeliest: the token of the largest logit.
        """
        token = likeliest
        if choice.processors or self.config.do_sample:
            before = torch.tensor([self.ids + choice.ids], device=logits.device)
            scores = choice.processors(before, logits.clone())
            if self.config.do_sample:
                token = int(torch.multinomial(scores.softmax(-1), 1, generator=choice.generator))
            else:
                token = int(scores.argmax())
        scores = [] if self.logprobs is None else score_tokens(logits, [token], self.logprobs)
        ended = token in self.ends
        if not ended:
            choice.ids.append(token)
        tokens = len(choice.ids) + ended
        finish = STOP if ended else LENGTH if tokens >= self.config.max_new_tokens else None
        text = ""
        if finish or self.stop or self.streamed:
            full = self.text_of(choice.ids)
            found = [place for stop in self.stop if (place := full.find(stop)) >= 0]
            if found:
                full, finish = full[: min(found)], STOP
            sure = len(full) if finish else certain(full, self.stop)
            text, choice.told = full[choice.told : sure], max(choice.told, sure)
        if text or scores or finish:
            self.tell(Piece(choice.index, text, scores, finish, tokens))
        self.open -= finish is not None
        if not self.open:
            self.tell(Finished())
        return finish is not None


def certain(text: str, stops: Sequence[str]) -> int:
    """How much of a text is sure to stay: not the start of a character or of a stop text at its end."""
    text = text.rstrip("\ufffd")
    return len(text) - max((begun(text, stop) for stop in stops), default=0)


def begun(text: str, marker: str) -> int:
    """How many characters at the end of a text begin a marker, without all of it."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


def score_tokens(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """The score of each of the tokens, by the logits (tokens, vocabulary) that it was chosen by."""
    logprobs = logits.float().log_softmax(-1).nan_to_num(LOWEST).clamp(min=LOWEST)  # JSON has no infinity
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[1]))
    likely = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenScore(*row) for row in zip(tokens, own, likely, strict=True)]
