"""Combined adapters against PEFT's add_weighted_adapter where that is right, and against the plain formula where it isn't."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lora_ft.commands.inspect.command import inspect_command
from lora_ft.core.errors import ConfigError, FilesError, ModelError
from lora_ft.methods.lora.combine import Part, Settings, combine
from lora_ft.methods.lora.derived import check_same_base, open_part, write_derived
from lora_ft.methods.lora.files import load_adapter
from lora_ft.methods.lora.inject import inject_lora, lora_layers
from tests.helpers.families import tiny_model, token_ids
from tests.helpers.tiny import save_with_record

IDS = token_ids(rows=2, length=9)
A, B = dict(targets=("q", "v"), rank=3, alpha=6.0), dict(targets=("q", "o"), rank=2, alpha=5.0)


def base_model(family: str):
    model = tiny_model("llama" if family == "llama_tied" else family)
    if family == "llama_tied":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def write(folder: Path, family: str, seed: int, settings: dict, **base) -> Path:
    """A random adapter with a record."""
    model = base_model(family)
    inject_lora(model, **settings, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            B.data.normal_(std=0.2, generator=generator)
    folder.mkdir()
    save_with_record(model, folder, "base", base={"name": "base", "revision": None, "fingerprint": "f"} | base)
    return folder


def adapters(tmp_path: Path, family: str, one=A, other=B) -> tuple[Path, Path]:
    return write(tmp_path / "a", family, 1, one), write(tmp_path / "b", family, 2, other)


def made(tmp_path: Path, folders, weights, **settings):
    """The result in tmp_path/out, and what `combine` says of it."""
    parts = [Part(open_part(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    check_same_base([part.adapter for part in parts])
    result = combine(parts, Settings(**settings))
    write_derived(tmp_path / "out", parts, Settings(**settings), result)
    return result


@torch.no_grad()
def ours(family: str, folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits with an adapter, and its update of each module."""
    model = base_model(family)
    load_adapter(model, folder)
    return model(input_ids=IDS).logits, {name: layer.delta() for name, layer in lora_layers(model).items()}


@torch.no_grad()
def pefts(family: str, folders, weights, **settings) -> torch.Tensor:
    """The logits with what PEFT makes of the adapters."""
    model = PeftModel.from_pretrained(base_model(family), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(i))
    model.add_weighted_adapter([str(i) for i in range(len(folders))], list(weights), "made", **settings)
    model.set_adapter("made")
    return model.eval()(input_ids=IDS).logits


def exact_sum(family: str, folders, weights) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in ours(family, folder)[1].items():
            total[module] = total.get(module, 0) + weight * delta
    return total


@pytest.mark.parametrize("family", ["gpt2", "llama_tied", "gpt_neox"])
@pytest.mark.parametrize(
    ("settings", "peft"),
    [
        (dict(how="cat"), dict(combination_type="cat")),
        (dict(how="svd", rank=2), dict(combination_type="svd", svd_rank=2)),
        (dict(how="ties", rank=20, density=0.3), dict(combination_type="ties_svd", svd_rank=20, density=0.3)),
        (dict(how="dare", rank=10, density=1.0), dict(combination_type="svd", svd_rank=10)),
    ],
)
def test_as_peft_makes_it(tmp_path, family, settings, peft):
    """Different ranks, scalings and modules; PEFT also reads what we write."""
    folders, weights = adapters(tmp_path, family), (0.7, 0.3)
    result = made(tmp_path, folders, weights, **settings)
    logits, updates = ours(family, tmp_path / "out")
    torch.testing.assert_close(logits, pefts(family, folders, weights, **peft), atol=1e-4, rtol=0)
    read = PeftModel.from_pretrained(base_model(family), tmp_path / "out").eval()(input_ids=IDS).logits
    torch.testing.assert_close(read, logits, atol=1e-5, rtol=0)
    exact = exact_sum(family, folders, weights)
    for module, error in result.errors.items():
        found = (updates[module] - exact[module]).norm() / exact[module].norm()
        assert error == pytest.approx(found.item(), abs=1e-5), module
    assert (max(result.errors.values()) < 1e-6) == (settings["how"] in ("cat", "dare"))


