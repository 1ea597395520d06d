"""The routes over a running engine, on the runs of `generate`'s tests: answers, streams, errors, adapters."""

import asyncio
import json
import random
import re
import shutil
import time
from base64 import b64encode
from hashlib import sha256

import pytest
from jsonschema import Draft202012Validator

from lora_ft.commands.generate.command import find_adapters
from lora_ft.commands.generate.serving import load
from lora_ft.commands.merge import merge_command
from lora_ft.commands.serve.api import Api, Settings
from lora_ft.commands.serve.engine import Engine
from lora_ft.commands.serve.jobs import Limits
from lora_ft.commands.serve.metrics import Metrics
from lora_ft.commands.serve.thread import started
from lora_ft.core.trust import NO_TRUST
from tests.commands.test_generate import BAD, GOOD, by_peft, here, reviewed, runs, said  # noqa: F401 (fixtures)
from tests.helpers.asgi import Answered, ask

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def api(runs):  # noqa: F811
    """Both adapters, and an engine that runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs)
        named, base = find_adapters([], ["reviews=reviews", "talk=talk"], None)
        served = load(named, base, raw=False, trust=NO_TRUST)
        (runs / "more").mkdir(exist_ok=True)
        shutil.copytree("talk", "more/talk", dirs_exist_ok=True)
        (runs / "more/out").symlink_to(runs / "reviews")
        engine = started(lambda: Engine(served, Limits(rows=4, queue=8), Metrics()))
        yield Api(served, engine, Settings("base-model", (), runs / "more"))
        engine.stop()


def get(api: Api, path: str, body=None, **more) -> Answered:
    return asyncio.run(asyncio.wait_for(ask(api.app, path, body, **more), 60))


def post(api: Api, path: str, model: str = "reviews", **body) -> dict:
    answered = get(api, path, {"model": model, "temperature": 0, "max_tokens": 12} | body)
    assert answered.status == 200, answered.body
    return answered.json()


def refused(answered: Answered, status: int, *words: str, param: str | None = None) -> None:
    assert answered.status == status, answered.body
    error = answered.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    assert all(word in error["message"] for word in words), error


def test_the_models_are_the_base_and_the_adapters(api):
    models = get(api, "/v1/models").json()["data"]
    assert [(m["id"], m["parent"], m["is_chat"]) for m in models] == [
        ("base-model", None, False),
        ("reviews", "base-model", False),
        ("talk", "base-model", True),
    ]
    assert get(api, "/v1/models/talk").json() == models[2]
    refused(get(api, "/v1/models/walk"), 404, "no model walk", param="model")
    assert get(api, "/health").json() == {"status": "ok"}


def test_the_openapi_document_says_what_the_routes_take(api):
    document = get(api, "/openapi.json").json()
    routes = {route.path.replace(":path", "") for route in api.app.app.routes}
    assert set(document["paths"]) == routes - {"/", "/openapi.json"}
    assert "security" not in document
    for path in (CHAT, COMPLETE):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        validator = Draft202012Validator(schema | {"components": document["components"]})
        body = {"model": "talk", "max_tokens": 2} | ({"messages": user("hi")} if path == CHAT else {"prompt": "hi"})
        changes = [
            {},
            {"model": "walk"},
            {"max_tokens": "2"},
            {"logit_bias": {}},
            {"logit_bias": {"5": 1}},
            {"user": "me"},
        ]
        changes += [{"nonsense": 1}, {"temperature": 3}, {"stop": ["a"]}, {"stream_options": {"include_usage": True}}]
        for change in changes:
            status = get(api, path, body | change).status
            assert validator.is_valid(body | change) == (status == 200), (path, change, status)
            assert str(status) in operation["responses"]


def test_the_page_is_one_file_that_loads_nothing_and_asks_this_api(api):
    answered = get(Api(api.served, api.engine, Settings("base-model", ("key",))), "/")  # also without the key
    page, policy = answered.body.decode(), answered.headers["content-security-policy"]
    assert answered.status == 200 and answered.headers["content-type"].startswith("text/html")
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert f"{tag}-src 'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert not re.findall(r"""https?:|//\w|\bsrc=|@import|url\(|\son\w+=|\sstyle=""", page)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", page)
    assert set(re.findall(r'fetch\("([^"]+)"', page)) == {"v1/models", CHAT[1:]}
    assert {"id", "is_chat"} <= get(api, "/v1/models").json()["data"][0].keys() and "model.is_chat" in page


