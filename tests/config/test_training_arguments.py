"""The tables over TrainingArguments, held against the installed version."""

import dataclasses
import inspect

import pytest
from transformers import TrainingArguments, optimization
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lora_ft.config.load import Config
from lora_ft.config.training_arguments import ALLOWED, OURS, REFUSED, SCHEDULERS, problems, scheduler_problem
from lora_ft.config.types import REPORTERS

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


def test_every_field_is_in_exactly_one_table():
    assert sorted([*OURS, *ALLOWED, *REFUSED]) == sorted(FIELDS)


def test_ours_are_settings():
    for place in OURS.values():
        section, _, setting = place.partition(".")
        field = Config.model_fields[section]
        assert not setting or setting in field.annotation.model_fields


@pytest.mark.parametrize(
    "name", sorted(set(ALLOWED) - {"fsdp"})
)  # on or off, and never the Trainer's: sharding is lora-ft's
def test_allowed_types_are_the_fields_types(name):
    kind = str if isinstance(ALLOWED[name].kind, tuple) else ALLOWED[name].kind
    assert kind.__name__ in str(FIELDS[name].type)


def test_the_words_are_transformers_own(tmp_path):
    assert set(ALLOWED["optim"].kind) <= {o.value for o in OptimizerNames}
    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK)
    following_a_metric = {"reduce_lr_on_plateau", "greedy"}
    assert set(SCHEDULERS) == {s.value for s in SchedulerType} - following_a_metric


def test_schedulers_take_what_the_table_says():
    given = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, kwargs in SCHEDULERS.items():
        function = optimization.TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        assert set(kwargs) == set(inspect.signature(function).parameters) - given, name


@pytest.mark.parametrize(
    "table, word",
    [
        ({"learning_rate": 1e-4}, "train.learning_rate"),
        ({"gradient_accumulation_steps": 2}, "micro-batches"),
        ({"push_to_hub": True}, "--push REPO"),
        ({"adam_beta3": 0.9}, "did you mean adam_beta"),
        ({"adam_beta2": 1}, "from 0 up to, not including, 1"),
        ({"adam_beta2": True}, "true does not fit"),
        ({"adam_beta2": float("nan")}, "nan does not fit"),
        ({"bf16": 1}, "true or false"),
        ({"optim": "adam"}, "one of adamw_torch_fused"),
        ({"ddp_timeout": 1.5}, "a whole number from 1"),
    ],
)
def test_what_is_refused(table, word):
    ((field, sentence),) = problems(table)
    assert field in table and word in sentence


def test_what_is_allowed():
    assert not list(problems({"adam_beta2": 0.99, "bf16": True, "run_name": "a", "adam_epsilon": 1e-6, "optim": "sgd"}))


def test_scheduler_arguments():
    assert scheduler_problem("linear", {}) is None
    assert scheduler_problem("cosine_with_min_lr", {"min_lr": 1e-5}) is None
    assert scheduler_problem("cosine", {"num_cycles": 0.5}) is None
    assert "takes no arguments" in scheduler_problem("linear", {"num_cycles": 1})
    assert "one of min_lr" in scheduler_problem("cosine_with_min_lr", {})
    assert "one of min_lr" in scheduler_problem("cosine_with_min_lr", {"min_lr": 1, "min_lr_rate": 1})
    assert "num_decay_steps" in scheduler_problem("warmup_stable_decay", {})
    assert "number" in scheduler_problem("cosine", {"num_cycles": "x"})
