"""Merging on disk: W' = W + s B A, shard by shard, verified before the folder gets its name (LoRA paper, section 4.1).

The sum is in float32, rounded once to the stored dtype, with one tensor in memory. The result is an ordinary
transformers folder.
"""

import shutil
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.core.machine import peak_memory
from lora_ft.core.messages import info, working
from lora_ft.core.run_folder import TEMPLATE
from lora_ft.methods.lora.compatibility import check_against
from lora_ft.methods.lora.experts import unpack_for
from lora_ft.methods.lora.files import WEIGHTS, write_record
from lora_ft.methods.lora.merge_shards import Merge, check_stored_copies, stored_keys, stored_tensors, write_shards
from lora_ft.methods.lora.onto import Onto
from lora_ft.methods.lora.peft import AdapterFile
from lora_ft.methods.lora.stored_names import Edit, plan_edits, stored_names
from lora_ft.methods.lora.verify import compare_logits, sample_rows
from lora_ft.methods.lora.whole import whole_paths
from lora_ft.model.files import Base, weight_files
from lora_ft.model.load import load_base, load_tokenizer, skeleton
from lora_ft.model.new_tokens import NewRows, ids_of
from lora_ft.model.small_files import forget_paths, small_files
from lora_ft.model.stored import stored_dtype
from lora_ft.nn.forms import Form