def test_answers_are_those_of_generate_and_end_where_the_template_ends(api, here):  # noqa: F811
    answer = post(api, CHAT, messages=user(GOOD))
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": " positive"} and choice["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    question = "is it a bad movie"
    assert post(api, CHAT, "talk", messages=user(question))["choices"][0]["message"]["content"] == by_peft(
        "talk", said(question)
    )
    turns = [*user(question), {"role": "assistant", "content": "awful"}, *user("is it a good movie")]
    found = post(api, CHAT, "talk", messages=turns)["choices"][0]["message"]["content"]
    assert found == by_peft("talk", said(question, "awful", "is it a good movie"))
    assert post(api, COMPLETE, prompt=BAD)["choices"][0]["text"] == by_peft("reviews", reviewed(BAD))
    raw = api.served.tokenizer(BAD)["input_ids"]
    assert post(api, COMPLETE, prompt=raw)["choices"][0]["text"] == by_peft("reviews", BAD)
    for base in ("base", "base-model"):
        assert post(api, COMPLETE, base, prompt=BAD)["choices"][0]["text"] == by_peft(None, BAD)
    assert post(api, COMPLETE, "talk", prompt=BAD)["choices"][0]["text"] == by_peft("talk", BAD)  # as it is


def test_requests_at_once_get_the_answers_they_get_alone(api, here):  # noqa: F811
    rows = [
        (model, f"the film is a {word} movie")
        for word in ("good", "bad", "great", "sad")
        for model in ("reviews", "talk")
    ]
    body = {"temperature": 0, "max_tokens": 12}

    async def all_at_once() -> list[Answered]:
        return await asyncio.gather(*(ask(api.app, CHAT, body | {"model": m, "messages": user(t)}) for m, t in rows))

    answers = [answered.json()["choices"][0]["message"]["content"] for answered in asyncio.run(all_at_once())]
    prompts = [api.served.prompt(model, text, "here") for model, text in rows]
    alone = api.engine.call(lambda: [api.served.answer([prompt])[0].text for prompt in prompts]).result(60)
    assert answers == alone


def test_several_prompts_and_choices_with_scores_and_echo(api):
    asked = dict(prompt=[GOOD, BAD], n=2, logprobs=1, echo=True, max_tokens=1)
    choices = post(api, COMPLETE, **asked)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [c["text"] for c in choices[::2]] == [f"{reviewed(GOOD)} positive", f"{reviewed(BAD)} negative"]
    for choice in choices:
        scores = choice["logprobs"]
        assert "".join(scores["tokens"]) == choice["text"]
        assert scores["token_logprobs"][0] is None and all(value < 0 for value in scores["token_logprobs"][1:])
        assert scores["text_offset"][1] == len(scores["tokens"][0])
        best = scores["top_logprobs"][-1]
        assert best[scores["tokens"][-1]] == pytest.approx(scores["token_logprobs"][-1])
    only = post(api, COMPLETE, **asked | {"max_tokens": 0, "n": 1, "prompt": GOOD})
    assert only["choices"][0]["text"] == reviewed(GOOD) and only["usage"]["completion_tokens"] == 0
    chat = post(api, CHAT, messages=user(GOOD), logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(chat[0]["top_logprobs"]) == 3 and bytes(chat[0]["bytes"]).decode() == chat[0]["token"]


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_stream_tells_what_the_whole_answer_says(api, path):
    body = {"messages": user(GOOD)} if path == CHAT else {"prompt": GOOD, "echo": True}
    body |= {"n": 2, "seed": 3, "temperature": 1.5, "max_tokens": 9}
    whole = post(api, path, "talk", **body)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answered = get(api, path, {"model": "talk"} | body | options)
    assert answered.headers["content-type"].startswith("text/event-stream") and len(answered.chunks) > 4
    *events, last = answered.events()
    assert last["usage"] == whole["usage"] and last["choices"] == []
    for i, choice in enumerate(whole["choices"]):
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == i]
        assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [choice["finish_reason"]]
        if path == CHAT:
            assert parts[0]["delta"]["role"] == "assistant"
            assert "".join(p["delta"].get("content", "") for p in parts) == choice["message"]["content"]
        else:
            assert "".join(p["text"] for p in parts) == choice["text"]


