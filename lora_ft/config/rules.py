"""The errors of a config in words: what the schema refuses, and the rules between settings."""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from pydantic import ValidationError

from lora_ft.config.json_schema import accepted, alternatives, choices, entry_at
from lora_ft.config.schema import (
    CHAT_SETTINGS,
    SECTIONS,
    Config,
    DataConfig,
    GenerationConfig,
    TrainerConfig,
    eval_sets,
    methods_of,
)
from lora_ft.config.training_arguments import OWN_SETTING, REFUSED, scheduler_problem
from lora_ft.core.messages import format_value
from lora_ft.core.metrics import SELECTION_METRICS, TEXT_METRICS, add_set_name, selection_metric
from lora_ft.core.names import nearest, template_columns

Place = tuple[str, ...]  # ("data", "eval")
Broken = tuple[str, str, str]  # a broken rule: (setting, the settings involved separated by spaces, message)

FORMS = ("prompt", "completion", "text", "messages")
ONE_FORM = "set one of prompt and completion, text, or messages"
FOR_EVALUATIONS = (
    *("train.early_stopping_patience", "train.predict_with_generate", "data.max_eval_examples"),
    *("trainer.eval_on_start", "trainer.eval_delay"),
)
NEEDS_EVAL = "needs data.eval: a data source, or a fraction (0.05) or number (500) of rows of data.train to hold out"
MAPPINGS = (
    *(("trainer", "lr_scheduler_kwargs"), ("data", "label_names"), ("data", "eval")),
    *(("data", "chat_template_kwargs"), ("data", "roles"), ("data", "format")),
    *(("adapter", "rank_pattern"), ("adapter", "alpha_pattern")),
)
SYNONYMS = {"fp16": "float16", "half": "float16", "fp32": "float32", "bf16": "bfloat16"}  # spelled too differently
EXAMPLES = {
    "model": "{name: gpt2}",
    "adapter": "{rank: 8}",
    "data": "{train: reviews.jsonl}",
    "train": "{learning_rate: 1e-4}",
    "generation": "{metrics: [bleu]}",
    "trainer": "{bf16: true}",
}


def schema_errors(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str, Place | None]]:
    """What the schema refuses: (path, message, for an unknown name the setting that was probably meant)."""
    try:
        Config.model_validate(data)
        return
    except ValidationError as e:  # misspelled before missing names
        errors = sorted(e.errors(include_url=False), key=lambda error: error["type"] != "extra_forbidden")
    meant = set()
    for error in errors:
        path = error["loc"]
        if error["type"] == "extra_forbidden":
            message, place = unknown(tuple(map(str, path)))
            meant.add(place)
            yield path, message, place
        elif error["type"] != "missing":
            yield path, _message(path, error), None
        elif path not in meant:
            yield path, f"missing ({entry_at(path)['description']})", None


def unknown(path: Place) -> tuple[str, Place | None]:
    """(message for a name that is not a setting, the setting that was probably meant)."""
    if len(path) == 3 and path[:2] in MAPPINGS:
        return f"set the whole mapping, as in --set '{'.'.join(path[:2])}={{{path[2]}: ...}}'", None
    section, name = path[:-1], path[-1]
    if section == ("trainer",):
        return _why_refused(name), None
    siblings = SECTIONS[section[0]].model_fields if section and section[0] in SECTIONS else Config.model_fields
    places: dict[str, Place] = {n: tuple(own.split(".")) for n, own in OWN_SETTING.items()}
    places |= {n: (s, n) for s, model in reversed(SECTIONS.items()) for n in model.model_fields}  # the first wins
    if name not in places and (near := nearest(name, siblings)):
        return f"no such setting; did you mean {near}?", (*section, near)
    if near := name if name in places else nearest(name, places):
        return f"no such setting here; did you mean {'.'.join(places[near])}?", places[near]
    return f"no such setting; available are {', '.join(siblings)}", None


def _why_refused(field: str) -> str:
    """Why `trainer` does not accept a field that is not one of TrainerConfig, and what to use instead."""
    if field in OWN_SETTING:
        return f"set {OWN_SETTING[field]} instead"
    if field in REFUSED:
        return f"cannot be set: {REFUSED[field]}"
    near = nearest(field, [*TrainerConfig.model_fields, *OWN_SETTING, *REFUSED])
    return "not a field of TrainingArguments; " + (f"did you mean {near}?" if near else "remove it")


