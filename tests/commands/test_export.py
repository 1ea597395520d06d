"""The portable subset is the same adapter to PEFT, whatever patterns it had; and a push is exactly what was exported."""

import json
import re
import types
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_ft.commands.export import hub
from lora_ft.commands.export.command import export_command
from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods.lora.files import save_adapter
from lora_ft.methods.lora.inject import inject_lora
from tests.helpers.tiny import write_base

IDS = torch.arange(3, 63).reshape(2, 30)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def loaded(base, adapter):
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def write_peft(folder, base, **settings):
    """A random adapter of PEFT's."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


CASES = {
    "plain": dict(target_modules=["v_proj", "q_proj"]),
    "rslora": dict(target_modules=["q_proj"], use_rslora=True),
    "patterns": dict(
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 11},
    ),
    "some layers": dict(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
    "a regex": dict(target_modules=r".*\.0\..*(k_proj|gate_proj)"),
    "all": dict(target_modules="all-linear", exclude_modules=["down_proj"]),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_same_function_without_patterns(tmp_path, capsys, name):
    base = write_base(tmp_path / "base")
    model = write_peft(tmp_path / "theirs", base, **CASES[name])
    export_command(tmp_path / "theirs", "peft")
    folder = tmp_path / "theirs-peft"
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert config["r"] == config["lora_alpha"] == 4
    assert {t.shape[0 if ".lora_A." in k else 1] for k, t in tensors.items()} == {4}
    assert config["target_modules"] == sorted(config["target_modules"])
    assert not {k for k in config if "pattern" in k or "layers" in k or k == "use_rslora"}
    again = loaded(base, folder)
    assert {n for n, _ in again.named_modules() if n.endswith("lora_A.default")} == {
        n for n, _ in model.named_modules() if n.endswith("lora_A.default")
    }
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert (logits(again) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    printed = capsys.readouterr().out
    assert all(runtime in printed for runtime in ("PEFT", "transformers", "vLLM", "llama.cpp"))
    assert re.search(rf"vllm serve {re.escape(str(base))} --enable-lora --max-lora-rank \d+ --lora-modules", printed)


def test_gpt2_keeps_its_orientation(tmp_path):
    base = write_base(tmp_path / "base", "gpt2")
    model = write_peft(tmp_path / "theirs", base, target_modules=["c_attn"], fan_in_fan_out=True)
    export_command(tmp_path / "theirs", "peft", output=tmp_path / "x")
    assert torch.allclose(logits(loaded(base, tmp_path / "x")), logits(model), atol=1e-5)


def test_nothing_of_the_machine_is_in_it(tmp_path):
    base = write_base(tmp_path / "base")
    write_peft(tmp_path / "theirs", base, target_modules=["q_proj"])
    (tmp_path / "theirs/log.jsonl").write_text("{}\n")
    export_command(tmp_path / "theirs", "peft")
    files = sorted((tmp_path / "theirs-peft").iterdir())
    assert [p.name for p in files] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not [p.name for p in files if str(tmp_path).encode() in p.read_bytes()]


class FakeHub:
    """The two calls of HfApi that a push makes."""

    def __init__(self, error=None):
        self.error, self.made, self.files = error, [], {}

    def create_repo(self, repo, private, exist_ok):
        if self.error:
            raise self.error
        self.made.append((repo, private, exist_ok))
        return f"https://huggingface.co/{repo}"

    def create_commit(self, repo, operations, commit_message):
        assert repo == self.made[-1][0] and commit_message
        self.files = {o.path_in_repo: o.path_or_fileobj for o in operations}


@pytest.fixture
def fake(monkeypatch):
    def install(error=None):
        api = FakeHub(error)
        monkeypatch.setattr(hub, "HfApi", lambda: api)
        monkeypatch.setattr(hub, "get_token", lambda: "hf_x")
        monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
        return api

    return install


@pytest.fixture
def adapter(tmp_path):
    write_peft(tmp_path / "theirs", write_base(tmp_path / "base"), target_modules=["q_proj"])
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "to, options, names",
    [
        ("peft", {}, {"adapter_config.json", "adapter_model.safetensors"}),
        ("gguf", {}, {"theirs-lora.gguf"}),
        ("gguf", {"merged": True, "verify": False}, {"theirs-merged.gguf"}),
        ("merged", {"verify": False}, {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}),
    ],
)
def test_a_push_is_what_was_exported_and_a_card(tmp_path, capsys, fake, adapter, to, options, names):
    api = fake()
    export_command(adapter, to, push="me/mine", **options)
    assert api.made == [("me/mine", True, True)]  # private
    assert {"README.md", *names} <= api.files.keys() <= {"README.md", *names, "tokenizer_config.json"}
    card = api.files["README.md"]
    text = card.decode() if isinstance(card, bytes) else Path(card).read_text()
    assert text.startswith("---\n") and str(tmp_path) not in text
    assert "pushed to https://huggingface.co/me/mine" in capsys.readouterr().out
    assert "lora_ft.json" not in api.files


def test_a_pushed_model_has_no_path_of_this_machine(tmp_path, fake, adapter):
    api = fake()
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: str(tmp_path / "base")}))
    export_command(adapter, "merged", push="me/mine", verify=False)
    contents = [f if isinstance(f, bytes) else Path(f).read_bytes() for f in api.files.values()]
    assert len(contents) >= 5 and not any(str(tmp_path).encode() in content for content in contents)


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_a_record_and_links_cannot_put_another_file_into_an_export(tmp_path, adapter, to):
    (tmp_path / "secret").write_text("SECRET")
    data = {"messages": "messages", "chat_template": str(tmp_path / "secret")}
    (adapter / "lora_ft.json").write_text(json.dumps({"format": 1, "kind": "adapter", "config": {"data": data}}))
    export_command(adapter, to, verify=False, output=tmp_path / "first")
    assert not any(b"SECRET" in p.read_bytes() for p in (tmp_path / "first").iterdir())
    (adapter / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="chat_template.jinja: a link out of its folder"):
        export_command(adapter, to, verify=False, output=tmp_path / "second")
    (adapter / "chat_template.jinja").unlink()
    (adapter / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="chat_template.jinja: can't be read"):
        export_command(adapter, to, verify=False, output=tmp_path / "second")
    (adapter / "chat_template.jinja").unlink()
    (tmp_path / "base/passwd.json").symlink_to(tmp_path / "secret")
    if to == "merged":
        with pytest.raises(ModelError, match="passwd.json: a link out of its folder"):
            export_command(adapter, to, verify=False, output=tmp_path / "third")
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()


def test_public_only_when_asked(fake, adapter):
    api = fake()
    export_command(adapter, "peft", push="me/mine", public=True)
    assert api.made == [("me/mine", False, True)]


def test_no_push_without_being_asked(fake, adapter):
    api = fake()
    export_command(adapter, "peft")
    assert not api.made and not api.files


def test_a_push_that_cannot_work_is_told_before_any_work(fake, adapter, monkeypatch, tmp_path):
    fake()
    for name in ("a/b/c", "mine"):
        with pytest.raises(ConfigError, match="owner/name"):
            export_command(adapter, "peft", push=name)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ModelError, match="hf auth login"):
        export_command(adapter, "peft", push="me/mine")
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        export_command(adapter, "peft", push="me/mine")
    assert not (tmp_path / "theirs-peft").exists()


def http_error(status):
    return HfHubHTTPError(f"{status} no", response=types.SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    "error, said",
    [
        (http_error(403), "write access"),
        (http_error(500), "refused the upload"),
        (ConnectionError("no route"), "reached"),
    ],
)
def test_a_hub_that_fails_is_told_kindly(fake, adapter, tmp_path, error, said):
    fake(error)
    with pytest.raises(ModelError, match=said):
        export_command(adapter, "peft", push="me/mine")
    assert (tmp_path / "theirs-peft").is_dir()


def test_peft_finds_a_local_base_and_an_export_does_not_show_its_folder(tmp_path):
    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    inject_lora(model, rank=2)
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", str(base))
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(found.eval()), logits(model.eval()))
    export_command(tmp_path / "ours", "peft", output=tmp_path / "exported", base=str(base))
    assert str(tmp_path) not in (tmp_path / "exported/adapter_config.json").read_text()


@pytest.mark.parametrize("to", ["peft", "gguf"])
def test_dora_is_refused_with_the_way_out(tmp_path, to):
    base = write_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    inject_lora(model, rank=2, dora=True)
    (tmp_path / "ours").mkdir()
    save_adapter(model, tmp_path / "ours", str(base))
    with pytest.raises(ModelError, match="ours: uses DoRA, .*Merge it"):
        export_command(tmp_path / "ours", to, output=tmp_path / "x", base=str(base))


@pytest.mark.parametrize("to", ["peft", "gguf"])
@pytest.mark.parametrize(
    "config, word", [({"peft_type": "PROMPT_TUNING"}, "PEFT loads the folder"), ({"method": "bottleneck"}, "eval")]
)
def test_other_methods_are_refused_with_the_way_out(tmp_path, to, config, word):
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"only LoRA is exported. .*{word}"):
        export_command(tmp_path, to, output=tmp_path / "x")
