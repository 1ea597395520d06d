"""`lora-ft inspect` names every planted defect, and its numbers are those of the full matrices."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft.commands.inspect.command import inspect_command
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.files import load_adapter
from lora_ft.methods.lora.inject import inject_lora, lora_layers
from lora_ft.model.files import resolve
from tests.helpers.families import tiny_model
from tests.helpers.tiny import python, save_with_record

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "lora_ft.json"
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def write(folder: Path, family: str = "llama", name: str = "out", seed: int = 1, **settings) -> Path:
    """A base, if there is none yet, and a random adapter on it with a record."""
    model, base = tiny_model(family), folder / "base"
    if not base.exists():
        model.save_pretrained(base)
    inject_lora(model, **{"targets": ("q", "v"), "rank": 3, "alpha": 6.0, "seed": seed} | settings)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            B.data.normal_(std=0.05, generator=generator)
    (folder / name).mkdir()
    about = {"name": str(base), "revision": None, "fingerprint": resolve(str(base)).fingerprint}
    save_with_record(model, folder / name, str(base), base=about, seed=5)
    return folder / name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return write(tmp_path_factory.mktemp("inspect")).parent


@pytest.fixture
def folder(prepared, tmp_path):
    """A base, and an adapter in out that names it where it is now."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    for name in (CONFIG, RECORD):
        path = tmp_path / "out" / name
        path.write_text(path.read_text().replace(str(prepared), str(tmp_path)))
    renew(tmp_path / "out")
    return tmp_path


def renew(out: Path) -> None:
    """Record the config's new hash: that it changed is not what a test is about."""
    from lora_ft.core.storage import manifest

    if (path := out / RECORD).exists():
        record = json.loads(path.read_text())
        record["files"] |= manifest(out, [CONFIG])
        path.write_text(json.dumps(record))


def found(capsys, *folders: Path, **options) -> tuple[set[str], str, dict]:
    """The kinds of the problems, the texts of all findings, and the whole of what --json prints."""
    try:
        inspect_command(folders, as_json=True, **options)
        refused = False
    except ModelError as e:
        refused = "see above" in str(e)
    content = json.loads(capsys.readouterr().out)
    findings = [finding for adapter in content["adapters"] for finding in adapter["findings"]]
    problems = {finding["kind"] for finding in findings if finding["problem"]}
    assert refused == bool(problems)
    return problems, "\n".join(finding["text"] for finding in findings), content


def tensors_changed(out: Path, change) -> None:
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS, {"format": "pt"})


def swap(tensors) -> None:
    for letter in "AB":
        one, other = Q.format(0, letter), Q.format(1, letter)
        tensors[one], tensors[other] = tensors[other], tensors[one]


def times(factor: float, name: str, index=...):
    return lambda tensors: tensors[name].__setitem__(index, tensors[name][index] * factor)


def kill_half(tensors) -> None:
    for name in [name for name in tensors if "layers.1" in name and "lora_B" in name]:
        tensors[name].zero_()


def drop(name: str):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if name in key]


PLANTED = {  # defect -> (change of the tensors, kind with a record, kind without one, words)
    "dead half": (kill_half, "dead", "dead", "2 of 4 modules do nothing"),
    "swapped layers": (swap, "swapped", None, "layer 0 and layer 1 are swapped: 4 tensors"),
    "NaN": (
        times(float("nan"), Q.format(0, "A"), (0, 0)),
        "nan",
        "nan",
        "NaN in model.layers.0.self_attn.q_proj.lora_A",
    ),
    "Inf": (
        times(float("inf"), Q.format(1, "B"), (0, 0)),
        "inf",
        "inf",
        "Inf in model.layers.1.self_attn.q_proj.lora_B",
    ),
    "missing module": (drop("layers.1.self_attn.q_proj"), "missing", "missing", "model.layers.1.self_attn.q_proj"),
    "missing half": (drop("layers.1."), "missing", "missing", "2 of"),
    "missing A": (drop(Q.format(1, "A")), "missing", "missing", "model.layers.1.self_attn.q_proj has no lora_A"),
    "rank": (lambda t: t.update({Q.format(0, "A"): t[Q.format(0, "A")][:2]}), "rank", "rank", "says rank 3"),
    "exploded": (times(1e3, Q.format(0, "B")), "exploded", "exploded", "|s B A| is far above |W| in 1 of 4"),
}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("defect", PLANTED)
def test_planted_defects_of_the_tensors(folder, capsys, defect, recorded):
    out = folder / "out"
    change, *kinds, words = PLANTED[defect]
    tensors_changed(out, change)
    if not recorded:
        (out / RECORD).unlink()
    problems, text, _ = found(capsys, out)
    if recorded or kinds[1]:
        assert kinds[not recorded] in problems and words in text, (problems, text)
    else:
        assert not problems and "layers exchanged" in text


