"""`lora-ft check`: everything short of training, within seconds: config, rows as the model sees them, targets, memory.

What `train` would refuse before its first step is reported here, all at once and by the same functions, except what only
the values of the weights show (`--time` loads them). The exit code is that of the error that training would meet first.
"""

from dataclasses import asdict

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel

from lora_ft.commands.check import display, warnings
from lora_ft.commands.check.chats import chat_turns
from lora_ft.commands.check.inspect import Inspection, inspect_run
from lora_ft.config.schema import Config
from lora_ft.core.messages import echo_json, format_bytes, printable
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.examples import column_array, reports
from lora_ft.methods.lora.files import bytes_on_disk
from lora_ft.methods.lora.inject import lora_layers, trainable

EXAMPLES_SHOWN = 2
OWN = "in this GPU's allocator"
PLACES = {"cuda": OWN, "xpu": OWN, "mps": "which this Mac's CPU and GPU share"}


def check(config: Config, *, as_json: bool = False, time: bool = False, trust: Trust = NO_TRUST) -> None:
    """Print what a run of `config` would do; `time` loads the model and times two steps.

    Raises:
        UserError: all that training would refuse, in one message, after the rest was printed.
    """
    result = inspect_run(config, time, trust)
    if as_json:
        echo_json(as_dict(result))
    elif result.model or result.has_data:
        show(result)
    if result.errors:
        raise type(result.errors[0])("\n".join(map(str, result.errors)))


def as_dict(result: Inspection) -> dict:
    """The result for machines; null for what is not known."""
    setup = result.setup
    facts: dict = {"config": setup.config.model_dump(mode="json"), "device": setup.device}
    if result.has_data:
        report = setup.train_set.report
        facts |= {
            "train": asdict(report),
            "eval": reports(setup.eval_sets),
            "lengths": display.histogram(warnings.lengths(setup.train_set), setup.config.data.max_length),
            "supervised_share": report.supervised / report.tokens,
            "end_token_learned": result.ends_learned,
            "eval_examples_in_train": result.in_common.get("", result.in_common or 0),
        }
    if result.plan:
        facts["steps"] = len(result.plan)
    if result.model:
        facts |= sizes(result.model, setup.config.adapter.method)
        facts["targets"] = {path: list(layer.rows) for path, layer in lora_layers(result.model).items()}
    facts["memory"] = asdict(result.memory) if result.memory else None
    if result.timing:
        facts["timing"] = asdict(result.timing)
    errors = [{"exit_code": e.exit_code, "message": str(e)} for e in result.errors]
    return facts | {"warnings": result.warnings, "errors": errors}


def sizes(model: PreTrainedModel, method: str) -> dict:
    """Numbers of parameters, and the bytes of the adapter's file and of Adam's state."""
    parameters = sum(p.numel() for p in trainable(model).values())
    total = sum(p.numel() for p in model.parameters())
    return {
        "base_parameters": total - (parameters if method != "full" else 0),
        "trainable_parameters": parameters,
        "parameters": total,
        "trainable_share": parameters / total,
        "adapter_bytes": bytes_on_disk(model) if method == "lora" else 4 * parameters,
        "adam_bytes": 8 * parameters,
    }


def show(result: Inspection) -> None:
    """Print the result for people: what to look at first, the settings that nobody gave last."""
    out, setup, config = display.console(), result.setup, result.setup.config
    for warning in result.warnings:
        display.paragraph(out, f"warning: {warning}", "yellow")
    if result.has_data:
        show_data(result, out)
    if result.model:
        numbers = sizes(result.model, config.adapter.method)
        parts = f"{numbers['trainable_parameters']:,} of {numbers['parameters']:,} parameters"
        share, file = numbers["trainable_share"], format_bytes(numbers["adapter_bytes"])
        trained = f"  trainable: {parts} ({share:.2%}); {file} on disk"
        lines = [*display.target_lines(lora_layers(result.model)), trained]
        display.section(out, f"{config.adapter.method}: {result.adapted}", lines)
    if result.memory:
        where = PLACES.get(setup.device, "on this CPU")
        lines = [f"  {part:<12}{format_bytes(value):>12}" for part, value in asdict(result.memory).items()]
        display.section(out, f"memory that training needs, {where}", lines)
    if result.plan:
        steps = f"steps: {len(result.plan):,} of {config.train.batch_size} examples"
        lines = result.timing.lines() if result.timing else []
        if result.seconds and not result.timing:
            texts = ", without the texts that are generated" if config.train.predict_with_generate else ""
            rough = f"{result.rough_time()}{texts}, by the speed of this CPU's matrix products"
            lines = [f"  {rough} (--time measures it)"]
        display.section(out, steps if lines else f"{steps} (--time: how long they take)", lines)
    display.section(out, "settings", display.settings_lines(config))


def show_data(result: Inspection, out: Console) -> None:
    """Print the counts, the lengths and a few examples as the model sees them."""
    setup, train, data = result.setup, result.setup.train_set, result.setup.config.data
    display.section(out, "data")
    for name, examples in {"train": train, **{f"eval {n}".strip(): e for n, e in setup.eval_sets.items()}}.items():
        display.paragraph(out, f"  {name}: {examples.report.summary()}")
    display.paragraph(
        out,
        f"  supervised: {train.report.supervised / train.report.tokens:.1%} of the tokens; an end token is learned in "
        f"{result.ends_learned:,} of {len(train.dataset):,}",
    )
    for kind, (count, supervised) in train.report.turns.items():
        display.paragraph(out, f"  turns: {printable(kind)}: {count:,}, supervised {supervised:,}")
    if train.report.turn_ends:
        ends = ", ".join(f"{printable(end) or 'no token'} {count:,}" for end, count in train.report.turn_ends.items())
        display.paragraph(out, f"  supervised turns end in: {ends}")
    bars = display.histogram_lines(display.histogram(warnings.lengths(train), data.max_length), out.encoding)
    display.section(out, f"tokens per example, before truncation to max_length {data.max_length}", bars)
    truncated = np.flatnonzero(column_array(train.dataset, "truncated")[EXAMPLES_SHOWN:]) + EXAMPLES_SHOWN
    marks, marked = "".join(display.marks(out.encoding)), data.truncate == "column" and data.text is None
    for i in [*range(min(EXAMPLES_SHOWN, len(train.dataset))), *truncated[:1].tolist()]:
        example = train.dataset[i]
        cut = f", truncated{' at [...]' * marked}" if example["truncated"] else ""
        tokens = f"{example['tokens']} tokens{cut}"
        title = f"{example['where']}: {tokens}; supervised between {marks}"
        turns = chat_turns(example, data, setup.tokenizer) if data.messages else []
        display.section(out, title, display.highlight_supervised(example, setup.tokenizer, out.encoding, turns))
