"""report.html, curves.svg, `lora-ft report`: what they show, that they are harmless, and that no run fails by them."""

import html
import json
import math
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import lora_ft.evaluation.evaluate
import lora_ft.report.write
import lora_ft.training.step
from lora_ft.commands.train import train
from lora_ft.config.load import load_config
from lora_ft.core.errors import FilesError, ModelError, NumbersError
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.storage import verify_manifest
from lora_ft.data.prepare import prepare_eval_sets
from lora_ft.evaluation.scoring import Scores
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base, load_tokenizer
from lora_ft.report.charts import log_ticks
from lora_ft.report.comparison import _winner, compare_runs
from lora_ft.report.curves import comparison_charts, run_charts
from lora_ft.report.runs import RunData, read_run_data, same_eval_data
from lora_ft.report.write import report_command, report_page
from tests.helpers.tiny import lora_ft as command_line
from tests.helpers.tiny import python, write_run

HOSTILE = '</pre><script>alert(1)</script><img src="http://x/y" onerror=z>"\'&amp;'
INVISIBLE = "\u202e\u2066\x9b31m\u0085\x1b]0;x\x07"  # reverses text, moves a cursor, sets a title
CLASSES = ["data.label_names={label: [negative, '" + HOSTILE.replace("'", "''") + "']}", "train.logging_steps=1"]


def run(folder: Path, *changes: str, resume: bool = False, overwrite: bool = False) -> None:
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(load_config("config.yaml", changes), resume=resume, overwrite=overwrite)
    finally:
        os.chdir(here)


def record(folder: Path) -> dict:
    return json.loads((folder / "out/lora_ft.json").read_text())


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A classification whose second label is meant to break out of the page."""
    folder = write_run(tmp_path_factory.mktemp("classified"), "gpt2")
    run(folder, *CLASSES, "adapter.dropout=0.1")
    return folder


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A run with generated answers, on rows that are meant to break out of the page."""
    folder = write_run(tmp_path_factory.mktemp("generated"))
    rows = [{"text": f"{i} {HOSTILE} {INVISIBLE}", "label": f"good {HOSTILE}"} for i in range(6)]
    rows[1]["text"] += " </div></main></body>" + "<svg onload=\"document.title='ran'\">" + "\u0301" * 300 + "w" * 2000
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(folder, "data.label_names=null", "data.max_length=2000")
    return folder


