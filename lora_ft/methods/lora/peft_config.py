"""PEFT's adapter_config.json (peft 0.21): which settings are accepted, a module's rank and alpha, the targeted modules.

Imports no torch.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import regex

from lora_ft.core.errors import ModelError
from lora_ft.core.messages import printable, warn
from lora_ft.nn.expert_names import PATH, is_targeted, parameter_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"  # the end of the name of an embedding's trained rows
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
LENGTHS = re.compile(r"base_model\.model\.(.+)\.lora_magnitude_vector")  # DoRA's

# Settings that change what the tensors compute. When off they are null, false, empty or absent.
REFUSED = {
    "lora_bias": "trained biases (lora_bias)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "velora_config": "VeLoRA (velora_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
}
KNOWN = {  # all others of PEFT 0.21; the last line: of earlier versions
    *(
        "peft_type",
        "task_type",
        "peft_version",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "ensure_weight_tying",
    ),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("modules_to_save", "trainable_token_indices", "megatron_config", "megatron_core", "qalora_group_size", *REFUSED),
    *("runtime_config", "merge_weights"),
}
# These only initialize A and B; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA also change W.
INITS_OF_A_AND_B = ("gaussian", "eva", "orthogonal")

# Limits for patterns, which an adapter's author chose and PEFT gives to `re`, where some never end
MAX_PATTERNS, MAX_PATTERN_CHARS, MATCH_SECONDS = 10_000, 10_000, 0.1


def check_config(path: Path, config: dict) -> None:
    """Check that an adapter with this config can be applied exactly: else raise ModelError."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported.")
    for key, what in REFUSED.items():
        if config.get(key):
            raise ModelError(f"{path}: the adapter uses {what}, which can't be applied here. Merge it with PEFT.")
    if (bias := config.get("bias")) not in (None, "none"):
        raise ModelError(f"{path}: bias is {bias!r}: trained biases can't be applied here. Merge it with PEFT.")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ModelError(f"{path}: task_type is {config['task_type']!r}; only CAUSAL_LM is supported.")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in INITS_OF_A_AND_B):
        raise ModelError(
            f"{path}: init_lora_weights {init!r} changes the base weights too. Convert the adapter with PEFT first "
            "(path_initial_model_for_weight_conversion)."
        )
    _rank(path, "r", config.get("r"))
    _alpha(path, "lora_alpha", config.get("lora_alpha"))
    for key, check in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ModelError(f"{path}: {key} must be a table of patterns.")
        _check_patterns(path, key, list(patterns))
        for pattern, value in patterns.items():
            check(path, f"{key}[{pattern!r}]", value)
    text, number = (str, "string"), (int, "number")
    kinds = {
        "target_modules": text,
        "target_parameters": text,
        "exclude_modules": text,
        "layers_pattern": text,
        "layers_to_transform": number,
    }
    for key, (kind, name) in kinds.items():
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(v, kind) for v in values):
            raise ModelError(f"{path}: {key} must be a {name} or a list of {name}s.")
        if key == "target_parameters" and not isinstance(value, list | None):
            raise ModelError(f"{path}: {key} must be a list of strings.")
        if kind is str:
            _check_patterns(path, key, [v for v in values if v is not None])
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key), bool | None):
            raise ModelError(f"{path}: {key} is {config[key]!r:.40}; it must be true or false.")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
        raise ModelError(f"{path}: modules_to_save must be a list of names.")
    token_indices(path, config.get("trainable_token_indices"))
    _check_unknown(path, {key: config[key] for key in sorted(config.keys() - KNOWN) if config[key]})


def _check_unknown(path: Path, settings: dict) -> None:
    """What PEFT 0.21 doesn't know: a later one's method is switched on by true, a list or a table; the rest is told."""
    for key, value in settings.items():
        if value is True or isinstance(value, list | dict):
            shown = printable(repr(value), 60)
            raise ModelError(
                f"{path}: unknown setting {printable(key)}: {shown}; it may change what the adapter does. Merge it with the "
                "PEFT that wrote it."
            )
    if settings:
        named = printable(", ".join(f"{key}: {value!r}" for key, value in settings.items()))
        warn(f"{path}: ignored settings that are unknown here, perhaps of a later PEFT: {named}.")


def file_rank(parts: dict[str, dict]) -> int:
    """R, the largest rank in an adapter's files, which holds the stacked parts of any module. parts: the record's `slices`."""
    return max(entry["rank"] * len(entry["parts"]) for entry in parts.values())


