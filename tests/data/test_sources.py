"""Rows and their locations in every kind of file, and the messages about files that cannot be read."""

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from lora_ft.core.errors import DataError
from lora_ft.data import files, json_files, sources
from lora_ft.data.files import FileFormat
from lora_ft.data.sources import content_hash, iter_rows


def rows(path):
    return [(row.where.removeprefix(path), row.columns) for row in iter_rows(path)]


def refused(path) -> str:
    """The message about the file or its first bad row."""
    try:
        return next(f"{row.where}: {row.problem}" for row in iter_rows(path) if row.problem)
    except DataError as e:
        return str(e)


def test_jsonl(write):
    path = write("a.jsonl", '\ufeff{"a": "x"}\n\n  \n{"a": "two\u2028lines", "b": 1}\r\n{"b": null}')
    assert rows(path) == [(":1", {"a": "x"}), (":4", {"a": "two\u2028lines", "b": 1}), (":5", {"b": None})]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"a": 1}\n{"a": \n', ":2: broken JSON"),
        ('{"a": 1}\n[1]\n', ":2: a row must be a JSON object"),
        ('{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", ":2: broken JSON"),
        ('{"a": ' + "[" * 100_000 + "\n", ":1: broken JSON"),
        (b'{"a": "x"}\n{"a": "\xe9"}\n', ":2: byte 8 of the line (0xe9) is not UTF-8"),
        (b'\xef\xbb\xbf{"a": "\xe9"}\n', ":1: byte 11 of the line (0xe9) is not UTF-8"),
        ('{"a": "x"}\n'.encode("utf-16"), ":1: byte 1 of the line (0xff)"),
        ('{"a": "\0"}\n', ":1: byte 8 of the line (0x00)"),
        ('\ufeff{"a": "\u00e9\0"}\n', ":1: byte 13 of the line (0x00)"),
    ],
)
def test_messages_locate_broken_lines(write, content, message):
    path = write("a.jsonl", content)
    assert refused(path).startswith(path + message)


def test_json(write):
    objects = [{"a": 1}, {"a": "]"}, {"a": [2, {"b": "\n"}]}]
    compact = write("compact.json", json.dumps(objects))
    assert rows(compact) == [(":1", o) for o in objects]
    pretty = write("pretty.json", "\n" + json.dumps(objects, indent=1) + "\n")
    assert [columns for _, columns in rows(pretty)] == objects
    lines = Path(pretty).read_text().split("\n")
    starts = [f":{i}" for i, line in enumerate(lines, 1) if line == " {"]
    assert [where for where, _ in rows(pretty)] == starts
    assert [c for _, c in rows(write("data.json", json.dumps({"version": 1, "data": objects})))] == objects
    assert rows(write("lines.json", '{"a": 1}\n{"a": 2}\n')) == [(":1", {"a": 1}), (":2", {"a": 2})]
    assert rows(write("none.json", "[ ]")) == []


