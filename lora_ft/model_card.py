"""The README.md beside an adapter: the hub's metadata, what was trained, and how to use it. Names no path of the machine."""

from pathlib import Path

import yaml

from lora_ft.adapter.files import portable_name
from lora_ft.metric_names import title
from lora_ft.names import is_local


def model_card(record: dict) -> str:
    """Markdown with a YAML head, from a record (lora_ft/record.py)."""
    config, base = record["config"], record["base"]["name"]
    name, data, adapter = portable_name(base), config["data"], config["adapter"]
    sources = [s for s in data["train"] if not is_local(s)]
    head = {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-ft", "transformers"],
        **({"datasets": sorted({s.split(":")[0].split("@")[0] for s in sources})} if sources else {}),
    }
    metrics = [(title(k), v) for k, v in record.get("metrics", {}).items() if title(k)]
    table = "".join(f"| {key} | {value:.4f} |\n" for key, value in metrics)
    targets = ", ".join([*adapter["targets"], *adapter["modules"]])
    examples = record["data"]["train"]["examples"]
    return f"""---
{yaml.safe_dump(head, sort_keys=True).strip()}
---

# A LoRA adapter for {name}

Trained with lora-ft on {examples:,} examples from {
        ", ".join(Path(s).name if is_local(s) else s for s in data["train"])
    }:
rank {adapter["rank"]}, alpha {adapter["alpha"]:g} on {targets}, {
        record["trainable_parameters"]:,} trainable parameters,
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

With PEFT, as with any LoRA adapter:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")  # this folder, or its hub id
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With transformers alone: `model = AutoModelForCausalLM.from_pretrained("{name}")`, then `model.load_adapter("FOLDER")`.

With vLLM, where it supports LoRA on this architecture:
`vllm serve {name} --enable-lora --max-lora-rank {served_rank(record)} --lora-modules mine=FOLDER`

Folded into the base, at no cost in inference: `lora-ft merge --adapter FOLDER`
"""


def served_rank(record: dict) -> int:
    """The smallest of vLLM's ranks that holds the file's: parts of a fused projection are stacked."""
    rank = max(entry["rank"] * len(entry["parts"]) for entry in record["slices"].values())
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
