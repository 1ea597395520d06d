"""`lora-ft combine` and `compress` as typed: their results are adapters like any other."""

import json
import shutil

import pytest

from tests.helpers.command import cli, refused, refused_untouched
from tests.helpers.tiny import write_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two runs on one base: a and b."""
    folder = write_run(tmp_path_factory.mktemp("combine"))
    for name, seed, rank in (("a", 0, 4), ("b", 3, 2)):
        changes = (f"output={name}", f"train.seed={seed}", f"adapter.rank={rank}", "train.evaluate_base=false")
        ended = cli(folder, "train", "config.yaml", *(word for change in changes for word in ("--set", change)))
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def said(folder, *words: str) -> str:
    ended = cli(folder, *words)
    assert ended.code == 0, ended.err
    return ended.out


def scores(folder, name: str) -> dict:
    return json.loads(said(folder, "eval", name, "--json", "--again"))["adapter"]


def test_a_combined_adapter_is_one_like_any_other(folder):
    """Evaluated, generated with, merged, looked into, combined again and compressed; half of each of two copies is the one."""
    shutil.copytree(folder / "a", folder / "copy")
    told = json.loads(said(folder, "combine", "a=0.5", "copy=0.5", "--out", "same", "--json"))
    assert told["rank"] == 8 and told["error"] == 0 and set(told["errors"].values()) == {0}
    assert scores(folder, "same")["loss"] == pytest.approx(scores(folder, "a")["loss"], abs=1e-5)

    out = said(folder, "combine", "a=0.7", "b=-0.3", "--out", "both", "--how", "svd", "--rank", "3")
    assert "both: svd of 0.7 x a, -0.3 x b" in out and "rank 3 on 4 modules" in out and "% at worst, in model." in out
    assert said(folder, "generate", "both", "--prompt", "good", "--json", "--max-new-tokens", "2").startswith("{")
    assert "merged both into base" in said(folder, "merge", "both")
    assert scores(folder, "both")["loss"] == pytest.approx(
        json.loads(said(folder, "eval", "both-merged", "--json"))["model"]["loss"], abs=1e-4
    )
    shown = said(folder, "inspect", "both")
    assert "made of     0.7 x a, -0.3 x b" in shown and "no problem found" in shown
    said(folder, "combine", "both=1", "b=0.3", "--out", "again")
    evaluated = cli(folder, "eval", "again", "--data", "train.jsonl")
    assert "again was trained on 48 of its 48 examples" in evaluated.err

    out = said(folder, "compress", "again", "--energy", "1")
    assert "rank 5 on 4 modules" in out and (folder / "again-small/lora_ft.json").is_file()
    assert "report" not in said(folder, "compress", "a", "--rank", "2", "--out", "small", "--eval")


def test_what_is_refused(folder):
    for words, code, message in (
        (("a=1", "b=x"), 2, "b=x: give FOLDER=WEIGHT"),
        (("a=1", "a=1"), 2, "a: named twice"),
        (("a=1", "b=1", "--rank", "3"), 2, "--how cat has the sum of the adapters' ranks"),
        (("a=1", "b=1", "--how", "svd", "--density", "0.5"), 2, "--density goes with --how ties or dare"),
        (("a=1", "base=1"), 4, "base: nothing trained there"),
        (("a=1", "b=1", "--out", "a"), 6, "a: exists already"),
    ):
        where = () if "--out" in words else ("--out", "both")
        refused_untouched(folder, code, message, command=("combine", *words, *where))
    refused_untouched(folder, 2, "give --rank N, or --energy SHARE", command=("compress", "a"))
    said(folder, "combine", "a=1", "b=1", "--out", "both")
    refused(cli(folder, "report", "both"), 4, "made of other adapters and holds no run")