@pytest.mark.parametrize(
    "value",
    [
        {"a": ["x", "y"], "b": [1, 2]},
        {"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}},
        {"columns": ["a", "b"], "index": [0, 1], "data": [["x", 1], ["y", 2]]},
        {"features": [{"name": "a"}], "rows": [{"row_idx": 0, "row": {"a": "x", "b": 1}}, {"row": {"a": "y", "b": 2}}]},
        {"version": "1", "intents": [{"a": "x", "b": 1}, {"a": "y", "b": 2}]},
        {"id1": {"a": "x", "b": 1}, "id2": {"a": "y", "b": 2}},
    ],
)
def test_objects_that_have_rows(write, value):
    path = write("a.json", json.dumps(value))
    assert rows(path) == [(" row 1", {"a": "x", "b": 1}), (" row 2", {"a": "y", "b": 2})]


def test_several_lists_of_rows_are_written_to_files_by_the_command_in_the_message(write):
    path = write("a.json", json.dumps({"train": [{"a": 1}, {"a": 2}], "test": [{"a": 3}]}))
    message = refused(path)
    assert "train, test" in message and "> train.jsonl" in message
    command = message.partition("python -c '")[2].partition("' <")[0]
    text = Path(path).read_text()
    out = subprocess.run(
        [sys.executable, "-Sc", command], input=text, capture_output=True, text=True, check=True
    ).stdout
    assert rows(write("train.jsonl", out)) == [(":1", {"a": 1}), (":2", {"a": 2})]
    assert "a .json file must be" in refused(write("chat.json", json.dumps({"messages": [{"role": "user"}], "id": 1})))


def test_texts_without_columns(write):
    assert rows(write("a.json", '["x", "y"]')) == [(":1", {"text": "x"}), (":1", {"text": "y"})]
    assert rows(write("a.jsonl", '"x"\n"y"\n')) == [(":1", {"text": "x"}), (":2", {"text": "y"})]


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"a": 1},\n {"a": ]', ":2: broken JSON"),
        ('[{"a": 1}\n {"a": 2}]', ":2: broken JSON"),
        ('[{"a": 1},\n]', ":2: broken JSON"),
        ('[{"a": 1}\n', "broken JSON"),
        ('[{"a": 1}]\n[2]', "text after the closing"),
        ('[{"a": 1},\n 5]', ":2: a row must be a JSON object"),
        ('{"rows": []}', "a .json file must be a list of objects"),
        ("5", "a .json file must be a list of objects"),
        ('{"a": 1,\n "b": }', ":2: broken JSON"),
    ],
)
def test_broken_json(write, content, message):
    assert message in refused(write("a.json", content))


def test_csv(write):
    path = write("a.csv", '\ufefftext,label\r\n"one, ""quoted""\ntwo lines",0\r\n\r\nplain,1\r\n')
    assert rows(path) == [
        (":2", {"text": 'one, "quoted"\ntwo lines', "label": "0"}),
        (":5", {"text": "plain", "label": "1"}),
    ]
    long = "x" * 300_000  # longer than the csv module's default limit
    assert rows(write("b.csv", f"text,n\n{long},1\n")) == [(":2", {"text": long, "n": "1"})]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a,b\n1,2\n1\n", ":3: 1 fields, the header has 2"),
        ("a,b\n1,2,3\n", ":2: 3 fields, the header has 2"),
        ('a,b\n1,2\n"never closed,2\n1,2\n', ":3: unexpected end of data"),
        ("a,b,a\n1,2,3\n", ":1: the header has 'a' more than once"),
    ],
)
def test_broken_csv(write, content, message):
    path = write("a.csv", content)
    assert refused(path).startswith(path + message)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "text;a, b\ngood; but, long\nbad;a, b, c\n", 'set data.format: {separator: ";"}'),
        ("a.csv", 'a,b\n"say \\"hi\\" now","x"\n', 'set data.format: {escape: "\\\\"}'),
        ("a.csv", 'a,b\n"oh" he said,x\n', "set data.format: {quote: none}"),
        ("a.csv", b"a,b\n\x93hi\x94,x\n", "set data.format: {encoding: cp1252}"),
        ("a.csv", "a,b\nx,y\n".encode("utf-16"), "set data.format: {encoding: utf-16}"),
        ("a.csv", "yes,yes\na,b\n", "data.format: {header: [prompt, completion]}"),
        ("a.csv", "text,label\rgood,1\rbad,0\r", "tr '\\r' '\\n' < OLD > NEW"),
        ("a.jsonl", '{"text": "good"}\r{"text": "bad"}\r', "tr '\\r' '\\n' < OLD > NEW"),
        ("a.parquet.gz", b"\x1f\x8b", "Unpack it first."),
        ("a.jsonl.xz", b"\x1f\x8b", "Unpack it first."),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "damaged compressed file"),
        ("a.xlsx", b"PK", "Save it as .csv"),
        ("a.txt", "It was", "data.long_text: split"),
    ],
)
def test_unsupported_files_get_a_hint_on_converting_them(write, name, content, message):
    assert message in refused(write(name, content))


