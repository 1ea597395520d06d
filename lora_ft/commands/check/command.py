"""`lora-ft check`: everything short of training, within seconds: config, rows as the model sees them, targets, memory.

All that `train` would refuse before its first step is found here, all at once, by the same functions, but for what only
the weights' values show (`--time` loads them); the exit code is that of what training would meet first.
"""

import json

import yaml
from transformers import PreTrainedModel

from lora_ft.commands.check import display, warnings
from lora_ft.commands.check.inspect import Looked, look
from lora_ft.config.load import Config
from lora_ft.data.examples import Examples, reports
from lora_ft.methods.interface import adds_parameters
from lora_ft.methods.lora.files import bytes_on_disk
from lora_ft.methods.lora.inject import lora_layers, trainable

SHOWN_ROWS = 2


def check(
    config: Config,
    *,
    as_json: bool = False,
    time: bool = False,
    other_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Print what a run of `config` would do.

    Raises:
        UserError: what training would refuse, all of it in one message, after what could be found out was printed.
    """
    found = look(config, time, other_base, trust_remote_code, allow_pickle)
    if as_json:
        print(json.dumps(as_dict(found)))
    elif found.model or found.train:
        show(found)
    if found.errors:
        raise type(found.errors[0])("\n".join(map(str, found.errors)))


def as_dict(found: Looked) -> dict:
    """All of it for machines; null for what is not known."""
    facts: dict = {"config": found.config.model_dump(mode="json"), "device": found.device}
    if found.train:
        facts |= {
            "train": found.train.report.as_dict(),
            "eval": reports(found.eval),
            "lengths": display.histogram(warnings.lengths(found.train), found.config.data.max_length),
            "supervised_share": found.train.report.supervised / found.train.report.tokens,
            "end_token_learned": found.ends_learned,
            "eval_examples_in_train": found.in_common.get("", found.in_common or 0),
        }
    if found.plan:
        facts["steps"] = len(found.plan)
    if found.model:
        facts |= sizes(found.model, found.config.adapter.method) | {
            "targets": {path: list(layer.rows) for path, layer in lora_layers(found.model).items()}
        }
    facts["memory"] = found.memory.as_dict() if found.memory else None
    if found.timing:
        facts["timing"] = found.timing.as_dict()
    errors = [{"exit_code": e.exit_code, "message": str(e)} for e in found.errors]
    return facts | {"warnings": found.warnings, "errors": errors}


def sizes(model: PreTrainedModel, method: str) -> dict:
    """Numbers of parameters, and the bytes of the adapter's file and of Adam's state."""
    parameters = sum(p.numel() for p in trainable(model).values())
    whole = sum(p.numel() for p in model.parameters())
    return {
        "base_parameters": whole - (parameters if adds_parameters(method) else 0),
        "trainable_parameters": parameters,
        "trainable_share": parameters / whole,
        "adapter_bytes": bytes_on_disk(model) if method == "lora" else 4 * parameters,
        "adam_bytes": 8 * parameters,
    }


def show(found: Looked) -> None:
    """All of it for people."""
    out = display.console()
    settings = yaml.safe_dump(found.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=76)
    out.print(settings.rstrip())
    if found.train and found.tokenizer:
        show_data(found, found.train, out)
    if found.model:
        about, layers = sizes(found.model, found.config.adapter.method), lora_layers(found.model)
        display.heading(out, f"{found.config.adapter.method}: {found.adapted}")
        for line in display.target_lines(layers):
            out.print(line)
        out.print(
            f"  trainable: {about['trainable_parameters']:,} of {about['base_parameters']:,} parameters "
            f"({about['trainable_share']:.2%}); {display.size(about['adapter_bytes'])} on disk"
        )
    if found.memory:
        where = "this GPU's allocator" if found.device == "cuda" else "on this CPU"
        display.heading(out, f"memory that training needs, {where}")
        for line in display.memory_lines(found.memory):
            out.print(line)
    if found.plan:
        steps = f"steps: {len(found.plan):,} of {found.config.train.batch_size} examples"
        display.heading(out, steps if found.timing else f"{steps} (--time: how long they take)")
    if found.timing:
        for line in found.timing.lines():
            out.print(f"  {line}")
    if found.warnings:
        out.print()
    for warning in found.warnings:
        display.paragraph(out, f"warning: {warning}", "yellow")


def show_data(found: Looked, train: Examples, out) -> None:
    display.heading(out, "data")
    for which, examples in (("train", train), *((f"eval {name}".strip(), of) for name, of in found.eval.items())):
        display.paragraph(out, f"  {which}: {examples.report.summary()}")
    out.print(
        f"  supervised: {train.report.supervised / train.report.tokens:.1%} of the tokens; an end token is learned in "
        f"{found.ends_learned:,} of {len(train.dataset):,}"
    )
    display.heading(out, f"tokens an example, before truncation to max_length {found.config.data.max_length}")
    bins = display.histogram(warnings.lengths(train), found.config.data.max_length)
    for line in display.histogram_lines(bins, out.encoding):
        out.print(line)
    first = list(range(min(SHOWN_ROWS, len(train.dataset))))
    cut = next((i for i, t in enumerate(train.dataset["truncated"]) if t and i not in first), None)
    for i in [*first, *([cut] if cut is not None else [])]:
        example = train.dataset[i]
        tail = ", truncated" if example["truncated"] else ""
        marks = "»«" if out.encoding.lower().startswith("utf") else ">><<"
        display.heading(out, f"{example['where']}: {example['tokens']} tokens{tail}; supervised between {marks}")
        out.print(display.seen(example, found.tokenizer, out.encoding))
