"""`lora-ft eval`: score an adapter beside its base, several adapters, or a complete model, on eval data."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.commands.eval_data import read_eval_sets, warn_of_trained_rows
from lora_ft.config.load import NOT_TRAINING, load_config, parse_config
from lora_ft.config.rules import FORMS
from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import echo_json, info
from lora_ft.core.run_folder import RECORD, read_record
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.batches import RowPacking
from lora_ft.data.examples import Examples, largest_id
from lora_ft.data.prepare import template_of
from lora_ft.evaluation.evaluate import compare_with_base, evaluate_set
from lora_ft.evaluation.kept import base_scores, recorded_scores
from lora_ft.evaluation.paired import Rows
from lora_ft.evaluation.references import eval_prompts
from lora_ft.evaluation.tables import EvalResult, print_result, save_texts
from lora_ft.evaluation.texts import check_installed
from lora_ft.methods.interface import METHODS, virtual_ids
from lora_ft.methods.lora.files import apply_adapter
from lora_ft.methods.lora.multi import use
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.trained import Trained, is_model, run_settings, training_records
from lora_ft.model.device import micro_batch_tokens, prepare_device
from lora_ft.model.files import Base, resolve
from lora_ft.model.fits import check_length, check_vocabulary
from lora_ft.model.load import load_base, load_tokenizer
from lora_ft.nn.attention import Isolation


def evaluate_command(
    folders: Sequence[Path],
    *,
    config_path: Path | None = None,
    data: str | None = None,
    base: str | None = None,
    as_json: bool = False,
    texts_path: Path | None = None,
    again: bool = False,
    overrides: Sequence[str] = (),
    trust: Trust = NO_TRUST,
) -> None:
    """Print the scores of a folder, or of several adapters of one base: as tables, or with `as_json` as one object.

    Several adapters are scored on the same examples: those of the command line, else the first's eval data and template.
    again: also compute scores that the run's record or the cache holds.

    Raises:
        UserError: nothing trained there, no eval data, or the wrong base.
    """
    folder, trained = folders[0], open_all(folders, base)
    record = trained[0].record if trained else read_record(folder) or {}
    model_name = base or (None if config_path else trained[0].base_name) if trained else str(folder)
    config = settings(folder, record, config_path, data, model_name, overrides)
    if texts_path and not config.generation.metrics:
        raise ConfigError("--texts: no texts are generated: name metrics, as in --set generation.metrics=[bleu].")
    if texts_path and not texts_path.absolute().parent.is_dir():
        raise ConfigError(f"--texts: {texts_path.parent} is not a folder. Create it, or name another.")
    check_installed(config.generation.metrics)
    device = prepare_device(config.trainer.use_cpu)

    name, revision = config.model.name, config.model.revision
    files = trained[0].base(name, trust, revision) if trained else resolve(name, revision, trust)
    tokenizer = load_tokenizer(files)
    several = len(trained) > 1
    for i, entry in enumerate(trained):
        entry.check(files, tokenizer, trust.other_base, str(entry.folder) if i else None)
        entry.note_form(config.model.quantization)
    for entry in trained[1:]:
        note_other_template(entry, config)
    sets = read_eval_sets(folder, config, tokenizer, named=bool(data))
    for name, examples in sets.items():
        info(f"{f'eval {name}'.strip()}: {examples.report.summary()}")
    for entry_folder, of in [(entry.folder, entry.record) for entry in trained] or [(folder, record)]:
        for training in training_records(of):
            warn_of_trained_rows(entry_folder, training, config, tokenizer, sets)
    results = None if again or texts_path or several else recorded_results(trained, config, files, sets)
    kept = results is not None
    if results is None:
        results = score_sets(trained, config, files, tokenizer, sets, device, again)
    if as_json:
        by_name = {result.name: result.as_dict(several=several) for result in results}
        echo_json(by_name.get("", {"sets": by_name}))
    else:
        for result in results:
            print_result(result)
        if kept:
            info(f"from the run's record, {folder / RECORD}; --again computes them")
    if texts_path:
        save_texts(texts_path, results)


def recorded_results(
    trained: Sequence[Trained], config: Config, files: Base, sets: Mapping[str, Examples]
) -> list[EvalResult] | None:
    """The results of a run's own eval sets as its record has them; None if one must be computed."""
    results = []
    for name, examples in sets.items():
        scores = recorded_scores(trained[0], config, files, name, examples) if trained else None
        if scores is None:
            return None
        results.append(EvalResult(name, len(examples.dataset), examples.label_words, None, scores))
    return results