@pytest.mark.parametrize(
    "name, content, format",
    [
        ("a.csv", 'text;label\n"good; but, long";1\n', {}),
        ("a.csv", "text\tlabel\ngood; but, long\t1\n", {}),
        ("a.csv", "text|label\ngood; but, long|1\n", {}),
        ("a.tsv", 'text;label\n"good; but, long";1\n', {}),
        ("a.csv", "good; but, long#1\n", {"separator": "#", "header": ("text", "label")}),
        ("a.csv", '"text";"label"\n\'good; but, long\';1\n', {"quote": "'", "header": None}),
        ("a.csv", 'text,label\n"good; but, long","1"\n'.encode("utf-16"), {"encoding": "utf-16"}),
        ("a.jsonl", '{"text": "good; but, long", "label": "1"}\n'.encode("utf-16"), {"encoding": "utf-16"}),
    ],
)
def test_formats_of_files(write, name, content, format):
    path = write(name, content)
    (row,) = iter_rows(path, FileFormat(**format))
    if "quote" in format:
        assert list(row.columns.values()) == ["good; but, long", "1"]
    else:
        assert row.columns == {"text": "good; but, long", "label": "1"}


def test_the_format_is_part_of_the_content(write):
    path = write("a.csv", b"text\n\x93hi\x94\n")
    (row,) = iter_rows(path, FileFormat("cp1252"))
    assert row.columns == {"text": "\u201chi\u201d"}
    formats = (FileFormat("cp1252"), FileFormat("latin-1"), FileFormat())
    assert len({content_hash(path, format)[0] for format in formats}) == 3
    with pytest.raises(DataError, match=r"a\.csv:1: not text in ascii"):
        list(iter_rows(path, FileFormat("ascii")))


def test_compressed_files_folders_and_patterns(tmp_path, write):
    lines = [json.dumps({"a": "x" * 999, "n": i}) + "\n" for i in range(300)]
    (tmp_path / "parts").mkdir()
    for i, (suffix, part) in enumerate({".gz": lines[:100], ".zst": lines[100:200], ".bz2": lines[200:]}.items()):
        half = len(part) // 2
        with pa.output_stream(str(tmp_path / f"parts/{i}.jsonl{suffix}"), compression="detect") as file:
            file.write("".join(part[:half]).encode())
            file.write("".join(part[half:]).encode())
    for source in (f"{tmp_path}/parts", f"{tmp_path}/parts/*", f"{tmp_path}/*/*.jsonl*", f"{tmp_path}/**/*.jsonl.*"):
        assert [row.columns["n"] for row in iter_rows(source)] == list(range(300))
        assert content_hash(source)[0] == content_hash(f"{tmp_path}/parts")[0]
    assert next(iter_rows(f"{tmp_path}/parts")).where == f"{tmp_path}/parts/0.jsonl.gz:1"
    two = gzip.compress(lines[0].encode()) + gzip.compress(lines[1].encode())
    assert [row.columns["n"] for row in iter_rows(write("two.jsonl.gz", two))] == [0, 1]
    assert "damaged compressed file" in refused(write("cut.jsonl.gz", gzip.compress("".join(lines).encode())[:-300]))
    assert "matches no file" in refused(f"{tmp_path}/*.csv")


def test_a_folder_that_may_not_be_one_data_set_is_refused(tmp_path, write):
    (tmp_path / "parts").mkdir()
    assert "without a data file" in refused(f"{tmp_path}/parts")
    for name in ("train-0.jsonl", "test.jsonl"):
        (tmp_path / "parts" / name).write_text("{}\n")
    assert f"a pattern such as {tmp_path}/parts/train*" in refused(f"{tmp_path}/parts")
    assert "Its folders do: parts" in refused(str(tmp_path))


def test_nested_squad_is_read_by_question(write):
    qas = [{"id": "1", "question": "When?", "answers": [{"text": "1800", "answer_start": 9}]}]
    article = {"title": "Bridges", "paragraphs": [{"context": "Built in 1800.", "qas": qas + [{"question": "Who?"}]}]}
    first, second = rows(write("squad.json", json.dumps({"version": "1.1", "data": [article]})))
    assert first[0] == " row 1, paragraph 1, question 1"
    answers = {"text": ["1800"], "answer_start": [9]}
    shared = {"title": "Bridges", "context": "Built in 1800."}
    assert first[1] == shared | {"id": "1", "question": "When?", "answers": answers}
    assert second[1] == shared | {"question": "Who?", "answers": {"text": []}}


