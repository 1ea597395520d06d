"""A copy of a model holds what is the model's: no file that a link leads to, and no path of this machine."""

import json

import pytest

from lora_ft.core.errors import ModelError
from lora_ft.model.files import Base
from lora_ft.model.small_files import forget_paths, small_files


@pytest.fixture
def model(tmp_path):
    (tmp_path / "secret").write_text('{"secret": 1}')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["passwd.json", "LICENSE", "notes.txt", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused(model, name):
    (model / name).symlink_to(model.parent / "secret")
    with pytest.raises(ModelError, match=f"{name}: a link out of its folder, to .*secret"):
        small_files(Base("model", model))


def test_a_folder_that_is_a_link_out_is_refused(model):
    (model.parent / "elsewhere").mkdir()
    (model.parent / "elsewhere/tool.jinja").touch()
    (model / "additional_chat_templates").symlink_to(model.parent / "elsewhere")
    with pytest.raises(ModelError, match="tool.jinja: a link out"):
        small_files(Base("model", model))


def test_code_behind_a_link_counts_where_code_is_trusted(model):
    (model / "own.py").symlink_to(model.parent / "secret")
    assert [p.name for p in small_files(Base("model", model))] == ["config.json"]
    with pytest.raises(ModelError, match="own.py"):
        small_files(Base("model", model, trusted_code=True))


def test_links_within_the_folder_and_the_hubs_cache_are_files(model, tmp_path):
    (model / "LICENSE").symlink_to(model / "config.json")
    (model / "folder.json").mkdir()
    assert [p.name for p in small_files(Base("model", model))] == ["LICENSE", "config.json"]
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert [p.name for p in small_files(Base("a/b", snapshot))] == ["config.json"]
    (snapshot / "passwd.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="passwd.json"):
        small_files(Base("a/b", snapshot))


def test_paths_that_libraries_noted_are_removed_and_nothing_else(model, monkeypatch):
    monkeypatch.chdir(model.parent)  # where `model` is a local base
    noted = {"_name_or_path": "/home/me/base", "text_config": {"_name_or_path": "model"}, "tokenizer_file": "~/x.json"}
    kept = {"name_or_path": "openai/gpt2", "vocab_file": "vocab.json", "eos_token": "/", "parts": [{"r": 1}]}
    (model / "tokenizer_config.json").write_text(json.dumps(noted | kept))
    before = (model / "config.json").stat().st_mtime_ns
    forget_paths(model)
    assert json.loads((model / "tokenizer_config.json").read_text()) == kept | {"text_config": {}}
    assert (model / "config.json").stat().st_mtime_ns == before  # without a path, it stays as it is
