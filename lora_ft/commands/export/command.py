"""`lora-ft export`: write an adapter or a model in a form that another program loads, and upload it if asked."""

from pathlib import Path

from transformers import PreTrainedModel

from lora_ft.commands.export import hub
from lora_ft.commands.export.adapter_files import write_adapter_gguf
from lora_ft.commands.export.gguf_format import FAMILIES
from lora_ft.commands.export.gguf_model import verify_gguf, write_model_gguf
from lora_ft.commands.export.modelfile import modelfile_of, write_modelfile
from lora_ft.commands.merge import merge_command
from lora_ft.core import storage
from lora_ft.core.errors import ConfigError, FilesError, ModelError
from lora_ft.core.messages import echo, format_bytes, warn
from lora_ft.core.names import published_name
from lora_ft.core.run_folder import TEMPLATE
from lora_ft.core.storage import sibling
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.methods.lora.compatibility import check_against, check_copies
from lora_ft.methods.lora.experts import unpack_for
from lora_ft.methods.lora.peft import AdapterFile, read_adapter
from lora_ft.methods.lora.portable import padded, plain_tensors, require_plain, write_plain
from lora_ft.methods.lora.whole import refuse_whole
from lora_ft.methods.model_card import CARD, export_card
from lora_ft.methods.trained import Trained, check_base
from lora_ft.methods.usage import vllm_command
from lora_ft.model.files import Base, resolve
from lora_ft.model.load import load_base, load_model_config, load_tokenizer, skeleton
from lora_ft.model.small_files import require_inside, small_files
from lora_ft.model.stored import stored_dtype
from lora_ft.nn.expert_names import PATH

OTHERS = {
    "prompt": "PEFT loads the folder as it is.",
    "bottleneck": "No other library reads this format: use it with `lora-ft eval`.",
}


