"""Loading a config: the accepted values, and the error messages."""

import json
import re

import pytest

from lora_ft.config.load import changes, load_config, parse_config
from lora_ft.config.schema import SECTIONS, Config, resume_class
from lora_ft.core.errors import ConfigError

GOOD = """\
model:
  name: gpt2
data:
  train: reviews.jsonl
  prompt: "Review: {sentence}"
  completion: " {label}"
"""
FORMLESS = "model: {name: gpt2}\ndata:\n  train: reviews.jsonl\n"


@pytest.fixture
def load(tmp_path):
    def load_text(text: str, *overrides: str) -> Config:
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def wrong(load):
    """The lines of the message, without the folder."""

    def message(text: str, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert caught.value.exit_code == 2
        return [re.sub(r"^\S*/c\.yaml", "c.yaml", line) for line in str(caught.value).splitlines()]

    return message


def test_defaults(load):
    config = load(GOOD)
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.targets) == (8, 16.0, ("q", "v"))
    assert (config.train.learning_rate, config.train.warmup_steps, config.train.batch_size) == (5e-4, 0.06, 16)
    assert (config.data.train, config.data.eval, config.output) == (("reviews.jsonl",), None, "out")


def test_a_record_round_trips(load):
    text = GOOD + "  label_names: {label: [bad, good]}\n  eval: [a.csv, b.csv]\nadapter: {layers: 1-3}\n"
    config = load(text, "trainer.adam_beta2=0.99")
    assert parse_config(json.loads(json.dumps(config.model_dump()))) == config == parse_config(config.model_dump())
    assert parse_config(config.model_dump(), ["adapter.rank=2"]).adapter.rank == 2
    with pytest.raises(ConfigError, match="out/lora_ft.json: adapter.rank: expected an integer from 1 to 65536, got 0"):
        parse_config({**config.model_dump(), "adapter": {"rank": 0}}, source="out/lora_ft.json")


def test_a_record_of_an_earlier_version_is_the_same_run(load):
    """`trainer` has only the given fields, and numbers may be written as integers."""
    config = load(GOOD + "  eval: 0.1\ntrainer: {eval_delay: 2, lr_scheduler_kwargs: {}}\n")
    record = json.loads(json.dumps(config.model_dump(mode="json")))
    assert record["trainer"] == {"eval_delay": 2, "lr_scheduler_kwargs": {}}
    record["trainer"]["eval_delay"] = 2
    assert parse_config(record) == config and not any(changes(record, config).values())
    assert changes(record, load(GOOD + "  eval: 0.2\noutput: b\ntrainer: {eval_delay: 2, use_cpu: true}\n")) == {
        "result": ["data.eval: was 0.1, is 0.2", "trainer.lr_scheduler_kwargs: was {}, is null"],
        "rounding": ["trainer.use_cpu: was null, is true"],
        "free": ['output: was "out", is "b"'],
        "longer": [],
    }


def test_changes_of_lists_name_their_items(load):
    (line,) = changes(load(GOOD).model_dump(mode="json"), load(GOOD, "adapter.targets=[q, o]"))["result"]
    assert line == 'adapter.targets: was ["q", "v"], is ["q", "o"]'


def test_frozen(load):
    with pytest.raises(ValueError):
        load(GOOD).adapter.rank = 3


def test_an_unknown_key_has_line_and_nearest_name(wrong):
    (line,) = wrong(GOOD + "train:\n  seed: 1\n  lerning_rate: 1\n")
    assert line == "c.yaml:9: train.lerning_rate: no such setting; did you mean learning_rate?"


@pytest.mark.parametrize(
    "text, meant",
    [
        ("rank: 8\n", "adapter.rank"),
        ("adapter: {learning_rate: 1}\n", "train.learning_rate"),
        ("train: {adam_beta2: 0.9}\n", "trainer.adam_beta2"),
        ("train: {per_device_train_batch_size: 2}\n", "train.batch_size"),
        ("trian: {seed: 1}\n", "train"),
    ],
)
def test_a_setting_in_the_wrong_place_gets_a_suggestion(wrong, text, meant):
    (line,) = wrong(GOOD + text)
    assert line.startswith("c.yaml:7: ") and line.endswith(f"did you mean {meant}?")


def test_a_misspelled_key_is_reported_once(wrong):
    assert len(wrong(GOOD.replace("prompt", "promt"))) == 1
    assert len(wrong(GOOD.replace("train:", "trian:"))) == 1


