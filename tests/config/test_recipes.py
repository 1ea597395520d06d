"""The shipped configs are valid and short, and have the settings that their first lines announce."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_ft.config.load import load_config

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_each_is_valid_short_and_commented(path):
    load_config(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 40


def test_all_three_forms_of_data_are_used():
    data = {path.stem: load_config(path).data for path in CONFIGS}
    assert set(data) == {"quickstart", "gpt2_sst2", "chat", "alpaca", "text", "e2e", "compare_sst2", "compare_e2e"}
    assert data["chat"].messages and data["text"].text
    assert all(data[name].prompt and data[name].completion for name in ("quickstart", "gpt2_sst2", "alpaca", "e2e"))


def test_gpt2_sst2_has_the_settings_of_the_paper():
    config = load_config(FOLDER / "gpt2_sst2.yaml")
    assert config.model.name == "gpt2"
    assert list(config.adapter.targets) == ["q", "v"]
    assert config.adapter.rank == 8
    assert config.output == "out"


def test_gpt2_sst2_with_local_files():
    overrides = ["model.name=models/smollm2", "data.train=sst2/train.tsv", "data.eval=sst2/dev.tsv"]
    config = load_config(FOLDER / "gpt2_sst2.yaml", [*overrides, "data.max_train_examples=2000"])
    assert config.model.name == "models/smollm2"
    assert (config.data.train, config.data.eval) == (("sst2/train.tsv",), ("sst2/dev.tsv",))
    assert config.data.max_train_examples == 2000


def test_e2e_has_the_settings_of_the_paper():
    config = load_config(FOLDER / "e2e.yaml")
    adapter, train, generation = config.adapter, config.train, config.generation
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.targets) == (4, 32, 0.1, ("q", "v"))
    assert (train.num_train_epochs, train.batch_size, train.learning_rate) == (5, 8, 2e-4)
    assert (generation.num_beams, generation.length_penalty, generation.no_repeat_ngram_size) == (10, 0.9, 4)
    assert generation.metrics and train.metric_for_best_model == "valid_loss"


def test_e2e_rows_are_read_from_the_text_files_of_the_paper(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("name : X | Type : pub||X is a pub . \nname : Y||Y || why ? \n")
    script = [sys.executable, FOLDER.parent / "scripts/e2e.py", tmp_path, tmp_path / "rows"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("2 rows, 2 meanings") == 3, done.stderr
    found = [json.loads(line) for line in (tmp_path / "rows/e2e_valid.jsonl").read_text().splitlines()]
    assert found == [
        {"meaning": "name : X | Type : pub", "reference": "X is a pub ."},
        {"meaning": "name : Y", "reference": "Y || why ?"},
    ]
    (tmp_path / "train.txt").write_text("no bars\n")
    broken = subprocess.run(script, capture_output=True, text=True)
    assert broken.returncode == 1 and "train.txt:1" in broken.stderr and "Traceback" not in broken.stderr
