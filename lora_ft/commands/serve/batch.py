"""The rows that run together: one forward pass gives each its next token, whichever adapters they name."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from lora_ft.commands.generate.serving import Served
from lora_ft.commands.serve.jobs import Choice, Job, PromptScores, TokenScore, score_tokens
from lora_ft.model.row_cache import Forward, Part, RowCache, joined, read_together


class Row(NamedTuple):
    """A running choice."""

    job: Job
    choice: Choice

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the last, which the next pass reads."""
        return len(self.job.ids) + len(self.choice.ids) - 1


@dataclass
class Reading:
    """A prompt that is being read. read: tokens of it in `cache`."""

    job: Job
    cache: DynamicCache
    read: int = 0
    scores: list[TokenScore] = field(default_factory=list)

    @property
    def is_new(self) -> bool:
        """Whether nothing of it has been read, not even for another prompt with the same beginning."""
        return not self.read and not self.job.score_prompt

    def score(self, logits: Tensor, end: int) -> None:
        """Take the scores of the tokens after those from `read` to `end`, by the logits there."""
        following = self.job.ids[self.read + 1 : end + 1]
        self.scores += score_tokens(logits[: len(following)], following, self.job.logprobs or 0)

    def tell_scores(self) -> None:
        """Tell the scores of the whole prompt."""
        self.job.tell(PromptScores([TokenScore(self.job.ids[0], None, []), *self.scores]))


def at_once(readings: Iterable[Reading], short: int) -> list[Reading]:
    """The new prompts of at most `short` tokens that are read in one pass with the first; [] if that is not one of them.

    With their padding they have at most four times as many tokens, for which running rows wait.
    """
    together: list[Reading] = []
    width = 0
    for reading in readings:
        if reading.is_new and len(reading.job.ids) <= short:
            width = max(width, len(reading.job.ids))
            if width * (len(together) + 1) > 4 * short:
                break
            together.append(reading)
        elif not together:
            break
    return together


class Batch:
    """Rows with their cache. together: they may be of different requests; else of one, whose own cache is used."""

    def __init__(self, served: Served, together: bool):
        self.served, self.together, self.forward = served, together, Forward(served.model)
        self.rows: list[Row] = []
        self._cache: RowCache | DynamicCache | None = None
        self._mixing = ExitStack()  # the adapters of the rows are stacked once, for as long as these stay the same
        self._mixed: list[str | None] | None = None

    @property
    def jobs(self) -> list[Job]:
        """The jobs of the rows, each once."""
        return list(dict.fromkeys(row.job for row in self.rows))

    def read(self, adapter: str | None, ids: list[int], cache: DynamicCache, read: int, *, every: bool) -> Tensor:
        """Read tokens of a prompt into its own cache, which has `read`; the logits (tokens, vocabulary) as of `Forward`."""
        self.leave_mix()
        with self.served.computing([adapter]):
            return self.forward(torch.tensor([ids]), cache, [read], every=every)[0].float()

    def read_whole(self, readings: list[Reading]) -> Tensor:
        """Read new prompts in one pass, each into its own cache; the logits (prompts, vocabulary) after each."""
        self.leave_mix()
        with self.served.computing([reading.job.adapter for reading in readings]):
            logits, caches = read_together(self.forward, [reading.job.ids for reading in readings])
        for reading, cache in zip(readings, caches, strict=True):
            reading.cache, reading.read = cache, len(reading.job.ids)
        return logits.float()

    def join(self, rows: list[Row], cache: DynamicCache) -> None:
        """Add the rows of a prompt that has been read into `cache`."""
        if rows and self.together:
            new = [Part(cache, 0, row.length) for row in rows]
            self._cache = joined([*self._parts(range(len(self.rows))), *new])
        elif rows:
            self._cache = cache
        self.rows += rows

    def step(self) -> Tensor:
        """The logits (rows, vocabulary) of the next tokens, after reading the last ones."""
        names = [row.job.adapter for row in self.rows]
        if names != self._mixed:
            self.leave_mix()
            self._mixing.enter_context(self.served.computing(names))
            self._mixed = names
        last = torch.tensor([[row.choice.ids[-1]] for row in self.rows])
        assert self._cache is not None
        return self.forward(last, self._cache, [row.length for row in self.rows])[:, -1].float()

    def keep(self, kept: list[int]) -> None:
        """Keep these rows alone; they have read their last token but one."""
        if len(kept) < len(self.rows):
            parts = self._parts(kept)
            self.rows = [self.rows[i] for i in kept]
            self._cache = joined(parts) if parts else None
        if not self.rows:
            self.leave_mix()

    def clear(self) -> None:
        """Forget all rows."""
        self.rows, self._cache = [], None
        self.leave_mix()

    def leave_mix(self) -> None:
        """Free the stacked adapters."""
        self._mixing.close()
        self._mixed = None

    def _parts(self, kept: "list[int] | range") -> list[Part]:
        return [Part(self._cache, i, self.rows[i].length) for i in kept]  # type: ignore[arg-type]
