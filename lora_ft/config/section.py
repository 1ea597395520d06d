"""A section of the config, and one of its settings."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# The effect on `--resume` of changing a setting. result: refused, the run would differ. rounding: a warning, only rounding
# and dropout masks change. free: none. longer: a higher value continues the run, with the schedule recomputed.
Resume = Literal["result", "rounding", "free", "longer"]


class Section(BaseModel):
    """A closed, immutable table of settings; values are not converted between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def setting(default: Any, text: str, *, resume: Resume = "result", methods: str = "", **bounds: Any) -> Any:
    """A setting of a section: `text` is its meaning for messages, JSON Schema and reference page; `...` makes it required.

    `methods` are the values of adapter.method that use it, separated by spaces (none: all), `bounds` pydantic's ge, gt, le, lt.
    """
    return Field(default, description=text, json_schema_extra={"resume": resume, "methods": methods}, **bounds)
