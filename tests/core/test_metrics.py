"""Metrics: every key has its title, format and direction, with the name of an eval set in front too."""

import math

import pytest

from lora_ft.core.metrics import (
    METRICS,
    add_set_name,
    format_metric,
    format_metrics,
    interval,
    metric_of,
    selection_metric,
    split_set_name,
)


@pytest.mark.parametrize(
    "key, title, text, lower_is_better",
    [
        ("loss", "loss", "0.5000", True),
        ("dev_perplexity", "dev perplexity", "0.5000", True),
        ("a_b_exact_match", "a_b exact match", "50.0%", False),
        ("accuracy", "accuracy", "50.0%", False),
        ("bleu", "BLEU", "0.50", False),
        ("something_new", "something new", "0.5", False),
    ],
)
def test_a_key_has_one_title_format_and_direction(key, title, text, lower_is_better):
    metric = metric_of(key)
    assert (metric.title, format_metric(key, 0.5), metric.lower_is_better) == (title, text, lower_is_better)


def test_set_names_are_added_and_split_again():
    sets = {"dev": dict.fromkeys(METRICS, 1.0), "dev_2": dict.fromkeys(METRICS, 2.0), "": {}}
    keys = {key: value for name, metrics in sets.items() for key, value in add_set_name(name, metrics).items()}
    assert split_set_name(keys, ["dev", "dev_2"]) == {"dev": sets["dev"], "dev_2": sets["dev_2"]}
    assert split_set_name({"loss": 1.0}, []) == {"": {"loss": 1.0}}
    assert split_set_name("damaged", ["dev"]) == {}
    damaged = {"loss": math.nan, "accuracy": 10**400, "accuracy_ci95": [0.1], "loss_vs_base": {"difference": 1.0}}
    damaged |= {"dev_confusion": [[1, 2], [3]], "confusion": [[1, "2"], [3, 4]], "rows": {"fixed": 1}}
    assert split_set_name(damaged, ["dev"]) == {"": {"rows": {"fixed": 1}}}


def test_the_metric_that_a_run_is_selected_by():
    assert selection_metric("loss", ["dev", "test"]) == ("dev", "loss")
    assert selection_metric("test_macro_f1", ["dev", "test"]) == ("test", "macro_f1")
    assert selection_metric("perplexity", [""]) is None and selection_metric("other_loss", ["dev"]) is None


def test_intervals_and_tables_are_not_single_numbers():
    metrics = {"loss": 1.0, "accuracy": 0.5, "accuracy_ci95": [0.25, 0.75], "confusion": [[1, 0], [0, 1]]}
    assert format_metrics(metrics) == "loss 1.0000, accuracy 50.0%"
    assert interval("accuracy", metrics) == [0.25, 0.75] and interval("loss", metrics) is None
