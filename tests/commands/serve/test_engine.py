"""The engine, turn by turn, against `generate` of each request alone."""

import random
import time

import pytest
import torch
from transformers import GenerationConfig

from lora_ft.commands.generate.prompts import prompt_format
from lora_ft.commands.generate.serving import Served
from lora_ft.commands.serve.engine import Engine
from lora_ft.commands.serve.jobs import Failed, Finished, Full, Job, Limits, Piece, PromptScores
from lora_ft.commands.serve.metrics import Metrics
from lora_ft.commands.serve.thread import started
from lora_ft.methods.lora.multi import use
from lora_ft.model.generate import generate, to_text
from lora_ft.model.row_cache import rows_can_join
from tests.helpers.families import FAMILIES, build
from tests.helpers.tiny import tiny_tokenizer
from tests.methods.lora.test_multi import ADAPTERS, served

FIVE_ROWS = Limits(rows=5)
NAMES = [None, *ADAPTERS]


def serving(tmp_path, family: str, limits: Limits = FIVE_ROWS) -> Engine:
    """An engine whose thread is not started, on a tiny model with adapters."""
    model, tokenizer = served(tmp_path, family), tiny_tokenizer()
    formats = {name: prompt_format(None, tokenizer, raw=True) for name in NAMES}
    return Engine(Served(None, model, tokenizer, formats), limits, Metrics())


class Asked:
    """A job and what it was told."""

    def __init__(self, engine: Engine, ids: list[int], new: int = 12, adapter: str | None = None, **more):
        config = GenerationConfig(do_sample=False)
        config.max_new_tokens = new
        for name in ("temperature", "top_p"):
            if name in more:
                config.do_sample = True
                setattr(config, name, more.pop(name))
        tokenizer = engine.served.tokenizer
        more = {"ends": {2}, "logprobs": 0} | more
        self.events: list = []
        self.job = Job(adapter, ids, config, text_of=lambda i: to_text(tokenizer, i), tell=self.events.append, **more)

    def pieces(self, number: int = 0) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece) and event.number == number]

    def ids(self, number: int = 0) -> list[int]:
        return [score.token for piece in self.pieces(number) for score in piece.scores]

    def text(self, number: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces(number))

    @property
    def over(self) -> bool:
        return any(isinstance(event, Finished | Failed) for event in self.events)


def alone(engine: Engine, asked: Asked) -> list[int]:
    """The tokens, with the end, that `generate` greedily gives a request by itself."""
    model, job = engine.served.model, asked.job
    use(model, job.adapter)
    config = GenerationConfig(max_new_tokens=job.config.max_new_tokens, do_sample=False)
    (row,) = generate(model, [job.ids], config, job.ends)
    use(model, None)
    return row.ids + [2] * row.ended


def prompts(generator: random.Random, count: int) -> list[list[int]]:
    """Of many lengths, some with a beginning that others have too."""
    beginning = [generator.randrange(3, 60) for _ in range(20)]
    return [
        beginning[: generator.choice((0, 12, 20))]
        + [generator.randrange(3, 60) for _ in range(generator.randint(1, 40))]
        for _ in range(count)
    ]


def finish(engine: Engine, *asked: Asked, turns: int = 2000) -> None:
    for _ in range(turns):
        if all(one.over for one in asked):
            return
        engine.turn()
    raise AssertionError("not finished")


@pytest.mark.parametrize("family", ["llama", "gpt2", "exaone4", "mpt", "phi3"])
def test_rows_that_come_and_go_at_random_get_their_tokens_alone(tmp_path, family, monkeypatch):
    monkeypatch.setattr("lora_ft.commands.serve.engine.CHUNK", 7)
    engine, generator = serving(tmp_path, family), random.Random(family)
    assert engine.together
    asked = [Asked(engine, ids, generator.randint(1, 30), generator.choice(NAMES)) for ids in prompts(generator, 16)]
    waiting, most = [*asked], 0
    while not all(one.over for one in asked):
        while waiting and generator.random() < 0.4:
            engine.submit([waiting.pop().job])
        engine.turn()
        most = max(most, len(engine.batch.rows))
    assert most == 5 and not engine.batch.rows
    expected = {id(one): alone(engine, one) for one in asked}
    assert [one.ids() for one in asked] == [expected[id(one)] for one in asked]
    last = max((one.job for one in asked), key=lambda job: len(job.ids))
    before, again = engine.metrics.prompt_tokens, Asked(engine, [*last.ids, 9, 8], 20, last.adapter)
    engine.submit([again.job])
    finish(engine, again)
    assert again.ids() == alone(engine, again)
    assert engine.metrics.prompt_tokens == before + 2  # the beginning is known


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mpt", "gemma2"])
def test_short_prompts_that_come_at_once_are_read_in_one_pass(tmp_path, family, monkeypatch):
    monkeypatch.setattr("lora_ft.commands.serve.engine.CHUNK", 7)
    engine, draw, passes = serving(tmp_path, family), random.Random(family), []
    forward = engine.batch.forward

    def noted(ids, *arguments, **more):
        passes.append(tuple(ids.shape))
        return forward(ids, *arguments, **more)

    engine.batch.forward = noted
    prompts = [[draw.randrange(3, 90) for _ in range(length)] for length in (3, 12, 7, 5, 1)]
    asked = [Asked(engine, ids, 6, NAMES[i % len(NAMES)]) for i, ids in enumerate(prompts)]
    engine.submit([one.job for one in asked])
    engine.turn()
    assert passes == [(4, 7), (4, 1)]  # all but the long one, and then a token for each
    finish(engine, *asked)
    assert [one.ids() for one in asked] == [alone(engine, one) for one in asked]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_lets_rows_join(family):
    assert rows_can_join(build(family))


