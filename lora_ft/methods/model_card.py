"""Model cards, the README.md beside trained or exported files: metadata for the Hub and how to use them. Imports no torch.

A card has no path of the user's machine, and no names of data files.
"""

from huggingface_hub import EvalResult, ModelCardData

from lora_ft.core.messages import escape_controls
from lora_ft.core.metrics import format_metric, metric_of, scalars
from lora_ft.core.names import is_local, portable_name
from lora_ft.methods.usage import is_hub, method_of, use

CARD = "README.md"

TITLES = {
    "lora": "A LoRA adapter for",
    "full": "A fine-tuned",
    "bottleneck": "Bottleneck adapters for",
    "prompt": "A tuned prompt for",
}
LIBRARY = {"lora": "peft", "prompt": "peft", "full": "transformers"}
HUB_METRIC = {"accuracy": "accuracy", "macro_f1": "f1", "perplexity": "perplexity"}  # lora-ft's name -> the Hub's
UNNAMED_BASE = """
The base has no name on the Hub here. Before you publish this, add it to the head of this page: `base_model: OWNER/NAME`.
"""

EXPORTS = {  # kind of export -> the Hub's library, the relation to the base in the Hub's words, how to use it
    "peft": ("peft", "adapter", "A LoRA adapter: `PeftModel.from_pretrained(base, REPO)`."),
    "merged": ("transformers", "finetune", "A LoRA adapter merged into its base: an ordinary transformers model."),
    "lora.gguf": (
        "gguf",
        "adapter",
        "A LoRA adapter for llama.cpp: `llama-cli -m BASE.gguf --lora {file}`, with a GGUF of the base.",
    ),
    "merged.gguf": ("gguf", "finetune", "A LoRA adapter merged into its base, for llama.cpp: `llama-cli -m {file}`."),
    "model.gguf": ("gguf", None, "A model for llama.cpp: `llama-cli -m {file}`."),
}


def export_card(kind: str, base_name: str, file: str) -> str:
    """The card of an export that has none, as Markdown with a YAML head. kind: a key of EXPORTS. file: or folder, its name."""
    (library, relation, usage), on_hub = EXPORTS[kind], not is_local(base_name)
    data = ModelCardData(
        base_model=base_name if on_hub else None,
        base_model_relation=relation if on_hub else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["lora", "lora-ft"],
    )
    usage = usage.format(file=code(file).strip("`"))
    return f"---\n{data.to_yaml()}\n---\n\n# {code(file)}\n\n{usage}\n\nBase: {code(base_name)}\n"


def model_card(record: dict) -> str:
    """The card of what was trained, from its record (`RunSetup.record`), as Markdown with a YAML head."""
    base, step = code(portable_name(record["base"]["name"])), record["step"]
    local, unnamed = ("", "") if is_hub(record) else ("a local copy of ", UNNAMED_BASE)
    form = f" in {quantization}" if (quantization := record["base"].get("quantization")) else ""
    named = [code(s) for s in record["config"]["data"]["train"] if not is_local(s)]
    sources = ", ".join(named) or "local files"
    return f"""---
{head(record).to_yaml()}
---

# {TITLES[method_of(record)]} {base}

Trained with lora-ft on {record["data"]["train"]["examples"]:,} examples from {sources}, on {local}{base}{form}:
{what_it_is(record)}, {record["trainable_parameters"]:,} trainable parameters, seed {record["seed"]}, step {step}.
{unnamed}{scores(record)}
## Use

`ADAPTER` is this folder, or its id on the Hub. {use(record)}"""


def head(record: dict) -> ModelCardData:
    """The Hub's metadata. Local bases and data are left out, and scores on local data with them."""
    data, base = record["config"]["data"], record["base"]["name"]
    train, evaluation = _sources(data, "train"), _sources(data, "eval")
    hub_id = {s: s.split("@")[0].split(":")[0] for s in train + evaluation if not is_local(s)}
    trained_on = sorted({hub_id[s] for s in train if s in hub_id})
    scored_on = hub_id.get(evaluation[0]) if len(evaluation) == 1 else None
    metrics = {HUB_METRIC[k]: v for k, v in record.get("metrics", {}).items() if k in HUB_METRIC}
    results = []
    if scored_on:
        results = [EvalResult("text-generation", scored_on, scored_on, k, round(v, 6)) for k, v in metrics.items()]
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
    """The sources of "train" or of all "eval" sets; data held out of the training data has the sources of "train"."""
    sources: list[str] = []
    for source in data["eval"].values() if isinstance(data[which], dict) else [data[which]]:
        source = data["train"] if isinstance(source, int | float) else source
        sources += [source] if isinstance(source, str) else source or []
    return sources


def scores(record: dict) -> str:
    """A table of the adapter's scores, and of the base's where it was evaluated."""
    base, rows = scalars(record.get("base_metrics", {})), []
    for key, value in scalars(record.get("metrics", {})).items():
        before = format_metric(key, base[key]) if key in base else ""
        rows.append(f"| {metric_of(key).title} | {before} | {format_metric(key, value)} |\n")
    return f"\n| on the eval data | base | adapter |\n|---|---|---|\n{''.join(rows)}" if rows else ""


def what_it_is(record: dict) -> str:
    """The method and its main settings, in words."""
    adapter = record["config"]["adapter"]
    match method_of(record):
        case "lora":
            targets = ", ".join(map(str, [*adapter["targets"], *adapter["modules"]]))
            patterns = {"rank": adapter.get("rank_pattern"), "alpha": adapter.get("alpha_pattern")}
            others = "".join(
                f", {what} {v:g} on {word}" for what, of in patterns.items() for word, v in (of or {}).items()
            )
            return f"LoRA of rank {adapter['rank']}, alpha {adapter['alpha']:g} on {targets}{others}"
        case "bottleneck":
            return f"bottleneck adapters of size {adapter['bottleneck_size']}, placement {adapter['placement']}"
        case "prompt":
            return f"{adapter['virtual_tokens']} virtual tokens"
        case _:
            return "every weight"


def code(text: str) -> str:
    """A user's text as inline code: on one line, without any effect as markup."""
    return "`" + " ".join(escape_controls(text).replace("`", "'").split()) + "`"
