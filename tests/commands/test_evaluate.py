"""What `lora-ft eval` says of its data: rows that were trained on, columns that the run reads."""

import json
import shutil
from pathlib import Path

import pytest

import lora_ft.commands.evaluate
from lora_ft.commands.train_run import closing_lines
from lora_ft.core.errors import FilesError
from lora_ft.evaluation import kept
from tests.helpers.command import cli, refused, train
from tests.helpers.tiny import write_reviews, write_run

READ_SCORES = kept.read_scores  # before the tests' own takes its place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"))
    write_reviews(folder / "train.jsonl", 30)
    (folder / "eval.jsonl").write_text("".join(f'{{"text": "a new text {i}", "label": {i % 2}}}\n' for i in range(6)))
    ended = train(folder, "train.max_steps=2", "train.evaluate_base=true")
    assert ended.code == 0, ended.err
    return folder


def test_rows_that_were_trained_on_are_told(folder, tmp_path):
    assert "warning" not in cli(folder, "eval", "out").err
    rows = (folder / "train.jsonl").read_text().splitlines()
    (folder / "mixed.jsonl").write_text("\n".join([*rows[:3], *(folder / "eval.jsonl").read_text().splitlines()]))
    ended = cli(folder, "eval", "out", "--data", "mixed.jsonl")
    assert ended.code == 0 and "eval: out was trained on 3 of its 9 examples" in ended.err, ended
    # the training data has moved: only its content says so
    shutil.move(folder / "train.jsonl", folder / "moved.jsonl")
    try:
        assert "out was trained on this data" in cli(folder, "eval", "out", "--data", "moved.jsonl").err
        assert "warning" not in cli(folder, "eval", "out").err
    finally:
        shutil.move(folder / "moved.jsonl", folder / "train.jsonl")


def test_wrong_columns_are_answered_with_those_of_the_run(folder):
    (folder / "other.jsonl").write_text('{"review": "good", "rating": 1}\n')
    refused(cli(folder, "eval", "out", "--data", "other.jsonl"), 3, 'reads these columns: "text", "label"', "--set")


def test_the_adapter_is_compared_with_its_base_row_by_row(folder):
    ended = cli(folder, "eval", "out", "--json", "--again")
    scores = json.loads(ended.out)
    for key in ("loss", "accuracy"):
        entry = scores["adapter"][f"{key}_vs_base"]
        assert entry["difference"] == pytest.approx(scores["adapter"][key] - scores["base"][key], abs=1e-9)
        assert entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1]
    record = json.loads((folder / "out/lora_ft.json").read_text())
    assert record["metrics"]["loss_vs_base"]["ci95"] == pytest.approx(
        scores["adapter"]["loss_vs_base"]["ci95"], rel=1e-3
    )
    assert "difference (95% interval)" in cli(folder, "eval", "out").out


def test_what_the_run_scored_is_not_scored_again(folder):
    def forbid():
        def load(*_, **__):
            raise AssertionError("the model is loaded")

        lora_ft.commands.evaluate.load_base = load

    then = cli(folder, "eval", "out", "--json", before=forbid)
    assert then.code == 0, then.err
    assert "from the run's record" in cli(folder, "eval", "out").err
    again = json.loads(cli(folder, "eval", "out", "--json", "--again").out)
    for who in ("base", "adapter"):
        now, kept_scores = again[who], json.loads(then.out)[who]
        assert now["loss"] == pytest.approx(kept_scores["loss"]) and now["confusion"] == kept_scores["confusion"]
        assert now.keys() == kept_scores.keys()
    rows = (folder / "eval.jsonl").read_text()
    (folder / "one_more.jsonl").write_text(rows + '{"text": "one more", "label": 1}\n')
    for others in (["--data", "one_more.jsonl"], ["--set", "model.dtype=bfloat16"], ["--set", "data.max_length=9"]):
        assert "the model is loaded" in cli(folder, "eval", "out", *others, before=forbid).err, others


def test_a_base_is_scored_once_for_all_runs(folder, monkeypatch):
    monkeypatch.setattr(kept, "read_scores", READ_SCORES)
    first, second = (
        train(folder, f"output=other{i}", "train.max_steps=1", f"train.seed={i}", "data.max_length=40") for i in (2, 3)
    )
    assert "base model evaluation (0 s)" in first.err and "base model evaluation (from an earlier run)" in second.err
    records = [json.loads((folder / f"other{i}/lora_ft.json").read_text()) for i in (2, 3)]
    assert records[0]["base_metrics"] == records[1]["base_metrics"]
    assert "difference" in records[1]["metrics"]["loss_vs_base"]


def test_a_run_ends_with_what_came_of_it(folder):
    shutil.copytree(folder, again := folder.parent / "again", ignore=shutil.ignore_patterns("out"))
    ended = train(again, "train.evaluate_base=true", "train.eval_steps=3")
    said = ended.err[ended.err.index("done in") :]
    assert "the best of 4 evaluations by loss" in said or "the best of 3 evaluations by loss" in said, said
    assert "base -> adapter" in said and "report: out/report.html" in said
    assert "next:   lora-ft generate out\n        lora-ft merge --adapter out\n" in said
    assert all(len(line) <= 80 for line in said.splitlines()), said
    assert ended.out == "out\n"


@pytest.mark.parametrize(
    "method, last", [("lora", "merge --adapter o"), ("full", "eval o"), ("bottleneck", "eval o"), ("prompt", "eval o")]
)
def test_the_commands_named_at_the_end_of_a_run_accept_its_method(tmp_path, monkeypatch, method, last):
    """`merge` takes only LoRA."""
    monkeypatch.chdir(tmp_path)
    lines = closing_lines(Path("o"), {"metrics": {}, "config": {"adapter": {"method": method}}})
    assert "\n".join(lines) == f"next:   lora-ft generate o\n        lora-ft {last}"


def test_a_full_cache_keeps_no_scores_and_ends_no_run(folder):
    def full():
        def fail(*_):
            raise FilesError("no room left")

        kept._keep = fail

    assert train(folder, "output=unkept", "train.max_steps=1", before=full).code == 0
