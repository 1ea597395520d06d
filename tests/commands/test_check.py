"""`lora-ft check`: what it catches, and what it shows, through the command line on a tiny base."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft.commands.check import display
from lora_ft.commands.check.chats import chat_turns
from lora_ft.commands.check.warnings import placeholder_words
from lora_ft.config.schema import DataConfig
from lora_ft.data.chats.encode import encode_chats
from lora_ft.data.chats.format import find_chat_format
from lora_ft.data.chats.render import render_chat, turn_starts
from lora_ft.data.template import Template
from lora_ft.data.tokens import text_encoder
from tests.data.conftest import build as build_tokenizer
from tests.helpers.command import cli, refused, settings
from tests.helpers.tiny import write_run

CHAT = """
model: {name: base}
data: {train: chats.jsonl, messages: messages, chat_template: chat.jinja}
train: {batch_size: 4, report_to: []}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("check"))


def checked(folder, *arguments, code=0, **changes):
    ended = cli(folder, "check", "config.yaml", "--json", *settings(**changes), *arguments)
    assert ended.code == code, ended
    return json.loads(ended.out), ended.err


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def warned(facts, *words):
    return any(all(word in warning for word in words) for warning in facts["warnings"])


def test_it_tells_what_a_run_would_be(made):
    facts, _ = checked(made)
    assert facts["steps"] == 12 and facts["trainable_parameters"] == 1088 and len(facts["targets"]) == 4
    assert facts["end_token_learned"] == facts["train"]["examples"] == 48
    assert sum(count for _, _, count in facts["lengths"]) == 48
    memory = facts["memory"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total") and memory["runtime"] > 2**27
    assert not (made / "out").exists()


def test_rows_of_both_sets_are_found(made):
    facts, _ = checked(made)
    assert facts["eval_examples_in_train"] == 20 and warned(facts, "data.eval", "also in data.train")
    write_rows(made / "other.jsonl", [{"text": f"another {i}", "label": 0} for i in range(5)])
    facts, _ = checked(made, data__eval="other.jsonl")
    assert facts["eval_examples_in_train"] == 0 and not warned(facts, "also in data.train")


def test_a_prompt_longer_than_max_length(made):
    facts, _ = checked(made, data__max_length=24)
    assert facts["train"]["truncated"] and warned(
        facts, "data.max_length 24", "lose the middle of their longest column"
    )
    assert facts["lengths"][-1][2] == facts["train"]["truncated"]


def test_a_misspelt_column(made):
    _, err = checked(made, data__prompt="{txt}", code=3)
    assert 'no column "txt"' in err and '"text"' in err


def test_labels_that_begin_alike(made):
    facts, _ = checked(made, data__label_names="{label: [great film, great movie]}")
    assert warned(facts, "share a first token", "great film")
    assert not warned(checked(made)[0], "share a first token")
    facts, _ = checked(
        made, data__label_names="null", data__completion=" good {label}", train__metric_for_best_model="loss"
    )
    assert warned(facts, "share a first token")  # completions of which there are only a few are labels, too


def chats(folder, template):
    (folder / "config.yaml").write_text(CHAT)
    (folder / "chat.jinja").write_text(template)
    turns = [{"role": "user", "content": "is it good"}, {"role": "assistant", "content": "it was great"}]
    write_rows(folder / "chats.jsonl", [{"messages": turns} for _ in range(8)])
    return folder


def test_an_all_masked_template(made, tmp_path):
    folder = chats(
        write_run(tmp_path), "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    facts, err = checked(folder, code=3)
    assert "chats.jsonl:1" in err and facts["errors"][0]["exit_code"] == 3


def test_an_end_token_that_is_never_learned(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<pad>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder = chats(write_run(tmp_path), template)  # <pad> ends each turn: lora-ft stops there, other tools at </s>
    facts, _ = checked(folder)
    assert facts["end_token_learned"] == 8 and warned(
        facts, "end token (</s>)", "turn of the chat template (<pad>)", "stop"
    )
    facts, _ = checked(folder, data__max_length=facts["train"]["longest"] - 1)
    assert facts["end_token_learned"] == 0 and warned(facts, "end token (<pad>, </s>)", "will not learn to stop")
    (folder / "chat.jinja").write_text(template.replace("<pad>", "</s>"))
    facts, _ = checked(folder)
    assert facts["end_token_learned"] == 8 and not warned(facts, "end token")


@pytest.mark.parametrize(
    "changes, code, words",
    [
        ({"adapter__init_from": "nowhere"}, 4, ["adapter.init_from: nowhere: no such folder"]),
        ({"train__report_to": "[neptune]"}, 2, ["neptune"]),
        ({"adapter__targets": "[gate, q]", "adapter__layers": "[7]"}, 4, ["layers [7]"]),
        ({"output": "train.jsonl"}, 6, ["a file"]),
        ({"output": "base"}, 6, ["contains a model"]),
    ],
)
def test_what_training_would_refuse(made, changes, code, words):
    facts, err = checked(made, code=code, **changes)
    assert all(word in err for word in words)
    assert facts["train"]["rows"] == 48  # the rest is told all the same


def test_an_example_longer_than_the_models_positions(tmp_path):
    folder = write_run(tmp_path, "gpt2")
    write_rows(folder / "train.jsonl", [{"text": "the film is a movie " * 40, "label": i % 2} for i in range(8)])
    _, err = checked(folder, code=2)
    assert "supports 128 positions" in err


def test_virtual_tokens_count(tmp_path):
    folder = write_run(tmp_path)
    config = (folder / "config.yaml").read_text().replace("{rank: 4, alpha: 8}", "{method: prompt, virtual_tokens: %d}")
    needed = []
    for tokens in (4, 40):
        (folder / "config.yaml").write_text(config % tokens)
        needed.append(checked(folder, train__share_prefixes="off")[0]["memory"]["activations"])
    assert needed[1] > 1.5 * needed[0]


def test_several_faults_at_once(made):
    facts, err = checked(made, code=6, output="base", adapter__init_from="nowhere", data__prompt="{txt}")
    assert [e["exit_code"] for e in facts["errors"]] == [6, 4, 3] and err.count("\n") >= 3


def test_what_people_see_fits_80_columns_and_needs_no_colour(made):
    ended = cli(made, "check", "config.yaml", *settings(data__max_length=30))
    assert ended.code == 0 and "\x1b" not in ended.out
    assert "» negative</s>«" in ended.out and "layers 0-1" in ended.out
    order = [
        ended.out.index(text) for text in ("warning:", "\ndata\n", "\nsettings\n", "rank: 4", "defaults of", "dropout")
    ]
    assert order == sorted(order) and ended.out.startswith("warning:") and "roughly" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80


def test_timing_measures_and_writes_nothing(made):
    facts, _ = checked(made, "--time")
    timing = facts["timing"]
    assert timing["tokens_per_second"] > 0 and timing["evaluations"] == 5 and timing["seconds_training"] > 0
    assert not (made / "out").exists()


def test_the_trials_of_learning_rates_are_part_of_the_time(made):
    auto = {"train__learning_rate": "auto", "train__max_steps": 30}
    timing = checked(made, "--time", **auto)[0]["timing"]
    # five of a fifth; scoring each on 8% of the rows, of which the run reads all five times, takes half of a step
    assert timing["seconds_trying"] == pytest.approx((1 + 5 * 0.08 / 5 / 2) * timing["seconds_training"])
    assert "with the trials of learning rates" in cli(made, "check", "config.yaml", *settings(**auto)).out
    assert "to try learning rates" in cli(made, "check", "config.yaml", "--time", *settings(**auto)).out
    too_few = settings(**auto | {"train__max_steps": 29})
    assert "learning rates" not in cli(made, "check", "config.yaml", *too_few).out
    name = "data.eval.tuning: "  # which trials need
    assert name in cli(made, "check", "config.yaml", *settings(**auto, data__eval='{"tuning": 5}')).err


def test_weights_of_nan_are_told_with_the_rest(tmp_path):
    folder = write_run(tmp_path)
    weights = load_file(folder / "base/model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "base/model.safetensors", {"format": "pt"})
    facts, err = checked(folder, "--time", code=4)
    assert "holds NaN or inf" in err and facts["errors"][0]["exit_code"] == 4 and facts["steps"] == 12


def test_gpt3_has_the_papers_numbers(tmp_path):
    for rank, parameters in ((4, 18_874_368), (1, 4_718_592)):
        config = dict(model_type="gpt2", n_embd=12288, n_head=96, n_layer=96, n_positions=64, vocab_size=50)
        assert parameters == 2 * 96 * rank * 2 * config["n_embd"]
        (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
        ended = cli(tmp_path, "check", "--shape", ".", "--json", *settings(adapter__rank=rank, data__max_length=16))
        facts = json.loads(ended.out)
        assert 48 * facts["trainable_parameters"] == parameters
    full = facts["memory"]["full"]
    assert full["adapter"] + full["optimizer"] == 16 * facts["base_parameters"]
    assert facts["memory"]["lora"]["total"] < 0.4 * full["total"]


def test_a_shape_that_is_none_is_named(tmp_path):
    ended = cli(tmp_path, "check", "--shape", "gpt5")
    assert ended.code == 4 and "gpt3-175b" in ended.err
    assert cli(tmp_path, "check").code == cli(tmp_path, "check", "x.yaml", "--shape", "gpt2").code == 2


def test_spans():
    assert display.spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_letters_for_classes_are_told_where_they_are_not_those_of_choices():
    data = {"train": ("a.jsonl",), "completion": " {label}", "label_names": {"label": ["A", "B"]}}
    (warning,) = placeholder_words(DataConfig(prompt="{text}\nLabel:", **data))
    assert "letters" in warning and "[negative, positive]" in warning
    assert not placeholder_words(DataConfig(prompt="{q}\nA. {a}\nB. {b}\nAnswer:", **data))
    assert not placeholder_words(DataConfig(prompt="{text}", **data | {"label_names": {"label": ["bad", "good"]}}))


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_chats_are_shown_turn_by_turn():
    """Each turn below its kind; supervised ones between marks, with the token that they end in."""
    tokenizer = build_tokenizer(chat_template=CHATML)
    chat = find_chat_format(tokenizer)
    turns = [("user", "so"), ("assistant", "it goes"), ("user", "hello"), ("assistant", "fine")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    own = build_tokenizer(chat_template="<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML)
    (first, _), *_ = turn_starts(row, Template(messages="messages"), find_chat_format(own))
    assert first == "user, after the chat template's own system prompt"
    template = Template(messages="messages")
    done = render_chat(row, template, chat)
    spans = [position for span in done.spans for position in span]
    (example,) = encode_chats([done.text], [spans], [[]], 100, "column", text_encoder(tokenizer))
    lines = display.highlight_supervised(example._asdict(), tokenizer, "utf-8", turn_starts(row, template, chat))
    assert [line.plain for line in lines] == [
        "  user",
        "<|im_start|>user\nso<|im_end|>",
        "  assistant, supervised, ends in <|im_end|>",
        "<|im_start|>assistant\n»it goes<|im_end|>«",
        "  user",
        "<|im_start|>user\nhello<|im_end|>",
        "  assistant, supervised, ends in <|im_end|>",
        "<|im_start|>assistant\n»fine<|im_end|>«\n",
    ]


@pytest.mark.parametrize(
    "truncate, shown",
    [
        ("start", ["  user", "  assistant, supervised, ends in <|im_end|>"] * 2),
        ("end", ["  system", "  user", "  assistant, supervised, ends in <|im_end|>", "  user"]),
        ("column", ["  system", "  user", "  assistant, supervised, ends in <|im_end|>"]),
    ],
)
def test_of_chats_that_are_cut_the_turns_that_are_left_are_shown(tmp_path, truncate, shown):
    """Where earlier turns are left out, the next turn of the user has the header of the first."""
    tokenizer = build_tokenizer(chat_template=CHATML)
    said = ("so it goes", "first " * 9, "it goes", "hello there " * 30, "fine")
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    write_rows(tmp_path / "a.jsonl", [{"messages": turns}])
    data = DataConfig(train=(str(tmp_path / "a.jsonl"),), messages="messages", max_length=90, truncate=truncate)
    done = render_chat({"messages": turns}, Template(messages="messages"), find_chat_format(tokenizer))
    spans, others = ([position for span in of for position in span] for of in (done.spans, done.others))
    (example,) = encode_chats([done.text], [spans], [others], 90, truncate, text_encoder(tokenizer))
    example = example._asdict() | {"row": 0}
    assert example["truncated"]
    starts = chat_turns(example, data, tokenizer)
    lines = [line.plain for line in display.highlight_supervised(example, tokenizer, "utf-8", starts)]
    assert [line for line in lines if line.startswith("  ")] == shown
    for line in lines[1::2]:
        assert line.count("<|im_start|>") == 1 or truncate == "start" and line == lines[1]
    if truncate == "column":
        assert lines[3].startswith("<|im_start|>user\n [...] hello") and "first" not in lines[3]


def test_the_share_that_trains_is_of_all_parameters_that_are_there(made):
    facts, _ = checked(made)
    assert facts["parameters"] == facts["base_parameters"] + facts["trainable_parameters"]
    assert facts["trainable_share"] == pytest.approx(facts["trainable_parameters"] / facts["parameters"])
    assert f"1,088 of {facts['parameters']:,} parameters" in cli(made, "check", "config.yaml").out
    config = (made / "config.yaml").read_text().replace("adapter: {rank: 4, alpha: 8}", "adapter: {method: full}")
    (made / "full.yaml").write_text(config)
    full = json.loads(cli(made, "check", "full.yaml", "--json").out)
    assert full["trainable_parameters"] == full["parameters"] == facts["base_parameters"]


def test_a_run_in_the_output_is_a_warning(made):
    record = made / "held" / "checkpoints" / "step-3" / "lora_ft.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"kind": "checkpoint", "files": {}, "config": {}, "base": {}}')
    facts, _ = checked(made, output="held")
    assert warned(facts, "output held", "already contains a run", "--resume", "--overwrite")
    refused(cli(made, "train", "config.yaml", "--set", "output=held"), 6, "already contains a run")