EXPERTS = "base_model.model.model.layers.1.mlp.experts.lora_{}.weight"  # of their last parameter, down_proj


@pytest.mark.parametrize(
    "change, kind, words",
    [
        (times(float("nan"), EXPERTS.format("A"), (0, 0)), "nan", "NaN in model.layers.1.mlp.experts.down_proj.lora_A"),
        (drop(EXPERTS.format("B")), "missing", "model.layers.1.mlp.experts.down_proj has no lora_B"),
        (lambda t: t.update({EXPERTS.format("A"): t[EXPERTS.format("A")][:-1]}), "rank", "A is (17,40)"),
        (times(0.0, EXPERTS.format("B")), "dead", "3 of 14 modules do nothing"),
        (lambda t: t.update({EXPERTS.format("B"): t[EXPERTS.format("B")].T}), "rank", "says rank 6"),
    ],
)
def test_planted_defects_of_experts(tmp_path, capsys, change, kind, words):
    out = write(tmp_path, "mixtral", targets=("q", "mlp"))
    assert not found(capsys, out)[0]
    tensors_changed(out, change)
    problems, text, _ = found(capsys, out)
    assert kind in problems and words in text, text


def test_a_config_with_another_alpha(folder, capsys):
    path = folder / "out" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 12}))
    problems, text, _ = found(capsys, folder / "out")
    assert problems == {"alpha", "changed"} and "lora_alpha 12 makes s = 4, but the record says s = 2" in text


@pytest.mark.parametrize("recorded", [True, False])
def test_another_base(folder, capsys, recorded):
    """With a record by its fingerprint; without one by the shapes, if they differ."""
    out = folder / "out"
    if recorded:
        tiny_model("llama", seed=3).save_pretrained(folder / "other")
        words = "not the weights the adapter was trained on"
    else:
        (out / RECORD).unlink()
        tiny_model("llama_mha").save_pretrained(folder / "other")
        words = "has other shapes in 4 modules"
    problems, text, _ = found(capsys, out, base=str(folder / "other"))
    assert problems == {"base"} and words in text
    assert found(capsys, out)[0] == set()


@pytest.mark.parametrize("size", [3, 100, -1])
def test_a_truncated_file(folder, capsys, size):
    path = folder / "out" / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    problems, text, content = found(capsys, folder / "out")
    assert "truncated" in problems and "truncated" in text and content["adapters"][0]["modules"] == []


