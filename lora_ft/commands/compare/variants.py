"""The variants of a comparison: the product of what `--vary` names, each a config of its own. Imports no torch."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_ft.config.load import Config, eval_sets, load_config, parse_config
from lora_ft.config.schema import AdapterConfig, methods_of
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import printable
from lora_ft.core.metrics import TEXT_METRICS, selection_metric

HELD_OUT = 0.1  # of train, to tune on
TUNED_ON = "tuning"  # that eval set's name
AT_THE_END = 2**31  # steps: only the last one, which is always evaluated


@dataclass(frozen=True)
class Axis:
    """A setting and its values, as texts that `--set` would take."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """What is varied in it (key -> text), and the whole config that gives."""

    settings: dict[str, str]
    config: Config

    @property
    def name(self) -> str:
        """As people call it: `lora, rank=4`."""
        parts = [v if k == "adapter.method" else f"{k.rpartition('.')[2]}={v}" for k, v in self.settings.items()]
        return ", ".join(parts) or "as configured"

    @property
    def folder(self) -> str:
        return folder_name(self.settings) or "as-configured"


def axis(option: str, text: str) -> Axis:
    """`KEY=V1,V2,...`, the values in YAML's flow style: `adapter.targets=[q],[q,v],all`.

    Raises:
        ConfigError: no key, no value, or a value twice.
    """
    key, _, listed = text.partition("=")
    values = _items(f"[{listed}]") if key.strip() and listed.strip() else []
    if not values:
        raise ConfigError(f"{option} {printable(text)}: give KEY=V1,V2,..., as in {option} adapter.rank=1,4,16")
    if again := next((value for value in values if values.count(value) > 1), None):
        raise ConfigError(f"{option} {printable(text)}: {printable(again)} is there twice")
    return Axis(key.strip(), tuple(values))


def _items(flow: str) -> list[str]:
    """The items of a list in YAML's flow style, each as it is written, a quoted text without its quotes; [] if it is none."""
    try:
        node = yaml.compose(flow, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return []
    return [
        str(item.value)
        if isinstance(item, yaml.ScalarNode) and item.style
        else flow[item.start_mark.index : item.end_mark.index]
        for item in (node.value if node else ())
    ]


def variants(path: Path, overrides: Sequence[str], axes: Sequence[Axis]) -> list[Variant]:
    """The product of the axes, each once: a setting that isn't of a variant's method is left out there.

    Raises:
        ConfigError: all that is wrong with the config or a variant; there is no eval data; two folders would be one.
    """
    base = load_config(path, overrides)
    if base.data.eval is None:
        raise ConfigError(f"{path}: data.eval: a comparison needs eval data; name some, or hold out a fraction (0.1)")
    if twice := next((a.key for a in axes if sum(a.key == b.key for b in axes) > 1), None):
        raise ConfigError(f"--vary {twice}: given twice; give all its values at once")
    for key in ("output", "train.seed"):
        if key in [a.key for a in axes]:
            raise ConfigError(f"--vary {key}: {'--seeds' if key == 'train.seed' else '--output'} is for that")
    found: list[Variant] = []
    for chosen in points(axes):
        method = chosen.get("adapter.method", base.adapter.method)
        settings = {key: value for key, value in chosen.items() if belongs(key, method)}
        if settings not in [variant.settings for variant in found]:
            found.append(Variant(settings, changed(base, settings)))
    for a in axes:
        if not any(a.key in variant.settings for variant in found):
            raise ConfigError(f"--vary {a.key}: is a setting of none of these methods")
    folders = [variant.folder for variant in found]
    if same := next((name for name in folders if folders.count(name) > 1), None):
        raise ConfigError(f"--vary: two variants would share the folder {same}; compare them apart")
    return found


def belongs(key: str, method: str) -> bool:
    """Whether a setting means something to a method."""
    section, _, name = key.partition(".")
    return section != "adapter" or name not in AdapterConfig.model_fields or method in methods_of(name)


def changed(config: Config, settings: dict[str, str]) -> Config:
    """The config with other settings; what stood there for another method goes.

    Raises:
        ConfigError: it is no config.
    """
    data = config.model_dump(mode="json")
    method = settings.get("adapter.method", config.adapter.method)
    data["adapter"] = {key: value for key, value in data["adapter"].items() if belongs(f"adapter.{key}", method)}
    named = ", ".join(f"{key}={value}" for key, value in settings.items())
    return parse_config(data, [f"{key}={value}" for key, value in settings.items()], f"the config with {named}")


def final(variant: Variant, tuned: dict[str, str], seed: int, output: Path, evaluate_base: bool) -> Config:
    """The config of a run that counts: nothing in it is chosen on the eval data."""
    config = changed(variant.config, tuned)
    train = _unchosen(config, config.train.metric_for_best_model, seed) | {
        "evaluate_base": evaluate_base,
        "predict_with_generate": bool(config.generation.metrics),
    }
    return _with(config, output, train=train)


def tuning(variant: Variant, tuned: dict[str, str], seed: int, output: Path, steps: int | None = None) -> Config:
    """The config of a run that only chooses `tuned`: scored on a tenth held out of train, after the eval data's own part.

    steps: shorter than the runs that count; None: as long.
    """
    config = changed(variant.config, tuned)
    held = {
        name or "eval": amount for name, amount in eval_sets(config.data.eval).items() if not isinstance(amount, tuple)
    }  # the others are sources
    data = {"eval": held | {TUNED_ON: HELD_OUT}, "max_eval_examples": config.data.max_eval_examples or 500}
    train = _unchosen(config, f"{TUNED_ON}_{tuning_metric(config)}", seed)
    train |= {"evaluate_base": False, "predict_with_generate": False}
    return _with(config, output, data=data, train=train | ({"max_steps": steps} if steps else {}))


def tuning_metric(config: Config) -> str:
    """What is tuned by: the config's metric, or the loss where that would need generated texts."""
    metric = _metric(config)[1]
    return "loss" if metric in TEXT_METRICS else metric


def chosen_metric(config: Config) -> tuple[str, str]:
    """(eval set, metric) that variants are ranked by: metric_for_best_model; where that is the loss, what says more."""
    name, metric = _metric(config)
    if metric == "loss" and config.generation.metrics:
        return name, config.generation.metrics[0]
    return name, "accuracy" if metric == "loss" and config.data.label_names else metric


def _metric(config: Config) -> tuple[str, str]:
    found = selection_metric(config.train.metric_for_best_model, list(eval_sets(config.data.eval)) or [""])
    assert found is not None  # the config's rules
    return found


def _unchosen(config: Config, metric: str, seed: int) -> dict:
    return {
        "seed": seed,
        "eval_steps": AT_THE_END,
        "load_best_model_at_end": False,
        "early_stopping_patience": None,
        "metric_for_best_model": metric,
        "save_total_limit": 1,
    }


def _with(config: Config, output: Path, **sections: dict) -> Config:
    data = config.model_dump(mode="json")
    return parse_config(
        data | {name: data[name] | section for name, section in sections.items()} | {"output": str(output)}
    )


def folder_name(settings: dict[str, str]) -> str:
    """`rank=4,targets=q-v`: a name for a folder, of the last words of keys and of what is plain in values."""
    return ",".join(
        f"{key.rpartition('.')[2]}={re.sub(r'[^A-Za-z0-9._+-]+', '-', value).strip('-')[:60]}"
        for key, value in settings.items()
    )


def points(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """The product of the axes as settings."""
    for values in itertools.product(*(a.values for a in axes)):
        yield dict(zip([a.key for a in axes], values, strict=True))
