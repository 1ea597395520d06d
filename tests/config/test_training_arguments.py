"""The tables of TrainingArguments, compared with the installed version of transformers."""

import dataclasses
import inspect
from typing import Literal, get_args, get_origin

import pytest
from transformers import TrainingArguments, optimization
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lora_ft.config.rules import schema_errors
from lora_ft.config.schema import Config, TrainerConfig
from lora_ft.config.training_arguments import OWN_SETTING, REFUSED, SCHEDULERS, scheduler_problem
from lora_ft.config.types import REPORTERS

ALLOWED = {name: field.annotation for name, field in TrainerConfig.model_fields.items()}
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}

CONFIG = {"model": {"name": "gpt2"}, "data": {"train": "a.jsonl", "text": "{text}"}}


def test_every_field_is_in_exactly_one_table():
    assert sorted([*OWN_SETTING, *ALLOWED, *REFUSED]) == sorted(FIELDS)


def test_own_settings_exist():
    for place in OWN_SETTING.values():
        section, _, setting = place.partition(".")
        field = Config.model_fields[section]
        assert not setting or setting in field.annotation.model_fields


@pytest.mark.parametrize("name", sorted(set(ALLOWED) - {"fsdp"}))  # which lora-ft implements itself
def test_types_of_allowed_fields_are_those_of_transformers(name):
    kind = str if get_origin(ALLOWED[name]) is Literal else get_origin(ALLOWED[name]) or ALLOWED[name]
    assert kind.__name__ in str(FIELDS[name].type)


def test_choices_are_those_of_transformers():
    assert set(get_args(ALLOWED["optim"])) <= {o.value for o in OptimizerNames}
    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK)
    depend_on_a_metric = {"reduce_lr_on_plateau", "greedy"}
    assert set(SCHEDULERS) == {s.value for s in SchedulerType} - depend_on_a_metric


def test_schedulers_accept_the_arguments_of_the_table():
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, kwargs in SCHEDULERS.items():
        function = optimization.TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        assert set(kwargs.split()) == set(inspect.signature(function).parameters) - given, name


@pytest.mark.parametrize(
    "table, word",
    [
        ({"learning_rate": 1e-4}, "train.learning_rate"),
        ({"gradient_accumulation_steps": 2}, "micro-batches"),
        ({"push_to_hub": True}, "--push REPO"),
        ({"adam_beta3": 0.9}, "did you mean adam_beta"),
        ({"adam_beta2": 1}, "from 0 and below 1"),
        ({"adam_beta2": True}, "got true"),
        ({"adam_beta2": float("nan")}, "got nan"),
        ({"bf16": 1}, "true or false"),
        ({"bf16": None}, "remove it to use the default"),
        ({"optim": "adam"}, "one of adamw_torch_fused"),
        ({"ddp_timeout": 1.5}, "an integer from 1"),
        ({"lr_scheduler_kwargs": [1]}, "a mapping"),
    ],
)
def test_refused_fields(table, word):
    ((path, message, _),) = schema_errors(CONFIG | {"trainer": table})
    assert path[0] == "trainer" and path[1] in table and word in message


def test_only_the_given_fields_are_passed_on():
    table = {"adam_beta2": 0.99, "bf16": True, "run_name": "a", "adam_epsilon": 1e-6, "optim": "sgd"}
    config = Config.model_validate(CONFIG | {"trainer": table})
    assert config.trainer.model_dump() == config.model_dump(mode="json")["trainer"] == table
    assert config.trainer.bf16 and not config.trainer.use_cpu


def test_scheduler_arguments():
    assert scheduler_problem("linear", {}) is None
    assert scheduler_problem("cosine_with_min_lr", {"min_lr": 1e-5}) is None
    assert scheduler_problem("cosine", {"num_cycles": 0.5}) is None
    assert "accepts no arguments" in scheduler_problem("linear", {"num_cycles": 1})
    assert "one of min_lr" in scheduler_problem("cosine_with_min_lr", {})
    assert "one of min_lr" in scheduler_problem("cosine_with_min_lr", {"min_lr": 1, "min_lr_rate": 1})
    assert "num_decay_steps" in scheduler_problem("warmup_stable_decay", {})
    assert "number" in scheduler_problem("cosine", {"num_cycles": "x"})