def score_sets(
    trained: Sequence[Trained],
    config: Config,
    files: Base,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Examples],
    device: str,
    again: bool,
) -> list[EvalResult]:
    """Load the model, and score each set with it and with its base; again: the base too where its scores were kept."""
    several = len(trained) > 1
    model = load_base(files, config.model.dtype, device, config.model.quantization)
    check_vocabulary(model, files, max(map(largest_id, sets.values())))
    if several:
        for entry in trained:
            apply_adapter(model, read_adapter(entry), str(entry.folder))
    elif trained:
        METHODS[trained[0].method].load(model, trained[0])
    longest = max(examples.report.longest for examples in sets.values()) + len(virtual_ids(model))
    check_length(model, files, longest)

    isolation = Isolation.detect(model, longest)
    at_most = micro_batch_tokens(config.train.micro_batch_tokens, device)
    packing = RowPacking.of(model, isolation, at_most, config.train.share_prefixes == "auto")
    own = ["adapter" if trained and trained[0].method != "full" else "model"]
    own = [str(entry.folder) for entry in trained] if several else own
    results = []
    for name, examples in sets.items():
        prompts = eval_prompts(model, tokenizer, examples, config) if config.generation.metrics else None
        result = EvalResult(name, len(examples.dataset), examples.label_words, prompts)
        base_rows: Rows = {}
        for who in ["base", *own] if trained else own:
            if several:
                use(model, None if who == "base" else who)
            compute = partial(
                evaluate_set, model, tokenizer, examples, prompts, config, isolation, packing, base=who == "base"
            )
            if who == "base":
                scored, _ = base_scores(files.fingerprint, examples, config, prompts is not None, compute, again)
            else:
                scored = compute()
            metrics, result.texts[who], rows = scored
            base_rows = rows if who == "base" else base_rows
            result.scores[who] = metrics | (compare_with_base(base_rows, rows) if who != "base" else {})
        results.append(result)
    return results


def open_all(folders: Sequence[Path], base: str | None) -> list[Trained]:
    """The trained folders; [] for a complete model. Raises ConfigError if they can't be scored together; as `Trained.open`."""
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ConfigError(f"{folder}: named twice")
        if not is_model(folder):
            continue
        if len(folders) > 1:
            problem = "a complete model. Several folders must be adapters of one base; score it alone."
            raise ConfigError(f"{folder}: {problem}")
        if base:
            problem = "is a complete model, not an adapter, and is scored as it is. Leave --base out."
            raise ConfigError(f"--base: {folder} {problem}")
        return []
    trained = [Trained.open(folder) for folder in folders]
    for entry in trained if len(trained) > 1 else ():
        if entry.alone:
            problem = f"{entry.alone}. Several folders must be LoRA adapters; score it alone."
            raise ConfigError(f"{entry.folder}: {problem}")
    return trained


def note_other_template(trained: Trained, config: Config) -> None:
    """Print a note where an adapter is scored on a template that it was not trained with."""
    own, used = (trained.record.get("config") or {}).get("data") or {}, config.data.model_dump(mode="json")
    different = [name for name in (*FORMS, "label_names") if name in own and own[name] != used[name]]
    if config.data.messages and trained.chat_template not in (None, template_of(config.data).chat_template):
        different.append("chat_template")
    if different:
        info(f"note: {trained.folder} was trained with another {', '.join(f'data.{name}' for name in different)}")


def settings(
    folder: Path, record: dict, config_path: Path | None, data: str | None, model: str | None, overrides: Sequence[str]
) -> Config:
    """The config file, else the record's, with the command line's model and data. Raises ConfigError if they say too little."""
    changes = [*NOT_TRAINING, *([f"model.name={model}"] if model else [])]
    if data:  # all of it, unless the command line asks for a sample
        changes += [f"data.eval={json.dumps(data, ensure_ascii=False)}", "data.max_eval_examples=null"]
    changes += overrides
    if config_path:
        return load_config(config_path, changes)
    if trained_with := run_settings(folder, record):
        return parse_config(trained_with, changes)
    forms = ("data=", *(f"data.{form}" for form in FORMS))
    if not (model and data and any(change.startswith(forms) for change in overrides)):
        raise ConfigError(
            f"{folder}: has no {RECORD}, so its template is unknown. Add --config FILE, or "
            f"{'' if model else '--base NAME and '}--data SOURCE with a template: --set 'data.prompt=...' "
            "--set 'data.completion=...', or --set 'data.text=...' or data.messages."
        )
    return parse_config({"model": {"name": model}, "data": {"train": data}}, changes, "the command line")
