"""`lora-ft merge`: fold an adapter into its base."""

import sys
from pathlib import Path

from lora_ft.commands.merge_onto import OntoName, form_to_merge_onto
from lora_ft.core.errors import ModelError
from lora_ft.core.messages import echo, listed, warn
from lora_ft.core.storage import refuse_existing, sibling
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.methods.lora.merge import merge_adapter
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained
from lora_ft.model.files import Base

WHY_NOT = {
    "full": "a complete model already, which loads anywhere as it is: there is nothing to merge.",
    "bottleneck": "adapter layers can't be merged: the nonlinearity between their two matrices leaves no single matrix "
    "that computes the same. Use them with `lora-ft eval`.",
    "prompt": "virtual tokens can't be merged: they are an input and change no weights. PEFT loads the folder as it is.",
}


def merge_command(
    folder: Path,
    *,
    base: str | None = None,
    onto: OntoName | None = None,
    output: Path | None = None,
    verify: bool = True,
    trust: Trust = NO_TRUST,
) -> Base:
    """Merge an adapter into its base, and print what was written and how it was verified. Returns the base.

    base: its name, if not the recorded one. onto: of a base that was quantized, see `form_to_merge_onto`.
    output: by default the sibling `FOLDER-merged`. verify: compare logits too.

    Raises:
        ModelError: the method can't be merged; or as `Trained.open`, `Trained.base` and `merge_adapter`.
        FilesError: `output` exists, or the disk is full.
    """
    trained = Trained.open(folder)
    if trained.method in WHY_NOT:
        raise ModelError(f"{folder}: {WHY_NOT[trained.method]}")
    adapter, files = read_adapter(trained), trained.base(base, trust)
    output = output or sibling(folder, "-merged")
    refuse_existing(output)
    form, progress = form_to_merge_onto(trained, files, onto), sys.stderr.isatty()
    report = merge_adapter(
        files, adapter, output, form=form, verify=verify, other_base=trust.other_base, progress=progress
    )
    echo(f"merged {folder} into {files.name}{f' in {form}' if form else ''}: {output}")
    echo(f"  {report['modules']} matrices, stored as {report['dtype']}; largest error {report['matrix_error']:.3g}")
    if report["whole"]:
        echo(f"  as they were trained in full: {listed(report['whole'], 3)}")
    if logits := report["logits"]:
        echo(
            f"  verified: merged logits match base + adapter within {logits['difference']:.3g} (limit "
            f"{logits['tolerance']:.3g}); {logits['rounding']:.3g} of it is rounding to {report['dtype']}, the rest "
            f"{logits['beyond_rounding']:.3g} (limit {logits['beyond_rounding_tolerance']:.3g}). The adapter moves the logits "
            f"by {logits['adapter_effect']:.3g}."
        )
        if logits["rounding"] > logits["adapter_effect"] / 2:
            warn(f"rounding to {report['dtype']} undoes much of so small an adapter")
    else:
        echo("  logits were not compared (--no-verify)")
    echo(f"  {report['seconds']:.1f} s, peak memory {report['peak_memory_mb']} MiB")
    return files
