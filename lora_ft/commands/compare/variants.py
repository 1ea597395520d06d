"""The variants of a comparison, the product of the `--vary` options, and the configs of their runs. Imports no torch."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_ft.config.load import load_config, parse_config
from lora_ft.config.schema import AdapterConfig, Config, eval_sets, methods_of
from lora_ft.config.tuning import tuning_config, tuning_metric, without_selection
from lora_ft.core.errors import ConfigError
from lora_ft.core.messages import printable
from lora_ft.core.metrics import selection_metric


@dataclass(frozen=True)
class Variant:
    """settings: the varied ones (key -> text). config: the complete config with them."""

    settings: dict[str, str]
    config: Config

    @property
    def name(self) -> str:
        """For tables and messages: `lora, rank=4`."""
        parts = [v if k == "adapter.method" else f"{k.rpartition('.')[2]}={v}" for k, v in self.settings.items()]
        return ", ".join(parts) or "as configured"

    @property
    def folder(self) -> str:
        """The start of its runs' folder names."""
        return folder_name(self.settings) or "as-configured"


def parse_axes(option: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """Setting -> values, from options `KEY=V1,V2,...` in YAML's flow style: `adapter.targets=[q],[q,v],all`.

    Raises:
        ConfigError: key or values are missing, or one of them is given twice.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, _, items = text.partition("=")
        key, values = key.strip(), _flow_items(f"[{items}]") if items.strip() else []
        if not key or not values:
            raise ConfigError(f"{option} {printable(text)}: give KEY=V1,V2,..., as in {option} adapter.rank=1,4,16")
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ConfigError(f"{option} {printable(text)}: {printable(twice)} is given twice")
        if key in axes:
            raise ConfigError(f"{option} {printable(key)}: given twice; give all its values at once")
        axes[key] = values
    return axes


def _flow_items(flow: str) -> list[str]:
    """The items of a list in YAML's flow style as texts, without quotes; [] if it is not such a list."""
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


def make_variants(path: Path, overrides: Sequence[str], axes: Mapping[str, Sequence[str]]) -> list[Variant]:
    """The product of the axes, each variant once: settings that do not apply to a variant's method are dropped.

    Raises:
        ConfigError: all errors of the config or of a variant; no eval data; two variants would share a folder.
    """
    base = load_config(path, overrides)
    if base.data.eval is None:
        sources = "a source, or a fraction of train to hold out (0.1)"
        raise ConfigError(f"{path}: data.eval: compare needs eval data: {sources}")
    for key, option in (("output", "--output"), ("train.seed", "--seeds")):
        if key in axes:
            raise ConfigError(f"--vary {key}: use {option} instead")
    variants: list[Variant] = []
    for point in grid_points(axes):
        method = point.get("adapter.method", base.adapter.method)
        settings = {key: value for key, value in point.items() if applies_to(key, method)}
        if settings not in [variant.settings for variant in variants]:
            variants.append(Variant(settings, with_settings(base, settings)))
    if unused := next((key for key in axes if not any(key in variant.settings for variant in variants)), None):
        raise ConfigError(f"--vary {unused}: applies to none of these methods")
    folders = [variant.folder for variant in variants]
    if shared := next((name for name in folders if folders.count(name) > 1), None):
        raise ConfigError(f"--vary: two variants would share the folder {shared}; compare them separately")
    return variants


def applies_to(key: str, method: str) -> bool:
    """Whether a setting has an effect with a method."""
    section, _, name = key.partition(".")
    return section != "adapter" or name not in AdapterConfig.model_fields or method in methods_of(name)


def with_settings(config: Config, settings: dict[str, str]) -> Config:
    """The config with other settings, and without those of another method."""
    data = config.model_dump(mode="json")
    method = settings.get("adapter.method", config.adapter.method)
    data["adapter"] = {key: value for key, value in data["adapter"].items() if applies_to(f"adapter.{key}", method)}
    if method != "lora":
        data["train"]["loraplus_ratio"] = None
    changes = [f"{key}={value}" for key, value in settings.items()]
    return parse_config(data, changes, f"the config with {', '.join(changes)}")


def final_config(variant: Variant, tuned: dict[str, str], seed: int, output: Path, evaluate_base: bool) -> Config:
    """The config of a run whose scores are reported: nothing in it is selected on the eval data."""
    config = with_settings(variant.config, tuned)
    train = {"evaluate_base": evaluate_base, "predict_with_generate": bool(config.generation.metrics)}
    return without_selection(config, output, train | {"seed": seed})


def tuning_run(variant: Variant, tuned: dict[str, str], seed: int, output: Path, steps: int | None = None) -> Config:
    """The config of a run that scores `tuned`. steps: its length; None: that of the final runs."""
    config = with_settings(variant.config, tuned)
    length = steps or config.train.max_steps
    return tuning_config(config, output, tuning_metric(variant.config), seed=seed, max_steps=length)


def ranking_metric(config: Config) -> tuple[str, str]:
    """(eval set, metric) to rank variants by: metric_for_best_model; if that is the loss, a more telling one."""
    selection = selection_metric(config.train.metric_for_best_model, list(eval_sets(config.data.eval)) or [""])
    assert selection is not None, "checked by the config's rules"
    name, metric = selection
    if metric == "loss" and config.generation.metrics:
        return name, config.generation.metrics[0]
    return name, "accuracy" if metric == "loss" and config.data.label_names else metric


def folder_name(settings: dict[str, str]) -> str:
    """A folder name for settings: `rank=4,targets=q-v`."""
    return ",".join(
        f"{key.rpartition('.')[2]}={re.sub(r'[^A-Za-z0-9._+-]+', '-', value)[:60].strip('-.')}"
        for key, value in settings.items()
    )


def grid_points(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """The product of the axes, each point as settings (key -> text)."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