def test_adapters_of_peft_with_patterns_layers_and_rslora(tmp_path, capsys):
    """Without a record: by the base's name, with the modules of both; `inspect` finds nothing wrong with the result."""
    settings = (
        dict(r=4, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2}, target_modules=["q_proj", "v_proj"]),
        dict(r=3, alpha_pattern={"down_proj": 1}, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    )
    folders = tmp_path / "a", tmp_path / "b"
    for folder, given in zip(folders, settings, strict=True):
        torch.manual_seed(len(given))
        model = tiny_model("llama")
        model.name_or_path = "base"
        model = get_peft_model(model, LoraConfig(lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **given))
        model.save_pretrained(folder)
    result = made(tmp_path, folders, (1.0, -2.0), how="cat")
    logits, updates = ours("llama", tmp_path / "out")
    for module, exact in exact_sum("llama", folders, (1.0, -2.0)).items():
        torch.testing.assert_close(updates.pop(module), exact, atol=1e-5, rtol=0)
    assert not updates and sorted({len(A) for A, _ in result.factors.values()}) == [3, 4, 5]
    read = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "out").eval()(input_ids=IDS).logits
    torch.testing.assert_close(read, logits, atol=1e-5, rtol=0)
    inspect_command([*folders])
    inspect_command([tmp_path / "out"])
    assert capsys.readouterr().out.count("no problem found") == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [dict(how="cat"), dict(how="svd", energy=0.9), dict(how="ties", density=0.5)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_combined_one_by_one_and_peft_reads_the_result(tmp_path, family, settings):
    folders = adapters(tmp_path, family, dict(targets=("q", "down"), rank=3), dict(targets=("q", "mlp"), rank=2))
    result = made(tmp_path, folders, (0.7, 0.3), **settings)
    logits, updates = ours(family, tmp_path / "out")
    exact = exact_sum(family, folders, (0.7, 0.3))
    assert updates.keys() == exact.keys() and any("experts" in module for module in exact)
    for module, error in result.errors.items():
        assert error == pytest.approx(
            ((updates[module] - exact[module]).norm() / exact[module].norm()).item(), abs=1e-5
        )
    assert settings["how"] != "cat" or max(result.errors.values()) == 0.0
    read = PeftModel.from_pretrained(base_model(family), tmp_path / "out").eval()(input_ids=IDS).logits
    torch.testing.assert_close(read, logits, atol=1e-5, rtol=0)


def test_the_plain_formula_where_peft_differs(tmp_path):
    """Half and half of one adapter is that adapter; PEFT's linear makes it twice. A negative weight takes away."""
    a, b = adapters(tmp_path, "llama", A, A)
    (tmp_path / "copy").mkdir()
    for file in a.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    same = (a, tmp_path / "copy")
    result = made(tmp_path, same, (0.5, 0.5), how="linear")
    logits, alone = ours("llama", tmp_path / "out")[0], ours("llama", a)[0]
    assert result.error < 1e-6
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
    assert (pefts("llama", same, (0.5, 0.5), combination_type="linear") - alone).abs().max() > 0.1

    parts = [Part(open_part(folder), weight) for folder, weight in ((a, 1.0), (b, -0.5))]
    exact = exact_sum("llama", (a, b), (1.0, -0.5))
    for how, kept in (("cat", 6), ("svd", 3), ("linear", 3)):
        made_of = combine(parts, Settings(how))
        for module, (A_, B_) in made_of.factors.items():
            U, S, V = torch.linalg.svd(exact[module])
            torch.testing.assert_close(B_ @ A_, U[:, :kept] * S[:kept] @ V[:kept], atol=1e-5, rtol=0)
            rest = (S[kept:].square().sum() / S.square().sum()).sqrt().item()
            assert len(A_) == kept and made_of.errors[module] == pytest.approx(rest, abs=1e-5)


def test_dare_keeps_entries_at_random_and_repeats_itself(tmp_path):
    """The entries are 0 or the exact ones / density; a seed gives the same ones, and the mean of many seeds is exact."""
    a, _ = adapters(tmp_path, "llama")
    part, exact = Part(open_part(a), 1.0), ours("llama", a)[1]
    settings = [Settings("dare", rank=32, density=0.5, seed=seed) for seed in range(60)]
    runs = [{m: B @ A for m, (A, B) in combine([part], of).factors.items()} for of in settings]
    again = combine([part], settings[0]).factors
    for module, update in exact.items():
        first = runs[0][module]
        assert torch.equal(first, again[module][1] @ again[module][0])
        kept = first.abs() > update.abs()
        assert 0.35 < kept.float().mean() < 0.65
        torch.testing.assert_close(first, torch.where(kept, 2 * update, 0.0), atol=1e-5, rtol=0)
        mean = torch.stack([run[module] for run in runs]).mean(0)
        assert (mean - update).norm() / update.norm() < 0.2  # 1 / sqrt(60) = 0.13


def test_compressed_to_the_rank_that_it_has(tmp_path):
    folder = write(tmp_path / "a", "gpt2", 1, dict(targets=("q", "v"), rank=3, alpha=6.0))
    part = Part(open_part(folder), 1.0)
    result = made(tmp_path, [folder], [1.0], how="svd", energy=1.0)
    assert {len(A) for A, _ in result.factors.values()} == {6} and result.error < 1e-6
    torch.testing.assert_close(ours("gpt2", tmp_path / "out")[0], ours("gpt2", folder)[0], atol=1e-5, rtol=0)
    half = combine([part], Settings("svd", energy=0.9))
    assert all(error <= 0.1**0.5 for error in half.errors.values()) and half.error > 0.01
    assert max(len(A) for A, _ in half.factors.values()) < 6


def test_what_is_refused(tmp_path):
    a, b = adapters(tmp_path, "llama")
    with pytest.raises(ConfigError, match="linear needs equal ranks, and they are: .*a 3, .*b 2"):
        made(tmp_path, (a, b), (1, 1), how="linear")
    other = write(tmp_path / "c", "llama", 3, A, fingerprint="g" * 20)
    with pytest.raises(
        ModelError, match=r"a is of base \(fingerprint f\); .*c is of base \(fingerprint gggggggggggg\)"
    ):
        made(tmp_path, (a, other), (1, 1), how="cat")
    nameless = write(tmp_path / "d", "llama", 4, A, name="elsewhere", fingerprint=None)
    with pytest.raises(ModelError, match="d is of elsewhere.*write its name into adapter_config.json"):
        made(tmp_path, (a, nameless), (1, 1), how="cat")
    wide = write(tmp_path / "e", "llama_mha", 5, A)
    with pytest.raises(ModelError, match=r"e: model.layers.0.self_attn.q_proj is \(32, 32\) here and \(48, 32\)"):
        made(tmp_path, (a, wide), (1, 1), how="cat")
    lengths = write(tmp_path / "f", "llama", 5, A | {"dora": True})
    with pytest.raises(ModelError, match="f: uses DoRA, which plain A and B can't say.*Merge it"):
        open_part(lengths)
    tensors = load_file(wide / "adapter_model.safetensors") | {"base_model.model.lm_head.weight": torch.ones(2, 2)}
    save_file(tensors, wide / "adapter_model.safetensors")
    (wide / "lora_ft.json").unlink()
    with pytest.raises(
        ModelError, match="has more than A and B.*: base_model.model.lm_head.weight. If these are copies"
    ):
        open_part(wide)
    made(tmp_path, (a, b), (1, 1), how="cat")
    with pytest.raises(FilesError, match="out: exists already"):
        made(tmp_path, (a, b), (1, 1), how="cat")