MALFORMED = [
    (CHAT, b"{", 400, "not valid JSON", None),
    (CHAT, b"[]", 400, "not a JSON object", None),
    (CHAT, b'{"model": ' + b"[" * 100_000, 400, "", None),
    (CHAT, b'{"a": \xff}', 400, "not valid JSON", None),
    (CHAT, {"messages": user("a")}, 400, "model", "model"),
    (
        CHAT,
        {"model": "none", "messages": user("a")},
        404,
        "no model none; there are base-model, reviews, talk",
        "model",
    ),
    (CHAT, {"model": "talk", "messages": []}, 400, "", "messages"),
    (
        CHAT,
        {"model": "talk", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "text",
        "messages",
    ),
    (CHAT, {"model": "talk", "messages": [*user("a"), {"role": "assistant", "content": "b"}]}, 400, "last", "messages"),
    (CHAT, {"model": "talk", "messages": user("\ud800")}, 400, "", "messages"),
    (CHAT, {"model": "reviews", "messages": [*user("a"), *user("b")]}, 400, "not trained on chats", "messages"),
    (CHAT, {"model": "reviews", "messages": user("a"), "columns": {"b": "c"}}, 400, "no such column", "messages"),
    (CHAT, {"model": "talk", "messages": user("a"), "temperature": 3}, 400, "temperature", "temperature"),
    (CHAT, {"model": "talk", "messages": user("a"), "temprature": 1}, 400, "temprature", "temprature"),
    (CHAT, {"model": "talk", "messages": user("a"), "logit_bias": {"5": 1}}, 400, "not supported", "logit_bias"),
    (CHAT, {"model": "talk", "messages": user("a"), "max_tokens": 0}, 400, "at least 1", "max_tokens"),
    (CHAT, {"model": "talk", "messages": user("a"), "max_tokens": 128}, 400, "128 positions", "messages"),
    (CHAT, {"model": "talk", "messages": user("a " * 200)}, 400, "128 positions", "messages"),
    (CHAT, {"model": "talk", "messages": user("a"), "n": 5}, 400, "n must be at most 4", "max_tokens"),
    (COMPLETE, {"model": "talk", "prompt": ""}, 400, "empty", "prompt"),
    (COMPLETE, {"model": "talk", "prompt": [[5], []]}, 400, "empty", "prompt"),
    (COMPLETE, {"model": "talk", "prompt": [100_000]}, 400, "token ids", "prompt"),
    (COMPLETE, {"model": "talk", "prompt": [-1]}, 400, "token ids", "prompt"),
    (COMPLETE, {"model": "talk", "prompt": "a", "stop": [""]}, 400, "stop", "stop"),
]


@pytest.mark.parametrize("path, body, status, words, param", MALFORMED)
def test_what_is_malformed_is_refused_by_name(api, path, body, status, words, param):
    refused(get(api, path, body), status, words, param=param)


def test_paths_methods_types_and_sizes(api):
    refused(get(api, "/v2"), 404, "no such path")
    refused(get(api, CHAT), 405, "another method")
    refused(get(api, CHAT, {}, headers={"content-type": "text/plain"}), 415, "application/json")
    refused(get(api, CHAT, b" " * (5 * 2**20)), 413, "larger")
    refused(get(api, CHAT, b"{}", headers={"content-length": "9" * 30}), 413, "larger")


def test_a_client_that_goes_away_frees_its_rows(api):
    body = {"model": "base", "prompt": "the", "max_tokens": 100, "n": 4, "stream": True, "logprobs": 0, "seed": 1}
    for gone_after, stream in ((3, True), (0, False)):
        get(api, COMPLETE, body | {"stream": stream, "temperature": 1.0}, gone_after=gone_after)
        until = time.monotonic() + 10
        while api.engine.batch.rows or api.engine.waiting:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert post(api, CHAT, messages=user(GOOD))["choices"][0]["message"]["content"] == " positive"


def test_a_full_queue_is_429(api, monkeypatch):
    monkeypatch.setattr(api.engine, "limits", Limits(rows=4, queue=0))
    answered = get(api, COMPLETE, {"model": "base", "prompt": "a"})
    refused(answered, 429, "queue is full")
    assert answered.headers["retry-after"] == "1"


def test_a_key_is_needed_but_for_health(api):
    locked = Api(api.served, api.engine, Settings("base-model", ("first", "second")))
    for given in (
        {},
        {"authorization": "Bearer third"},
        {"authorization": "Basic first"},
        {"authorization": "Bearer "},
    ):
        answered = get(locked, "/v1/models", headers=given)
        refused(answered, 401, "key")
        assert answered.headers["www-authenticate"] == "Bearer"
    assert get(locked, "/v1/models", headers={"authorization": "Bearer second"}).status == 200
    assert [get(locked, path).status for path in ("/health", "/metrics")] == [200, 401]


def test_without_a_key_web_pages_of_other_hosts_are_refused(api):
    local = Api(api.served, api.engine, Settings("base-model", hosts=("localhost", "127.0.0.1", "[::1]")))
    for host in ("evil.example", "evil.example:8000", "", "[::1", "127.0.0.1.evil.example"):
        refused(get(local, "/v1/models", headers={"host": host}), 403, "own name")
    assert [get(local, "/health", headers={"host": h}).status for h in ("LOCALHOST:1", "[::1]:80", "127.0.0.1")] == [
        200
    ] * 3


def test_adapters_come_and_go_from_below_one_folder(api, here):  # noqa: F811
    load_path, unload_path = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    for path in ("../reviews", "/etc", "nothing", "out", "\0", "a" * 5000, str(here / "reviews"), ""):
        answered = get(api, load_path, {"lora_name": "new", "lora_path": path})
        assert answered.status == 400 and answered.json()["error"]["param"] == "lora_path", path
    (here / "more/bad").mkdir()
    refused(get(api, load_path, {"lora_name": "new", "lora_path": "bad"}), 400, "nothing trained", param="lora_path")
    for taken in ("talk", "base", "base-model"):
        refused(get(api, load_path, {"lora_name": taken, "lora_path": "talk"}), 400, "already", param="lora_name")
    assert get(api, load_path, {"lora_name": "new", "lora_path": "talk"}).status == 200
    question = user("is it a bad movie")
    assert post(api, CHAT, "new", messages=question)["choices"] == post(api, CHAT, "talk", messages=question)["choices"]
    assert get(api, unload_path, {"lora_name": "new"}).status == 200
    refused(get(api, unload_path, {"lora_name": "new"}), 404, "no adapter new", param="lora_name")
    refused(get(api, CHAT, {"model": "new", "messages": question}), 404, "no model new", param="model")
    closed = Api(api.served, api.engine, Settings("base-model"))
    refused(get(closed, load_path, {"lora_name": "new", "lora_path": "talk"}), 404, "no such path")


def test_metrics_are_in_prometheus_form(api):
    before = api.engine.metrics.requests["talk", 200]
    post(api, CHAT, "talk", messages=user("is it a bad movie"))
    text = get(api, "/metrics").body.decode()
    assert f'lora_ft_requests_total{{model="talk",status="200"}} {before + 1}\n' in text
    for line in text.splitlines():
        assert line.startswith(("# HELP lora_ft_", "# TYPE lora_ft_")) or float(line.rsplit(" ", 1)[1]) >= 0
    assert 'seconds_bucket{le="+Inf"}' in text


def test_a_merged_model_is_served(here, tmp_path):  # noqa: F811
    merge_command(here / "reviews", output=tmp_path / "merged", verify=False)
    named, base = find_adapters([tmp_path / "merged"], [], None)
    served = load(named, base, raw=False, trust=NO_TRUST)
    engine = started(lambda: Engine(served, Limits(), Metrics()))
    answer = post(Api(served, engine, Settings("merged")), CHAT, "merged", messages=user(GOOD))
    engine.stop()
    assert answer["choices"][0]["message"]["content"] == " positive"


def test_nothing_that_is_sent_breaks_the_server(api, capfd):
    """Random bytes, and bodies with random parts replaced: an answer in time, and never a 500."""
    generator, seen = random.Random(0), set()
    good = [
        {"model": "talk", "messages": user("secret-words"), "max_tokens": 2, "stream": False, "n": 1, "logprobs": True},
        {"model": "reviews", "prompt": "secret-words", "max_tokens": 2, "echo": True, "logprobs": 1, "stop": ["a"]},
        {"lora_name": "a", "lora_path": "b"},
    ]
    odd = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "\ud800",
        "\0",
        [],
        {},
        [[]],
        [{}],
        {"role": "user"},
        "a" * 999,
        0.5,
        "talk",
    ]

    def broken(value):
        if generator.random() < 0.2:
            return generator.choice(odd)
        if isinstance(value, dict):
            return {key if generator.random() < 0.95 else "x": broken(part) for key, part in value.items()}
        return [broken(part) for part in value] if isinstance(value, list) else value

    async def all_of_them() -> None:
        for i in range(3000):
            path = generator.choice([CHAT, COMPLETE, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
            if i % 3 == 0:
                body = generator.randbytes(generator.randrange(60))
            elif i % 3 == 1:
                body = bytearray(json.dumps(generator.choice(good)).encode())
                body[generator.randrange(len(body))] = generator.randrange(256)
            else:
                body = broken(generator.choice(good))
            answered = await asyncio.wait_for(ask(api.app, path, bytes(body) if i % 3 == 1 else body), 20)
            seen.add(answered.status)
            assert answered.status < 500, (path, body, answered.body)

    asyncio.run(all_of_them())
    assert {200, 400, 404} <= seen
    said_of_it = capfd.readouterr()
    assert "secret-words" not in said_of_it.out + said_of_it.err
    assert post(api, CHAT, messages=user(GOOD))["choices"][0]["message"]["content"] == " positive"
