"""The merged folder is base + adapter, loads without lora_ft, and a wrong or half-made one never appears."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_ft.commands.merge import merge_command
from lora_ft.core import storage
from lora_ft.core.errors import ConfigError, FilesError, ModelError
from lora_ft.methods.lora import files, merge, merge_shards, stored_names, verify
from lora_ft.methods.lora.inject import inject_lora, lora_layers
from lora_ft.methods.lora.peft import AdapterFile, read_adapter
from lora_ft.methods.trained import Trained
from lora_ft.model.files import Base, resolve
from lora_ft.model.load import load_base
from lora_ft.nn.dora import DoRALinear
from lora_ft.nn.lora import LoRALinear
from lora_ft.nn.quantized import QuantizedLinear
from tests.helpers.families import FAMILIES, tiny_model, token_ids
from tests.helpers.tiny import save_with_record

IDS = token_ids(rows=2, length=11)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def write_base(model, folder, **how) -> Base:
    model.save_pretrained(folder, **how)
    return resolve(str(folder))


def write_adapter(model, folder, base=None, scale=0.3, **settings) -> Path:
    """Random adapters on `model`, in place, saved with a record."""
    inject_lora(model, **({"targets": ("q", "v"), "rank": 3, "alpha": 7.0, "seed": 0} | settings))
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        for B in layer.lora_B.values():
            B.data.normal_(std=scale, generator=generator)
        for length in layer.magnitude.values() if isinstance(layer, DoRALinear) else ():
            length.data.mul_(1 + scale * torch.randn(length.shape, generator=generator).to(length))
    folder.mkdir()
    about = {"name": base.name, "revision": None, "fingerprint": base.fingerprint} if base else {}
    save_with_record(model, folder, "base", base=about, seed=5)
    return folder


def read(folder: Path) -> AdapterFile:
    return read_adapter(Trained.open(folder))


def merge_folder(base: Base, folder: Path, output: Path, **settings) -> dict:
    return merge.merge_adapter(base, read(folder), output, **settings)


def case(tmp_path, family="llama", dtype=torch.float32, model=None, how=None, **settings):
    """A base on disk, an adapter on disk, and the adapted model in memory."""
    model = (model or tiny_model(family)).to(dtype)
    base = write_base(model, tmp_path / "base", **(how or {}))
    adapter = write_adapter(model, tmp_path / "adapter", base, **settings)
    return base, adapter, model


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


DENSE = [f for f in FAMILIES if f not in ("gemma3",)]


@pytest.mark.parametrize("family", DENSE)
def test_every_family_merges_to_what_it_computed(tmp_path, family):
    base, adapter, model = case(tmp_path, family, targets=("attention",))
    report = merge_folder(base, adapter, tmp_path / "out", verify=False)
    assert report["modules"] == len(lora_layers(model)) and not report["untied"]
    merged = plain(tmp_path / "out")
    assert torch.allclose(logits(merged), logits(model), atol=2e-5)
    assert (logits(merged) - logits(tiny_model(family))).abs().max() > 1e-3
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[k], after[k]) for k in before) == report["modules"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "qwen2_moe", "phimoe"])
def test_experts_are_merged_where_the_files_have_them(tmp_path, family):
    base, adapter, model = case(tmp_path, family, targets=("all",), rank_pattern={"down": 2})
    report = merge_folder(base, adapter, tmp_path / "out")
    assert report["modules"] == len(lora_layers(model)) and report["logits"]["adapter_effect"] > 1
    assert torch.allclose(logits(plain(tmp_path / "out")), logits(model), atol=2e-5)
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}


@pytest.mark.parametrize(
    "family, dtype", [("gpt2", torch.float32), ("gpt_neox", torch.float32), ("llama", torch.bfloat16)]
)
@pytest.mark.parametrize("form", [None, "int8"])
def test_lengths_of_dora_are_merged_and_proved(tmp_path, family, dtype, form):
    base, adapter, _ = case(tmp_path, family, dtype=dtype, targets=("v", "up"), dora=True)
    report = merge_folder(base, adapter, tmp_path / "out", form=form)
    assert report["logits"]["adapter_effect"] > 100 * report["logits"]["difference"]
    again = load_base(base, "float32", quantization=form)
    files.load_adapter(again, adapter)
    assert torch.allclose(
        logits(plain(tmp_path / "out").float()), logits(again), atol=2e-5 if dtype == torch.float32 else 0.05
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gpt_neo", "opt"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_head_is_untied(tmp_path, capsys, family, tied):
    model = tiny_model(family)
    if tied != model.config.tie_word_embeddings:
        config = model.config
        config.tie_word_embeddings = tied
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    base, adapter, model = case(tmp_path, model=model, modules=("lm_head",))
    assert (model.get_input_embeddings().weight is lora_layers(model)["lm_head"].base.weight) == tied
    report = merge_folder(base, adapter, tmp_path / "out")
    assert report["untied"] == tied and ("head" in capsys.readouterr().err) == tied
    merged = plain(tmp_path / "out")
    assert torch.allclose(logits(merged), logits(model), atol=2e-5)
    assert torch.equal(merged.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not merged.config.tie_word_embeddings
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    before, after = load_file(tmp_path / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert len(after) == len(before) + tied


@pytest.mark.parametrize("family, form, dtype", [("gpt2", "nf4", torch.float32), ("llama", "int8", torch.bfloat16)])
def test_onto_the_quantized_weights_it_was_trained_on(tmp_path, capsys, monkeypatch, family, form, dtype):
    base, adapter, _ = case(tmp_path, family, dtype, targets=("q", "v"))
    trained = load_base(base, "float32", quantization=form)
    files.load_adapter(trained, adapter)
    record = json.loads((adapter / files.RECORD).read_text())
    (adapter / files.RECORD).write_text(json.dumps(record | {"base": record["base"] | {"quantization": form}}))

    merge_command(adapter, onto="quantized", output=tmp_path / "a")
    made = load_file(tmp_path / "a/model.safetensors")
    for path, layer in [*trained.named_modules()]:
        if isinstance(layer, LoRALinear) or (isinstance(layer, QuantizedLinear) and not path.endswith(".base")):
            wanted = layer.weight + (layer.delta() if isinstance(layer, LoRALinear) else 0)
            ours = made[f"{path}.weight"].T if family == "gpt2" else made[f"{path}.weight"]
            torch.testing.assert_close(ours, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    report = json.loads((tmp_path / "a/lora_ft.json").read_text())["merge"]
    assert report["onto"] == form and report["verified"] == ["matrices", "logits"]
    assert (
        report["logits"]["difference"] <= (1e-4 if dtype == torch.float32 else 0.02) * report["logits"]["largest_logit"]
    )

    merge_command(adapter, onto="original", output=tmp_path / "b")
    other = load_file(tmp_path / "b/model.safetensors")
    unchanged = [name for name, tensor in load_file(tmp_path / "base/model.safetensors").items()]
    assert sum(not torch.equal(other[n], made[n]) for n in unchanged) > len(lora_layers(trained))
    said = capsys.readouterr()
    assert (
        f"merged {adapter} into {base.name} in {form}" in said.out and "another function than was trained" in said.err
    )

    merge_command(adapter)  # nothing to compare by
    assert load_file(f"{adapter}-merged/model.safetensors").keys() == made.keys()
    assert f"no eval data at hand to compare by (the run has none): merged onto the {form}" in capsys.readouterr().err


def test_onto_quantized_needs_a_base_that_was(tmp_path):
    _, adapter, _ = case(tmp_path)
    with pytest.raises(ConfigError, match="was trained on a base that was not quantized"):
        merge_command(adapter, onto="quantized")


def test_a_tied_head_stored_under_its_own_name_alone(tmp_path):
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    base, adapter, model = case(tmp_path, model=model, modules=("lm_head",))
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    save_file({k.replace("model.embed_tokens", "lm_head"): v for k, v in tensors.items()}, path, {"format": "pt"})
    merge_folder(base, adapter, tmp_path / "out", other_base=True)
    assert torch.allclose(logits(plain(tmp_path / "out")), logits(model), atol=2e-5)


def test_the_hubs_gpt2_has_names_without_prefix_and_buffers(tmp_path):
    base, adapter, model = case(tmp_path, "gpt2", modules=("attn.c_proj", "lm_head"))
    path = tmp_path / "base/model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path, {"format": "pt"})
    merge_folder(base, adapter, tmp_path / "out", other_base=True)
    after = load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == tensors.keys() | {"h.0.attn.bias", "lm_head.weight"}
    assert torch.allclose(logits(plain(tmp_path / "out")), logits(model), atol=2e-5)


def test_shards_index_and_other_files_are_kept(tmp_path):
    base, adapter, model = case(
        tmp_path, "gpt2", how={"max_shard_size": "20KB"}, targets=("all",), modules=("lm_head",)
    )
    folder = tmp_path / "base"
    for name in ("merges.txt", "vocab.txt", "extra.model", "chat_template.jinja", "LICENSE", "modeling_own.py"):
        (folder / name).write_text("{}")
    for name in ("pytorch_model.bin", "model.onnx", "tf_model.h5", "extra.gguf", "README.md"):
        (folder / name).write_text("x")
    (folder / "lora_ft.json").write_text("{}")
    before = os.umask(0o027)
    merge_folder(base, adapter, tmp_path / "out", verify=False)
    os.umask(before)
    kept = {p.name for p in folder.iterdir() if p.suffix == ".safetensors"}
    assert len(kept) > 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == kept | {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "lora_ft.json",
        "merges.txt",
        "vocab.txt",
        "extra.model",
        "chat_template.jinja",
        "LICENSE",
    }
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}
    old = json.loads((folder / "model.safetensors.index.json").read_text())
    new = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert new["weight_map"].keys() == old["weight_map"].keys() | {"lm_head.weight"}
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + 100 * 32 * 4
    assert all(new["weight_map"][k] == v for k, v in old["weight_map"].items())
    assert torch.allclose(logits(plain(tmp_path / "out")), logits(model), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_kept_and_rounded_to_once(tmp_path, dtype):
    base, adapter, model = case(tmp_path, "gpt2", dtype)
    report = merge_folder(base, adapter, tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    assert {t.dtype for t in after.values()} == {dtype}
    for name, layer in lora_layers(model).items():  # an independent sum in float64, rounded once
        exact = layer.base.weight.double() + layer.delta().double().T
        off = (after[f"{name}.weight"].double() - exact).abs()
        assert (off <= exact.abs() * torch.finfo(dtype).eps * 0.5001 + 1e-7).all()
    proof = report["logits"]
    assert 0 < proof["rounding"] <= proof["tolerance"] and proof["beyond_rounding"] <= proof["rounding"] / 16


def test_the_result_needs_no_lora_ft(tmp_path):
    base, adapter, model = case(tmp_path, "gpt_neox")
    merge_folder(base, adapter, tmp_path / "out")
    torch.save(logits(model), tmp_path / "expected")
    program = """if True:
        import sys, torch
        sys.modules["lora_ft"] = None
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
        ids = torch.tensor(eval(sys.argv[3]))
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, torch.load(sys.argv[2]), atol=2e-5)
    """
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out", tmp_path / "expected", str(IDS.tolist())], check=True
    )


def test_the_record_says_what_was_merged_and_proved(tmp_path):
    base, adapter, _ = case(tmp_path)
    for name, proved in (("a", True), ("b", False)):
        merge_folder(base, adapter, tmp_path / name, verify=proved)
        record = json.loads((tmp_path / name / "lora_ft.json").read_text())
        assert (record["kind"], record["seed"], record["other_base"]) == ("merged", 5, False)
        assert record["base"]["fingerprint"] == base.fingerprint
        assert record["merge"]["verified"] == ["matrices", "logits"][: 1 + proved]
        assert (record["merge"]["logits"] is not None) == proved
        assert set(record["merge"]["matrix_errors"]) == set(read(adapter).tensors)
        assert "model.safetensors" in record["files"] and "config.json" in record["files"]
        storage.verify_manifest(tmp_path / name, record["files"], ModelError)
    with pytest.raises(ModelError, match="a merged model"):
        read(tmp_path / "a")


# ---- the command ----


def test_the_command_finds_base_and_output(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case(Path("."))
    merge_command(Path("adapter"))
    out = capsys.readouterr().out
    assert "adapter-merged" in out and "4 matrices, stored as float32" in out and "logits" in out
    assert (tmp_path / "adapter-merged/model.safetensors").is_file()
    with pytest.raises(FilesError, match="adapter-merged: exists already"):
        merge_command(Path("adapter"))
    merge_command(Path("adapter"), output=Path("else/where"), verify=False)
    assert "--no-verify" in capsys.readouterr().out and Path("else/where/config.json").is_file()


def test_an_adapter_that_names_no_base(tmp_path):
    base, adapter, _ = case(tmp_path)
    (adapter / files.RECORD).unlink()
    config = json.loads((adapter / files.CONFIG).read_text())
    (adapter / files.CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="--base"):
        merge_command(adapter)
    merge_command(adapter, base=str(tmp_path / "base"))


def test_another_base_is_refused_or_insisted_on(tmp_path, capsys):
    base, adapter, _ = case(tmp_path)
    other = write_base(tiny_model("llama", seed=1), tmp_path / "other")
    with pytest.raises(ModelError, match=other.fingerprint[:12]) as caught:
        merge_folder(other, adapter, tmp_path / "out")
    assert base.fingerprint[:12] in str(caught.value) and "--other-base" in str(caught.value)
    assert not (tmp_path / "out").exists()
    merge_folder(other, adapter, tmp_path / "out", other_base=True)
    assert "warning" in capsys.readouterr().err
    record = json.loads((tmp_path / "out/lora_ft.json").read_text())
    assert record["other_base"] is True and record["base"]["fingerprint"] == other.fingerprint


def test_pefts_adapter_with_a_head_merges(tmp_path):
    import peft

    base = write_base(tiny_model("gpt2"), tmp_path / "base")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        tiny_model("gpt2"), peft.LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    assert read(tmp_path / "adapter").copies  # PEFT adds the head's base weight
    merge_folder(base, tmp_path / "adapter", tmp_path / "out")
    assert torch.allclose(logits(plain(tmp_path / "out")), logits(theirs), atol=2e-5)
    other = write_base(tiny_model("gpt2", seed=1), tmp_path / "other")
    with pytest.raises(ModelError, match="lm_head.weight that differs"):
        merge_folder(other, tmp_path / "adapter", tmp_path / "out2")


# ---- what must fail ----


def nothing_left(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_matrix_fails_the_first_proof(tmp_path, monkeypatch, dtype):
    base, adapter, _ = case(tmp_path, dtype=dtype)
    right = torch.addmm

    def wrong(W, B, A, alpha):
        result = right(W, B, A, alpha=alpha)
        result[5, 3] += 0.05
        return result

    monkeypatch.setattr(merge_shards.torch, "addmm", wrong)
    with pytest.raises(ModelError, match="failed its verification: model.layers.0.self_attn.q_proj on random x"):
        merge_folder(base, adapter, tmp_path / "out", verify=False)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_left_out_fails_the_second_proof(tmp_path, monkeypatch, dtype):
    base, adapter, _ = case(tmp_path, dtype=dtype)
    right = merge_shards.merged

    def wrong(W, edit, adapter, shard, dtype):
        new, error = right(W, edit, adapter, shard, dtype)
        return (W.clone() if edit.module == "model.layers.1.self_attn.v_proj" else new), error

    monkeypatch.setattr(merge_shards, "merged", wrong)
    with pytest.raises(
        ModelError, match=r"failed its verification: logits differ by .* in sample row \d+, position \d+"
    ):
        merge_folder(base, adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_features", [1, 7, 300])
def test_the_matrix_bound_holds_and_bites(dtype, in_features):
    generator = torch.Generator().manual_seed(in_features)
    x = verify.random_signs(in_features)
    for scale in (1e-7, 1e-3, 1.0, 30.0):
        W = (torch.randn(40, in_features, generator=generator) * scale).to(dtype)
        A = torch.randn(5, in_features, generator=generator)
        B = torch.randn(40, 5, generator=generator) * scale
        merged = (W.float() + 0.7 * (B @ A)).to(dtype)
        error, quotient = verify.matrix_error(W, merged, A, B, 0.7, x)
        assert 0 <= quotient <= 1
        # one element wrong by 2% of what its row adds up to (half precision: and some of its smallest steps), and a NaN
        merged[3, 0] += 0.02 * (W[3].float().abs().sum() + (B[3] @ A).abs().sum()) + in_features * 1e-6
        assert verify.matrix_error(W, merged, A, B, 0.7, x)[1] > 1
        merged[3, 0] = torch.nan
        assert verify.matrix_error(W, merged, A, B, 0.7, x)[1] > 1


def test_nan_in_the_base_is_named(tmp_path):
    base, adapter, _ = case(tmp_path)
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model.safetensors: model.norm.weight contains NaN"):
        merge_folder(base, adapter, tmp_path / "out", other_base=True)
    assert nothing_left(tmp_path)


def test_overflow_of_the_stored_dtype(tmp_path):
    base, adapter, _ = case(tmp_path, dtype=torch.float16, scale=1e5)
    with pytest.raises(ModelError, match="too large for torch.float16"):
        merge_folder(base, adapter, tmp_path / "out")


def test_a_truncated_base(tmp_path):
    base, adapter, _ = case(tmp_path)
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="model.safetensors"):
        merge_folder(base, adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_quantized_bases(tmp_path):
    base, adapter, _ = case(tmp_path)
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{key} is torch.float8_e4m3fn"):
        merge_folder(base, adapter, tmp_path / "out", other_base=True)
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="can't be merged into quantized weights"):
        merge_folder(base, adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


def test_an_adapter_of_another_architecture(tmp_path):
    base, _, _ = case(tmp_path)
    shutil.rmtree(tmp_path / "adapter")
    write_adapter(tiny_model("gpt2"), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"unexpected: transformer.h.0.attn.c_attn.*another model's adapter"):
        merge_folder(base, tmp_path / "adapter", tmp_path / "out")
    assert nothing_left(tmp_path)


def test_weights_that_are_part_of_another_tensor_on_disk():
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="no separate tensor for model.layers.0.mlp.up_proj.weight"):
        stored_names.plan_edits(model, {}, [], ["model.layers.0.mlp.up_proj"])


def test_no_space(tmp_path, monkeypatch):
    base, adapter, _ = case(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(FilesError, match=r"\d+ bytes needed, 0 free"):
        merge_folder(base, adapter, tmp_path / "out")
    assert nothing_left(tmp_path)


def killed_at(stage: int, base: Base, adapter: Path, output: Path) -> int:
    """Merge in a child process that dies by SIGKILL before its `stage`-th fsync or rename; how the child ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = stage

    def deadly(function):
        def call(*args):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    try:
        os.fsync, Path.rename, Path.replace = deadly(os.fsync), deadly(Path.rename), deadly(Path.replace)
        merge_folder(base, adapter, output, verify=False)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_every_stage(tmp_path):
    """No folder of that name, or a complete one; and the next merge clears away what was left."""
    base, adapter, _ = case(tmp_path)
    output, died_without, died_with = tmp_path / "out", 0, 0
    for stage in range(100):
        ended = killed_at(stage, base, adapter, output)
        if output.exists():
            record = json.loads((output / files.RECORD).read_text())
            storage.verify_manifest(output, record["files"], ModelError)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]
            shutil.rmtree(output)
            died_with += ended == -signal.SIGKILL
        else:
            assert ended == -signal.SIGKILL
            assert sum(p.name.startswith(".out.partial-") for p in tmp_path.iterdir()) == 1
            died_without += 1
        if ended == 0:
            break
    assert ended == 0 and died_without >= 10 and died_with == 1  # the last fsync is the parent folder's