def file_ranks(parts: dict[str, dict]) -> dict[str, int]:
    """Each module's rank in the files: R for all if they have one scaling, else their own."""
    if len({entry["scaling"] for entry in parts.values()}) == 1:
        return dict.fromkeys(parts, file_rank(parts))
    return {module: entry["rank"] * len(entry["parts"]) for module, entry in parts.items()}


def _rank(path: Path, key: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{path}: {key} is {value!r}; a rank is an integer of at least 1.")


def _alpha(path: Path, key: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e30:
        text = value if isinstance(value, float) else repr(value)[:40]
        raise ModelError(f"{path}: {key} is {text}; it must be a finite number.")


def by_pattern(path: Path, patterns: dict | None, module: str, default):
    """The value of the first pattern that matches the end of the module's path (PEFT's `get_pattern_key`), or `default`."""
    for pattern, value in (patterns or {}).items():
        try:
            if _match(rf"(.*\.)?({pattern})$", module):
                return value
        except (regex.error, RecursionError, TimeoutError) as e:
            raise ModelError(f"{path}: {pattern!r:.200} isn't a valid pattern ({e}).") from e
    return default


def _check_patterns(path: Path, key: str, patterns: list[str]) -> None:
    if len(patterns) > MAX_PATTERNS or any(len(pattern) > MAX_PATTERN_CHARS for pattern in patterns):
        limit = f"at most {MAX_PATTERNS:,} patterns of {MAX_PATTERN_CHARS:,} characters are read"
        raise ModelError(f"{path}: {key}: {limit}.")


_compiled = cache(regex.compile)


def _match(pattern: str, name: str, whole: bool = False) -> regex.Match | None:
    """`re.match` or, for the `whole` name, `re.fullmatch`. Raises TimeoutError for a pattern that backtracks without end."""
    compiled = _compiled(pattern)
    try:
        return (compiled.fullmatch if whole else compiled.match)(name, timeout=MATCH_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"matching {name} takes more than {MATCH_SECONDS} s") from None


def targeted(config: dict, names: Iterable[str], head: str | None) -> set[str] | None:
    """The modules that PEFT would adapt with this config (its `check_target_module_exists`).

    A subset of `names`, the paths of the linear modules, of which `head` is the output head; experts' layers by the parameters
    that it would adapt. None if the config leaves the choice to PEFT's table of architectures.
    """
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")
    if wanted is None:
        return None
    experts = {name for name in names if PATH.fullmatch(name)}
    of_experts = {name for name in experts if is_targeted(parameter_of(name), config.get("target_parameters") or [])}
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def chosen(name: str) -> bool:
        if excluded and _named(excluded, name):
            return False
        if wanted == "all-linear":
            return name != head
        if not _named(wanted, name):
            return False
        if not layers or isinstance(wanted, str) or name in wanted:
            return True
        matches = (_match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", name) for p in patterns)
        return next((int(match["index"]) in layers for match in matches if match), False)

    try:
        return of_experts | {name for name in names if name not in experts and chosen(name)}
    except (regex.error, RecursionError, TimeoutError) as e:
        where = "target_modules, exclude_modules or layers_pattern"
        raise ModelError(f"{CONFIG}: a pattern of {where} is invalid: {e}.") from e


def token_indices(path: Path, setting: object) -> list[int]:
    """The tokens whose rows are trained: the list, or that of the modules in a table, if they have the same.

    Raises ModelError for anything else.
    """
    lists = list(setting.values()) if isinstance(setting, dict) else [setting or []]
    if not lists or any(ids != lists[0] for ids in lists):
        raise ModelError(f"{path}: trainable_token_indices has other tokens for each module. Merge it with PEFT.")
    ids = lists[0]
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids) or len({*ids}) < len(ids):
        raise ModelError(f"{path}: trainable_token_indices must be a list of different token ids.")
    return ids


def is_saved_whole(name: str, modules_to_save: list[str] | None) -> bool:
    """Whether PEFT trains the module of this name in full: it compares the ends, whole words or not (its `_set_trainable`)."""
    return name.endswith(tuple(modules_to_save or ()))


def _named(patterns: str | list[str], name: str) -> bool:
    if isinstance(patterns, str):
        return _match(patterns, name, whole=True) is not None
    return any(f".{name}".endswith(f".{p}") for p in patterns)