def test_a_setting_that_cannot_be_read_is_reported_once(wrong):
    (line,) = wrong(GOOD + "output: *x\n")
    assert line.startswith("c.yaml:7: output: aliases (*x) are not supported")
    assert [line[:10] for line in wrong(GOOD + "train: &x {seed: -1}\n")] == ["c.yaml:7: "] * 2


def test_a_repeated_key_names_both_lines(wrong):
    (line,) = wrong(GOOD + "train:\n  seed: 1\n  seed: 1\n")
    assert line.startswith("c.yaml:9: train.seed: given twice, in lines 8 and 9")


def test_all_errors_at_once_in_the_order_of_the_file(wrong):
    text = GOOD + "adapter:\n  rank: 0\n  dropout: 1.5\n  rank: 4\ntrain:\n  seed: -1\n  early_stopping_patience: 2\n"
    lines = wrong(text + "trainer:\n  fp16: true\n", "adapter.alpha=x")
    at = ["c.yaml:8: adapter.rank", "c.yaml:9: adapter.dropout", "c.yaml:10: adapter.rank", "c.yaml:12: train.seed"]
    at += ["c.yaml:13: train.early_stopping_patience", "c.yaml:15: trainer.fp16", "--set adapter.alpha"]
    assert [line[: len(start)] for line, start in zip(lines, at, strict=True)] == at


def test_missing_settings_are_named(wrong):
    assert [line.split(":")[2].strip() for line in wrong("{}")] == ["model.name", "data.train", "data"]


@pytest.mark.parametrize("text", ["adapter:\ntrain:\n", "adapter: {}\n", "adapter: null\ntrainer: null\n"])
def test_an_empty_section_has_its_defaults(load, text):
    assert load(GOOD + text) == load(GOOD)


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]", "- a\n", "word", "*x"])
def test_files_that_are_not_configs(wrong, text):
    (line,) = wrong(text)
    assert "c.yaml" in line


def with_setting(place: str, given: str) -> str:
    """The text of GOOD with one more setting."""
    section, _, setting = place.partition(".")
    if place == "data.train":
        return GOOD.replace("train: reviews.jsonl", f"train: {given}")
    if section in ("model", "data"):
        return GOOD.replace(f"{section}:\n", f"{section}:\n  {setting}: {given}\n")
    return GOOD + (f"{section}: {{{setting}: {given}}}\n" if setting else f"{section}: {given}\n")


# setting, value in the file, value in the config
ACCEPTED = [
    ("train.learning_rate", "1e-4", 1e-4),
    ("train.learning_rate", "1", 1.0),
    ("adapter.rank", "65536", 65536),
    ("adapter.alpha", "32", 32.0),
    ("adapter.dropout", "0", 0.0),
    ("adapter.targets", "all", ("all",)),
    ("adapter.targets", "[q, mlp]", ("q", "mlp")),
    ("adapter.layers", "null", None),
    ("adapter.layers", "6-11", (6, 7, 8, 9, 10, 11)),
    ("adapter.layers", "'3'", (3,)),
    ("adapter.layers", "[2, 0]", (0, 2)),
    ("adapter.modules", "lm_head", ("lm_head",)),
    ("data.train", "[a.csv, b.csv]", ("a.csv", "b.csv")),
    ("data.eval", "0.05", 0.05),
    ("data.eval", "500", 500),
    ("data.eval", "nyu-mll/glue:sst2@validation", ("nyu-mll/glue:sst2@validation",)),
    ("data.eval", "[a.csv]", ("a.csv",)),
    ("data.eval", "{dev: 0.1, test: a.csv, more: [b.csv]}", {"dev": 0.1, "test": ("a.csv",), "more": ("b.csv",)}),
    ("generation.metrics", "bleu", ("bleu",)),
    ("generation.metrics", "[rouge_l, exact_match]", ("rouge_l", "exact_match")),
    ("data.label_names", "{label: [no, yes]}", {"label": ("no", "yes")}),
    ("train.warmup_steps", "0", 0),
    ("train.warmup_steps", "0.5", 0.5),
    ("train.save_steps", "100", 100),
    ("train.save_steps", "100.0", 100),
    ("train.micro_batch_tokens", "auto", "auto"),
    ("train.micro_batch_tokens", "4096", 4096),
    ("train.max_steps", "null", None),
    ("train.save_total_limit", "null", None),
    ("train.report_to", "[]", ()),
    ("train.report_to", "none", ()),
    ("train.report_to", "wandb", ("wandb",)),
    ("model.dtype", "bfloat16", "bfloat16"),
    ("trainer.optim", "sgd", "sgd"),
    ("output", "runs/1", "runs/1"),
]