def merge_adapter(
    base: Base,
    adapter: AdapterFile,
    output: Path,
    *,
    form: Form | None = None,
    verify: bool = True,
    other_base: bool = False,
    progress: bool = False,
) -> dict:
    """Write base + adapter as a plain model to `output` and verify it; after a failure or a kill there is no `output`.

    Dtypes, sharding, tokenizer and generation config stay. An adapter on a tied head unties it (with a message). Returns
    modules, whole, dtype, matrix_error, logits (a dict, or None), untied, bytes, seconds, peak_memory_mb.

    Args:
        form: merge onto the base quantized like this, whose values are written in the stored dtypes; None: as it is stored.
        verify: compare logits, for which complete models are loaded one after the other; the record tells.
        other_base: allow a base that the adapter was not trained on.
    """
    start = time.perf_counter()
    tokenizer = tokenizer_of(base)
    adapter.trained.check(base, tokenizer, other_base)
    if not base.gguf:
        small_files(base)  # refused before the work
    with storage.atomic_folder(output) as staged:
        check_fits(base, adapter)
        model = skeleton(base)
        if base.gguf or base.pickles:
            storage.require_space(output.parent, 8 * model.num_parameters())  # two float32 copies, for a while
            source = as_safetensors(base, tokenizer, staged / ".base")
        elif getattr(model.config, "quantization_config", None):
            problem = "an adapter can't be merged into quantized weights. Name the full-precision model."
            raise ModelError(f"model {base.name}: {problem}")
        else:
            source = base
        shards = weight_files(source)
        keys = stored_keys(shards)
        stored = stored_names(model, keys)
        of_rows = adapter.rows.module if adapter.rows else None
        edits, unties = plan_edits(model, stored, keys, adapter.tensors, adapter.whole, of_rows)
        onto = Onto.of(model, stored, form)
        new = NewRows.of(model, stored, ids_of(tokenizer, source.new_tokens)) if source.new_tokens else NewRows()
        if unties:
            info("note: the adapter changes the tied head or embedding, so the merged model's head is no longer tied")
        check_stored_copies(model, adapter, shards, stored)
        storage.require_space(output.parent, space_needed(shards, edits))
        written = write_shards(shards, staged, Merge.of(adapter, edits, onto, new), progress)
        copy_files(source, staged, unties)
        if source.new_tokens:
            write_tokens(staged, tokenizer, model.get_input_embeddings().weight.shape[0])
        write_chat_template(staged, adapter.trained.chat_template)
        logits = None
        if verify:
            rows = sample_rows(adapter.trained.record, tokenizer, model.get_input_embeddings().weight.shape[0])
            merged = replace(source, name=str(output), folder=staged, revision=None, new_tokens=())
            with working("verifying the merged model"):
                logits = compare_logits(source, adapter, merged, written.dtypes, rows, form)
        if source is not base:
            shutil.rmtree(source.folder)
        report = {
            "modules": len(adapter.tensors),
            "whole": whole_paths(adapter) + ([f"the rows of {len(adapter.rows.ids)} tokens"] if adapter.rows else []),
            "onto": form,
            "dtype": ", ".join(sorted({str(d).removeprefix("torch.") for d in written.dtypes.values()})),
            "matrix_error": max(written.errors.values()),
            "logits": logits,
            "untied": unties,
        }
        names = [p.name for p in staged.iterdir() if p.is_file()]
        write_record(staged, merged_record(adapter, base, other_base, report, written.errors), names)
        size = sum((staged / n).stat().st_size for n in names)
    seconds = time.perf_counter() - start
    return report | {"bytes": size, "seconds": seconds, "peak_memory_mb": peak_memory() // 2**20}


def check_fits(base: Base, adapter: AdapterFile) -> None:
    """`check_against` a skeleton of the base, whose experts are then unpacked, unlike those in its files."""
    model = skeleton(base)
    unpack_for(model, adapter.stored)
    check_against(model, adapter)


def tokenizer_of(base: Base) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer; None for a folder without one, whose weights can still be merged."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
    if base.gguf is None and not any((base.folder / name).exists() for name in files):
        return None
    return load_tokenizer(base)


def as_safetensors(base: Base, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> Base:
    """Save a .gguf file (in float32) or pickled weights (as stored) as a folder that the merge can read."""
    dtype = "float32" if base.gguf else str(stored_dtype(base)).removeprefix("torch.")
    load_base(base, dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Base(base.name, folder, trusted_code=base.trusted_code)


def space_needed(shards: list[Path], edits: list[Edit]) -> int:
    """Bytes that the merged weights need, and some more for the small files."""
    added = {e.source for e in edits if e.target != e.source}
    size = sum(path.stat().st_size for path in shards) + 2**26
    return size + sum(tensor.nbytes for tensor in stored_tensors(shards, added).values())


def copy_files(base: Base, staged: Path, unties: bool) -> None:
    """Copy the small files, without paths of this machine; the config says if the head is untied."""
    for path in small_files(base):
        target = staged / path.relative_to(base.folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)  # the content alone: modes follow the umask
    forget_paths(staged)
    if unties:
        configure(staged, tie_word_embeddings=False)


def write_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Give a model's folder the tokenizer with its new tokens; `rows`: of the embedding that has theirs."""
    tokenizer.save_pretrained(folder)
    configure(folder, vocab_size=rows)
    forget_paths(folder)


def configure(folder: Path, **settings: Any) -> None:
    """Change settings of a model's config.json, and of its part for text if it has one."""
    config = storage.read_json(folder / "config.json", ModelError) | settings
    if isinstance(config.get("text_config"), dict):
        config["text_config"] |= settings
    storage.write_json(folder / "config.json", config)


def write_chat_template(folder: Path, text: str | None) -> None:
    """Give a model's folder the chat template of a run (None: keep its own), in both places where tools look for one."""
    config = folder / "tokenizer_config.json"
    if text is None or not config.is_file():
        return
    storage.write_file(folder / TEMPLATE, text)
    settings = storage.read_json(config, ModelError)
    if "chat_template" in settings:
        storage.write_json(config, settings | {"chat_template": text})


def merged_record(adapter: AdapterFile, base: Base, other_base: bool, report: dict, errors: dict[str, float]) -> dict:
    """The merged model's record: what it is made of, how it was verified, and what `eval` needs from the training."""
    trained = adapter.trained.record
    trained_on = (trained.get("base") or {}).get("fingerprint")
    kept = ("config", "tokenizer", "data", "seed", "trainable_parameters")
    verified = ["matrices", "logits"] if report["logits"] else ["matrices"]
    if config := trained.get("config"):  # the merged model itself is not quantized
        trained = trained | {"config": config | {"model": (config.get("model") or {}) | {"quantization": None}}}
    return {
        "format": 1,
        "kind": "merged",
        **{key: trained[key] for key in kept if key in trained},
        "base": {key: getattr(base, key) for key in ("name", "revision", "fingerprint")} | {"dtype": report["dtype"]},
        "other_base": other_base and trained_on not in (None, base.fingerprint),
        "adapter": {"name": adapter.folder.resolve().name, "sha256": storage.sha256(adapter.folder / WEIGHTS)},
        "merge": report | {"matrix_errors": errors, "verified": verified},
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
