"""Scores of texts against sacrebleu and rouge-score; generation metrics in training and evaluation."""

import json
import os

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lora_ft.commands.evaluate import evaluate_command
from lora_ft.commands.train import train
from lora_ft.config.load import load_config
from lora_ft.core.errors import ConfigError, DataError
from lora_ft.core.signals import Stopped
from lora_ft.evaluation import texts
from lora_ft.evaluation.texts import check_installed, text_metrics
from tests.helpers.tiny import write_run
from tests.training.test_resume import log, stop_at

ALL = ["bleu", "rouge_l", "exact_match"]
TEXTS = ["the cat sat on the mat", " A pub in the city centre . ", "nothing of the kind at all", "Blue Spice"]
REFERENCES = [
    ["the cat is on the mat", "there is a cat on the mat"],
    ["It is a pub near the river .", "A pub in the city centre .", "In the centre there is a pub ."],
    ["something else entirely is wanted here"],
    ["Blue Spice is cheap", "Blue Spice"],
]


def test_bleu_with_several_references_equals_sacrebleu():
    # sacrebleu's own call where every text has as many references: the missing ones are copies
    most = max(map(len, REFERENCES))
    padded = [(several * most)[:most] for several in REFERENCES]
    wanted = sacrebleu.corpus_bleu([t.strip() for t in TEXTS], [list(stream) for stream in zip(*padded, strict=True)])
    found = text_metrics(["bleu"], TEXTS, REFERENCES)[0]
    assert found["bleu"] == pytest.approx(wanted.score, rel=1e-12) and 0 < wanted.score < 100
    assert "tok:13a" in found["bleu_signature"]
    assert found.keys() == {"bleu", "bleu_signature"}


def test_bleu_by_hand():
    # one text, five of six words right: precisions 5/6, 3/5, 1/4, and 0/3, which sacrebleu smooths to 1/6
    found = text_metrics(["bleu"], ["the cat sat on the mat"], [["the cat is on the mat"]])[0]["bleu"]
    assert found == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25, rel=1e-9)


def test_rouge_l_takes_the_best_reference_of_a_prompt():
    scorer = RougeScorer(["rougeL"])
    wanted = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in several)
        for text, several in zip(TEXTS, REFERENCES, strict=True)
    ]
    assert text_metrics(["rouge_l"], TEXTS, REFERENCES)[0] == {"rouge_l": pytest.approx(sum(wanted) / 4)}
    # by hand: the longest common subsequence of "a b c d" and "a c d e" is 3 of 4 and 4
    assert text_metrics(["rouge_l"], ["a b c d"], [["x", "a c d e"]])[0]["rouge_l"] == pytest.approx(3 / 4)


def test_exact_match_accepts_any_reference():
    assert text_metrics(["exact_match"], TEXTS, REFERENCES)[0] == {"exact_match": 0.5}


def test_a_missing_library_is_reported_with_the_install_command(monkeypatch):
    check_installed(ALL)
    monkeypatch.setitem(texts.LIBRARIES, "bleu", "sacrebleu_is_not_here")
    with pytest.raises(ConfigError, match=r"lora-ft\[generation\]"):
        check_installed(ALL)
    check_installed(["exact_match"])


