"""`lora-ft eval`: an adapter beside its base, or a whole model, on eval data."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from lora_ft.config.load import NOT_TRAINING, Config, load_config, parse_config
from lora_ft.core import run_folder
from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.core.messages import info
from lora_ft.core.storage import read_json
from lora_ft.data.examples import largest_id
from lora_ft.data.prepare import evaluation_sets
from lora_ft.evaluation.evaluate import evaluate_set
from lora_ft.evaluation.tables import Result, save_texts, show
from lora_ft.evaluation.texts import check_installed, questions_for
from lora_ft.methods.interface import bare, load, method_of, virtual_ids
from lora_ft.methods.lora.compatibility import check_base, check_tokenizer, check_trained_on
from lora_ft.methods.lora.files import CONFIG, load_adapter
from lora_ft.methods.lora.multi import use
from lora_ft.model.device import micro_batch_tokens, prepare_device
from lora_ft.model.files import resolve, resolve_of
from lora_ft.model.load import check_length, check_vocabulary, load_base, load_tokenizer
from lora_ft.nn.attention import Isolation
from lora_ft.training.record import read_record


def evaluate_command(
    folders: Sequence[Path],
    *,
    config_path: Path | None = None,
    data: str | None = None,
    base: str | None = None,
    as_json: bool = False,
    texts_path: Path | None = None,
    overrides: Sequence[str] = (),
    other_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Print the scores of a folder, or of several adapters of one base: a table, or with `as_json` an object.

    Several are scored on the same examples: what the command line says, else the eval data and template of the first.

    Raises:
        UserError: nothing trained there, no eval data, or the wrong base.
    """
    folder = folders[0]
    others = {str(other): read_record(other) or {} for other in check_several(folders)}
    is_adapter, unfinished = run_folder.has_adapter(folder), run_folder.unfinished(folder)
    if unfinished or (not is_adapter and not (folder / "config.json").is_file()):
        raise ModelError(
            unfinished
            or f"{folder}: nothing trained there. Train first, `lora-ft train CONFIG`, or name a folder: `lora-ft eval FOLDER`."
        )
    if base and not is_adapter:
        raise ConfigError(
            f"--base: {folder} is a whole model, not an adapter, and is scored as it is. Leave --base out."
        )
    record = read_record(folder) or {}
    recorded = record.get("base") or {}
    model_name = base if is_adapter else str(folder)
    if not model_name and not config_path:
        model_name = recorded.get("name") or read_json(folder / CONFIG, ModelError).get("base_model_name_or_path")
    config = settings(folder, record, config_path, data, model_name, overrides)

    if texts_path and not config.generation.metrics:
        raise ConfigError("--texts: nothing is generated: name metrics, as in --set generation.metrics=[bleu].")
    if texts_path and not texts_path.absolute().parent.is_dir():
        raise ConfigError(f"--texts: {texts_path.parent} is no folder; make it, or name another.")
    check_installed(config.generation.metrics)
    device = prepare_device(config)
    if is_adapter and config.model.name == recorded.get("name"):
        files = resolve_of(folder, recorded, allow_pickle)
    else:
        files = resolve(config.model.name, config.model.revision, allow_pickle)
    tokenizer = load_tokenizer(files, trust_remote_code)
    if is_adapter:
        check_base(record, files, other_base)
        check_tokenizer(record, files, tokenizer, other_base)
    for other, its_record in others.items():
        check_trained_on(other, its_record, files, tokenizer, other_base)
        tell_other_data(other, its_record, config)
    sets = evaluation_sets(config.data, tokenizer, config.train.seed)
    for name, examples in sets.items():
        info(f"{f'eval {name}'.strip()}: {examples.report.summary()}")
    model = load_base(files, config.model.dtype, trust_remote_code, device)
    check_vocabulary(model, files, max(map(largest_id, sets.values())))
    for name in [str(folder), *others] if others else []:
        load_adapter(model, name, name)
    if is_adapter and not others:
        load(model, folder)
    prefix = virtual_ids(model)
    longest = max(examples.report.longest for examples in sets.values()) + len(prefix)
    check_length(model, files, longest)
    whole = not (folder / CONFIG).is_file()  # also full fine-tuning's

    isolation = Isolation.detect(model, longest)
    at_most = micro_batch_tokens(config, device)
    results = []
    for name, examples in sets.items():
        asked = questions_for(model, tokenizer, examples, config) if config.generation.metrics else None
        result = Result(name, len(examples.dataset), examples.label_words, asked)
        own = [str(folder), *others] if others else ["model" if whole else "adapter"]
        for who in ["base", *own] if is_adapter else own:
            if others:
                use(model, None if who == "base" else who)
            ids = [] if who == "base" else prefix
            prompts = asked.with_prefix(ids) if asked else None
            with bare(model) if who == "base" else nullcontext():
                result.scores[who], result.texts[who] = evaluate_set(
                    model, tokenizer, examples.with_prefix(ids), prompts, config, isolation, at_most
                )
        results.append(result)
    if as_json:
        found = {result.name: result.as_dict(several=bool(others)) for result in results}
        print(json.dumps(found.get("", {"sets": found})))
    else:
        for result in results:
            show(result)
    if texts_path:
        save_texts(texts_path, results)