TABLE = [["text", "n"], ['say "hi"', "1"], ["two\nlines", "2"], ["a\ttab", "3"], ['"all"', "4"], ["plain", "5"]]


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_a_tsv_with_a_quoted_header_is_quoted(tmp_path, quoting):
    path = tmp_path / "a.tsv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows(TABLE)
    assert [list(columns.values()) for _, columns in rows(str(path))] == TABLE[1:]
    assert [where for where, _ in rows(str(path))] == [":2", ":3", ":5", ":6", ":7"]


@pytest.mark.parametrize("header", ["text\tn", '"text"\tn', 'text "a"\tn', '"text\tn"'])
def test_a_tsv_without_a_quoted_header_is_unquoted(write, header):
    """Only the header decides: quotes below it are kept even if a CSV reader would accept them."""
    path = write("a.tsv", header + '\n"say ""hi"""\t1\n"two\nlines"\t2\nplain\t3\n')
    text, n = header.split("\t")
    assert rows(path)[0] == (":2", {text: '"say ""hi"""', n: "1"}) and rows(path)[-1][1] == {text: "plain", n: "3"}
    problems = [row.problem for row in iter_rows(path) if row.problem]
    assert problems[0].startswith("1 fields, the header has 2 (quotes are plain characters here")


@pytest.mark.parametrize(
    "fields",
    [
        ['it says "no" and means it', "fine"],  # inside a field
        ['"begins with one', "fine"],  # never closed
        ['"begins', 'ends"'],  # one opens a field, another closes one in a later line
        ['"half" a quote', "fine"],
        ['ends with one "', '" begins with one', "fine"],
        ["don't '' `` \\", '"'],
    ],
)
def test_a_tsv_with_stray_quotes_is_read_verbatim(write, fields):
    lines = [f"{i}\t{field}" for i, field in enumerate(fields)]
    path = write("glue.tsv", "label\tsentence\n" + "\n".join(lines) + "\n")
    expected = [(f":{i + 2}", {"label": str(i), "sentence": field}) for i, field in enumerate(fields)]
    assert rows(path) == expected


def test_tsv_wrong_number_of_fields(write):
    path = write("a.tsv", "a\tb\n1\t2\n1\t2\t3\n")
    assert refused(path).startswith(path + ":3: 3 fields, the header has 2")


def test_parquet(tmp_path, write):
    path = str(tmp_path / "a.parquet")
    data = [{"a": i, "m": [{"role": "user", "content": "x"}]} for i in range(3000)]
    pa.parquet.write_table(pa.Table.from_pylist(data), path, row_group_size=700)
    found = rows(path)
    assert [columns for _, columns in found] == data and found[2999][0] == " row 3000"
    assert "damaged Parquet file" in refused(write("b.parquet", b"PAR1 nonsense"))


@pytest.fixture
def low_limits(monkeypatch):
    """Limits of 1 KiB instead of hundreds of MiB."""
    for module in (files, json_files):
        monkeypatch.setattr(module, "MAX_LINE", 2**10)
    monkeypatch.setattr(files, "PART", 2**6)
    monkeypatch.setattr(sources, "MAX_UNPACKED", 2**10)
    monkeypatch.setattr(sources, "BATCH_BYTES", 2**10)