@pytest.mark.parametrize("place, given, becomes", ACCEPTED)
@pytest.mark.parametrize("by", ["file", "set"])
def test_accepted(load, place, given, becomes, by):
    section, _, setting = place.partition(".")
    config = load(GOOD, f"{place}={given}") if by == "set" else load(with_setting(place, given))
    value = getattr(config, section)
    value = getattr(value, setting) if setting else value
    assert value == becomes and type(value) is type(becomes)


REFUSED = [
    *[("adapter.rank", given, "1 to 65536") for given in ("0", "-1", "true", "1000000000000", "8.0", "'8'", "null")],
    *[("adapter.rank", given, "1 to 65536") for given in ("{a: 1}", "[8]", "1" * 300, "1" * 5000)],
    *[("train.learning_rate", given, "above 0") for given in ("fast", ".nan", ".inf", "-1", "0", "1e400", "true")],
    *[("adapter.dropout", given, "below 1") for given in ("1.5", "1", "-0.1", ".nan")],
    *[("adapter.alpha", given, "above 0") for given in ("0", "-1", ".inf")],
    ("adapter.rslora", "1", "true or false"),
    ("adapter.rslora", "yes", "true or false"),
    ("adapter.method", "dora", "lora"),
    ("adapter.targets", "[q_proj]", "did you mean q?"),
    ("adapter.targets", "[c_attn]", "adapter.modules"),
    ("adapter.targets", "[q, q]", "given twice"),
    ("adapter.targets", "'q,v'", "[q, v]"),
    ("adapter.targets", "[]", "nothing would be trained"),
    *[("adapter.layers", given, "6-11") for given in ("11-6", "[]", "6", "[-1]", "[true]", "0-1000000000", "[1, 1.0]")],
    *[("data.eval", given, "a fraction below 1") for given in ("0", "1.5", "-1", "true", "500.0", ".nan", "[]", "[3]")],
    *[("data.eval", given, "dev: dev.jsonl") for given in ("{}", "{a b: x}")],
    *[
        ("data.eval", given, "a fraction below 1")
        for given in ("{dev: null}", "{dev: {a: b}}", "{dev: []}", "{dev: 0}")
    ],
    ("data.eval", "['']", "not a name"),
    ("data.train", "[]", "jsonl"),
    ("data.train", "''", "not a name"),
    ("data.label_names", "{label: [a]}", "two words"),
    ("data.label_names", "{label: [0, 1]}", "quotes"),
    ("data.label_names", "{label: [a, a]}", "twice"),
    ("data.label_names", "{other: [a, b]}", "is not a column of data.completion"),
    ("data.label_names", "{label: [a, b], other: [a, b]}", "one column"),
    ("data.max_eval_examples", "5", "needs data.eval"),
    ("data.chat_template", "chat.jinja", "data.messages only"),
    ("data.long_text", "split", "data.text only"),
    ("data.truncate", "middle", "column, start, end"),
    ("data.bad_rows", "skp", "did you mean skip?"),
    ("model.dtype", "fp16", "did you mean float16?"),
    ("data.max_length", "0", "from 2"),
    *[("train.save_steps", given, "fraction of the run") for given in ("0", "1.5", "-1", "true", ".inf", ".nan", "x")],
    ("train.warmup_steps", "2.5", "an integer"),
    ("train.max_steps", "0", "from 1"),
    ("train.num_train_epochs", "0", "above 0"),
    ("train.batch_size", "0", "from 1"),
    ("train.micro_batch_tokens", "all", "auto"),
    ("train.micro_batch_tokens", "true", "auto"),
    ("train.lr_scheduler_type", "reduce_lr_on_plateau", "cosine"),
    ("train.lr_scheduler_type", "cosine_with_min_lr", "trainer.lr_scheduler_kwargs"),
    ("train.seed", "4294967296", "below 4294967296"),
    ("train.report_to", "[wandbb]", "wandb"),
    ("train.early_stopping_patience", "2", "needs data.eval"),
    ("train.metric_for_best_model", "acuracy", "did you mean accuracy?"),
    ("train.metric_for_best_model", "macro_f1", "needs data.label_names"),
    ("train.metric_for_best_model", "bleu", "predict_with_generate"),
    ("train.metric_for_best_model", "dev_loss", "is not a metric of this config"),
    ("train.predict_with_generate", "true", "needs generation.metrics"),
    ("generation.metrics", "[blue]", "did you mean bleu?"),
    ("generation.metrics", "[bleu, bleu]", "given twice"),
    ("generation.top_p", "0.9", "do_sample: true"),
    ("generation.length_penalty", "0.9", "num_beams from 2"),
    ("generation.num_beams", "0", "from 1"),
    ("model.dtype", "int8", "bfloat16"),
    ("trainer.learning_rate", "1", "train.learning_rate"),
    ("trainer.fsdp", "full_shard", "true or false"),
    ("trainer.lr_scheduler_kwargs", "{power: 2}", "linear does not accept power"),
    ("output", "''", "not a name"),
]


