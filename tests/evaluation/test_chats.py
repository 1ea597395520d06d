"""Chats learned by heart: eval, the report's samples and `generate` write what was learned, and stop."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_ft.commands.evaluate import evaluate_command
from lora_ft.commands.generate.command import generate_command
from lora_ft.commands.merge import merge_command
from lora_ft.commands.train import train
from lora_ft.config.load import load_config, parse_config
from lora_ft.evaluation import texts
from lora_ft.evaluation.references import EvalPrompts
from lora_ft.model.generate import Generated
from tests.helpers.families import COMMON, shake, tiny_model
from tests.helpers.tiny import tiny_tokenizer

TEMPLATES = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
WORDS = ("film", "movie", "good", "bad")


def turns(word: str, answer: dict) -> dict:
    return {"messages": [{"role": "user", "content": word}, {"role": "assistant", **answer}]}


def reasoning(word: str, n: int) -> dict:
    return {"content": WORDS[n - 1], "reasoning_content": f"some {word}"}


def call(word: str, n: int) -> dict:
    function = {"name": "find", "arguments": {"word": WORDS[n - 1]}}
    return {"content": "", "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    "name, answer, learned",
    [
        ("qwen3", reasoning, "<think>\nsome film\n</think>\n\nbad"),
        ("gptoss", reasoning, "<|channel|>analysis<|message|>some film<|end|><|start|>assistant<|channel|>final<|message|>bad"),
        ("qwen2_5", call, '<tool_call>\n{"name": "find", "arguments": {"word": "bad"}}\n</tool_call>'),
    ],
)  # fmt: skip
def test_what_was_learned_is_written_everywhere(tmp_path, monkeypatch, capsys, name, answer, learned):
    monkeypatch.chdir(tmp_path)
    template = (TEMPLATES / f"{name}.jinja").read_text()
    markers = sorted(set(re.findall(r"<\|[a-z_]+\|>|</?(?:think|tool_call)>", template)))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(m, special="|" in m, normalized=False) for m in markers])
    tokenizer.save_pretrained("base")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON | sizes))
    shake(model)
    model.save_pretrained("base")
    (tmp_path / "run.jinja").write_text(template)
    rows = [turns(word, answer(word, n)) for n, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name": "base"},
        "adapter": {"rank": 32, "alpha": 64, "targets": "all", "modules": ["lm_head"]},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "messages": "messages", "chat_template": "run.jinja"},
        "train": {"max_steps": 200, "batch_size": 4, "learning_rate": 0.01, "evaluate_base": False, "eval_steps": 0.99},
        "generation": {"metrics": ["exact_match"], "max_new_tokens": 60},
        "output": "out",
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    train(load_config(Path("run.yaml")))
    (tmp_path / "run.jinja").unlink()  # the run's copy is used from here on
    capsys.readouterr()

    evaluate_command([Path("out")], as_json=True)
    assert json.loads(capsys.readouterr().out)["adapter"]["exact_match"] == 1.0
    samples = json.loads(Path("out/samples.json").read_text())
    assert samples["samples"][0]["adapter"] == learned == samples["samples"][0]["reference"]
    assert "adapter" not in samples["samples"][0]["cut"]
    generate_command([Path("out")], prompts="rows.jsonl", as_json=True, greedy=True)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["answer"] == learned

    merge_command(Path("out"), output=Path("merged"))
    assert AutoTokenizer.from_pretrained("merged").chat_template == template


def test_reasoning_left_out_of_the_loss_is_left_out_of_the_score(monkeypatch):
    """With data.reasoning: drop the answer is compared; what the model thought before it was not learned."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    said = tokenizer("<think>\nsome film\n</think>\n\nbad").input_ids
    monkeypatch.setattr(texts, "generate_in_batches", lambda *_, **__: [Generated(said, True)])
    prompts, model = EvalPrompts(["film"], [[5]], [["bad"]], 0), tiny_model("llama")
    for reasoning, expected in {"drop": "bad", "keep": "<think>\nsome film\n</think>\n\nbad"}.items():
        data = {"train": "a.jsonl", "messages": "messages", "reasoning": reasoning}
        config = parse_config({"model": {"name": "m"}, "data": data, "generation": {"metrics": ["exact_match"]}})
        assert texts.generate_texts(model, tokenizer, prompts, config) == [expected]