def test_lines_up_to_the_limit_are_read_in_parts(write, low_limits):
    lines = ["x" * n for n in (0, 63, 64, 65, 128, 1023)]
    for encoding in ("utf-8", "utf-16"):
        path = write("a.txt", "\r\n".join(lines).encode(encoding))
        assert "".join(files.text_lines(Path(path), encoding)).split("\r\n") == lines


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_header_with_several_separators_none_of_which_reads_the_file(write, name):
    """Each separator is tried once: trying one must not try the others again."""
    path = write(name, "text\tlabel,a;b|c\nx\n")
    assert ":2: 1 fields, the header has 2" in refused(path) and "separator" not in refused(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_files_that_hold_nothing(write, low_limits, name):
    """A sparse file, whose NULs are one line, is refused by its start; one of spaces by the limit of a line."""
    path = write(name, b"")
    os.truncate(path, 2**29)
    assert ":1: byte 1 of the line (0x00) is not UTF-8 text" in refused(path)
    path = write(name, " " * 2**11)
    assert f"the limit for {'a .json file' if name == 'a.json' else 'one row'}." in refused(path)


def converted(message: str, old: str) -> list[dict]:
    """The rows that are read after the command in a message was run on a file, as a shell runs it."""
    command = re.search(r"(jq|iconv|tr|python) .*? < OLD(\.jsonl)? > NEW(\.jsonl)?", message, re.DOTALL)[0]
    new = Path(old).with_name("new.jsonl" if "NEW.jsonl" in command else f"new{Path(old).suffix}")
    command = re.sub(r" < .*", "", command).replace("python", sys.executable, 1)
    with open(old, "rb") as source, new.open("wb") as target:
        subprocess.run(command, shell=True, check=True, stdin=source, stdout=target)
    return [row.columns for row in iter_rows(str(new))]


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq, which the message tells users to run")
@pytest.mark.parametrize("gap", ["", "\n"])
@pytest.mark.parametrize("content", ["\ufeff [%s]", '{"version": [1], "data": [%s], "more": {"data": [3]}}'])
def test_a_json_file_above_the_limit_names_the_command_that_converts_it(write, low_limits, content, gap):
    given = [{"a": i, "b": {"c": [i, "é", []]}} for i in range(50)]
    path = write("a.json", content % f",{gap}".join(map(json.dumps, given)))
    message = refused(path)
    assert "the limit for a .json file" in message and converted(message, path) == given


@pytest.mark.parametrize(
    "name, content, rows",
    [
        ("a.txt", b'A "text"\nof lines', [{"text": 'A "text"\nof lines'}]),
        ("a.md", b"# It's", [{"text": "# It's"}]),
        ("a.csv", "text,n\ncafé,1\n".encode("cp1252"), [{"text": "café", "n": "1"}]),
        ("a.jsonl", '{"a": "ü"}\n'.encode("utf-16"), [{"a": "ü"}]),
        ("a.jsonl", '{"a": "ü"}\n'.encode("utf-16-be"), [{"a": "ü"}]),
        ("a.csv", "text,n\né\x81,1\n".encode("latin1"), [{"text": "é\x81", "n": "1"}]),
        ("a.csv", b"a,b\r1,2\r3,4\r", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ("a.jsonl", b'{"a": 1}\r{"a": 2}\r', [{"a": 1}, {"a": 2}]),
    ],
)
def test_the_command_in_a_message_makes_a_file_that_is_read(write, name, content, rows):
    path = write(name, content)
    assert converted(refused(path), path) == rows


def test_the_command_for_a_folder_of_texts(tmp_path):
    for label, text in (("neg", "bad"), ("pos", "good")):
        (tmp_path / "texts" / label).mkdir(parents=True)
        (tmp_path / "texts" / label / "1.txt").write_text(text)
    message = refused(str(tmp_path / "texts"))
    command = re.search("python .* FOLDER", message)[0].replace("python", sys.executable, 1)
    made = subprocess.run(command.replace("FOLDER", "texts"), shell=True, check=True, cwd=tmp_path, capture_output=True)
    (tmp_path / "new.jsonl").write_bytes(made.stdout)
    assert [row.columns for row in iter_rows(str(tmp_path / "new.jsonl"))] == [
        {"text": "bad", "label": "neg"},
        {"text": "good", "label": "pos"},
    ]


def test_a_parquet_file_of_absurd_expansion_is_refused_by_its_metadata(tmp_path, low_limits, monkeypatch):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"a": pa.nulls(10**5, pa.int8())}), path)
    assert "claim to hold 100,000 rows" in refused(str(path))
    pa.parquet.write_table(pa.table({"a": ["x" * 2**12] * 3}), path)
    sizes = []
    real = pa.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pa.parquet.ParquetFile, "iter_batches", lambda *a, batch_size: sizes.append(batch_size) or real(*a, batch_size)
    )
    assert len(rows(str(path))) == 3 and sizes == [1]  # each value may be as large as all that is stored


def test_many_columns(write):
    names = [f"column {i}" for i in range(30_000)]
    path = write("a.csv", "\n".join([",".join(names)] * 3))
    assert [len(row.columns) for row in iter_rows(path)] == [30_000] * 2
    assert "'column 7'" in refused(write("a.csv", ",".join([*names, "column 7"])))