@pytest.mark.parametrize("place, given, word", REFUSED)
def test_refused(wrong, place, given, word):
    lines = wrong(with_setting(place, given))
    assert any(re.match(rf"c\.yaml:\d+: {place}", line) and word in line for line in lines)
    assert all(len(line) < 500 for line in lines)


@pytest.mark.parametrize(
    "form, word",
    [
        ("", "set one of prompt and completion, text, or messages"),
        ("  prompt: '{a}'\n", "needs data.completion"),
        ("  completion: '{a}'\n", "needs data.prompt"),
        ("  text: '{a}'\n  messages: m\n", "cannot be combined with text"),
        ("  prompt: a\n  completion: '{b}'\n  text: '{c}'\n", "cannot be combined with prompt and completion"),
        ("  prompt: a\n  completion: b\n", "names no column"),
        ("  prompt: ''\n  completion: '{b}'\n", "empty"),
        ("  text: {a}\n", "needs quotes"),
        ("  text: '{a.b}'\n", "{a.b} is not a column name"),
        ("  text: '{a!r}'\n", "{a!r} is not a column name"),
        ("  text: '{{a}}'\n", "names no column"),
        ("  text: '{a'\n", "not closed"),
        ("  messages: '{m}'\n", "bare name"),
        ("  text: '{a}'\n  label_names: {a: [x, y]}\n", "needs data.prompt and data.completion"),
        ("  messages: m\n  long_text: split\n", "text only"),
        ("  text: '{a}'\n  truncate: start\n", "data.prompt and data.messages only"),
        ("  text: '{a}[['\n", "a [[ is not closed"),
    ],
)
def test_invalid_forms(wrong, form, word):
    (line,) = wrong(FORMLESS + form)
    assert word in line


@pytest.mark.parametrize(
    "form",
    [
        "  prompt: 'no column'\n  completion: '{b}'\n",
        "  text: '{a} {{plain}}'\n  long_text: split\n",
        "  messages: turns\n  chat_template: chat.jinja\n",
    ],
)
def test_forms(load, form):
    load(FORMLESS + form)


def test_a_classification(load):
    text = GOOD + "  label_names: {label: [bad, good]}\n  eval: 0.1\ntrain: {metric_for_best_model: macro_f1}\n"
    assert load(text + "trainer: {run_name: x}\n").train.metric_for_best_model == "macro_f1"


def test_modules_alone_are_enough(load):
    assert load(GOOD + "adapter: {targets: [], modules: [lm_head]}\n").adapter.targets == ()


@pytest.mark.parametrize(
    "more, word",
    [
        (
            "adapter: {init: pissa, dora: true}",
            "adapter.dora: starts from whole weights, pissa from their principal part",
        ),
        ("adapter: {init: pissa, init_from: a}", "adapter.init: both say what to start from"),
        ("adapter: {init: pissa}\ntrainer: {fsdp: true}", "trainer.fsdp needs whole weights"),
        ("adapter: {dora: true}\ntrainer: {fsdp: true}", "trainer.fsdp needs whole weights"),
    ],
)
def test_what_dora_and_pissa_exclude(wrong, more, word):
    (line,) = wrong(f"{GOOD}{more}\n")
    assert all(part in line for part in word.split("trainer.fsdp "))


def test_set_takes_text_literally(load):
    text = "[1] {sentence}: # null"
    assert load(GOOD, f"data.prompt={text}").data.prompt == text
    assert load(GOOD, "output=null").output == "null"  # may not be null
    assert load(GOOD, "model.revision=1e4").model.revision == "1e4"
    assert load(GOOD, "model.revision=x", "model.revision=null").model.revision is None
    assert load(GOOD, "trainer.run_name=true").trainer.model_dump() == {"run_name": "true"}


