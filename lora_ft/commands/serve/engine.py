"""The engine: one thread that computes all requests together, token by token, whichever adapters they name.

Each turn reads a piece of one prompt, so that a long one does not stall the others, or several short prompts, and then gives
every running row its next token in one forward pass. A row joins when its prompt has been read and leaves when its answer is
complete.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from lora_ft.commands.generate.serving import Served
from lora_ft.commands.serve.batch import Batch, Reading, Row, at_once
from lora_ft.commands.serve.beginnings import Beginnings
from lora_ft.commands.serve.jobs import Choice, Failed, Full, Job, Limits
from lora_ft.commands.serve.metrics import Metrics
from lora_ft.core.errors import is_out_of_memory
from lora_ft.core.messages import info
from lora_ft.methods.lora.multi import is_expert, shared_layers
from lora_ft.model.row_cache import ROOM, RowCache, rows_can_join

CHUNK = 64  # tokens of a prompt that are read at once


class Engine:
    """Runs jobs on a model with adapters; all methods may be called from any thread.

    together: rows of different requests share a batch. Where the architecture can't (see `rows_can_join`), or the method of
    an adapter, requests are computed one after the other.
    """

    def __init__(self, served: Served, limits: Limits, metrics: Metrics):
        self.served, self.limits, self.metrics = served, limits, metrics
        self.together = (
            served.by_name and not any(map(is_expert, shared_layers(served.model))) and rows_can_join(served.model)
        )
        self.batch = Batch(served, self.together)
        self.beginnings = Beginnings(limits.tokens // 4 if self.together else 0)
        self.waiting: deque[Job] = deque()
        self.reading: deque[Reading] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Stop the thread after its turn; what still runs fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread:
            self._thread.join()

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs, all or none; raises Full."""
        with self._changed:
            if len(self.waiting) >= self.limits.queue:
                raise Full
            self.waiting.extend(jobs)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Have the thread call `function` between two turns, when no pass is under way.

        Rows that run keep their stacked adapters: a function that changes which ones compute leaves the batch's mix first.
        """
        future: Future = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def jobs(self) -> list[Job]:
        """All jobs that wait, are read or run; for the thread itself."""
        return [*self.waiting, *(r.job for r in self.reading), *self.batch.jobs]

    def refusal(self, job: Job) -> str | None:
        """Why a job can never run, in words."""
        if job.n > (self.limits.rows if self.together else 1):
            return f"n must be at most {self.limits.rows if self.together else 1} on this server"
        most = self.slot_tokens // job.n - ROOM
        if job.longest > most:
            return (
                f"prompt and max_tokens are {job.longest} tokens, and this server's cache has room for {max(most, 0)}"
            )
        return None

    @property
    def slot_tokens(self) -> int:
        """Tokens that the cache may hold for rows; the others are for beginnings."""
        return self.limits.tokens - self.beginnings.limit

    # ---- all below runs in the thread ----

    def run(self) -> None:
        """Compute until `stop`."""
        self._thread = threading.current_thread()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or self._calls or self.waiting or self.reading or self.batch.rows
                )
                if self._stopping:
                    break
            try:
                self.turn()
            except Exception as e:  # a fault fails the requests, not the server
                memory = is_out_of_memory(e)
                self._fail_all(Failed(503 if memory else 500, "out of memory" if memory else "internal error"))
                info(f"a step failed: {type(e).__name__}" + (" (out of memory)" if memory else ""))
        self._fail_all(Failed(503, "the server is stopping"))

    def turn(self) -> None:
        """Calls, one piece of a prompt or some short ones, and one token of every row."""
        while self._calls:
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as e:  # noqa: BLE001 (the caller's)
                future.set_exception(e)
        self._drop()
        while self.waiting and self._has_room(self.waiting[0]):
            with self._changed:
                job = self.waiting.popleft()
            if self._guarded(job, self._admits, job):
                cache, read = self._begin_cache(job)
                self.reading.append(Reading(job, cache, read))
        if self.reading:
            self._read()
        if self.batch.rows:
            self._step()
        self.metrics.rows, self.metrics.waiting = len(self.batch.rows), len(self.waiting)

    def _admits(self, job: Job) -> bool:
        if job.adapter not in self.served.formats:
            job.tell(Failed(404, "the adapter has been unloaded"))
            return False
        job.begin(self.served.model)
        return True

    def _guarded(self, job: Job, function: Callable[..., bool], *arguments: Any) -> bool:
        """What `function` returns; an error in it fails this job alone, and returns False."""
        try:
            return function(*arguments)
        except Exception as e:
            if is_out_of_memory(e):
                raise
            info(f"a request failed: {type(e).__name__}")
            job.tell(Failed(500, "internal error"))
            job.gone = True
            return False

    def _begin_cache(self, job: Job) -> tuple[DynamicCache, int]:
        if not self.together:
            return DynamicCache(config=self.served.model.config), 0
        return (RowCache(), 0) if job.score_prompt else self.beginnings.find(job.adapter, job.ids)

    def _has_room(self, job: Job) -> bool:
        running = [*(r.job for r in self.reading), *self.batch.jobs]
        if not self.together:
            return not running
        rows = len(self.batch.rows) + sum(r.job.n for r in self.reading) + job.n
        longest = max(j.longest for j in [*running, job])
        return rows <= self.limits.rows and rows * (longest + ROOM) <= self.slot_tokens

    def _drop(self) -> None:
        """Take out what nobody waits for, or waits for too long."""
        now = time.monotonic()
        for job in self.jobs():
            if not job.gone and now > job.deadline:
                job.tell(Failed(504, "the request took longer than the server's time limit"))
                job.gone = True
        with self._changed:
            self.waiting = deque(job for job in self.waiting if not job.gone)
        self.reading = deque(reading for reading in self.reading if not reading.job.gone)
        self.batch.keep([i for i, row in enumerate(self.batch.rows) if not row.job.gone])

    def _read(self) -> None:
        """Read a chunk of a prompt, after whose last one its rows join; or short prompts together."""
        reading = self.reading[0]
        if len(short := at_once(self.reading, CHUNK)) > 1 and self.together:
            logits = self.batch.read_whole(short)
            self.metrics.prompt_tokens += sum(reading.read for reading in short)
            for i, own in enumerate(short):
                self._join(own, logits[i : i + 1])
            self.reading = deque(other for other in self.reading if not any(other is own for own in short))
            return
        job = reading.job
        end = min(reading.read + CHUNK, len(job.ids)) if self.together else len(job.ids)
        chunk = job.ids[reading.read : end]
        logits = self.batch.read(job.adapter, chunk, reading.cache, reading.read, every=job.score_prompt)
        if job.score_prompt:
            reading.score(logits, end)
        self.metrics.prompt_tokens += end - reading.read
        reading.read = end
        if end == len(job.ids):
            if job.score_prompt:
                reading.tell_scores()
            self._join(reading, logits[-1:])
        self.reading.popleft()  # only now: where a step fails, all that it was for are told
        if end < len(job.ids):
            self.reading.append(reading)

    def _join(self, reading: Reading, logits: Tensor) -> None:
        job = reading.job
        if self.together:
            self.beginnings.keep(job.adapter, job.ids, reading.cache)
        if not job.config.max_new_tokens:  # only the scores of the prompt are asked for
            job.tell_no_answers()
            return
        self.metrics.first_token(time.monotonic() - job.arrived)
        likeliest = int(logits.argmax())
        rows = [Row(job, choice) for choice in job.choices if not self._choose(job, choice, logits, likeliest)]
        self.batch.join(rows if not job.gone else [], reading.cache)

    def _choose(self, job: Job, choice: Choice, logits: Tensor, likeliest: int) -> bool:
        self.metrics.generated_tokens += 1
        return self._guarded(job, job.choose, choice, logits, likeliest)

    def _step(self) -> None:
        """Give every row its next token."""
        logits = self.batch.step()
        likeliest = logits.argmax(-1).tolist()
        over = [self._choose(*row, logits[i : i + 1], likeliest[i]) for i, row in enumerate(self.batch.rows)]
        self.batch.keep([i for i, row in enumerate(self.batch.rows) if not (over[i] or row.job.gone)])

    def _fail_all(self, failed: Failed) -> None:
        for job in self.jobs():
            job.tell(failed)
        with self._changed:
            self.waiting.clear()
        self.reading.clear()
        self.batch.clear()