def test_one_after_the_other_where_rows_cannot_join(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ft.commands.serve.engine.rows_can_join", lambda model: False)
    engine = serving(tmp_path, "llama")
    asked = [Asked(engine, ids, 6, name) for ids, name in zip(prompts(random.Random(1), 4), NAMES, strict=False)]
    engine.submit([one.job for one in asked])
    most = 0
    while not all(one.over for one in asked):
        engine.turn()
        most = max(most, len(engine.batch.rows))
    assert most == 1 and [one.ids() for one in asked] == [alone(engine, one) for one in asked]
    assert "n must be at most 1" in engine.refusal(Asked(engine, [5], n=2).job)


def test_choices_of_a_seed_are_the_same_whatever_else_runs_and_differ_among_each_other(tmp_path):
    engine = serving(tmp_path, "llama", Limits(rows=8))
    alike = dict(new=10, adapter="wide", n=3, seed=7, temperature=1.0, top_p=0.9)
    first = Asked(engine, [5, 6, 7, 8], **alike)
    engine.submit([first.job])
    finish(engine, first)
    again, other = Asked(engine, [5, 6, 7, 8], **alike), Asked(engine, [9] * 30, 20, "small")
    engine.submit([other.job, again.job])
    finish(engine, again, other)
    answers = [first.ids(number) for number in range(3)]
    assert answers == [again.ids(number) for number in range(3)]
    assert len({tuple(ids) for ids in answers}) == 3


def test_scores_are_the_models_log_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ft.commands.serve.engine.CHUNK", 3)
    engine, ids = serving(tmp_path, "llama"), list(range(5, 16))
    asked = Asked(engine, ids, 4, "wide", logprobs=2, score_prompt=True)
    nothing = Asked(engine, ids, 0, "wide", logprobs=0, score_prompt=True)
    engine.submit([asked.job, nothing.job])
    finish(engine, asked, nothing)
    use(engine.served.model, "wide")
    row = torch.tensor([ids + asked.ids()])
    expected = engine.served.model(row).logits[0].log_softmax(-1)
    told = next(event for event in asked.events if isinstance(event, PromptScores)).scores
    scores = [*told, *(score for piece in asked.pieces() for score in piece.scores)]
    assert [score.token for score in scores] == row[0].tolist() and scores[0].logprob is None
    for place, score in enumerate(scores[1:]):
        assert score.logprob == pytest.approx(expected[place, score.token].item(), abs=1e-4)
        assert score.top[0][0] == expected[place].argmax() and len(score.top) == 2
    assert nothing.pieces()[0].finish == "length" and not nothing.ids()


def test_an_answer_ends_before_a_stop_text_of_which_no_part_is_told(tmp_path):
    engine = serving(tmp_path, "llama")
    full = Asked(engine, [5, 6, 7], 20)
    engine.submit([full.job])
    finish(engine, full)
    stop = full.text()[6:9]
    asked = Asked(engine, [5, 6, 7], 20, stop=[stop, "not there"], streamed=True, logprobs=None)
    engine.submit([asked.job])
    finish(engine, asked)
    assert asked.text() == full.text()[: full.text().index(stop)]
    assert asked.pieces()[-1].finish == "stop"


def test_what_nobody_waits_for_leaves_and_what_takes_too_long_fails(tmp_path):
    engine = serving(tmp_path, "llama", Limits(rows=2))
    gone, late, stays, waits = (Asked(engine, [5 + i] * 4, 30) for i in range(4))
    engine.submit([gone.job, late.job, stays.job, waits.job])
    for _ in range(4):
        engine.turn()
    assert len(engine.batch.rows) == 2 and len(engine.waiting) == 2
    gone.job.gone, late.job.deadline = True, time.monotonic() - 1
    finish(engine, stays, waits, late)
    assert late.events[-1].status == 504 and not gone.over
    assert stays.ids() == alone(engine, stays) and waits.ids() == alone(engine, waits)


def test_memory_and_the_queue_are_bounded(tmp_path):
    engine = serving(tmp_path, "llama", Limits(rows=8, tokens=512, queue=3))
    assert "room for 320" in engine.refusal(Asked(engine, [5] * 4, 400).job)
    asked = [Asked(engine, [5 + i] * 4, 60) for i in range(3)]
    engine.submit([one.job for one in asked])
    with pytest.raises(Full):
        engine.submit([Asked(engine, [5], 1).job])
    for _ in range(8):
        engine.turn()
    assert len(engine.batch.rows) == 3  # 3 * (64 + 64) tokens
    more = [Asked(engine, [8] * 4, 60), Asked(engine, [9] * 100, 2)]
    engine.submit([one.job for one in more])
    engine.turn()
    assert len(engine.waiting) == 2
    finish(engine, *asked, *more)
    assert engine.beginnings.tokens <= engine.beginnings.limit == 128


def test_a_fault_in_a_step_fails_the_requests_and_not_the_engine(tmp_path, monkeypatch):
    engine = started(lambda: serving(tmp_path, "llama"))
    with monkeypatch.context() as patch:
        patch.setattr(engine.batch, "step", lambda: 1 / 0)
        asked = Asked(engine, [5, 6], 9)
        engine.submit([asked.job])
        until = time.monotonic() + 20
        while not asked.over and time.monotonic() < until:
            time.sleep(0.01)
    assert asked.events[-1] == Failed(500, "internal error")
    again = Asked(engine, [5, 6], 9)
    engine.submit([again.job])
    while not again.over and time.monotonic() < until:
        time.sleep(0.01)
    engine.stop()
    assert again.ids() == alone(engine, again)
