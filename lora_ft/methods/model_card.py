"""The README.md beside an adapter: the hub's metadata, what was trained, and how to use it. Names no path of the machine."""

import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from lora_ft.core.metrics import format_metric, metric_of, scalars
from lora_ft.core.names import is_local, portable_name

TITLES = {
    "lora": "A LoRA adapter for",
    "full": "A fine-tuned",
    "bottleneck": "Bottleneck adapters for",
    "prompt": "A tuned prompt for",
}
LIBRARY = {"lora": "peft", "prompt": "peft", "full": "transformers"}
HUB_METRIC = {"accuracy": "accuracy", "macro_f1": "f1", "perplexity": "perplexity"}  # ours -> the Hub's name


def model_card(record: dict) -> str:
    """Markdown with a YAML head, from a record (lora_ft/record.py)."""
    base = portable_name(record["base"]["name"])
    local = "" if is_hub(record) else "a local copy of "
    sources = ", ".join(Path(s).name if is_local(s) else s for s in record["config"]["data"]["train"])
    return f"""---
{head(record).to_yaml()}
---

# {TITLES[method_of(record)]} {code(base)}

Trained with lora-ft on {record["data"]["train"]["examples"]:,} examples from {code(sources)}, on {local}{code(base)}:
{what_it_is(record)}, {record["trainable_parameters"]:,} trainable parameters, seed {record["seed"]}, step {
        record["step"]
    }.
{
        ""
        if is_hub(record)
        else '''
The base has no name on the Hub here. Before you publish this, add it to the head of this page: `base_model: OWNER/NAME`.
'''
    }{scores(record)}
## Use

`ADAPTER` is this folder, or its id on the Hub. {use(record)}"""


def use(record: dict) -> str:
    """How to use what was trained, with other libraries where they read it."""
    match method_of(record):
        case "full":
            return 'With transformers, as any model: `AutoModelForCausalLM.from_pretrained("ADAPTER")`.\n'
        case "bottleneck":
            return "With lora-ft: `lora-ft eval ADAPTER`. No other library reads this format.\n"
    peft = f"""With PEFT:

```python
{peft_snippet(record, "ADAPTER")}
```
"""
    if method_of(record) == "prompt":
        return peft
    return f"""{peft}
With transformers alone (which wants peft installed):

```python
{transformers_snippet(record, "ADAPTER")}
```

{vllm_text(record)}

Folded into the base, at no cost in inference: `lora-ft merge --adapter ADAPTER`
"""


def head(record: dict) -> ModelCardData:
    """The Hub's metadata. A base or data of this machine has no name there, so it gets none; scores go with their data."""
    data, base = record["config"]["data"], record["base"]["name"]
    hub_id = {
        s: s.split("@")[0].split(":")[0] for s in _sources(data, "train") + _sources(data, "eval") if not is_local(s)
    }
    trained_on = sorted({hub_id[s] for s in _sources(data, "train") if s in hub_id})
    scored_on = [hub_id.get(s) for s in _sources(data, "eval")]
    metrics = {HUB_METRIC[k]: v for k, v in record.get("metrics", {}).items() if k in HUB_METRIC}
    results = [
        EvalResult("text-generation", scored_on[0], scored_on[0], name, round(value, 6))
        for name, value in metrics.items()
        if len(scored_on) == 1 and scored_on[0]
    ]
    return ModelCardData(
        base_model=base if is_hub(record) else None,
        library_name=LIBRARY.get(method_of(record), "lora-ft"),
        pipeline_tag="text-generation",
        tags=[method_of(record), "lora-ft", "transformers"],
        datasets=trained_on or None,
        metrics=sorted(metrics) or None,
        model_name="adapter" if results else None,
        eval_results=results or None,
    )


def _sources(data: dict, which: str) -> list[str]:
    """The names of the sources of train, or of all eval sets; what is held out of the training data comes from there."""
    found: list[str] = []
    for source in data["eval"].values() if isinstance(data[which], dict) else [data[which]]:
        source = data["train"] if isinstance(source, int | float) else source
        found += [source] if isinstance(source, str) else source or []
    return found


