"""The card's head is the Hub's, its words are nobody's markup, and its snippets run as they stand."""

import copy
import json
import os
import re

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from lora_ft.commands.train import train
from lora_ft.config.load import load_config
from lora_ft.methods.lora.files import load_adapter
from lora_ft.methods.model_card import model_card
from lora_ft.methods.usage import peft_snippet
from lora_ft.model.files import resolve
from lora_ft.model.load import load_base
from tests.helpers.tiny import tiny_tokenizer, write_run

CHAT = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"


def trained(folder, *changes):
    """The record of a short run in `folder`, made from inside of it."""
    here = os.getcwd()
    os.chdir(folder)
    try:
        train(load_config("config.yaml", ["train.max_steps=2", "train.learning_rate=0.1", *changes]))
    finally:
        os.chdir(here)
    return json.loads((folder / "out/lora_ft.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("card"))
    trained(folder)
    return folder


def snippets(folder) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (folder / "out/README.md").read_text(), re.DOTALL)
    return [code.replace("ADAPTER", str(folder / "out")) for code in found]


def executed(code: str, folder, monkeypatch) -> dict:
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(code, "snippet", "exec"), names)
    return names


def as_ours(names: dict, folder, base: str) -> None:
    """The snippet's model computes what base + adapter compute here."""
    ours = load_base(resolve(base))
    ids = torch.tensor([[5, 14, 15, 92, 65]])
    with torch.no_grad():
        bare = ours(ids).logits
        load_adapter(ours, folder / "out")
        wanted, found = ours(ids).logits, names["model"](ids).logits
    assert torch.allclose(found.float(), wanted.float(), atol=1e-4)
    assert not torch.allclose(bare, wanted, atol=1e-3)


@pytest.mark.parametrize("which", [0, 1], ids=["peft", "transformers"])
def test_its_snippets_run_and_give_the_adapter(folder, monkeypatch, capsys, which):
    as_ours(executed(snippets(folder)[which], folder, monkeypatch), folder, "base")
    assert capsys.readouterr().out.strip()


def test_so_does_the_reports(folder, monkeypatch):
    record = json.loads((folder / "out/lora_ft.json").read_text())
    as_ours(executed(peft_snippet(record, str(folder / "out")), folder, monkeypatch), folder, "base")


def test_for_chats_they_use_the_template(tmp_path, monkeypatch):
    folder = write_run(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"is it {i}"}, {"role": "assistant", "content": "good"}]}
        for i in range(9)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.jinja").write_text(CHAT)
    changes = ["data.prompt=null", "data.completion=null", "data.label_names=null", "data.messages=messages"]
    trained(folder, *changes, "data.chat_template=own.jinja", "data.eval=2")
    names = executed(snippets(folder)[0], folder, monkeypatch)
    assert names["tokenizer"].decode(names["inputs"]["input_ids"][0]) == "<s>...</s>"


def write_gguf(path) -> None:
    """A random Llama of one layer in llama.cpp's own format."""
    tokenizer, draw = tiny_tokenizer(), np.random.default_rng(0)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(backend["vocab"], key=backend["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(words))])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd.weight": (len(words), 32),
        "output.weight": (len(words), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.normal(size=shape).astype(np.float32) * 0.3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_for_a_gguf_base_too(tmp_path, monkeypatch):
    folder = write_run(tmp_path)
    (folder / "bases").mkdir()
    write_gguf(folder / "bases/tiny.gguf")
    trained(folder, "model.name=bases/tiny.gguf")
    for snippet in snippets(folder):
        names = executed(snippet, folder, monkeypatch)
        as_ours(names, folder, "bases/tiny.gguf")
    card = (folder / "out/README.md").read_text()
    assert "vllm serve ADAPTER-merged" in card and "base_model" not in ModelCard(card).data.to_dict()


def test_a_local_base_and_local_data_have_no_name_on_the_hub(folder):
    text = (folder / "out/README.md").read_text()
    head = ModelCard(text).data.to_dict()
    assert "base_model" not in head and "datasets" not in head and "model-index" not in head
    assert head["library_name"] == "peft" and head["pipeline_tag"] == "text-generation" and "lora" in head["tags"]
    assert head["metrics"] == ["accuracy", "f1", "perplexity"]
    assert "base_model: OWNER/NAME" in text and str(folder) not in text


@pytest.fixture
def hub(folder):
    """A record as of a run on the Hub's model and data."""
    record = copy.deepcopy(json.loads((folder / "out/lora_ft.json").read_text()))
    record["base"] |= {"name": "openai-community/gpt2", "revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e"}
    record["config"]["data"] |= {"train": ["nyu-mll/glue:sst2@train"], "eval": ["nyu-mll/glue:sst2@validation"]}
    return record


def test_the_hubs_names_and_scores(hub):
    text = model_card(hub)
    data = ModelCard(text).data
    assert data.base_model == "openai-community/gpt2" and data.datasets == ["nyu-mll/glue"]
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    assert scores == {
        "accuracy": pytest.approx(hub["metrics"]["accuracy"], abs=1e-6),
        "f1": pytest.approx(hub["metrics"]["macro_f1"], abs=1e-6),
        "perplexity": pytest.approx(hub["metrics"]["perplexity"], abs=1e-6),
    }
    assert {result.dataset_type for result in data.eval_results} == {"nyu-mll/glue"}
    assert text.count("revision='607a30d783dfa663caf39e06633721c8d4cfcd7e'") == 4
    assert "vllm serve openai-community/gpt2 --revision 607a30d" in text


def test_no_path_of_the_machine_and_no_markup_of_a_users(hub):
    hub["base"] |= {"name": "/home/me/secret/base`\n# Title", "revision": None}
    hub["config"]["data"] |= {"train": ["/home/me/secret/rows.jsonl"], "prompt": "```\n# {x}\n```"}
    text = model_card(hub)
    assert "/home/me" not in text and "rows.jsonl" not in text and "from local files" in text
    assert len(re.findall("^```", text, re.MULTILINE)) == 6 and "\n# Title" not in text
