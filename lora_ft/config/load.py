"""The door for configs: a YAML file, `--set` or a record in; a `Config` out, or all that is wrong in one message.

Each line of a message is `path:line: section.setting: what is wrong; what to do`. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

from lora_ft.config import training_arguments, yaml_reader
from lora_ft.config.adapter_settings import AdapterConfig
from lora_ft.config.problems import SECTIONS, field_at, plain_type, refused, unknown
from lora_ft.config.rules import rules
from lora_ft.config.schema import Config, DataConfig, GenerationConfig, ModelConfig, TrainConfig, eval_sets
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import format_value, printable
from lora_ft.core.metrics import SELECTION_METRICS
from lora_ft.core.names import nearest

__all__ = [
    "NOT_TRAINING",
    "AdapterConfig",
    "Config",
    "DataConfig",
    "GenerationConfig",
    "ModelConfig",
    "TrainConfig",
    "eval_sets",
    "load_config",
    "parse_config",
    "resume_class",
]

# As overrides: how a run chooses its best step counts for nothing where a model is only scored, maybe on other sets.
NOT_TRAINING = ("train.metric_for_best_model=loss", "train.predict_with_generate=false")
AT_MOST = 30  # lines of a message
COMMAND_LINE = 10**9  # the "line" of what `--set` gave: sorts last


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file; `overrides` are the `key.path=value` of `--set`, in order; they beat the file.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    name = printable(str(path))
    try:
        document = yaml_reader.read(_text(path, name))
    except yaml_reader.Unreadable as e:
        raise ConfigError(f"{name}{f':{e.line}' if e.line else ''}: {e.message}") from None
    if document.value is None and not document.problems:
        raise ConfigError(f"{name}: empty; a config needs at least model.name, data.train and what to learn from it")
    if not isinstance(document.value, dict):
        what = document.problems[0].message if document.problems else f"{format_value(document.value)} is no config"
        raise ConfigError(f"{name}:1: {what}; a config begins with sections such as `model:`")
    return _config(document, overrides, name)


def parse_config(data: Mapping[str, Any], overrides: Sequence[str] = (), source: str = "the record's config") -> Config:
    """A config from values that are typed already, such as a record's; `source` names them in messages.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    return _config(yaml_reader.Document(dict(data), {}, []), overrides, printable(source))


def resume_class(section: str, setting: str = "") -> str:
    """What changing `section.setting` means for `--resume`: result, rounding, free or longer (see lora_ft.config.schema)."""
    if section == "trainer":
        return training_arguments.ALLOWED[setting].resume
    extra = field_at((section, setting)).json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["resume"])


def _config(document: yaml_reader.Document, overrides: Sequence[str], source: str) -> Config:
    # A missing or empty section has its defaults; copies, so that the caller's tables stay as they are.
    data = {
        key: {} if value is None and key in (*SECTIONS, "trainer") else value for key, value in document.value.items()
    }
    data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    data = {section: {} for section in SECTIONS} | data
    lines = dict(document.lines)
    wrong = [(line, path, message) for path, line, message, _ in document.problems]
    bad: set[Any] = {
        path[:2] for path, _, _, unread in document.problems if unread
    }  # no more is said of these settings
    for override in overrides:
        place, value, problem = _override(override)
        lines = {known: line for known, line in lines.items() if known[: len(place)] != place}
        lines[place] = COMMAND_LINE
        if problem:
            wrong.append((COMMAND_LINE, place, problem))
        elif len(place) == 1:
            data[place[0]] = value
        elif isinstance(data.setdefault(place[0], {}), dict):
            data[place[0]][place[1]] = value
    for path, message, meant in list(refused(_without(data, bad))):
        if path[:2] not in bad:
            wrong.append((_line(path, lines), path, message))
        bad |= {meant} if meant else set()
    bad |= {path[:2] for _, path, _ in wrong}
    sound = _without(data, bad)
    for section, setting in (("model", "name"), ("data", "train")):
        sound.setdefault(section, {}).setdefault(setting, "stands in")  # only so that the rules can be asked
    config = Config.model_validate(sound)
    for path, others, message in rules(config):
        if not bad.intersection((path, path[:1], *others)):
            wrong.append((_line(path, lines), path, message))
    if wrong:
        raise ConfigError(_message(wrong, source))
    return _naming_its_set(config)


def _naming_its_set(config: Config) -> Config:
    """Of several eval sets the first governs. Its name is written out, so that the record tells when another one does."""
    first, key = next(iter(eval_sets(config.data.eval)), ""), config.train.metric_for_best_model
    if not first or key not in SELECTION_METRICS:
        return config
    train = config.train.model_copy(update={"metric_for_best_model": f"{first}_{key}"})
    return config.model_copy(update={"train": train})


def _without(data: dict[str, Any], places: set[Any]) -> dict[str, Any]:
    """A copy without the settings and sections at `places`."""
    kept = {key: value for key, value in data.items() if (key,) not in places}
    return {
        key: {k: v for k, v in value.items() if (key, k) not in places} if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def _override(text: str) -> tuple[tuple[str, ...], Any, str | None]:
    """(path, value, what is wrong) of one `key.path=value`: text for a text setting, else YAML."""
    key, equals, raw = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        return path, None, "give key.path=value, as in --set train.learning_rate=1e-4"
    if path in [(section,) for section in (*SECTIONS, "trainer")]:
        return path, None, f"is a section; name one of its settings, as in {path[0]}.NAME=value"
    try:
        if path[0] == "trainer" and len(path) == 2:
            kind = training_arguments.ALLOWED[path[1]].kind if path[1] in training_arguments.ALLOWED else None
            null, is_text = False, kind is str or isinstance(kind, tuple)
        else:
            assert len(path) == 2 if path[0] in SECTIONS else len(path) == 1
            kind, null = plain_type(field_at(path))
            is_text = kind is str or get_origin(kind) is Literal
    except (AssertionError, KeyError):
        return path, None, unknown(path)[0]
    if is_text:
        return path, None if null and raw == "null" else raw, None
    try:
        document = yaml_reader.read(raw)
    except yaml_reader.Unreadable as e:
        return path, None, e.message
    return path, document.value, document.problems[0].message if document.problems else None


def _line(path: tuple[str | int, ...], lines: Mapping[yaml_reader.Path, int]) -> int:
    """The line of the nearest thing that stands in the file on the way to `path`; 0 where there is none."""
    return next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 0)


def _message(wrong: list[tuple[int, yaml_reader.Path, str]], source: str) -> str:
    text = []
    for line, path, message in sorted(wrong, key=lambda w: w[0]):
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{printable(part, 60)}" for part in path)[1:]
        at = f"--set {name}" if line == COMMAND_LINE else f"{source}:{line}" if line else source
        text.append(f"{at}: {name}: {message}" if name and line != COMMAND_LINE else f"{at}: {message}")
    return "\n".join(text[:AT_MOST] + ([f"... and {len(text) - AT_MOST} more"] if len(text) > AT_MOST else []))


def _text(path: str | Path, name: str) -> str:
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
