"""`lora-ft check`: everything short of training, within seconds: config, rows as the model sees them, targets, memory.

All that `train` would refuse before its first step is result here, all at once, by the same functions, but for what only
the weights' values show (`--time` loads them); the exit code is that of what training would meet first.
"""

import json

import yaml
from transformers import PreTrainedModel

from lora_ft.commands.check import display, warnings
from lora_ft.commands.check.inspect import Inspection, inspect_run
from lora_ft.config.load import Config
from lora_ft.core.trust import NO_TRUST, Trust
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
    trust: Trust = NO_TRUST,
) -> None:
    """Print what a run of `config` would do.

    Raises:
        UserError: what training would refuse, all of it in one message, after what could be result out was printed.
    """
    result = inspect_run(config, time, trust)
    if as_json:
        print(json.dumps(as_dict(result)))
    elif result.model or result.has_data:
        show(result)
    if result.errors:
        raise type(result.errors[0])("\n".join(map(str, result.errors)))


def as_dict(result: Inspection) -> dict:
    """All of it for machines; null for what is not known."""
    facts: dict = {"config": result.setup.config.model_dump(mode="json"), "device": result.setup.device}
    if result.has_data:
        facts |= {
            "train": result.setup.train_set.report.as_dict(),
            "eval": reports(result.setup.eval_sets),
            "lengths": display.histogram(warnings.lengths(result.setup.train_set), result.setup.config.data.max_length),
            "supervised_share": result.setup.train_set.report.supervised / result.setup.train_set.report.tokens,
            "end_token_learned": result.ends_learned,
            "eval_examples_in_train": result.in_common.get("", result.in_common or 0),
        }
    if result.plan:
        facts["steps"] = len(result.plan)
    if result.model:
        facts |= sizes(result.model, result.setup.config.adapter.method) | {
            "targets": {path: list(layer.rows) for path, layer in lora_layers(result.model).items()}
        }
    facts["memory"] = result.memory.as_dict() if result.memory else None
    if result.timing:
        facts["timing"] = result.timing.as_dict()
    errors = [{"exit_code": e.exit_code, "message": str(e)} for e in result.errors]
    return facts | {"warnings": result.warnings, "errors": errors}


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


def show(result: Inspection) -> None:
    """All of it for people."""
    out = display.console()
    settings = yaml.safe_dump(
        result.setup.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=76
    )
    out.print(settings.rstrip())
    if result.has_data:
        show_data(result, result.setup.train_set, out)
    if result.model:
        numbers, layers = sizes(result.model, result.setup.config.adapter.method), lora_layers(result.model)
        display.heading(out, f"{result.setup.config.adapter.method}: {result.adapted}")
        for line in display.target_lines(layers):
            out.print(line)
        out.print(
            f"  trainable: {numbers['trainable_parameters']:,} of {numbers['base_parameters']:,} parameters "
            f"({numbers['trainable_share']:.2%}); {display.size(numbers['adapter_bytes'])} on disk"
        )
    if result.memory:
        where = "this GPU's allocator" if result.setup.device == "cuda" else "on this CPU"
        display.heading(out, f"memory that training needs, {where}")
        for line in display.memory_lines(result.memory):
            out.print(line)
    if result.plan:
        steps = f"steps: {len(result.plan):,} of {result.setup.config.train.batch_size} examples"
        display.heading(out, steps if result.timing else f"{steps} (--time: how long they take)")
    if result.timing:
        for line in result.timing.lines():
            out.print(f"  {line}")
    if result.warnings:
        out.print()
    for warning in result.warnings:
        display.paragraph(out, f"warning: {warning}", "yellow")


def show_data(result: Inspection, train: Examples, out) -> None:
    display.heading(out, "data")
    for which, examples in (
        ("train", train),
        *((f"eval {name}".strip(), of) for name, of in result.setup.eval_sets.items()),
    ):
        display.paragraph(out, f"  {which}: {examples.report.summary()}")
    out.print(
        f"  supervised: {train.report.supervised / train.report.tokens:.1%} of the tokens; an end token is learned in "
        f"{result.ends_learned:,} of {len(train.dataset):,}"
    )
    display.heading(out, f"tokens an example, before truncation to max_length {result.setup.config.data.max_length}")
    bins = display.histogram(warnings.lengths(train), result.setup.config.data.max_length)
    for line in display.histogram_lines(bins, out.encoding):
        out.print(line)
    first = list(range(min(SHOWN_ROWS, len(train.dataset))))
    cut = next((i for i, t in enumerate(train.dataset["truncated"]) if t and i not in first), None)
    for i in [*first, *([cut] if cut is not None else [])]:
        example = train.dataset[i]
        tail = ", truncated" if example["truncated"] else ""
        marks = "»«" if out.encoding.lower().startswith("utf") else ">><<"
        display.heading(out, f"{example['where']}: {example['tokens']} tokens{tail}; supervised between {marks}")
        out.print(display.seen(example, result.setup.tokenizer, out.encoding))