SETTINGS = [
    "data.eval={dev: eval.jsonl, held: 12}",
    "generation.metrics=[bleu, rouge_l, exact_match]",
    "generation.max_new_tokens=6",
    "generation.max_prompts=3",
    "train.predict_with_generate=true",
    "train.metric_for_best_model=held_rouge_l",
    "train.eval_steps=0.5",
    "train.num_train_epochs=8",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which a run has ended that chose its step by a generated text's score."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(load_config("config.yaml", SETTINGS))
        yield folder
    finally:
        os.chdir(here)


def evaluated(capsys, *overrides: str, **options) -> dict:
    evaluate_command([options.pop("folder")], as_json=True, overrides=overrides, **options)
    return json.loads(capsys.readouterr().out)


def test_every_set_is_scored_by_name(folder):
    record = json.loads((folder / "out/lora_ft.json").read_text())
    names = {f"{s}_{m}" for s in ("dev", "held") for m in ("loss", "perplexity", "accuracy", *ALL)}
    assert names <= record["metrics"].keys()
    lines = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_dev_loss" in line]
    assert len(evaluations) == 2 and {f"eval_{name}" for name in names} <= evaluations[0].keys()
    best = max(evaluations, key=lambda line: (line["eval_held_rouge_l"], -line["eval_held_loss"], line["step"]))
    assert record["step"] == best["step"]
    data = record["data"]
    assert (data["train"]["used"], data["eval"]["held"]["used"], data["eval"]["dev"]["used"]) == (36, 12, 20)
    assert "| dev BLEU |" in (folder / "out/README.md").read_text()


def test_eval_reproduces_the_metrics_of_training(folder, capsys):
    record = json.loads((folder / "out/lora_ft.json").read_text())
    sets = evaluated(capsys, folder=folder / "out")["sets"]
    assert [(name, found["examples"]) for name, found in sets.items()] == [("dev", 20), ("held", 12)]
    for name, found in sets.items():
        for metric in ("loss", *ALL):
            assert found["adapter"][metric] == pytest.approx(record["metrics"][f"{name}_{metric}"], rel=1e-5)
        assert found["base"].keys() == {key for key in found["adapter"] if not key.endswith("_vs_base")}
        assert {f"{key}_vs_base" for key in ("loss", "accuracy", *ALL)} <= found["adapter"].keys()
        bleu = found["adapter"]["bleu"] - found["base"]["bleu"]
        assert found["adapter"]["bleu_vs_base"]["difference"] == pytest.approx(bleu, abs=1e-9)
    assert sets["dev"]["base"]["exact_match"] == 0  # a random model
    assert sets["dev"]["adapter"]["rouge_l"] > sets["dev"]["base"]["rouge_l"]


def test_a_run_resumes_only_with_the_same_data_in_every_set(folder):
    before = (folder / "eval.jsonl").read_bytes()
    (folder / "eval.jsonl").write_bytes(before + before.splitlines(keepends=True)[0])
    try:
        with pytest.raises(DataError, match="data.eval.dev has changed"):
            train(load_config("config.yaml", [*SETTINGS, "train.num_train_epochs=9"]), resume=True)
    finally:
        (folder / "eval.jsonl").write_bytes(before)


def test_a_run_stopped_while_generating_ends_in_the_same_bits(folder, tmp_path, monkeypatch):
    settings = [*SETTINGS, "generation.do_sample=true", "adapter.dropout=0.1", "train.max_steps=6"]
    settings += ["train.metric_for_best_model=dev_loss"]
    train(load_config("config.yaml", [*settings, f"output={tmp_path / 'complete'}"]))
    broken = load_config("config.yaml", [*settings, f"output={tmp_path / 'broken'}"])
    for stops, check in enumerate((12, 9, 19, 8)):
        stop_at(monkeypatch, check)
        with pytest.raises(Stopped):
            train(broken, resume=stops > 0)
    monkeypatch.undo()
    train(broken, resume=True)
    assert log(tmp_path / "broken") == log(tmp_path / "complete")
    ended = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("broken", "complete")]
    assert ended[0] == ended[1]


def test_data_on_the_command_line_overrides_named_sets(folder, capsys):
    found = evaluated(capsys, folder=folder / "out", data="eval.jsonl")
    assert found["examples"] == 20 and "exact_match" in found["adapter"]


def test_texts_are_saved_and_the_first_is_printed(folder, capsys):
    evaluate_command([folder / "out"], texts_path=folder / "texts.jsonl", overrides=["generation.num_beams=2"])
    lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert [line["set"] for line in lines] == ["dev"] * 3 + ["held"] * 3
    assert all(line.keys() == {"set", "prompt", "references", "base", "adapter"} for line in lines)
    shown = capsys.readouterr().out
    assert "BLEU" in shown and lines[0]["adapter"] in shown and lines[0]["prompt"].split("\n")[0] in shown


def test_texts_need_metrics_and_positions(folder):
    with pytest.raises(ConfigError, match="no texts are generated"):
        evaluate_command([folder / "out"], texts_path=folder / "t.jsonl", overrides=["generation.metrics=[]"])
    with pytest.raises(ConfigError, match="128 positions"):
        evaluate_command([folder / "out"], overrides=["generation.max_new_tokens=128"])


def test_the_first_set_selects_the_best_checkpoint(folder):
    both = "data.eval={dev: eval.jsonl, test: eval.jsonl}"
    config = load_config("config.yaml", [both, "train.metric_for_best_model=accuracy"])
    assert config.train.metric_for_best_model == "dev_accuracy"
    assert load_config("config.yaml", [both]).train.metric_for_best_model == "dev_loss"
    named = load_config("config.yaml", [both, "train.metric_for_best_model=test_macro_f1"])
    assert named.train.metric_for_best_model == "test_macro_f1"
    assert load_config("config.yaml").train.metric_for_best_model == "loss"
    with pytest.raises(ConfigError, match="did you mean test_loss"):
        load_config("config.yaml", [both, "train.metric_for_best_model=tst_loss"])
    with pytest.raises(ConfigError, match="predict_with_generate"):
        load_config("config.yaml", [both, "train.metric_for_best_model=test_bleu", "generation.metrics=[bleu]"])