def scores(record: dict) -> str:
    """A table of the adapter's scores, beside the base's where they were taken."""
    base, rows = scalars(record.get("base_metrics", {})), []
    for key, value in scalars(record.get("metrics", {})).items():
        before = format_metric(key, base[key]) if key in base else ""
        rows.append(f"| {metric_of(key).title} | {before} | {format_metric(key, value)} |\n")
    return f"\n| on the eval data | base | adapter |\n|---|---|---|\n{''.join(rows)}" if rows else ""


def method_of(record: dict) -> str:
    return record["config"]["adapter"].get("method", "lora")


def what_it_is(record: dict) -> str:
    """The method and its main settings, in words."""
    adapter = record["config"]["adapter"]
    match method_of(record):
        case "lora":
            targets = ", ".join([*adapter["targets"], *adapter["modules"]])
            return f"LoRA of rank {adapter['rank']}, alpha {adapter['alpha']:g} on {targets}"
        case "bottleneck":
            return f"bottleneck adapters of size {adapter['bottleneck_size']}, placement {adapter['placement']}"
        case "prompt":
            return f"{adapter['virtual_tokens']} virtual tokens"
        case _:
            return "every weight"


def is_hub(record: dict) -> bool:
    """Whether the base came from the hub: then, and only then, it has a revision."""
    return bool(record["base"].get("revision"))


def code(text: str) -> str:
    """Text of a user's as Markdown shows it: on one line, and no markup."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


# ---- snippets: each is run by a test ----


def peft_snippet(record: dict, adapter: str) -> str:
    """Python that loads base and adapter with PEFT and answers a prompt of the kind that was trained on."""
    return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{_loading(record)}
model = PeftModel.from_pretrained(model, {adapter!r})
{_asking(record)}"""


def transformers_snippet(record: dict, adapter: str) -> str:
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

{_loading(record)}
model.load_adapter({adapter!r})
{_asking(record)}"""


def vllm_text(record: dict) -> str:
    base = record["base"]
    if base["name"].endswith(".gguf"):
        return "vLLM serves the merged model: `lora-ft merge --adapter ADAPTER`, then `vllm serve ADAPTER-merged`."
    name = shlex.quote(" ".join(portable_name(base["name"]).split()))
    pinned = f" --revision {base['revision']}" if is_hub(record) else ""
    return f"""With vLLM, where it supports LoRA on this architecture:

```
vllm serve {name}{pinned} --enable-lora --max-lora-rank {served_rank(record)} --lora-modules mine=ADAPTER
```"""


def _loading(record: dict) -> str:
    name, revision = portable_name(record["base"]["name"]), record["base"].get("revision")
    if name.endswith(".gguf"):
        file = Path(name)
        where, options = str(file.parent), f"gguf_file={file.name!r}"
        comment = "  # the folder of the .gguf file"
    else:
        where, options = name, f"revision={revision!r}" if revision else ""
        comment = "" if revision else "  # the base, where it is on your machine"
    arguments = f"base, {options}" if options else "base"
    return f"""base = {where!r}{comment}
tokenizer = AutoTokenizer.from_pretrained({arguments})
model = AutoModelForCausalLM.from_pretrained({arguments})"""


def _asking(record: dict) -> str:
    data = record["config"]["data"]
    if data["messages"]:
        own = data["chat_template"]
        template = f"tokenizer.chat_template = open({Path(own).name!r}).read()  # the run's own\n" if own else ""
        inputs = f"""{template}messages = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
    else:
        braces = "  # with texts in the place of what is in braces" if data["prompt"] else ""
        inputs = f'inputs = tokenizer({data["prompt"] or "Once upon a time"!r}, return_tensors="pt"){braces}'
    return f"""{inputs}
answer = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def served_rank(record: dict) -> int:
    """The smallest of vLLM's ranks that holds the file's: parts of a fused projection are stacked."""
    return vllm_rank(max(entry["rank"] * len(entry["parts"]) for entry in record["slices"].values()))


def vllm_rank(rank: int) -> int:
    """The smallest of the ranks that vLLM's --max-lora-rank takes and that holds `rank`."""
    return next((r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank), rank)