def export_command(
    folder: Path,
    to: str,
    *,
    output: Path | None = None,
    base: str | None = None,
    merged: bool = False,
    dtype: str = "auto",
    verify: bool = True,
    push: str | None = None,
    public: bool = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Write `folder`, an adapter or for gguf also a complete model, in another form, and print what can load it.

    Args:
        to: peft, merged or gguf. push: a hub repository to upload to. verify: compare the logits of a complete model.
        merged: for gguf: base and adapter in one file.
        dtype: for gguf: of the matrices; "auto" is float32 for an adapter and the stored dtype for a model.

    Raises:
        ConfigError: options that don't go together.
        ModelError: nothing to export, family or tokenizer not supported, failed verification or upload.
        FilesError: the output exists, or can't be written.
    """
    complete = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    if to != "gguf" and (merged or dtype != "auto"):
        raise ConfigError(f"--merged and --dtype go with --to gguf; this is --to {to}")
    if complete and (to != "gguf" or base or merged):
        raise ConfigError(
            f"{folder}: a complete model, not an adapter; use `lora-ft export {folder} --to gguf` without --base and --merged"
        )
    if public and not push:
        raise ConfigError("--public goes with --push REPO")
    if push:
        hub.check(push)
    kind = to if to != "gguf" else "model.gguf" if complete else "merged.gguf" if merged else "lora.gguf"
    target = output or sibling(folder, ".gguf" if complete else f"-{kind}")
    for path in (target, modelfile_of(target))[: 2 if to == "gguf" else 1]:
        if path.exists():
            raise FilesError(f"{path}: already exists. Remove it, or name another place with --output.")
    if to == "merged":
        files = merge_command(folder, base=base, output=target, verify=verify, trust=trust)
    elif complete:
        files = resolve(str(folder), trust=trust)
        export_model_gguf(files, target, dtype, None, verify)
    else:
        trained = Trained.open(folder)
        if trained.method != "lora":
            raise ModelError(f"{folder}: of method {trained.method}; only LoRA is exported. {OTHERS[trained.method]}")
        adapter, files = read_adapter(trained), trained.base(base, trust)
        way_out = f"Use --to merged{', and export that folder --to gguf' if to == 'gguf' else ''}."
        refuse_whole(adapter, "this form holds A and B alone", way_out)
        if merged:
            trained.check(files, load_tokenizer(files), trust.other_base)
            if trained.quantization:
                warn(
                    f"{folder} was trained on the base in {trained.quantization}; merged onto the original weights it is "
                    f"another function. The trained one: `lora-ft merge {folder} --onto quantized`, and that folder --to gguf"
                )
            export_model_gguf(files, target, dtype, adapter, verify)
        else:
            check_base(trained.record, files, trust.other_base)
            export_peft(adapter, files, target) if to == "peft" else export_lora_gguf(adapter, files, target, dtype)
    if to == "gguf":
        write_modelfile(target, folder, files, alone=not (complete or merged))
    if push:
        echo(f"pushed to {hub.push(push, hub.uploads(target, kind, published_name(files.name)), public)}")


def export_peft(adapter: AdapterFile, base: Base, target: Path) -> None:
    """Write the adapter's two files and its model card as a folder, after checking that it fits the base."""
    model = _checked_model(adapter, base)
    with storage.atomic_folder(target) as staged:
        recorded = adapter.trained.adapter_config.get("base_model_name_or_path") or ""
        tensors, _ = padded(plain_tensors(adapter))
        rank = write_plain(staged, tensors, [adapter], published_name(recorded) or None)
        if (card := adapter.folder / CARD).is_file():
            require_inside(adapter.folder, card)
            name = str(adapter.trained.adapter_config.get("base_model_name_or_path"))  # PEFT's cards may have a path
            text = card.read_text(encoding="utf-8", errors="replace").replace(name, published_name(name))
        else:
            text = export_card("peft", published_name(base.name), target.name)
        storage.write_file(staged / CARD, text)
        if adapter.trained.chat_template:
            storage.write_file(staged / TEMPLATE, adapter.trained.chat_template)
    family = model.config.model_type
    own_converter, ours = f"its own converter, if it supports {family}", f"lora-ft export {adapter.folder} --to gguf"
    echo(f"{target}: rank {rank} on {len(adapter.tensors)} modules, the scaling folded into B (lora_alpha = r)")
    echo(f'  PEFT          PeftModel.from_pretrained(base, "{target}")')
    echo(f'  transformers  model.load_adapter("{target}"), with peft installed')
    if any(map(PATH.fullmatch, adapter.stored)):
        return  # which the others take merged
    echo(f"  vLLM          {vllm_command(base.name, rank, f'{target.name}={target}')}")
    echo(f"                where it supports LoRA for {family}")
    echo(f"  llama.cpp     {ours if family in FAMILIES else own_converter}")


def export_lora_gguf(adapter: AdapterFile, base: Base, target: Path, dtype: str) -> None:
    """Write the adapter alone as a GGUF."""
    model = _checked_model(adapter, base)
    with storage.atomic_file(target, 0) as temporary:
        size = write_adapter_gguf(adapter, model, temporary, "float32" if dtype == "auto" else dtype, base.name)
    any_base = f"any GGUF of {published_name(base.name)}, quantized too"
    echo(f"{target}: the adapter of {len(adapter.tensors)} modules, {format_bytes(size)}")
    echo(f"  llama.cpp  llama-cli -m BASE.gguf --lora {target}, with {any_base}")
    if form := adapter.trained.quantization:
        way_out = f"`lora-ft merge {adapter.folder} --onto quantized`, and that folder --to gguf"
        echo(
            f"  trained on the base in {form}, which no GGUF is: on each it is another function. The trained one: {way_out}"
        )
    else:
        echo(f"  the trained function is that on {base.gguf or 'an unquantized GGUF'}; on others it is another")


def export_model_gguf(base: Base, target: Path, dtype: str, adapter: AdapterFile | None, verify: bool) -> None:
    """Write a complete model, merged with the adapter if there is one, as a GGUF, and verify it."""
    if base.gguf or base.pickles:
        way_out = "Merge first: --to merged, then export that folder --to gguf."
        raise ModelError(f"base {base.name}: no safetensors. {way_out}")
    dtype = str(stored_dtype(base)).removeprefix("torch.") if dtype == "auto" else dtype
    small_files(base)  # the vocabulary and the template come from them
    with storage.atomic_file(target, 0) as temporary:
        size = write_model_gguf(base, temporary, dtype, adapter)
        verified = verify_gguf(temporary, dtype, base, adapter) if verify else "logits were not compared (--no-verify)"
    echo(f"{target}: {published_name(base.name)}{' + adapter' if adapter else ''}, {dtype}, {format_bytes(size)}")
    if window := getattr(load_model_config(base), "sliding_window", None):
        echo(f"  note: the model attends to the last {window:,} positions; llama.cpp, in this architecture, to all")
    echo(f"  {verified}")
    echo(f"  llama.cpp  llama-cli -m {target}; smaller: llama-quantize {target} small.gguf Q4_K_M")


def _checked_model(adapter: AdapterFile, base: Base) -> PreTrainedModel:
    """The base, without weights unless the adapter has copies of them, after checking that the adapter fits it."""
    require_plain(adapter)
    model = load_base(base) if adapter.copies else skeleton(base)  # copies are not exported, so they must be the base's
    unpack_for(model, adapter.stored)
    check_against(model, adapter)
    check_copies(model, adapter)
    return model