def _message(path: tuple[str | int, ...], error: Any) -> str:
    if error["type"] == "value_error":  # a message of lora_ft.config.types
        return str(error["ctx"]["error"])
    value = error["input"]
    if len(path) == 1 and path[0] in SECTIONS:
        example = f"{path[0]}: {EXAMPLES[str(path[0])]}"
        return f"{format_value(value)} is not a section; put its settings under it, as in {example}"
    if error["type"] == "too_short":
        return f"is empty ({entry_at(path)['description']})"
    entry, hint = entry_at(path), ""
    kinds = [kind.get("items", kind) for kind in alternatives(entry)]
    takes_text = any(kind.get("type") == "string" and "enum" not in kind for kind in kinds)
    if value is None:
        hint = "; remove it to use the default"
    elif takes_text and isinstance(value, Mapping):
        hint = '; a text that starts with a brace needs quotes: "{column}"'
    elif takes_text and not isinstance(value, list | tuple):
        hint = "; put text in quotes"
    elif isinstance(value, str) and (near := nearest(SYNONYMS.get(value, value), choices(entry))):
        hint = f"; did you mean {near}?"
    return f"expected {accepted(entry)}, got {format_value(value)}{hint}"


def broken_rules(config: Config) -> Iterator[Broken]:
    """The rules between settings that a config breaks."""
    yield from _data_rules(config)
    yield from _adapter_rules(config)
    yield from _eval_rules(config)
    yield from _generation_rules(config)
    kwargs = config.trainer.lr_scheduler_kwargs
    if problem := scheduler_problem(config.train.lr_scheduler_type, kwargs or {}):
        schedule, arguments = "train.lr_scheduler_type", "trainer.lr_scheduler_kwargs"
        at, hint = (arguments, "") if kwargs else (schedule, f", in {arguments}")
        yield at, f"{schedule} {arguments}", problem + hint


def _data_rules(config: Config) -> Iterator[Broken]:
    """Exactly one form of text, and settings that belong to another form."""
    data = config.data
    forms = [form for form in FORMS if getattr(data, form) is not None]
    involved = " ".join(f"data.{form}" for form in FORMS)
    if not forms:
        yield "data", involved, f"defines no training text; {ONE_FORM}"
    elif forms in (["prompt"], ["completion"]):
        missing = "completion" if forms == ["prompt"] else "prompt"
        yield f"data.{forms[0]}", involved, f"needs data.{missing} too; or use data.text alone"
    elif len(forms) > 1 and forms != ["prompt", "completion"]:
        yield f"data.{forms[-1]}", involved, f"cannot be combined with {' and '.join(forms[:-1])}; {ONE_FORM}"
    elif data.label_names is not None:
        column, columns = next(iter(data.label_names)), template_columns(data.completion or "")
        if not data.completion:
            message = f"needs data.prompt and data.completion, but the config has data.{forms[0]}"
            yield "data.label_names", involved, message
        elif column not in columns:
            has = ", ".join(map(format_value, columns))
            message = f"{format_value(column)} is not a column of data.completion, which has {has}"
            yield "data.label_names", involved, message
    for name in ("chat_template", *CHAT_SETTINGS):
        if getattr(data, name) != DataConfig.model_fields[name].default and forms and data.messages is None:
            yield f"data.{name}", involved, "is for data.messages only; remove it, or use data.messages"
    if data.truncate != "column" and data.text is not None:
        yield (
            "data.truncate",
            involved,
            "is for data.prompt and data.messages only (other texts lose their end); remove it",
        )
    if data.long_text == "split" and forms and data.text is None:
        yield "data.long_text", involved, "split is for data.text only; remove it, or use data.text"


