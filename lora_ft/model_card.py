"""The README.md beside an adapter: the hub's metadata, what was trained, and how to use it. Names no path of the machine."""

from pathlib import Path

import yaml

from lora_ft.adapter.files import portable_name
from lora_ft.names import is_local

TITLES = {
    "lora": "A LoRA adapter for",
    "full": "A fine-tuned",
    "bottleneck": "Bottleneck adapters for",
    "prompt": "A tuned prompt for",
    "bias": "Tuned biases for",
}
TITLE = {"loss": "loss", "perplexity": "perplexity", "accuracy": "accuracy", "macro_f1": "macro-F1"}


def model_card(record: dict) -> str:
    """Markdown with a YAML head, from a record (lora_ft/record.py)."""
    config, base = record["config"], record["base"]["name"]
    name, data, adapter = portable_name(base), config["data"], config["adapter"]
    sources = [s for s in data["train"] if not is_local(s)]
    method = adapter.get("method", "lora")
    head = {
        "base_model": name,
        "library_name": {"lora": "peft", "prompt": "peft", "full": "transformers"}.get(method, "lora-ft"),
        "pipeline_tag": "text-generation",
        "tags": [method, "lora-ft", "transformers"],
        **({"datasets": sorted({s.split(":")[0].split("@")[0] for s in sources})} if sources else {}),
    }
    metrics = [(TITLE[k], v) for k, v in record.get("metrics", {}).items() if k in TITLE]
    table = "".join(f"| {key} | {value:.4f} |\n" for key, value in metrics)
    examples = record["data"]["train"]["examples"]
    return f"""---
{yaml.safe_dump(head, sort_keys=True).strip()}
---

# {TITLES[method]} {name}

Trained with lora-ft on {examples:,} examples from {
        ", ".join(Path(s).name if is_local(s) else s for s in data["train"])
    }:
{settings(adapter)}{record["trainable_parameters"]:,} trainable parameters,
seed {record["seed"]}, step {record["step"]}.
{
        f'''
| on the eval data | |
|---|---|
{table}'''
        if table
        else ""
    }
## Use

{use(method, name, record)}"""


def settings(adapter: dict) -> str:
    """The method's main settings, in words."""
    match adapter.get("method", "lora"):
        case "lora":
            targets = ", ".join([*adapter["targets"], *adapter["modules"]])
            return f"rank {adapter['rank']}, alpha {adapter['alpha']:g} on {targets}, "
        case "bottleneck":
            return f"size {adapter['bottleneck_size']}, placement {adapter['placement']}, "
        case "prompt":
            return f"{adapter['virtual_tokens']} virtual tokens, "
        case _:
            return ""


def use(method: str, name: str, record: dict) -> str:
    """How to use what was trained, with lora-ft and without."""
    peft = f"""With PEFT, as with any {"LoRA adapter" if method == "lora" else "prompt"}:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")  # this folder, or its hub id
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""
    if method == "prompt":
        return peft
    if method == "full":
        return 'With transformers, as any model: `AutoModelForCausalLM.from_pretrained("FOLDER")`.\n'
    if method == "bottleneck":
        return "With lora-ft: `lora-ft eval FOLDER`. No other library reads this format.\n"
    if method == "bias":
        return "Folded into the base, for any library: `lora-ft merge --adapter FOLDER`.\n"
    return f"""{peft}
With transformers alone: `model = AutoModelForCausalLM.from_pretrained("{name}")`, then `model.load_adapter("FOLDER")`.

With vLLM, where it supports LoRA on this architecture:
`vllm serve {name} --enable-lora --max-lora-rank {served_rank(record)} --lora-modules mine=FOLDER`

Folded into the base, at no cost in inference: `lora-ft merge --adapter FOLDER`
"""


def served_rank(record: dict) -> int:
    """The smallest of vLLM's ranks that holds the file's: parts of a fused projection are stacked."""
    rank = max(entry["rank"] * len(entry["parts"]) for entry in record["slices"].values())
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
