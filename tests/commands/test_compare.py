"""`lora-ft compare`: its variants and runs, their results, and resuming."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_ft.commands.compare import runs
from lora_ft.commands.compare.command import compare_command, parse_seeds
from lora_ft.commands.compare.display import format_mean, show
from lora_ft.commands.compare.page import page
from lora_ft.commands.compare.results import mean_interval, metrics_over_seeds
from lora_ft.commands.compare.runs import run_and_stream
from lora_ft.commands.compare.variants import final_config, make_variants, parse_axes, ranking_metric, tuning_run
from lora_ft.config.load import parse_config
from lora_ft.core.errors import ConfigError
from lora_ft.core.storage import sha256
from tests.helpers.command import Ended, Forked, cli
from tests.helpers.tiny import write_run

CONFIG = """
model: {name: base}
adapter: {rank: 4, alpha: 8}
data: {train: train.jsonl, eval: eval.jsonl, text: "{text}"}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def named(path: Path, *vary: str) -> list[str]:
    return [variant.name for variant in make_variants(path, [], parse_axes("--vary", vary))]


def test_values_are_split_where_yaml_would():
    assert parse_axes("--vary", ["adapter.targets=[q],[q, v],all"]) == {"adapter.targets": ["[q]", "[q, v]", "all"]}
    assert parse_axes("--vary", ["data.prompt='a, b','{x}: '"]) == {"data.prompt": ["a, b", "{x}: "]}
    assert parse_axes("--vary", ["train.learning_rate=1e-4,1e-3"]) == {"train.learning_rate": ["1e-4", "1e-3"]}


@pytest.mark.parametrize("text", ["adapter.rank", "adapter.rank=", "=1,2", "adapter.rank=[1,2", "adapter.rank=1,1"])
def test_a_malformed_axis_is_refused(text):
    with pytest.raises(ConfigError, match="--vary"):
        parse_axes("--vary", [text])


def test_a_setting_to_tune_is_given_once():
    with pytest.raises(ConfigError, match="given twice"):
        parse_axes("--tune", ["train.learning_rate=1e-4,1e-3", "train.learning_rate=1e-2"])


def test_a_rate_is_not_chosen_within_what_is_tuned(config):
    options = {"vary": [], "overrides": ["train.learning_rate=auto"]}
    with pytest.raises(ConfigError, match="auto is not supported with --tune"):
        compare_command(config, tune=["adapter.rank=2,4"], **options)


def test_an_eval_set_cannot_be_the_one_to_tune_on(config):
    options = {"vary": [], "tune": ["train.learning_rate=1e-4,1e-3"], "overrides": ["data.eval={tuning: 0.2}"]}
    with pytest.raises(ConfigError, match="another name"):
        compare_command(config, **options)


def test_the_variants_are_the_product(config):
    assert named(config) == ["as configured"]
    assert named(config, "adapter.rank=1,2", "train.learning_rate=1e-3,1e-4") == [
        "rank=1, learning_rate=1e-3",
        "rank=1, learning_rate=1e-4",
        "rank=2, learning_rate=1e-3",
        "rank=2, learning_rate=1e-4",
    ]


def test_settings_apply_only_to_their_own_methods(config):
    assert named(config, "adapter.method=lora,full", "adapter.rank=1,2") == ["lora, rank=1", "lora, rank=2", "full"]
    full = make_variants(config, [], {"adapter.method": ["full"]})[0].config
    assert full.adapter.model_dump() == {"method": "full"}  # the config's rank and alpha are LoRA's


@pytest.mark.parametrize(
    "vary",
    [
        ["adapter.rnk=1,2"],
        ["adapter.rank=0,2"],
        ["adapter.bottleneck_size=1,2"],
        ["train.seed=1,2"],
        ["output=a,b"],
        ["adapter.rank=1", "adapter.rank=2"],
        ["adapter.targets=[q,v],[q-v]"],
    ],
)
def test_an_invalid_variation_is_refused_before_the_first_run(config, vary):
    with pytest.raises(ConfigError):
        named(config, *vary)


def test_eval_data_is_required(config):
    with pytest.raises(ConfigError, match="eval"):
        make_variants(config, ["data.eval=null"], {})


@pytest.mark.parametrize("seeds", ["", "a", "1,1", "-1", "1.5"])
def test_seeds_are_whole_numbers(seeds):
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(seeds)


def test_nothing_is_selected_on_the_eval_data(config):
    variant = make_variants(config, ["train.early_stopping_patience=2"], {})[0]
    run = final_config(variant, {"train.learning_rate": "1e-2"}, 3, Path("out"), evaluate_base=False)
    assert (run.train.learning_rate, run.train.seed) == (1e-2, 3)
    assert not run.train.load_best_model_at_end and run.train.early_stopping_patience is None
    chooses = tuning_run(variant, {}, 0, Path("out"))
    assert chooses.data.eval == {"tuning": 0.1}
    assert chooses.train.metric_for_best_model == "tuning_loss"


def test_tuning_data_excludes_eval_rows_held_out_of_train(config):
    variant = make_variants(config, ["data.eval={a: 0.2, b: eval.jsonl}"], {})[0]
    assert tuning_run(variant, {}, 0, Path("out")).data.eval == {"a": 0.2, "tuning": 0.1}


def test_the_ranking_metric(config):
    base = make_variants(config, [], {})[0].config
    assert ranking_metric(base) == ("", "loss")
    data = base.model_dump(mode="json")
    data["data"] |= {"text": None, "prompt": "{a}", "completion": "{b}", "eval": {"dev": "d.jsonl"}}
    data["generation"]["metrics"] = ["bleu"]
    assert ranking_metric(parse_config(data)) == ("dev", "bleu")


def test_the_interval_is_students_t():
    found = mean_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["ci95"] == pytest.approx([2 - 2.484, 2 + 2.484], abs=1e-3)  # 4.303 / sqrt(3), as in any textbook
    assert "ci95" not in mean_interval([1.0])


@pytest.mark.parametrize(
    "key, mean, half, text",
    [
        ("loss", 5.1212, 0.4, "5.1212 ± 0.4000"),
        ("accuracy", 0.862, 0.011, "86.2% ± 1.1"),
        ("bleu", 56.81, 12.346, "56.81 ± 12.35"),
        ("perplexity", 49219, 1234.5, "49,219 ± 1,234"),
    ],
)
def test_a_mean_and_its_spread_have_the_same_decimals(key, mean, half, text):
    assert format_mean(key, {"mean": mean, "ci95": [mean - half, mean + half]}) == text


def test_what_a_run_says_last_about_its_adapter_is_left_out(capsys):
    said = "import sys; sys.stderr.write('done\\nnext:   a\\n        b\\n')"
    assert run_and_stream([sys.executable, "-Sc", said]) == (0, "b")
    assert capsys.readouterr().err == "  done\n"


def test_metrics_of_several_eval_sets_are_kept_apart():
    config = {"data": {"eval": {"dev": "a", "other": "b"}}}
    records = [{"config": config, "metrics": {"dev_loss": x, "other_loss": 2 * x}} for x in (1.0, 3.0)]
    found = metrics_over_seeds(records)
    assert found["dev"]["loss"]["mean"] == 2.0 and found["other"]["loss"]["values"] == [2.0, 6.0]


def compare(folder: Path, *words: str) -> Ended:
    """`lora-ft compare config.yaml` in a fork, and its runs in forks of that."""
    return cli(folder, "compare", "config.yaml", *words, before=lambda: setattr(runs.subprocess, "Popen", Forked))


