"""What every section of a config is, and what its settings say of `--resume`."""

from typing import Any

from pydantic import BaseModel, ConfigDict

# What changing a setting means for a run that is resumed.
RESULT: dict[str, Any] = {"resume": "result"}  # another result: refused
ROUNDING: dict[str, Any] = {"resume": "rounding"}  # only rounding, and where dropout masks fall: a warning
FREE: dict[str, Any] = {"resume": "free"}  # nothing
LONGER: dict[str, Any] = {"resume": "longer"}  # more of it goes on, with the schedule derived again


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
