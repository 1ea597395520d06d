"""Fold an adapter into its base on disk, W' = W + s B A, shard by shard, and prove the result before it gets its name.

The LoRA paper's section 4.1, "No additional inference latency". A sum in float32, one rounding to the stored dtype;
never two shards in memory. What comes out is an ordinary transformers folder.
"""

import resource
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.core import storage
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.compatibility import base_of, check_against, check_base, check_tokenizer
from lora_ft.methods.lora.files import RECORD, WEIGHTS, write_record
from lora_ft.methods.lora.merge_shards import check_copies, stored_keys, write_shards
from lora_ft.methods.lora.peft import AdapterFile, read_adapter
from lora_ft.methods.lora.stored_names import Edit, plan, stored_names
from lora_ft.methods.lora.verify import compare_logits, sample_rows
from lora_ft.model.files import Base, fingerprint, opened, stored_dtype, weight_files
from lora_ft.model.load import load_base, load_tokenizer, skeleton

# What transformers reads beside the weights; the weights of other formats would be unmerged ones.
COPIED = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
NOT_COPIED = ("*.index.json", RECORD, "adapter_config.json", "trainer_state.json", "state.json")


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
    """`lora-ft merge`: find the base, merge, and print what was made and how it was proved.

    Raises:
        UserError: as `merge_adapter`; or no base is named, on the command line or in the adapter.
    """
    found = read_adapter(adapter)
    files = base_of(adapter, found.record, found.config, base, allow_pickle)
    output = output or beside(adapter, "-merged")
    report = merge_adapter(
        files, adapter, output, verify=verify, other_base=other_base, trust_remote_code=trust_remote_code,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(f"merged {adapter} into {files.name}: {output}")
    print(f"  {report['modules']} matrices, stored as {report['dtype']}; largest error {report['matrix_error']:.3g}")
    if logits := report["logits"]:
        print(
            f"  logits: {logits['difference']:.3g} off base + adapter at most, {logits['rounding']:.3g} of it by rounding to "
            f"{report['dtype']}; beyond that {logits['beyond_rounding']:.3g} ({logits['beyond_rounding_tolerance']:.3g} "
            f"allowed). The adapter moves them by {logits['adapter_effect']:.3g}."
        )
        if logits["rounding"] > logits["adapter_effect"] / 2:
            print(f"WARNING: rounding to {report['dtype']} undoes much of so small an adapter.", file=sys.stderr)
    else:
        print("  logits were not compared (--no-verify)")
    print(f"  {report['seconds']:.1f} s, {report['peak_memory_mb']} MB of memory at most")


def beside(folder: Path, ending: str) -> Path:
    """The sibling of `folder` whose name is its name and `ending`."""
    here = folder if folder.name not in ("", "..") else folder.resolve()
    return here.with_name(here.name + ending)


def merge_adapter(
    base: Base,
    adapter: Path,
    output: Path,
    *,
    verify: bool = True,
    other_base: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> dict:
    """Write base + adapter as a plain model to `output`, proved; on any failure, or kill, nothing of that name appears.

    Keeps dtypes, sharding, tokenizer and generation config. An adapter on a tied head unties it (said on stderr).
    `verify` False leaves out the second part of the proof, which loads whole models; the record says so.

    Returns:
        modules, dtype, matrix_error, logits (a dict, or None), untied, bytes, seconds, peak_memory_mb.

    Raises:
        ModelError: the adapter or base is damaged, doesn't fit the other, or the proof fails.
        FilesError: `output` exists, or the disk is full.
    """
    start = time.perf_counter()
    found = read_adapter(adapter)
    check_base(found.record, base, other_base)
    tokenizer = tokenizer_of(base, trust_remote_code)
    if tokenizer is None and (found.record or {}).get("tokenizer"):
        raise ModelError(
            f"model {base.name}: has no tokenizer, and the adapter was trained with one. Restore its files."
        )
    if tokenizer is not None:
        check_tokenizer(found.record, base, tokenizer, other_base)
    with storage.staged_folder(output) as staged:
        model = skeleton(base, trust_remote_code)
        check_against(model, found)
        if base.gguf or base.pickles:
            storage.require_space(output.parent, 8 * model.num_parameters())  # twice in float32, for a while
            source = as_safetensors(base, tokenizer, staged / ".base", trust_remote_code)
        elif getattr(model.config, "quantization_config", None):
            raise ModelError(f"model {base.name}: quantized weights can't take a merge. Name the full-precision model.")
        else:
            source = base
        shards = weight_files(source)
        stored = stored_names(model, stored_keys(shards))
        edits, unties = plan(model, stored, found.tensors)
        if unties:
            print("The adapter moves the tied head: the merged model's head is a weight of its own.", file=sys.stderr)
        check_copies(model, found, shards, stored)
        storage.require_space(output.parent, space_needed(shards, edits))
        errors, dtypes = write_shards(shards, staged, edits, found, progress)
        copy_files(source, staged, unties, trust_remote_code)
        logits = None
        if verify:
            rows = sample_rows(found.record, tokenizer, model.get_input_embeddings().weight.shape[0])
            merged = Base(str(output), staged)
            logits = compare_logits(source, adapter, merged, dtypes, rows, trust_remote_code)
        if source is not base:
            shutil.rmtree(source.folder)
        report = {
            "modules": len(found.tensors),
            "dtype": ", ".join(sorted({str(d).removeprefix("torch.") for d in dtypes.values()})),
            "matrix_error": max(errors.values()),
            "logits": logits,
            "untied": unties,
        }
        names = [p.name for p in staged.iterdir() if p.is_file()]
        write_record(staged, record_of(found, base, other_base, report, errors), names)
        size = sum((staged / n).stat().st_size for n in names)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
    return report | {"bytes": size, "seconds": time.perf_counter() - start, "peak_memory_mb": peak}


def tokenizer_of(base: Base, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer; None only for a folder without one, whose weights can still be merged."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
    if base.gguf is None and not any((base.folder / name).exists() for name in files):
        return None
    return load_tokenizer(base, trust_remote_code)


def as_safetensors(
    base: Base, tokenizer: PreTrainedTokenizerBase | None, folder: Path, trust_remote_code: bool
) -> Base:
    """The model of a .gguf file (in float32) or of pickles (as stored) as a folder: the base that the merge reads."""
    dtype = "float32" if base.gguf else str(stored_dtype(base)).removeprefix("torch.")
    load_base(base, dtype, trust_remote_code).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Base(base.name, folder)


def space_needed(shards: list[Path], edits: list[Edit]) -> int:
    """Bytes of the merged weights, and some for the small files."""
    added = {e.source for e in edits if e.target != e.source}
    size = sum(path.stat().st_size for path in shards) + 2**26
    for shard in shards:
        with opened(shard) as file:
            for name in added.intersection(file.keys()):
                size += file.get_tensor(name).nbytes  # mapped, not read
    return size


def copy_files(base: Base, staged: Path, unties: bool, trust_remote_code: bool) -> None:
    """Config, tokenizer, templates and licence as they are; code only if trusted. The config learns of an untying."""
    skipped = {path for pattern in NOT_COPIED for path in base.folder.glob(pattern)}
    for pattern in (*COPIED, *(["*.py"] if trust_remote_code else [])):
        for path in sorted(set(base.folder.glob(pattern)) - skipped):
            target = staged / path.relative_to(base.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)  # the content alone: modes follow the umask
    if unties:
        config = storage.read_json(staged / "config.json", ModelError) | {"tie_word_embeddings": False}
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
        storage.write_json(staged / "config.json", config)


def record_of(adapter: AdapterFile, base: Base, other_base: bool, report: dict, errors: dict[str, float]) -> dict:
    """The merged model's record: what it is made of, how it was proved, and what `eval` needs from the adapter's."""
    trained, found = adapter.record or {}, fingerprint(base)
    trained_on = (trained.get("base") or {}).get("fingerprint")
    return {
        "format": 1,
        "kind": "merged",
        **{
            key: trained[key]
            for key in ("config", "tokenizer", "data", "seed", "trainable_parameters")
            if key in trained
        },
        "base": {"name": base.name, "revision": base.revision, "fingerprint": found, "dtype": report["dtype"]},
        "other_base": other_base and trained_on not in (None, found),  # merged into a base it was not trained on
        "adapter": {"name": adapter.folder.resolve().name, "sha256": storage.sha256(adapter.folder / WEIGHTS)},
        "merge": {
            **report,
            "matrix_errors": errors,
            "verified": ["matrices", *(["logits"] if report["logits"] else [])],
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