def test_a_tokenizer_that_changed_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lora_ft.model.load import load_tokenizer, tokenizer_hash

    base, adapter, _ = case(tmp_path)
    words = {"[UNK]": 0, "The": 1, "capital": 2}

    def write(vocabulary):
        raw = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(tmp_path / "base")

    write(words)
    record = json.loads((adapter / files.RECORD).read_text())
    storage.write_json(adapter / files.RECORD, record | {"tokenizer": tokenizer_hash(load_tokenizer(base))})
    merge_folder(base, adapter, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    write(words | {"of": 3})
    with pytest.raises(ModelError, match="tokenizer"):
        merge_folder(base, adapter, tmp_path / "out2")


def test_a_gguf_base_becomes_a_float32_folder(tmp_path, monkeypatch):
    """The .gguf reader is transformers' own; here it is stood in for by a folder, to keep the test in milliseconds."""
    base, adapter, model = case(tmp_path)
    gguf = Base("base.gguf", tmp_path / "base", gguf=tmp_path / "base/config.json")
    from lora_ft.model import load as lora_model

    monkeypatch.setattr(lora_model, "load_model_config", lambda *_: model.config)
    monkeypatch.setattr(merge, "load_base", lambda b, *_: load_base(base, "float32"))
    monkeypatch.setattr(merge, "tokenizer_of", lambda *_: None)
    merge_folder(gguf, adapter, tmp_path / "out", other_base=True)
    assert not (tmp_path / "out/.base").exists()
    assert torch.allclose(logits(plain(tmp_path / "out")), logits(model), atol=2e-5)


@pytest.mark.parametrize("samples", [5, True, "x", {"a": [1]}, [[1, 10**9], [True], "x", 3]])
def test_samples_of_other_types_are_replaced(samples):
    assert [len(row) for row in verify.sample_rows({"samples": samples}, None, 10)] == [24]
