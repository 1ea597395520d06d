"""Answers of base and adapter for the report: of every method that keeps its base, and within the model's positions."""

import pytest
import torch
from transformers import GenerationConfig

from lora_ft.config.load import load_config
from lora_ft.config.schema import AdapterConfig
from lora_ft.data.prepare import prepare_eval_sets
from lora_ft.evaluation.samples import generate_samples
from lora_ft.methods.interface import METHODS, virtual_ids
from lora_ft.methods.lora.inject import trainable
from lora_ft.model.files import resolve
from lora_ft.model.generate import generate, to_text
from lora_ft.model.load import load_base, load_tokenizer
from tests.helpers.tiny import write_run


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(base, tokenizer, eval examples) of a run on plain completions."""
    folder = write_run(tmp_path_factory.mktemp("run"), "gpt2")
    changes = [f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl", "data.label_names=null"]
    base = resolve(str(folder / "base"))
    tokenizer = load_tokenizer(base)
    config = load_config(folder / "config.yaml", changes)
    return base, tokenizer, prepare_eval_sets(config.data, tokenizer, 0)[""]


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prompt"])
def test_answers_are_those_of_the_bare_base_and_of_the_adapted_model(parts, method):
    base, tokenizer, examples = parts
    model, plain = load_base(base), load_base(base)
    METHODS[method].inject(model, AdapterConfig(method=method), 0, tokenizer)
    torch.manual_seed(0)
    for parameter in trainable(model).values():
        parameter.data = torch.randn_like(parameter)
    samples = generate_samples(model, tokenizer, examples, 60)
    assert len(samples) == 4
    for sample in samples:
        ids = tokenizer(sample["prompt"])["input_ids"]
        config = GenerationConfig(max_new_tokens=16, do_sample=False)
        for name, (of, prompt) in {"base": (plain, ids), "adapter": (model, virtual_ids(model) + ids)}.items():
            (answer,) = generate(of, [prompt], config, {tokenizer.eos_token_id})
            assert sample[name] == to_text(tokenizer, answer.ids)
    assert any(sample["base"] != sample["adapter"] for sample in samples)


def test_an_answer_ends_at_the_last_position_of_the_model(parts):
    base, tokenizer, examples = parts
    model = load_base(base)
    longest = max(map(len, examples.dataset["input_ids"]))
    model.config.n_positions = longest  # as with data.max_length at the model's limit
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:longest]
    assert len(generate_samples(model, tokenizer, examples, 60)) == 4
