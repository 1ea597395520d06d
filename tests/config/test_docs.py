"""The JSON Schema accepts what a config accepts, by an independent validator; the generated files are up to date."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from lora_ft.config.docs import FILE, HEADER, reference, schema_text
from lora_ft.config.json_schema import config_schema
from lora_ft.config.load import load_config, parse_config
from lora_ft.config.schema import TrainerConfig
from lora_ft.core.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
VALIDATOR = jsonschema.Draft202012Validator(config_schema())
TEXT = {"train": "a.jsonl", "text": "{text}"}
PAIR = {"train": "a.jsonl", "prompt": "{a}", "completion": "{b}"}


def test_the_json_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(config_schema())


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_name_the_schema(path):
    text = path.read_text()
    VALIDATOR.validate(yaml.safe_load(text))
    assert text.splitlines()[0] == HEADER + FILE


def test_every_setting_has_a_description():
    schema = config_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, entry in section["properties"].items():
            assert "description" in entry or "$ref" in entry, name
    assert schema["$defs"]["TrainerConfig"]["properties"].keys() == TrainerConfig.model_fields.keys()


@pytest.mark.parametrize("path, content", [("configs/" + FILE, schema_text()), ("docs/config.md", reference())])
def test_the_committed_files_are_up_to_date(path, content):
    """If not: lora-ft schema > configs/lora-ft.schema.json; lora-ft schema --markdown > docs/config.md"""
    assert (REPOSITORY / path).read_text() == content


# (section, setting, value), valid or not
VALUES = [
    *[("model", "dtype", v) for v in ("bfloat16", "fp32", 1)],
    *[("adapter", "rank", v) for v in (1, 0, "8", 1.5, 65537)],
    *[("adapter", "alpha", v) for v in (1, 0.5, 0, "a")],
    *[("adapter", "dropout", v) for v in (0, 0.1, 1)],
    *[("adapter", "targets", v) for v in ("all", ["q", "mlp"], ["q_proj"], "query", ["q", "q"], 3)],
    *[("adapter", "modules", v) for v in ("lm_head", ["a", "b"], [""], None)],
    *[("adapter", "layers", v) for v in (None, [0, 3], "6-11", "3", "a-b", [], [-1], 4)],
    *[("data", "train", v) for v in (["a.csv", "b.csv"], "", None, 3)],
    *[("data", "eval", v) for v in (None, "b.csv", ["b.csv"], 0.05, 500, 0, 1.5, -1, True)],
    *[("data", "messages", v) for v in ("{turns}",)],
    *[("data", "max_length", v) for v in (2, 1, "many")],
    *[("train", "warmup_steps", v) for v in (0, 0.1, 10, -1, 1.5)],
    *[("train", "eval_steps", v) for v in (0.25, 10, 0, 2.5)],
    *[("train", "micro_batch_tokens", v) for v in ("auto", 512, 0, "all")],
    *[("train", "lr_scheduler_type", v) for v in ("cosine", "cosin")],
    *[("train", "report_to", v) for v in ("none", "wandb", [], ["tensorboard"], ["w&b"])],
    *[("train", "lerning_rate", v) for v in (1e-4,)],
    *[("trainer", "optim", v) for v in ("sgd", "adam")],
    *[("trainer", "adam_beta1", v) for v in (0.9, 1, -0.1)],
    *[("trainer", "bf16", v) for v in (True, 1)],
    *[("trainer", "fp16", v) for v in (True,)],
]


@pytest.mark.parametrize("section, setting, value", VALUES)
def test_schema_and_config_accept_the_same_values(section, setting, value):
    config = {"model": {"name": "gpt2"}, "data": dict(TEXT)}
    config[section] = config.get(section, {}) | {setting: value}
    agree(config)


@pytest.mark.parametrize(
    "value", [None, {"b": ["no", "yes"]}, {"b": ["one"]}, {"b": ["x", "x"]}, {"b": [0, 1]}, {}, ["no", "yes"]]
)
def test_schema_and_config_accept_the_same_label_names(value):
    agree({"model": {"name": "gpt2"}, "data": PAIR | {"label_names": value}})


@pytest.mark.parametrize("config", [{"model": {"name": "gpt2"}}, {"data": TEXT}, {"model": {}, "data": TEXT}])
def test_schema_and_config_require_the_same_settings(config):
    agree(config)


def agree(config: dict) -> None:
    try:
        parse_config(config)
        accepted = True
    except ConfigError:
        accepted = False
    assert VALIDATOR.is_valid(json.loads(json.dumps(config))) == accepted


def test_numbers_are_read_as_in_editors(tmp_path):
    """In YAML 1.2, which editors use, 1e-4 is a number."""
    path = tmp_path / "c.yaml"
    path.write_text('model: {name: gpt2}\ndata: {train: a.jsonl, text: "{t}"}\ntrain: {learning_rate: 1e-4}\n')
    assert load_config(path).train.learning_rate == 1e-4
