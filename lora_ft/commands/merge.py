"""`lora-ft merge` for every method: LoRA (lora_ft.methods.lora.merge) folds into the base; the others say why not."""

from pathlib import Path

from lora_ft.core.errors import ModelError
from lora_ft.methods.lora import merge as lora
from lora_ft.methods.tensor_files import method_of

WHY_NOT = {
    "full": "a whole model already, which loads anywhere as it is: nothing is left to fold.",
    "bottleneck": "adapter layers can't be folded: between their two matrices is a nonlinearity, so no single matrix does "
    "what they do. Use them with `lora-ft eval`.",
    "prompt": "virtual tokens can't be folded: they are an input, and change no weights. PEFT loads the folder as it is.",
}


def merge_command(
    adapter: Path,
    *,
    base: str | None = None,
    output: Path | None = None,
    verify: bool = True,
    other_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Fold what was trained into its base, and print what was made.

    Raises:
        UserError: it can't be folded, and why; or as `merge_adapter`.
    """
    method = method_of(adapter)
    if method in WHY_NOT:
        raise ModelError(f"{adapter}: {WHY_NOT[method]}")
    lora.merge_command(
        adapter, base=base, output=output, verify=verify, other_base=other_base,
        trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
    )  # fmt: skip
