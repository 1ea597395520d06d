"""Roles, local paths and hub ids, columns in braces, and text that is safe to print."""

from pathlib import Path

import pytest

from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value, printable
from lora_ft.core.names import (
    is_local,
    nearest,
    nearest_role,
    parse_hub_data,
    portable_name,
    published_name,
    template_columns,
    with_slashes,
)
from lora_ft.core.paths import local_path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "reviews").write_text("")
    return tmp_path


LOCAL = ["models", "reviews", "models/none", "/x", "./x", "../x", "~/x", "a/b/c", "x.jsonl", "a/x.PARQUET", "m.gguf"]
LOCAL += [r"C:\data\x.jsonl", "C:/models/x", r"data\x", r"\\server\share\x", "//server/share/x"]  # as Windows has them


@pytest.mark.parametrize("name", LOCAL)
def test_local_names(folder, name):
    assert is_local(name)


@pytest.mark.parametrize(
    "name", ["gpt2", "nyu-mll/glue:sst2@train", "HuggingFaceTB/SmolLM2-135M", "none/x", "", "a\0b"]
)
def test_hub_names(folder, name):
    assert not is_local(name)


def test_a_path_of_windows_opens_here_and_has_a_portable_name(folder):
    assert local_path(r"models\x") == Path("models/x") and with_slashes(r"\\server\share\x") == "//server/share/x"
    for name in (r"C:\data\x", "C:/data/x", r"\\server\share\x", "//server/share/x"):
        assert portable_name(name) == published_name(name) == "x"
    (folder / r"a\b").touch()
    assert local_path(r"a\b") == Path(r"a\b")  # only Windows has no such name


def test_a_folder_here_makes_a_hub_name_local(folder):
    assert not is_local("gpt2")
    (folder / "gpt2").mkdir()
    assert is_local("gpt2")


@pytest.mark.parametrize(
    "source, parts",
    [
        ("imdb", ("imdb", None, None)),
        ("nyu-mll/glue:sst2@train", ("nyu-mll/glue", "sst2", "train")),
        ("nyu-mll/glue:sst2", ("nyu-mll/glue", "sst2", None)),
        ("imdb@train[:100]", ("imdb", None, "train[:100]")),
    ],
)
def test_hub_data(source, parts):
    assert parse_hub_data(source) == parts


@pytest.mark.parametrize("source", ["", "imdb@", "imdb:", "imdb:@train", "a/b/c", "a b", "/x", "a/:c", "é"])
def test_invalid_hub_data(source):
    with pytest.raises(ConfigError, match="owner/name"):
        parse_hub_data(source)


def test_columns_of_a_template():
    assert template_columns("Review: {review text}\n{label} {{plain}} {label}") == ("review text", "label")
    assert template_columns("none") == ()


def test_optional_columns_of_a_template():
    template = "{a}[[\n{b} {c}]] [[[[{d}]]]] [[A]] [[ {a} ]]"
    assert template_columns(template) == ("a", "b", "c", "d")
    assert template_columns(template, optional=True) == ("b", "c")
    assert template_columns(template, optional=False) == ("a", "d")


@pytest.mark.parametrize("template", ["{a} [[{b}", "[[{a} [[{b}]]", "[[", "[[ {a} ]"])
def test_brackets_that_are_not_closed(template):
    with pytest.raises(ValueError, match=r"a \[\[ is .*write \[\[\[\["):
        template_columns(template)


@pytest.mark.parametrize(
    "template",
    ["{", "}", "{a", "{}", "{ }", "{a.b}", "{a[0}", "{[0]}", "{a[]}", "{a[{b}]}", "{a!r}", "{a:>3}", "{a:{b}}"],
)
def test_braces_without_a_column_name(template):
    with pytest.raises(ValueError, match="column name"):
        template_columns(template)


@pytest.mark.parametrize(
    "word, role",
    [
        ("q_proj", "q"),
        ("self_attn.v_proj", "v"),
        ("query", "q"),
        ("gate_proj", "gate"),
        ("Q", "q"),
        ("attnetion", "attention"),
    ],
)
def test_the_nearest_role(word, role):
    assert nearest_role(word) == role


def test_nearest():
    assert nearest("lerning_rate", ["learning_rate", "seed"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate", "seed"]) is None


def test_control_characters_are_escaped():
    assert printable("a\x1b[31m\n\u202eé\udcff") == "a\\x1b[31m\\n\\u202eé\\udcff"
    assert len(printable("x" * 10_000)) == 200
    assert format_value("\x07") == '"\\x07"'
    assert format_value(10**4000) == "1" + "0" * 19 + "..."
    assert (format_value(None), format_value(True), format_value(1), format_value([])) == (
        "null",
        "true",
        "1",
        "an empty list",
    )