def test_a_tilde_is_the_home_folder(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(GOOD, "output=~/runs/one", "adapter.init_from=~/a")
    assert (config.output, config.adapter.init_from) == ("/home/someone/runs/one", "/home/someone/a")
    assert load(GOOD, "output=runs/~").output == "runs/~"


def test_set_overrides_the_file_and_earlier_ones(load):
    config = load(GOOD + "train: {seed: no number, batch_size: 2}\n", "train.seed=4", "train.seed=5")
    assert (config.train.seed, config.train.batch_size) == (5, 2)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.lerning_rate=1", "--set train.lerning_rate: no such setting; did you mean learning_rate?"),
        ("rank=1", "--set rank: no such setting here; did you mean adapter.rank?"),
        ("adapter={rank: 1}", "--set adapter: is a section"),
        ("seed", "--set seed: give key.path=value"),
        ("=1", "--set : give key.path=value"),
        ("a.b.c=1", "--set a.b.c: no such setting"),
        ("adapter.rank=8.5", "--set adapter.rank: expected an integer from 1 to 65536, got 8.5"),
        ("adapter.rank=", "--set adapter.rank: expected an integer from 1 to 65536, got null"),
        ("data.eval=[", "--set data.eval: not valid YAML"),
        ("data.eval=*x", "--set data.eval: aliases"),
        ("data.label_names={label: [a, a]}", '--set data.label_names: "a" is given twice'),
        ("adapter.targets=[q, x]", '--set adapter.targets[1]: unknown role "x"'),
        ("trainer.fp16=true", "--set trainer.fp16: cannot be set"),
        ("trainer.a.b=true", "--set trainer.a.b: no such setting"),
        (
            "trainer.lr_scheduler_kwargs.power=2",
            "--set trainer.lr_scheduler_kwargs.power: set the whole mapping, as in --set '",
        ),
        ("data.eval.dev=a.csv", "--set data.eval.dev: set the whole mapping, as in --set 'data.eval={dev: ...}'"),
        ("data.label_names.label=[a, b]", "--set data.label_names.label: set the whole mapping, as in"),
    ],
)
def test_refused_overrides(wrong, override, message):
    (line,) = wrong(GOOD, override)
    assert line.startswith(message)


def test_control_characters_are_escaped(wrong):
    lines = wrong(GOOD + 'output: "a\\x1b[31m"\n"\\x1b[2J": 3\n', "\x1b[2J=3")
    assert len(lines) == 3 and all("\\x1b" in line and "\x1b" not in line for line in lines)


def test_files_that_cannot_be_read(tmp_path):
    near = tmp_path / "config.yaml"
    near.write_bytes(b"a: 1\nb: \xff\n")
    cases = {
        tmp_path / "confg.yaml": f"did you mean {near}",
        tmp_path: "directory",
        near: r"config.yaml:2: byte 9 \(0xff\) is not UTF-8",
        "a\0b": "cannot be read",
        tmp_path / ("x" * 5000): "cannot be read",
    }
    for path, said in cases.items():
        with pytest.raises(ConfigError, match=said):
            load_config(path)
    near.write_bytes(b"a" * 10**6)
    with pytest.raises(ConfigError, match="too large"):
        load_config(near)
    near.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(near).model.name == "gpt2"


def test_long_messages_are_truncated(wrong):
    lines = wrong(GOOD + "".join(f"x{n}: 1\n" for n in range(1000)))
    assert lines[-1] == "... and 970 more" and len(lines) == 31


def test_every_setting_has_a_description_and_a_resume_class():
    places = [(section, name) for section, model in SECTIONS.items() for name in model.model_fields]
    for section, name in [*places, ("output", "")]:
        assert resume_class(section, name) in ("result", "rounding", "free", "longer")
    for section, name in places:
        assert SECTIONS[section].model_fields[name].description
    assert [p for p in places if resume_class(*p) == "longer"] == [
        ("train", "num_train_epochs"),
        ("train", "max_steps"),
    ]
    assert resume_class("train", "micro_batch_tokens") == "rounding" and resume_class("train", "seed") == "result"
    assert {n for s, n in places if s != "trainer" and resume_class(s, n) == "free"} == {
        *("logging_steps", "save_steps", "save_total_limit", "report_to", "evaluate_base", "truncate")
    }


def test_sections():
    schema = Config.model_json_schema()
    assert set(schema["properties"]) == {"model", "adapter", "data", "train", "generation", "trainer", "output"}