def test_a_saved_data_set_gets_a_hint_on_converting_it(tmp_path):
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "saved")
    assert "to_parquet" in refused(str(tmp_path / "saved"))


def test_folders_missing_unsupported_and_empty_files(tmp_path, write):
    write("x.jsonl", "{}")
    write("y.csv", "a\n1\n")
    assert "a folder" in refused(str(tmp_path)) and "x.jsonl" in refused(str(tmp_path))
    assert "no such file" in refused(str(tmp_path / "missing.jsonl"))
    assert f"Did you mean {tmp_path}/x.jsonl?" in refused(str(tmp_path / "x.jsnl.json"))
    assert ".parquet" in refused(write("x.txt", "hello"))
    for folder, text in (("pos", "fine"), ("neg", "dull")):
        (tmp_path / "films" / folder).mkdir(parents=True)
        (tmp_path / "films" / folder / "1.txt").write_text(text)
    message = refused(str(tmp_path / "films"))
    command = message.partition("python -c '")[2].partition("'")[0]
    made = subprocess.run(
        [sys.executable, "-c", command, tmp_path / "films"], capture_output=True, text=True, check=True
    )
    assert [json.loads(line) for line in made.stdout.splitlines()] == [
        {"text": "dull", "label": "neg"},
        {"text": "fine", "label": "pos"},
    ]
    for name in ("empty.jsonl", "empty.csv", "empty.tsv", "empty.json"):
        assert rows(write(name, "")) == []
        assert rows(write(name, " \n\n")) == []
    assert rows(write("header.csv", "a,b\n")) == [] == rows(write("header.tsv", "a\tb\n"))


def test_content_hash_depends_only_on_the_content(write):
    a, b, c = write("a.jsonl", "{}\n"), write("b.jsonl", "{}\n"), write("c.jsonl", "{} \n")
    assert content_hash(a)[0] == content_hash(b)[0] != content_hash(c)[0]


def test_without_the_hub_the_message_offers_local_data():
    message = refused("some-owner/some-data:config@train")  # tests run offline
    assert (
        "not a local file" in message
        and "cannot be reached" in message
        and "HF_HOME" in message
        and "--set data.train=FILE" in message
    )


def test_a_downloaded_data_set_is_read_offline():
    """Files of `hf download`; `datasets` by itself reads only tables that it prepared."""
    repo = Path(os.environ["HF_HUB_CACHE"]) / "datasets--some--reviews"
    snapshot = repo / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("b" * 40)
    (snapshot / "part.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    config = "configs:\n- config_name: small\n  data_files:\n  - split: test\n    path: part.jsonl\n"
    (snapshot / "README.md").write_text(f"---\n{config}---\n")
    assert [row.columns for row in iter_rows("some/reviews:small@test")] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match="nothing"):
        list(iter_rows("some/reviews:nothing@test"))


def test_one_downloaded_config_and_split_is_enough_offline():
    """A download of one config lacks the files of the first config, and perhaps its own other splits."""
    repo = Path(os.environ["HF_HUB_CACHE"]) / "datasets--some--many"
    snapshot = repo / "snapshots" / ("c" * 40)
    (snapshot / "b").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("c" * 40)
    (snapshot / "b/test-0.jsonl").write_text('{"text": "a"}\n')
    splits = "  - {split: train, path: NAME/train-*}\n  - {split: test, path: NAME/test-*}\n"
    configs = "".join(f"- config_name: {n}\n  data_files:\n{splits.replace('NAME', n)}" for n in "ab")
    info = "dataset_info:\n- config_name: b\n  features: [{name: text, dtype: string}]\n  splits:\n"
    info += "  - {name: train, num_bytes: 9, num_examples: 9}\n  - {name: test, num_bytes: 9, num_examples: 1}\n"
    (snapshot / "README.md").write_text(f"---\nconfigs:\n{configs}{info}---\n")
    assert [row.columns for row in iter_rows("some/many:b@test")] == [{"text": "a"}]
    assert [row.columns for row in iter_rows("some/many:b")] == [{"text": "a"}]
    with pytest.raises(DataError, match="train"):
        list(iter_rows("some/many:b@train"))
    with pytest.raises(DataError):
        list(iter_rows("some/many:a@test"))
