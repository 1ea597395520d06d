"""`lora-ft check A.yaml B.yaml ...`: what training these configs together would do, shortly; one config has all details."""

from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console

from lora_ft.commands.check import display
from lora_ft.commands.check.command import PLACES, as_dict
from lora_ft.commands.check.inspect import Inspection, inspect_run
from lora_ft.commands.check.memory import Memory, largest_rows
from lora_ft.config.schema import Config
from lora_ft.config.together import check_together
from lora_ft.core.messages import echo_json, format_bytes
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.methods.lora.inject import lora_layers
from lora_ft.nn.attention import Isolation
from lora_ft.report.figures import format_duration
from lora_ft.training.joint_rows import row_limit
from lora_ft.training.joint_step import check_joint


def check_several(configs: Mapping[str, Config], *, as_json: bool = False, trust: Trust = NO_TRUST) -> None:
    """Print what the runs of `configs`, by their names, would do together.

    Raises:
        UserError: all that training would refuse, in one message, after the rest was printed.
    """
    check_together(configs)
    results = {name: inspect_run(config, False, trust) for name, config in configs.items()}
    for result in results.values():
        if result.model:
            with result.collect_errors():
                checkpointing = result.setup.config.train.gradient_checkpointing
                check_joint(result.model, lora_layers(result.model), checkpointing)
    together = memory_together([*results.values()])
    if as_json:
        facts = {"configs": {name: as_dict(result) for name, result in results.items()}}
        echo_json(facts | {"memory": asdict(together) if together else None})
    else:
        show(results, together)
    errors = [(name, error) for name, result in results.items() for error in result.errors]
    if errors:
        raise type(errors[0][1])("\n".join(f"{name}: {error}" for name, error in errors))


def memory_together(results: list[Inspection]) -> Memory | None:
    """The memory of all runs in one process: one base, every adapter, and the tensors of one row. None if one is not known."""
    parts = [result.memory for result in results if result.memory]
    if len(parts) < len(results):
        return None
    own = [max(row.tokens for row in largest_rows(result.plan)) for result in results if result.plan]
    setup, model = results[0].setup, results[0].model
    limit = row_limit(setup.config.train.micro_batch_tokens, setup.device)
    shared = model and Isolation.guess_from_config(model, setup.longest(model)) is Isolation.ATTENTION
    tokens = min(sum(own), max(limit, *own)) if shared else max(own)  # of the longest row
    grown = {
        part: int(tokens * max(getattr(memory, part) / size for memory, size in zip(parts, own, strict=True)))
        for part in ("activations", "heap")
    }
    sums = {part: sum(getattr(memory, part) for memory in parts) for part in ("adapter", "optimizer")}
    most = {part: max(getattr(memory, part) for memory in parts) for part in ("runtime", "weights", "logits")}
    amounts = most | sums | grown
    return Memory(**amounts, total=sum(amounts.values()))


def show(results: Mapping[str, Inspection], together: Memory | None) -> None:
    """Print a few lines for each run, and what they need together."""
    out: Console = display.console()
    for name, result in results.items():
        for warning in result.warnings:
            display.paragraph(out, f"warning: {name}: {warning}", "yellow")
    for name, result in results.items():
        lines = [f"  data: {result.setup.train_set.report.summary()}"] if result.has_data else []
        if result.model:
            lines.append(f"  lora: {result.adapted}, rank {result.setup.config.adapter.rank}")
        if result.plan:
            steps = f"  steps: {len(result.plan):,} of {result.setup.config.train.batch_size} examples"
            lines.append(steps + (f", alone {result.rough_time()}" if result.seconds else ""))
        if result.memory:
            lines.append(f"  memory, alone: {format_bytes(result.memory.total)}")
        display.section(out, name, lines)
    if together:
        where = PLACES.get(next(iter(results.values())).setup.device, "on this CPU")
        lines = [f"  {part:<12}{format_bytes(value):>12}" for part, value in asdict(together).items()]
        display.section(out, f"memory that training them together needs, {where}", lines)
    seconds = [result.seconds for result in results.values()]
    if all(seconds):
        text = f"  roughly {format_duration(sum(s or 0 for s in seconds))} one by one; together less, where steps are short"
        display.section(out, "time", [text])