VARY = [
    "--vary",
    "adapter.method=lora,bottleneck,prompt",
    "--tune",
    "train.learning_rate=1e-5,3e-2",
    "--set",
    "train.max_steps=6",
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison: its folder, and the finished command."""
    folder = write_run(tmp_path_factory.mktemp("compare"), "mixtral")  # whose experts take no adapter layers
    return folder, compare(folder, *VARY, "--seeds", "0,1")


def result(folder: Path) -> dict:
    return json.loads((folder / "out-compare" / "compare.json").read_text())


def test_compares_methods_from_a_config(compared):
    folder, done = compared
    assert done.code == 0, done.err
    found = result(folder)
    lora, bottleneck, prompt = found["variants"]
    assert lora["tuned"] == {"train.learning_rate": "3e-2"}  # the other learns nothing
    assert len(lora["metrics"][""]["accuracy"]["values"]) == 2
    assert lora["metrics"][""]["loss"]["mean"] < found["base"][""]["loss"]
    assert lora["trainable_parameters"] > prompt["trainable_parameters"] > 0
    assert lora["bytes_on_disk"] == (Path(folder, lora["runs"]["0"]) / "adapter_model.safetensors").stat().st_size
    assert "experts" in bottleneck["refused"] and "metrics" not in bottleneck
    for word in ("lora", "skipped: ", "3e-2", "base"):
        assert word in done.out


def test_runs_trained_together_and_one_by_one_have_the_same_scores(compared):
    folder, done = compared
    assert "compare: training 2 runs together" in done.err  # two rates, then two seeds, of LoRA alone
    assert "(--one-by-one)" in done.out
    together, prompt = result(folder)["variants"][0], result(folder)["variants"][2]
    assert "seconds_per_step" in prompt and "seconds_per_step" not in together
    words = ["--vary", "adapter.method=lora", *VARY[2:], "--seeds", "0,1", "--one-by-one", "--output", "alone"]
    assert compare(folder, *words).code == 0
    alone = json.loads((folder / "alone/compare.json").read_text())["variants"][0]
    assert (alone["tuned"], alone["metrics"]) == (together["tuned"], together["metrics"])
    assert alone["seconds_per_step"] > 0 and alone["peak_memory_mb"] > 0


def test_brackets_in_names_are_printed(capsys):
    names = {"targets=[q]": "", "targets=[q,v]": "no [k] in [/base]"}  # rich would take them for its own markup
    variants = [
        {"name": n, "settings": {}, "tuned": {}, "tried": []} | ({"refused": r} if r else {}) for n, r in names.items()
    ]
    show({"variants": variants, "seeds": [0], "tuned": {}, "base": {}, "varied": {}, "metric": ["", "loss"]})
    printed = capsys.readouterr().out
    assert all(word in printed for word in (*names, "no [k] in [/base]"))


def test_runs_of_a_comparison_are_ordinary_runs(compared):
    folder, _ = compared
    run = result(folder)["variants"][0]["runs"]["1"]
    done = cli(folder, "eval", run, "--json")
    assert done.code == 0, done.err
    accuracy = result(folder)["variants"][0]["metrics"][""]["accuracy"]["values"][1]
    assert json.loads(done.out)["adapter"]["accuracy"] == accuracy


def test_tuning_runs_keep_no_checkpoint(compared):
    folder, _ = compared
    assert not list(folder.glob("out-compare/tuning/*/checkpoints/step-*"))
    assert list(folder.glob("out-compare/runs/*/checkpoints/step-*/lora_ft.json"))


def test_a_repeated_command_trains_nothing_and_gives_the_same_result(compared):
    folder, _ = compared
    before = {p: p.stat().st_mtime_ns for p in folder.glob("out-compare/*/*/lora_ft.json")}
    before |= {p: p.stat().st_mtime_ns for p in folder.glob("out-compare/tuning/*/tuning.json")}
    assert len(before) == 8
    old = result(folder)
    weights = Path(folder, old["variants"][0]["runs"]["0"], "adapter_model.safetensors")
    times = {f"{part}_{what}": 1.0 for part in ("prompt", "token") for what in ("ms", "ratio")}
    old["variants"][0]["latency"] = {"of": sha256(weights), "prompt_tokens": 64, "adapter": times}
    (folder / "out-compare/compare.json").write_text(json.dumps(old))  # as benchmarks/latency.py does
    done = compare(folder, *VARY, "--seeds", "0,1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == result(folder) == old
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not list(folder.glob("out-compare/tuning/*/lora_ft.json"))


def test_a_folder_with_runs_of_other_settings_is_refused(compared):
    folder, _ = compared
    done = compare(folder, *VARY, "--seeds", "0", "--set", "train.batch_size=4")
    assert done.code == 2
    assert "train.batch_size: was 8, is 4" in done.err and "--output" in done.err


def test_the_page_opens_offline(compared):
    text = page(result(compared[0]))
    assert not re.search(r"<script|https?://(?!www\.w3)", text)
    assert "skipped: " in text and "<svg" in text


def test_a_signal_stops_the_run_and_the_same_command_resumes_it(tmp_path):
    """The comparison and its run are processes of their own, until they are stopped."""
    folder = write_run(tmp_path)
    words = ["--vary", "adapter.rank=1,2", "--set", "train.max_steps=200"]
    command = [sys.executable, "-m", "lora_ft", "compare", "config.yaml", *words]
    child = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    log = folder / "out-compare/runs/rank=1,seed=0/log.jsonl"
    until = time.monotonic() + 90
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 143, child.stderr.read()
    assert list(log.parent.glob("checkpoints/step-*/lora_ft.json"))
    done = compare(folder, *words)
    assert done.code == 0, done.err
    assert "resuming after step" in done.err and "rank=2" in done.out


def test_if_no_variant_can_be_trained_the_exit_code_is_that_of_the_run(tmp_path):
    folder = write_run(tmp_path, "mixtral")
    done = compare(folder, "--vary", "adapter.method=bottleneck")
    assert done.code == 4
    assert "bottleneck: skipped: " in done.err and not list(folder.glob("out-compare/runs/*"))
