"""A tiny base model with a real tokenizer in a folder, as a user would have it, and a little corpus."""

import json
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.helpers.families import COMMON, FAMILIES, shake

TEXT = "the film is a good bad movie that was great awful and it made me happy sad Review Sentiment positive negative"
SPECIAL = ["<pad>", "<s>", "</s>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words; ids 0, 1, 2 are pad, bos and eos, as in the tiny models."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT, TEXT.replace(" ", ": ")] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_with_record(model, folder: Path, base_name: str, **record) -> None:
    """The adapter of a model in an existing folder, with a run's record."""
    from lora_ft.methods.lora.files import CONFIG, WEIGHTS, save_adapter, write_record

    slices = save_adapter(model, folder, base_name)
    write_record(folder, {"format": 1, "kind": "adapter"} | record | {"slices": slices}, [WEIGHTS, CONFIG])


def write_base(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """A random model of `family`, its vocabulary the tokenizer's, in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    model_type, settings = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **COMMON | settings | {"vocab_size": len(tokenizer)})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    shake(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_reviews(path: Path, n: int = 48) -> Path:
    """Labelled rows: `label` is 1 where the text says good."""
    rows = [
        {"text": f"the film is a {'good' if i % 2 else 'bad'} movie " + "that was it " * (i % 4), "label": i % 2}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CONFIG = """
model: {name: base}
adapter: {rank: 4, alpha: 8}
data:
  train: train.jsonl
  eval: eval.jsonl
  prompt: "Review: {text}\\nSentiment:"
  completion: " {label}"
  label_names: {label: [negative, positive]}
train: {batch_size: 8, num_train_epochs: 2, learning_rate: 3.0e-2, logging_steps: 2, report_to: []}
"""


def write_run(folder: Path, family: str = "llama", config: str = CONFIG) -> Path:
    """A folder with base/, train.jsonl, eval.jsonl and config.yaml, ready to run in."""
    write_base(folder / "base", family)
    write_reviews(folder / "train.jsonl")
    write_reviews(folder / "eval.jsonl", 20)
    (folder / "config.yaml").write_text(config)
    return folder


# What a run leaves in its output; beside these curves.svg, if it logged more than one step.
RUN_FILES = {
    "adapter_model.safetensors",
    "adapter_config.json",
    "README.md",
    "lora_ft.json",
    "log.jsonl",
    "report.html",
}
RUN_FILES |= {"checkpoints", "samples.json"}


def lora_ft(*arguments: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """The command line as a user types it, in a process of its own."""
    command = [sys.executable, "-m", "lora_ft", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def python(program: str, cwd: Path | None = None) -> str:
    """What a Python program prints in a process of its own, where nothing is imported yet; it must end well."""
    result = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout
