"""Loading a config: a YAML file, `--set` options or a record in; a `Config`, or one message with all errors, out.

Each line of the message is `path:line: section.setting: what is wrong; what to do`. Imports no torch.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from lora_ft.config import yaml_reader
from lora_ft.config.json_schema import alternatives, entry_at
from lora_ft.config.rules import broken_rules, schema_errors, unknown
from lora_ft.config.schema import SECTIONS, Config, eval_sets, resume_class
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value, printable
from lora_ft.core.metrics import SELECTION_METRICS
from lora_ft.core.names import nearest
from lora_ft.core.paths import refuse_special

# Overrides where a model is only evaluated, perhaps on other sets: how a run selects its best step does not matter.
NOT_TRAINING = ("train.metric_for_best_model=loss", "train.predict_with_generate=false")
MAX_LINES = 30  # of an error message
COMMAND_LINE = 10**9  # the line number of a `--set` option: sorts last
UNKNOWN = "unknown"  # in place of a required setting that is missing, so that the rules can be checked


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file; `overrides` are the `key.path=value` of `--set`, in order, and take precedence over the file.

    Raises:
        ConfigError: all errors, one per line.
    """
    name = printable(str(path))
    try:
        document = yaml_reader.read(_read_text(path, name))
    except yaml_reader.Unreadable as e:
        raise ConfigError(f"{name}{f':{e.line}' if e.line else ''}: {e.message}") from None
    if document.value is None and not document.problems:
        raise ConfigError(f"{name}: empty; a config needs at least model.name, data.train and a text to learn")
    if not isinstance(document.value, dict):
        messages = [p.message for p in document.problems] or [f"{format_value(document.value)} is not a config"]
        raise ConfigError(f"{name}:1: {messages[0]}; a config consists of sections such as `model:`")
    return _parse(document, overrides, name)


def load_configs(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Config]:
    """Config files by their names without folder and ending, or by their paths if two are called the same.

    overrides: for each of them. Raises as `load_config`, and if one is given twice.
    """
    if twice := next((path for i, path in enumerate(paths) if path in paths[:i]), None):
        raise ConfigError(f"{printable(str(twice))}: given twice")
    names = [printable(Path(path).stem) for path in paths]
    if len({*names}) < len(names):
        names = [printable(str(path)) for path in paths]
    return {name: load_config(path, overrides) for name, path in zip(names, paths, strict=True)}


def parse_config(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "the record's config") -> Config:
    """A config from parsed values such as those of a record; `source` names them in messages. Raises as `load_config`."""
    return _parse(yaml_reader.Document(dict(data), {}, []), overrides, printable(source))


def changes(before: dict, config: Config) -> dict[str, list[str]]:
    """The settings that differ between a record's config and this one: "section.setting: was X, is Y", by resume class.

    A setting that the record lacks did not exist then; its default is what the run did.
    """
    old, new = _flat(before), _flat(config.model_dump(mode="json"))
    fields = ((section, name, f) for section, model in SECTIONS.items() for name, f in model.model_fields.items())
    defaults = {(s, name): to_jsonable_python(f.default) for s, name, f in fields if not f.is_required()}
    old = {path: value for path, value in defaults.items() if path in new} | old
    by_class: dict[str, list[str]] = {"result": [], "rounding": [], "free": [], "longer": []}
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            values = [json.dumps(settings.get(path), ensure_ascii=False) for settings in (old, new)]
            alike = len(os.path.commonprefix(values)) - 40  # of long values, a part from before the first difference on
            was, now = (printable(v if alike < 100 else f"...{v[alike:]}") for v in values)
            by_class[resume_class(*path)].append(f"{'.'.join(path)}: was {was}, is {now}")
    return by_class


def _flat(config: dict) -> dict[tuple[str, ...], Any]:
    """("adapter", "rank") -> value; a setting outside of sections is ("output",)."""
    flat: dict[tuple[str, ...], Any] = {}
    for section, value in config.items():
        flat |= {(section, name): v for name, v in value.items()} if isinstance(value, dict) else {(section,): value}
    return flat


def _parse(document: yaml_reader.Document, overrides: Sequence[str], source: str) -> Config:
    # Copies, so that the caller's tables stay as they are; a missing or empty section has its defaults.
    data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in document.value.items()}
    data |= {section: {} for section in SECTIONS if data.get(section) is None}
    lines = dict(document.lines)
    errors = [(problem.line, problem.path, problem.message) for problem in document.problems]
    # The settings and sections with an error so far: no further error is reported for them.
    bad: set[Any] = {problem.path[:2] for problem in document.problems if problem.unread}
    bad -= {(section,) for section in SECTIONS}  # a section keeps its other settings
    for override in overrides:
        path, value, error = _parse_override(override)
        lines = {known: line for known, line in lines.items() if known[: len(path)] != path} | {path: COMMAND_LINE}
        if error:
            errors.append((COMMAND_LINE, path, error))
        elif len(path) == 1:
            data[path[0]] = value
        elif isinstance(data.setdefault(path[0], {}), dict):
            data[path[0]][path[1]] = value
    for place, message, meant in list(schema_errors(_without(data, bad))):
        if place[:2] not in bad:
            errors.append((_line(place, lines), place, message))
        bad |= {meant} if meant else set()
    bad |= {place[:2] for _, place, _ in errors}
    valid = _without(data, bad)
    for section, name in (("model", "name"), ("data", "train")):
        valid.setdefault(section, {}).setdefault(name, UNKNOWN)
    config = Config.model_validate(valid)
    for at, involved, message in broken_rules(config):
        path, *others = (tuple(name.split(".")) for name in (at, *involved.split()))
        if not bad.intersection((path, path[:1], *others)):
            errors.append((_line(path, lines), path, message))
    if errors:
        raise ConfigError(_format_errors(errors, source))
    return _with_metric_of_first_set(config)


def _with_metric_of_first_set(config: Config) -> Config:
    """With several eval sets, `loss` is that of the first: written out, so that the record shows a change of the first set."""
    first, key = next(iter(eval_sets(config.data.eval)), ""), config.train.metric_for_best_model
    if not first or key not in SELECTION_METRICS:
        return config
    train = config.train.model_copy(update={"metric_for_best_model": f"{first}_{key}"})
    return config.model_copy(update={"train": train})


def _without(data: dict[str, Any], paths: set[Any]) -> dict[str, Any]:
    """A copy without the settings and sections at `paths`."""
    return {
        key: {k: v for k, v in value.items() if (key, k) not in paths} if isinstance(value, dict) else value
        for key, value in data.items()
        if (key,) not in paths
    }


def _parse_override(text: str) -> tuple[tuple[str, ...], Any, str | None]:
    """(path, value, error) of one `key.path=value`. For a text setting the value is taken literally, otherwise as YAML."""
    key, equals, raw = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        return path, None, "give key.path=value, as in --set train.learning_rate=1e-4"
    if len(path) == 1 and path[0] in SECTIONS:
        return path, None, f"is a section; name one of its settings, as in {path[0]}.NAME=value"
    if len(path) > 2 or len(path) == 2 and path[0] not in SECTIONS:
        return path, None, unknown(path)[0]
    try:
        types = {kind.get("type") for kind in alternatives(entry_at(path))}
    except KeyError:
        return path, None, unknown(path)[0]
    if "string" in types and types <= {"string", "null"}:
        return path, None if "null" in types and raw == "null" else raw, None
    try:
        document = yaml_reader.read(raw)
    except yaml_reader.Unreadable as e:
        return path, None, e.message
    return path, document.value, document.problems[0].message if document.problems else None


def _line(path: tuple[str | int, ...], lines: Mapping[yaml_reader.Path, int]) -> int:
    """The line of the innermost part of `path` that is in the file; 0 if there is none."""
    return next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 0)


def _format_errors(errors: list[tuple[int, yaml_reader.Path, str]], source: str) -> str:
    """One line for each error, in the order of the file."""
    text = []
    for line, path, message in sorted(errors, key=lambda error: error[0]):
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part, 60)}" for part in path)[1:]
        at = f"--set {name}" if line == COMMAND_LINE else f"{source}:{line}" if line else source
        text.append(f"{at}: {name}: {message}" if name and line != COMMAND_LINE else f"{at}: {message}")
    return "\n".join(text[:MAX_LINES] + ([f"... and {len(text) - MAX_LINES} more"] if len(text) > MAX_LINES else []))


def _read_text(path: str | Path, name: str) -> str:
    """The content of a config file, `name` in messages."""
    refuse_special(Path(path), ConfigError)
    try:
        with open(path, "rb") as file:
            data = file.read(yaml_reader.MAX_BYTES + 1)
    except FileNotFoundError:
        folder = Path(path).parent
        near = nearest(Path(path).name, [p.name for p in folder.glob("*.y*ml")]) if folder.is_dir() else None
        hint = f"did you mean {printable(str(folder / near))}?" if near else "check the path"
        raise ConfigError(f"{name}: no such file; {hint}") from None
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise ConfigError(f"{name}: cannot be read ({reason}); give a YAML file") from None
    if len(data) > yaml_reader.MAX_BYTES:
        raise ConfigError(f"{name}: {yaml_reader.TOO_LARGE}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        at = f"byte {e.start + 1} (0x{data[e.start]:02x})"
        raise ConfigError(f"{name}:{line}: {at} is not UTF-8; save the file as UTF-8") from None