@pytest.fixture
def folder(classified, tmp_path):
    """A copy of the classification's folder without its output."""
    shutil.copytree(classified, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out"))
    return tmp_path


class Page(HTMLParser):
    """tags: (name, attributes) of all elements. text: the text of the page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def harmless(page: Page) -> None:
    """No script, no request; the hostile text is shown as text."""
    names, attributes = {tag for tag, _ in page.tags}, {(k, v) for _, found in page.tags for k, v in found.items()}
    assert not names & {"script", "img", "iframe", "link", "object", "a", "base", "form"}
    assert not [k for k, _ in attributes if k in ("src", "href", "srcset") or k.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in attributes
    assert "url(" not in page.text and "@import" not in page.text
    assert "<script>alert(1)</script><img src=" in page.text
    assert "\u0301" * 7 not in page.text
    assert not set(page.text) & set(INVISIBLE) - {*"]0;x31m"}


def test_the_result_comes_first_with_intervals_and_both_confusion_tables(classified):
    page, about = Page(classified / "out/report.html"), record(classified)
    harmless(page)
    for metrics in (about["base_metrics"], about["metrics"]):
        assert f"{metrics['accuracy']:.1%}" in page.text
        assert " to ".join(f"{end:.1%}" for end in metrics["accuracy_ci95"]) in page.text
    sections = ["Result", "What changed", "Use it", "Curves", "Data", "Complete config"]
    assert sections == sorted(sections, key=page.text.index)
    counts = [n for metrics in (about["base_metrics"], about["metrics"]) for row in metrics["confusion"] for n in row]
    assert sum(1 for tag, a in page.tags if tag == "td" and "--share" in (a.get("style") or "")) == len(counts) == 8
    assert about["data"]["train"]["content"] in page.text and about["base"]["fingerprint"] in page.text
    charts = {a["aria-label"].partition(" by ")[0] for _, a in page.tags if "aria-label" in a}
    assert {"Loss", "Learning rate", "Eval accuracy", "Tokens per second", "Peak memory so far, MiB"} <= charts
    rows = {found["kind"]: found for found in json.loads((classified / "out/samples.json").read_text())["rows"]}
    split = about["metrics"]["accuracy_vs_base"]
    assert [rows[kind]["count"] for kind in ("fixed", "broken")] == [split["better"], split["worse"]]
    assert all(row["prompt"] in page.text for found in rows.values() for row in found["rows"])
    assert page.text.index("lora-ft generate out") < page.text.index("lora-ft eval out")
    folded = page.text.index("Hashes of base")
    assert page.text.index(about["base"]["fingerprint"]) > folded and sum(tag == "details" for tag, _ in page.tags) == 3


def test_generated_answers_of_base_and_adapter_are_side_by_side(generated):
    harmless(Page(generated / "out/report.html"))
    samples = json.loads((generated / "out/samples.json").read_text())["samples"]
    assert len(samples) == 4
    assert all(s["prompt"].startswith("Review:") and s["reference"] == f" good {HOSTILE}" for s in samples)
    tokenizer, model = load_tokenizer(resolve(str(generated / "base"))), load_base(resolve(str(generated / "base")))
    prompt = tokenizer(samples[0]["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        first = model(prompt).logits[0, -1].argmax()
    assert tokenizer.decode([first], skip_special_tokens=True) == samples[0]["base"][: len(tokenizer.decode([first]))]


def test_the_base_score_equals_plain_cross_entropy(classified):
    config = load_config(classified / "config.yaml", CLASSES)
    tokenizer, model = load_tokenizer(resolve(str(classified / "base"))), load_base(resolve(str(classified / "base")))
    here = os.getcwd()
    os.chdir(classified)
    examples = prepare_eval_sets(config.data, tokenizer, 0)[""].dataset
    os.chdir(here)
    losses = []
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"][1:])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0], reduction="sum"))
    supervised = sum(label >= 0 for example in examples for label in example["labels"])
    assert record(classified)["base_metrics"]["loss"] == pytest.approx(float(sum(losses)) / supervised, rel=1e-4)
    assert record(classified)["base_seconds"] >= 0


def test_scoring_the_base_does_not_change_training(classified, folder, monkeypatch):
    """With dropout: a random number drawn for it would show."""
    scored, calls = lora_ft.evaluation.evaluate.score, []

    def not_the_base(*args, **options):
        calls.append(1)
        return Scores(1, 1.0, 1) if len(calls) == 1 else scored(*args, **options)

    monkeypatch.setattr(lora_ft.evaluation.evaluate, "score", not_the_base)
    run(folder, *CLASSES, "adapter.dropout=0.1")
    assert record(folder)["base_metrics"] == {"loss": 1.0, "perplexity": pytest.approx(2.71828, abs=1e-4)}
    name = "out/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (classified / name).read_bytes()
    times = {"seconds", "tokens_per_second", "peak_memory_mb"}
    logs = [[json.loads(line) for line in (f / "out/log.jsonl").read_text().splitlines()] for f in (folder, classified)]
    ours, theirs = ([{k: v for k, v in line.items() if k not in times} for line in log] for log in logs)
    assert ours == theirs


def test_a_failing_report_is_only_a_warning(folder, monkeypatch, capsys):
    def fails(run):
        raise RuntimeError("no")

    monkeypatch.setattr(lora_ft.report.write, "write_run_report", fails)
    run(folder, "train.max_steps=1")
    assert "warning: no report" in capsys.readouterr().err
    about = record(folder)
    assert "report.html" not in about["files"]
    verify_manifest(folder / "out", about["files"], FilesError)


def test_the_manifest_lists_reports_without_hashes(classified):
    files = record(classified)["files"]
    assert files["report.html"] is None and files["curves.svg"] is None


def test_curves_svg_needs_no_other_file(classified):
    """curves.svg has the charts of the page, with colours that need no style sheet, on white."""
    drawing = ElementTree.parse(classified / "out/curves.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    assert drawing.tag == f"{svg}svg" and drawing.find(f"{svg}rect").get("fill") == "#ffffff"
    page = Page(classified / "out/report.html")
    lines = [a["d"] for tag, a in page.tags if tag == "path"]
    drawn = [path for path in drawing.iter(f"{svg}path") if path.get("d") in lines]
    assert len(drawn) == len(lines) > 0 and all(path.get("stroke", "").startswith("#") for path in drawn)
    titles = {a["aria-label"].partition(" by ")[0] for _, a in page.tags if " by " in a.get("aria-label", "")}
    texts = [text.text for text in drawing.iter(f"{svg}text")]
    assert all(any(text.startswith(title) for text in texts) for title in titles)
    assert not [e for e in drawing.iter() if e.tag in (f"{svg}style", f"{svg}script", f"{svg}image")]


def test_curves_png_of_an_earlier_version_is_replaced_with_its_run(classified, folder):
    """--overwrite removes it, --resume keeps the folder valid; another tool's curves.png is left alone."""
    shutil.copytree(classified / "out", folder / "out")
    (folder / "out/curves.svg").rename(folder / "out/curves.png")
    (folder / "out/curves.png").write_bytes(b"\x89PNG\r\n\x1a\n tEXtSoftware\0lora-ft")
    about = record(folder)
    about["files"]["curves.png"] = about["files"].pop("curves.svg")
    (folder / "out/lora_ft.json").write_text(json.dumps(about))
    run(folder, *CLASSES, "adapter.dropout=0.1", "train.num_train_epochs=7", resume=True)
    assert record(folder)["files"]["curves.svg"] is None and (folder / "out/curves.svg").exists()
    run(folder, "train.max_steps=1", overwrite=True)
    assert not (folder / "out/curves.png").exists() and "curves.png" not in record(folder)["files"]
    (folder / "out/curves.png").write_bytes(b"\x89PNG\r\n\x1a\n of another tool")
    run(folder, "train.max_steps=1", overwrite=True)
    assert (folder / "out/curves.png").exists()


def stopped(folder: Path, monkeypatch, look: int, *changes: str) -> None:
    """A run that is stopped by a signal at the look-th check for one."""
    count = 0

    def check(self):
        nonlocal count
        count += 1
        if count == look:
            raise Stopped(15, self.hint)

    monkeypatch.setattr(Stopper, "check", check)
    with pytest.raises(Stopped):
        run(folder, *changes)
    monkeypatch.undo()


def test_an_interrupted_run_has_a_report_that_can_be_regenerated(folder, monkeypatch):
    stopped(folder, monkeypatch, 20, *CLASSES)
    page = Page(folder / "out/report.html")
    harmless(page)
    assert "Not finished" in page.text and "which is saved" in page.text and "--resume" in page.text
    (folder / "out/report.html").unlink()
    code = "import sys, lora_ft.cli; sys.argv = ['lora-ft', 'report', 'out']\ntry: lora_ft.cli.main()\n"
    code += "except SystemExit as e: assert not e.code\nassert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    assert python(code, folder) == "out/report.html\n"
    again = Page(folder / "out/report.html")
    harmless(again)
    assert "Not finished" in again.text and "base" in again.text
    run(folder, *CLASSES, resume=True)
    assert "Not finished" not in Page(folder / "out/report.html").text


def test_a_run_that_has_a_checkpoint_but_no_log_has_a_report(folder, monkeypatch, capsys):
    stopped(folder, monkeypatch, 20, *CLASSES)
    for name in ("report.html", "log.jsonl"):
        (folder / "out" / name).unlink()
    capsys.readouterr()
    report_command([folder / "out"], None)
    assert capsys.readouterr().out == f"{folder / 'out/report.html'}\n"
    assert "Not finished" in Page(folder / "out/report.html").text


def test_a_run_that_stopped_at_nan_has_a_report(folder, monkeypatch):
    loss, calls = lora_ft.training.step.supervised_loss, []

    def spoilt(*args, **options):
        calls.append(1)
        return loss(*args, **options) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr("lora_ft.training.step.supervised_loss", spoilt)
    with pytest.raises(NumbersError):
        run(folder, "train.save_steps=9", "train.eval_steps=9", "train.logging_steps=1")
    page = Page(folder / "out/report.html")
    assert "Not finished: step 2 of 12" in page.text and "not a finite number" in page.text
    assert not (folder / "out/checkpoints").exists(), "no record to make it from again, but the page is there"
    monkeypatch.undo()
    run(folder, "train.max_steps=1")  # it holds no run, so nothing needs to be asked
    assert "Not finished" not in Page(folder / "out/report.html").text


def test_a_signal_before_the_first_step_leaves_no_report(folder, monkeypatch):
    stopped(folder, monkeypatch, 1)
    assert not (folder / "out/report.html").exists()


def test_overwrite_removes_own_reports_and_keeps_other_files(folder, monkeypatch):
    stopped(folder, monkeypatch, 20)
    before = (folder / "out/report.html").read_text()
    monkeypatch.setattr(lora_ft.report.write, "write_run_report", lambda run: None)
    run(folder, "train.max_steps=1", overwrite=True)
    assert before and not (folder / "out/report.html").exists() and not (folder / "out/curves.svg").exists()
    monkeypatch.undo()
    (folder / "out/report.html").write_text("mine")
    run(folder, "train.max_steps=1", overwrite=True)
    with pytest.raises(FilesError, match=r"report\.html"):
        report_command([folder / "out"], None)
    shutil.rmtree(folder / "out/checkpoints")
    with pytest.raises(FilesError, match=r"report\.html"):
        run(folder, "train.max_steps=1", overwrite=True)
    assert (folder / "out/report.html").read_text() == "mine"


def test_several_runs_on_one_page(classified, generated, tmp_path):
    done = command_line("report", str(classified / "out"), str(generated / "out"), cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "compare-report.html\n", done.stderr
    page = Page(tmp_path / "compare-report.html")
    harmless(page)
    for folder in (classified, generated):  # without the folders that both share
        assert f"{folder.name}/out" in page.text and str(folder) not in page.text
    assert str(classified.parent) in page.text
    assert "data.max_length" in page.text and "adapter.dropout" in page.text and "train.batch_size" not in page.text
    assert "scored on different eval data" in page.text


def test_runs_with_other_seeds_and_forms_of_the_base_are_compared_on_the_rows_they_share(folder):
    def run_of(name: str, *changes: str) -> RunData:
        run(folder, *CLASSES, "train.max_steps=1", f"output={folder / name}", *changes)
        return read_run_data(folder / name)

    first, other = run_of("first"), run_of("seed", "train.seed=1")
    quantized = run_of("quantized", "train.seed=2", "model.quantization=int8")
    assert same_eval_data(first, other) and same_eval_data(first, quantized)
    page = compare_runs([first, quantized])
    assert "different eval data" not in page and page.count("in int8") == 1
    bars = [str(_winner([first, second], ["a", "b"], True)[1]) for second in (other, quantized)]
    assert "'base'" in bars[0] and "'base'" not in bars[1]  # in another form it is another base
    sampled = [run_of(f"sampled{seed}", f"train.seed={seed}", "data.max_eval_examples=3") for seed in (0, 1)]
    assert not same_eval_data(*sampled) and not same_eval_data(first, sampled[0])
    assert not same_eval_data(first, run_of("longer", "data.max_length=100"))
    held_out = [run_of(f"part{seed}", f"train.seed={seed}", "data.eval=0.5") for seed in (0, 1)]
    assert not same_eval_data(*held_out) and same_eval_data(held_out[0], held_out[0])


def test_runs_with_named_eval_sets(folder):
    shutil.copy(folder / "eval.jsonl", folder / "other.jsonl")
    for rank in (2, 4):
        sets = "data.eval={dev: eval.jsonl, other: other.jsonl}"
        run(folder, *CLASSES, sets, f"adapter.rank={rank}", f"output=by{rank}", "train.max_steps=4")
    alone, both = (folder / name for name in ("by2/report.html", "both.html"))
    report_command([folder / "by2", folder / "by4"], both)
    for page in (alone, both):
        assert all(f"Eval {name} loss" in page.read_text() for name in ("dev", "other"))


def test_folders_without_a_run_are_refused(classified, tmp_path):
    for place, words in ((tmp_path, "no run"), (sorted((classified / "out/checkpoints").iterdir())[0], "a checkpoint")):
        with pytest.raises(ModelError, match=words):
            report_command([place], None)
    shutil.copytree(classified / "out", tmp_path / "out")
    about = record(classified)
    del about["config"]
    (tmp_path / "out/lora_ft.json").write_text(json.dumps(about))
    with pytest.raises(FilesError, match="config"):
        report_command([tmp_path / "out"], None)


def test_a_log_with_a_cut_line_and_nan_is_read(classified, tmp_path):
    shutil.copytree(classified / "out", tmp_path / "out")
    with (tmp_path / "out/log.jsonl").open("a") as log:
        log.write('{"step": 13, "loss": NaN, "grad_norm": 1.0}\n[]\n' + "[" * 100_000 + '\n{"step": 14, "lo')
    lines = read_run_data(tmp_path / "out").log
    assert lines[-1] == {"step": 13, "grad_norm": 1.0}
    report_command([tmp_path / "out"], tmp_path / "page.html")
    assert (tmp_path / "page.html").exists()


ODD = (None, [], [None], "x", {}, math.nan, 10**400, -1)
FIELDS = {
    "lora_ft.json": "base.name base_seconds trainable_parameters planned_steps config.adapter config.adapter.rank "
    "config.adapter.targets config.data.prompt config.data.label_names.label data.eval data.eval.examples "
    "data.train.skipped metrics.loss metrics.accuracy_ci95 metrics.accuracy_vs_base metrics.accuracy_vs_base.p "
    "metrics.confusion base_metrics.confusion.0 base_metrics",
    "log.jsonl": "step loss seconds",
    "samples.json": "samples rows",
}


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_are_left_out_or_refused_with_the_file(classified, tmp_path, name):
    path = shutil.copytree(classified / "out", tmp_path / "out") / name
    text = path.read_text()
    whole = text.splitlines()[0] if name.endswith("l") else text
    for field in FIELDS[name].split():
        for value in ODD:
            content = at = json.loads(whole)
            *parents, last = (int(key) if key.isdigit() else key for key in field.split("."))
            for key in parents:
                at = at[key]
            at[last] = value
            path.write_text(text.replace(whole, json.dumps(content, indent=None if name.endswith("l") else 2)))
            try:
                report_page(read_run_data(tmp_path / "out"))
            except FilesError as e:
                assert name == "lora_ft.json" and str(path) in str(e) and field.split(".")[0] in str(e)


# ---- charts ----


def test_large_numbers_have_no_exponent_in_any_chart(tmp_path):
    lines = [
        {"step": i, "seconds": i, "tokens_per_second": 12345.0, "peak_memory_mb": 40960.0 + i} for i in range(1, 9)
    ]
    data = RunData(tmp_path, {}, lines, 8, 8, True, None, {}, {}, [])
    for charts in (run_charts(data), comparison_charts([data, data], ["a", "b"])):
        labels = {chart.title: [label for _, label in chart.y_ticks] for chart in charts}
        assert labels["Tokens per second"][-1] == "15,000" and "40,000" in labels["Peak memory so far, MiB"]


def test_a_narrow_logarithmic_axis_has_ticks():
    for low, high in ((1.2e6, 1.9e6), (8, 16), (2.1, 4.9)):
        found = log_ticks(math.log10(low), math.log10(high))
        assert len(found) > 1 and all(low <= value <= high for value in found)
    assert log_ticks(0, 2) == [1, 2, 5, 10, 20, 50, 100] and log_ticks(0, 4) == [1, 10, 100, 1000, 10000]


# ---- in a browser ----

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.skipif(not BROWSER, reason="opens the pages in a browser: needs chromium or Chrome on the PATH")
def test_no_page_is_wider_than_a_phone_or_runs_what_a_row_says(classified, generated, tmp_path):
    """Each page in a frame of 320 pixels; a script outside of it writes into the title what it finds there."""
    report_command([classified / "out", generated / "out", generated / "out"], tmp_path / "compare.html")
    for page in (classified / "out/report.html", generated / "out/report.html", tmp_path / "compare.html"):
        looks = (
            "[d.documentElement.scrollWidth, d.documentElement.clientWidth, d.title, d.body.lastElementChild.tagName]"
        )
        (tmp_path / "frame.html").write_text(
            f'<iframe id=f src="file://{page}" width=320 height=800 onload="const d = f.contentDocument; '
            f'document.title = JSON.stringify({looks})"></iframe>'
        )
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--dump-dom"]
        done = subprocess.run(
            [BROWSER, *flags, f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=60
        )
        found = html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0])
        assert found, (page, done.stdout[:500])
        width, room, title, last = json.loads(found)
        assert width <= room and title != "ran" and last == "FOOTER", (page, found)


def test_rows_of_wrong_types_in_a_damaged_file():
    from lora_ft.report.scores import _shown_rows

    assert _shown_rows({"kind": "fixed", "count": "\0", "rows": -1})["rows"] == []
    assert _shown_rows({"kind": "fixed", "count": "\0", "rows": [{"where": "a:1"}, 3]})["count"] == 1