def _adapter_rules(config: Config) -> Iterator[Broken]:
    """Settings of another method, and what full fine-tuning excludes."""
    adapter, method = config.adapter, config.adapter.method
    for name in sorted(adapter.model_fields_set - {"method"}):
        if method not in (methods := methods_of(name)):
            message = f"applies to method {' and '.join(methods)}, but adapter.method is {method}; remove one of them"
            yield f"adapter.{name}", "adapter.method", message
    if config.train.loraplus_ratio and method != "lora":
        yield (
            "train.loraplus_ratio",
            "adapter.method",
            f"applies to method lora, but adapter.method is {method}; remove it",
        )
    if method == "full" and config.model.dtype in ("bfloat16", "float16"):
        yield "model.dtype", "adapter.method", "full trains float32 weights; leave it auto, and use trainer.bf16"
    if method == "full" and config.model.quantization:
        message = "full trains the base's weights, which can't be stored in few bits; remove it, or use method lora"
        yield "model.quantization", "adapter.method", message
    if config.trainer.fsdp and config.model.quantization:
        message = "a quantized base is not shared out among processes; remove one of the two"
        yield "trainer.fsdp", "model.quantization", message
    for setting in ("train_modules", "train_tokens", "add_tokens"):
        if getattr(adapter, setting) and config.trainer.fsdp:
            message = f"shares out the base's modules, but {setting} trains some of them; remove one of the two"
            yield "trainer.fsdp", f"adapter.{setting}", message
    if method == "full" and config.trainer.fsdp:
        message = "shards a frozen base, but full trains it; remove fsdp, or use method lora, bottleneck or prompt"
        yield "trainer.fsdp", "adapter.method", message
    if adapter.init == "pissa" and adapter.dora:
        yield (
            "adapter.dora",
            "adapter.init",
            "starts from whole weights, pissa from their principal part; remove one of them",
        )
    if adapter.init == "pissa" and adapter.init_from:
        yield "adapter.init", "adapter.init_from", "both say what to start from; remove one of them"
    if config.trainer.fsdp and (adapter.dora or adapter.init == "pissa"):
        own = "adapter.dora" if adapter.dora else "adapter.init"
        yield own, "trainer.fsdp", "needs whole weights, and fsdp has parts of them; remove one of the two"
    if method == "lora" and not adapter.targets and not adapter.modules:
        yield "adapter.targets", "adapter.modules", "nothing would be trained; add a role, or set adapter.modules"


def _eval_rules(config: Config) -> Iterator[Broken]:
    """Settings that need evaluation data, and the values of metric_for_best_model."""
    data, train, key = config.data, config.train, config.train.metric_for_best_model
    at, sets = "train.metric_for_best_model", list(eval_sets(data.eval))
    for name in FOR_EVALUATIONS:
        if data.eval is None and attrgetter(name)(config):
            yield name, "data.eval", NEEDS_EVAL
    selected = selection_metric(key, sets or [""])
    if selected is None:
        metrics = dict.fromkeys(SELECTION_METRICS)
        available = [name for set_name in ("", *sets) for name in add_set_name(set_name, metrics)]
        near = nearest(key, available)
        hint = f"did you mean {near}?" if near else f"give one of {', '.join(available[:20])}"
        yield at, "data.eval", f"{format_value(key)} is not a metric of this config; {hint}"
        return
    metric = selected[1]
    if key != "loss" and data.eval is None:
        yield at, "data.eval", f"{key} {NEEDS_EVAL}"
    if metric in ("accuracy", "macro_f1") and data.label_names is None:
        yield at, "data.label_names", f"{metric} needs data.label_names, which makes the evaluation a classification"
    if metric in TEXT_METRICS and not (train.predict_with_generate and metric in config.generation.metrics):
        message = f"{metric} needs train.predict_with_generate, and {metric} in generation.metrics"
        yield at, "train.predict_with_generate generation.metrics", message


def _generation_rules(config: Config) -> Iterator[Broken]:
    """Metrics that need completions, and settings that have no effect on the kind of decoding."""
    generation = config.generation
    if generation.metrics and config.data.text is not None:
        message = "compares with completions or assistant turns, which data.text does not have; remove it"
        yield "generation.metrics", "data.text", message
    if config.train.predict_with_generate and not generation.metrics:
        message = f"needs generation.metrics: one or more of {', '.join(TEXT_METRICS)}"
        yield "train.predict_with_generate", "generation.metrics", message
    unused = [] if generation.do_sample else [(name, "do_sample: true") for name in ("temperature", "top_k", "top_p")]
    unused += [] if generation.num_beams > 1 else [("length_penalty", "num_beams from 2")]
    for name, needed in unused:
        if getattr(generation, name) != GenerationConfig.model_fields[name].default:
            involved = "generation.do_sample generation.num_beams"
            yield f"generation.{name}", involved, f"has no effect without generation.{needed}"