def check_several(folders: Sequence[Path]) -> Sequence[Path]:
    """The folders after the first; where there are any, all must hold adapters, each named once.

    Raises:
        ConfigError: a whole model, or a folder twice. ModelError: nothing trained in one.
    """
    for i, folder in enumerate(folders if len(folders) > 1 else ()):
        if folder in folders[:i]:
            raise ConfigError(f"{folder}: named twice")
        if not run_folder.has_adapter(folder):
            if (folder / "config.json").is_file():
                raise ConfigError(
                    f"{folder}: a whole model. Several at once must be adapters of one base; score it alone."
                )
            raise ModelError(run_folder.unfinished(folder) or f"{folder}: nothing trained there.")
        if (method := method_of(folder)) != "lora":
            raise ConfigError(f"{folder}: of method {method}. Several at once must be LoRA adapters; score it alone.")
    return folders[1:]


def tell_other_data(folder: str, record: dict, config: Config) -> None:
    """Say so where an adapter is scored on a template that isn't its own."""
    own, ours = (record.get("config") or {}).get("data") or {}, config.data.model_dump(mode="json")
    settings = [s for s in ("prompt", "completion", "text", "messages", "chat_template", "label_names") if s in own]
    if differ := [setting for setting in settings if own[setting] != ours[setting]]:
        info(f"note: {folder} was trained with another {', '.join(f'data.{s}' for s in differ)}")


def settings(
    folder: Path, record: dict, config_path: Path | None, data: str | None, model: str | None, overrides: Sequence[str]
) -> Config:
    """The config to score with: the file's, else the record's, with the command line's model and data."""
    changes = [*NOT_TRAINING, *([f"model.name={model}"] if model else [])]
    if data:  # all of it, unless the command line says otherwise
        changes += [f"data.eval={json.dumps(data, ensure_ascii=False)}", "data.max_eval_examples=null"]
    changes += overrides
    if config_path:
        return load_config(config_path, changes)
    if "config" in record:
        return parse_config(record["config"], changes)
    forms = ("data.prompt", "data.completion", "data.text", "data.messages", "data=")
    if not (model and data and any(change.startswith(forms) for change in overrides)):
        raise ConfigError(
            f"{folder}: has no {run_folder.RECORD}, so it doesn't say what it was made for. Add --config FILE, or "
            f"{'' if model else '--base NAME and '}--data SOURCE with a template: --set 'data.prompt=...' "
            "--set 'data.completion=...', or --set 'data.text=...' or data.messages."
        )
    return parse_config({"model": {"name": model}, "data": {"train": data}}, changes, "the command line")
