"""What differs between a record's config and one of now, by what it means for going on. Imports no torch."""

from lora_ft.config.load import Config, resume_class
from lora_ft.core.messages import format_value


def flat(config: dict) -> dict[tuple[str, str], object]:
    """(section, setting) -> value; a top-level setting has the section ""."""
    settings: dict[tuple[str, str], object] = {}
    for section, value in config.items():
        if isinstance(value, dict):
            settings |= {(section, k): v for k, v in value.items()}
        else:
            settings["", section] = value
    return settings


def changes(before: dict, now: Config) -> dict[str, list[str]]:
    """What differs between a record's config and this one, by class (see lora_ft.config.schema): "section.setting: was X, is Y"."""
    old, new = flat(before), flat(now.model_dump(mode="json"))
    found: dict[str, list[str]] = {"result": [], "rounding": [], "free": [], "longer": []}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            section, setting = key
            try:
                kind = resume_class(section, setting) if section else resume_class(setting)
            except KeyError:  # not a setting of this version
                kind = "result"
            name = f"{section}.{setting}".lstrip(".")
            found[kind].append(f"{name}: was {format_value(old.get(key))}, is {format_value(new.get(key))}")
    return found