@pytest.mark.parametrize(
    "family, settings",
    [
        ("llama", {"targets": ("q", "down")}),
        ("gpt2", {"targets": ("q", "v", "o")}),
        ("gpt_neox", {"targets": ("attention",)}),
        ("mixtral", {"targets": ("q", "mlp")}),
        ("gpt_oss", {"targets": ("o", "mlp")}),
    ],
)
def test_the_numbers_are_those_of_the_full_matrices(tmp_path, capsys, family, settings):
    one, other = write(tmp_path, family, **settings), write(tmp_path, family, "other", 2, **settings | {"rank": 2})
    problems, _, content = found(capsys, one, other, intruders=True)
    assert not problems
    deltas = []
    for folder, entry in zip((one, other), content["adapters"], strict=True):
        model = tiny_model(family)
        load_adapter(model, folder)
        layers = lora_layers(model)
        deltas.append({name: layer.delta().double() for name, layer in layers.items()})
        assert [m["name"] for m in entry["modules"]] == sorted(layers)
        for m in entry["modules"]:
            D, W = deltas[-1][m["name"]], layers[m["name"]].base.weight.detach().double()
            W = W.T if family == "gpt2" else W
            S = torch.linalg.svdvals(D)
            p = S / S.sum()
            assert m["norm"] == pytest.approx(D.norm().item(), rel=1e-5)
            assert m["ratio"] == pytest.approx((D.norm() / W.norm()).item(), rel=1e-5)
            assert m["effective_rank"] == pytest.approx(torch.exp(-(p * (p + 1e-30).log()).sum()).item(), rel=1e-4)
            assert m["rank_99"] == 1 + int((S.pow(2).cumsum(0) < 0.99 * S.pow(2).sum()).sum())
            U, after = torch.linalg.svd(W)[0], torch.linalg.svd(W + D)[0][:, :10]
            assert m["intruders"] == int(((U[:, : min(W.shape)].T @ after).abs().amax(0) < 0.5).sum())
    for entry in content["overlap"]:
        a, b = (of[entry["name"]] for of in deltas)
        assert entry["cosine"] == pytest.approx(((a * b).sum() / a.norm() / b.norm()).item(), abs=1e-6)
        for way, X, Y in (("columns", a, b), ("rows", a.T, b.T)):
            X, Y = (torch.linalg.svd(Z)[0][:, : torch.linalg.matrix_rank(Z, rtol=1e-5)] for Z in (X, Y))
            expected = torch.linalg.svdvals(X.T @ Y).square().sum() / min(X.shape[1], Y.shape[1])
            assert entry[way] == pytest.approx(expected.item(), abs=1e-5)


def test_a_base_whose_files_have_other_names(tmp_path, capsys):
    """As the hub's gpt2, without the prefix and the tied head; its names come from transformers."""
    out = write(tmp_path, "gpt2", targets=("q", "o"), modules=("lm_head",))
    before = found(capsys, out, intruders=True)[2]["adapters"][0]["modules"]
    weights = tmp_path / "base/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, weights, {"format": "pt"})
    (out / RECORD).unlink()
    problems, _, content = found(capsys, out, intruders=True)
    assert not problems and content["adapters"][0]["modules"] == before
    assert [m["name"] for m in before][-1] == "lm_head" and all(m["ratio"] > 0 for m in before)


def test_what_the_terminal_and_the_page_show(folder, capsys):
    shutil.copytree(folder / "out", folder / "copy")
    inspect_command([folder / "out", folder / "copy"], html=folder / "page.html")
    shown, page = capsys.readouterr().out, (folder / "page.html").read_text()
    for words in ("no problem found", "by role", "change by layer", "overlap", "1.000"):
        assert words in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if "fingerprint" not in line and str(folder) not in line)
    assert page.count("<table") == 2 * 3 + 1 and "--share: 1.0" in page


def test_a_base_that_is_not_here(folder, capsys):
    out = folder / "out"
    shutil.rmtree(folder / "base")
    problems, text, content = found(capsys, out)
    assert not problems and "is not on this machine" in text and content["adapters"][0]["modules"][0]["ratio"] is None
    path = out / CONFIG
    (out / RECORD).unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 6000}))
    problems, text, _ = found(capsys, out)
    assert not problems and "s is 2000, where 0.5 to 4 is usual" in text
    with pytest.raises(ModelError, match="no such model on this machine"):
        inspect_command([out], base="who/knows")
    with pytest.raises(ModelError, match="no adapter_config.json"):
        inspect_command([folder])


def test_it_imports_no_torch(folder):
    out = folder / "out"
    program = f"""
import sys
sys.argv = ["lora-ft", "inspect", {str(out)!r}]
import lora_ft.cli
try:
    lora_ft.cli.main()
except SystemExit as e:
    assert not e.code
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    assert "no problem found" in python(program)
