"""The shipped configs are valid, short, and mean what their first lines say."""

from pathlib import Path

import pytest

from lora_ft.config import load_config

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_loads_and_is_short_and_commented(path):
    load_config(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 40


def test_the_three_forms_of_data_are_all_shown():
    data = {path.stem: load_config(path).data for path in CONFIGS}
    assert set(data) == {"quickstart", "gpt2_sst2", "chat", "alpaca", "text"}
    assert data["chat"].messages and data["text"].text
    assert all(data[name].prompt and data[name].completion for name in ("quickstart", "gpt2_sst2", "alpaca"))


def test_gpt2_sst2_is_the_papers_choice():
    config = load_config(FOLDER / "gpt2_sst2.yaml")
    assert config.model.name == "gpt2"
    assert list(config.adapter.targets) == ["q", "v"]
    assert config.adapter.rank == 8
    assert config.output == "out"


def test_gpt2_sst2_takes_local_files_from_the_command_line():
    overrides = ["model.name=models/smollm2", "data.train=sst2/train.tsv", "data.eval=sst2/dev.tsv"]
    config = load_config(FOLDER / "gpt2_sst2.yaml", [*overrides, "data.max_train_examples=2000"])
    assert config.model.name == "models/smollm2"
    assert (config.data.train, config.data.eval) == (("sst2/train.tsv",), ("sst2/dev.tsv",))
    assert config.data.max_train_examples == 2000
