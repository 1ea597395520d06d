"""The benchmark's workloads and models, and the lora-ft config of each pair."""

import argparse
import csv
import json
import math
from pathlib import Path

from lora_ft.config.load import parse_config
from lora_ft.config.schema import Config

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
# model -> modules for (q and v, all). PEFT cannot adapt only q and v within GPT-2's c_attn, so all rows adapt all of it.
MODULES = {
    "smollm2": (["q_proj", "v_proj"], LLAMA),
    "gpt2": (["attn.c_attn"], GPT2),
    "llama1b": (["q_proj", "v_proj"], LLAMA),
    "llama8b": (["q_proj", "v_proj"], LLAMA),
    "qwen7b": (["q_proj", "v_proj"], LLAMA),
}
# The real shapes of Llama 3.2 1B, Llama 3.1 8B and Qwen 2.5 7B
WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {
    "llama1b": dict(zip(WIDTHS, (2048, 8192, 16, 32, 8), strict=True), vocab_size=128_256, tie_word_embeddings=True),
    "llama8b": dict(zip(WIDTHS, (4096, 14336, 32, 32, 8), strict=True), vocab_size=128_256),
    "qwen7b": dict(zip(WIDTHS, (3584, 18944, 28, 28, 4), strict=True), vocab_size=152_064),
}
MODELS = tuple(MODULES)
WORKLOADS = {
    "sst2": dict(batch=16, rank=8, every=False),
    "e2e_qv": dict(batch=8, rank=4, every=False),
    "e2e_all": dict(batch=8, rank=16, every=True),
    "text": dict(batch=4, rank=16, every=True, length=512),
    "text1024": dict(batch=8, rank=16, every=True, length=1024),
}


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the options for the paths of the model and the data."""
    parser.add_argument("--smollm2", type=Path, default="models/smollm2-135m-instruct")
    parser.add_argument("--sst2", type=Path, default="../shared/data/sst2/train.tsv", help="GLUE's train.tsv")
    parser.add_argument("--e2e", type=Path, default="../shared/data/e2e/train.txt", help="lines INPUT||OUTPUT")


def config_of(workload: str, model: str, folder: Path, examples: int) -> Config:
    """The config that trains on `examples` rows of the data that `write_data` wrote to `folder`."""
    w = WORKLOADS[workload]
    data: dict = {"train": str(folder / f"{workload}.jsonl"), "max_train_examples": examples}
    if workload == "sst2":
        data |= {"prompt": "Review: {sentence}\nSentiment:", "completion": " {label}", "max_length": 128}
        data |= {"label_names": {"label": ["negative", "positive"]}}
    elif "length" in w:
        data |= {"text": "{text}", "max_length": w["length"]}
    else:
        data |= {"prompt": "{input}\n", "completion": "{output}", "max_length": 256}
    adapter = {"rank": w["rank"], "alpha": 2 * w["rank"], "targets": [], "modules": MODULES[model][w["every"]]}
    train = {"batch_size": w["batch"], "learning_rate": 2e-4}
    return parse_config({"model": {"name": str(folder / model)}, "adapter": adapter, "data": data, "train": train})


def write_data(workload: str, sst2: Path, e2e: Path, folder: Path) -> None:
    """Write the workload's rows to FOLDER/WORKLOAD.jsonl."""
    if workload == "sst2":
        with sst2.open(newline="") as file:
            rows = [
                r | {"label": int(r["label"])} for r in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            ]
    else:
        lines = e2e.read_text().splitlines()
        rows = [dict(zip(("input", "output"), line.split("||"), strict=True)) for line in lines]
        if length := WORKLOADS[workload].get("length"):  # enough lines for a row to have more tokens than that
            n = math.ceil(length / 30)
            rows = [{"text": "\n".join(lines[i : i + n])} for i in range(0, len(lines) - n, n)]
    (folder / f"{workload}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(model: str, smollm2: Path, folder: Path) -> None:
    """Create FOLDER/MODEL: SmolLM2, or another architecture's real shape with random weights and SmolLM2's tokenizer."""
    if model == "smollm2":
        (folder / model).symlink_to(smollm2.absolute())
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

    torch.manual_seed(0)
    if model == "gpt2":  # without dropout, so that losses are comparable
        config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    else:
        config = (Qwen2Config if model.startswith("qwen") else LlamaConfig)(**SHAPES[model])
    dtype = torch.float32 if model == "gpt2" else torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / model)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder / model)
