"""The strict YAML reader: plain words as in YAML 1.2, line numbers, and refused syntax."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.config.yaml_reader import MAX_BYTES, Unreadable, read

WORDS = {
    "1e-4": 1e-4, "5.0e-4": 5e-4, ".5": 0.5, "5.": 5.0, "-1": -1, "+3": 3, "010": 10, "0x1F": 31, "0o17": 15,
    ".inf": float("inf"), "-.Inf": float("-inf"), "true": True, "False": False, "null": None, "~": None, "": None,
    "yes": "yes", "no": "no", "on": "on", "y": "y", "12:30": "12:30", "2024-01-01": "2024-01-01", "1_000": "1_000",
    "1e": "1e", "0x": "0x", "'1'": "1", '"true"': "true", "<<": "<<", "=": "=", "a:b@c": "a:b@c", "6-11": "6-11",
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_plain_words(word):
    value = read(f"key: {word}\n").value["key"]
    assert value == WORDS[word] and type(value) is type(WORDS[word])


def test_lines():
    document = read("# comment\na:\n  b: 1\n  c:\n  - x\n  - {d: 2}\n\ne: |\n  1\n  2\nf: 3\n")
    lines = {("a",): 2, ("a", "b"): 3, ("a", "c"): 4, ("a", "c", 0): 5, ("a", "c", 1, "d"): 6, ("e",): 8, ("f",): 11}
    assert {path: document.lines[path] for path in lines} == lines
    assert not document.problems


def test_a_repeated_key_names_both_lines_and_keeps_the_first_value():
    document = read("a: 1\nb: {c: 2, c: [3]}\na:\n  x: {y: 1}\nd: 4\n")
    assert document.value == {"a": 1, "b": {"c": 2}, "d": 4}
    assert [(p.path, p.line) for p in document.problems] == [(("b", "c"), 2), (("a",), 3)]
    assert "lines 1 and 3" in document.problems[1].message


@pytest.mark.parametrize(
    "text, word",
    [
        ("a: &x [1]\nb: 2\n", "anchors (&x)"),
        ("a: 1\nb: *x\n", "aliases (*x)"),
        ("a: !!python/object/apply:os.system [x]\n", "!!python/object/apply:os.system"),
        ("a: !!int 3\n", "!!int"),
        ("a: !own 3\n", "!own"),
        ("{[1]: 2}\n", "key"),
        ("prompt: {{x}}\n", "quotes"),
        ("true: 2\n", "true"),
        ("1: 2\n", "1 is not"),
    ],
)
def test_refused_syntax_is_skipped(text, word):
    problems = read(text + "last: 1\n" if text.startswith(("a", "prompt", "true", "1")) else text).problems
    assert len(problems) == 1 and word in problems[0].message


def test_nothing_is_executed(tmp_path):
    path = tmp_path / "run"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"):
        assert read(f"a: {tag} ['touch {path}']\n").problems
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10_000,
        "{a: " * 10_000,
        "- " * 10_000,
        "? " * 10_000,
        "\n".join(" " * n + "a:" for n in range(400)),
        "a" * (MAX_BYTES + 1),
        "a: [1,\n",
        "a: b: c\n",
        "\ta: 1\n",
        "a: \x00\n",
        "a: \x1b\n",
        "a: 1\n---\nb: 2\n",
        '"\\UFFFFFFFF"',
        "a:\n  b: 1\n c: 2\n",
        "%YAML 3.0\n---\na",
    ],
)
def test_unreadable_text_is_refused_within_a_second(text):
    start = time.perf_counter()
    with pytest.raises(Unreadable):
        read(text)
    assert time.perf_counter() - start < 1


def test_an_alias_bomb_stays_small():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n"
    start = time.perf_counter()
    document = read(bomb)
    assert len(document.problems) >= 9 and len(repr(document.value)) < 10_000
    assert time.perf_counter() - start < 1


def test_unreadable_text_is_reported_with_line_and_hint():
    with pytest.raises(Unreadable) as caught:
        read("data:\n  prompt: Review: {sentence}\n")
    assert caught.value.line == 2 and "quotes" in caught.value.message


def test_a_byte_order_mark_is_accepted():
    assert read("\ufeffa: 1\n").value == {"a": 1}
    assert read("").value is None and read("# only a comment\n").value is None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:- \n{}[],&*!|>'\"#?%@\\\t~01", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        read(text)
    except Unreadable as e:
        assert e.message
