"""The section `adapter`: each method's own settings."""

from typing import Any, Literal, get_args

from pydantic import Field, model_serializer

from lora_ft.config.section import RESULT, Section
from lora_ft.config.types import Layers, LocalPath, Name, Names, Targets


def of(*methods: str) -> dict[str, Any]:
    """A setting of these methods alone."""
    return RESULT | {"methods": list(methods)}


class AdapterConfig(Section):
    method: Literal["lora", "full", "bottleneck", "prompt"] = Field(
        "lora",
        description="what trains: LoRA's A and B, every weight, adapter layers, or virtual tokens",
        json_schema_extra=RESULT,
    )
    rank: int = Field(8, ge=1, le=65536, description="rows of A and columns of B", json_schema_extra=of("lora"))
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank", json_schema_extra=of("lora"))
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead", json_schema_extra=of("lora"))
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input", json_schema_extra=of("lora"))
    targets: Targets = Field(
        ("q", "v"),
        description="roles q k v o gate up down, or groups attention (q k v o), mlp (gate up down), all (both)",
        json_schema_extra=of("lora"),
    )
    modules: Names = Field(
        (),
        description="more modules by exact name or dotted suffix, for what no role reaches",
        json_schema_extra=of("lora"),
    )
    layers: Layers = Field(
        None,
        description='which layers: null for all, a list [0, 1, 2], or a range "6-11"',
        json_schema_extra=of("lora", "bottleneck"),
    )
    init_from: LocalPath | None = Field(
        None,
        description="begin from this adapter's weights (lora-ft's or PEFT's) instead of the method's own start",
        json_schema_extra=of("lora", "bottleneck", "prompt"),
    )
    bottleneck_size: int = Field(
        64, ge=1, le=65536, description="width of an adapter layer's middle", json_schema_extra=of("bottleneck")
    )
    placement: Literal["houlsby", "pfeiffer"] = Field(
        "houlsby",
        description="adapter layers after attention and MLP (houlsby), or after the MLP alone (pfeiffer)",
        json_schema_extra=of("bottleneck"),
    )
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "relu", description="in an adapter layer's middle", json_schema_extra=of("bottleneck")
    )
    virtual_tokens: int = Field(
        20, ge=1, le=65536, description="learned vectors in front of each example", json_schema_extra=of("prompt")
    )
    init_text: Name | None = Field(
        None,
        description="a text whose tokens the virtual ones start from; null: drawn from the vocabulary",
        json_schema_extra=of("prompt"),
    )

    @model_serializer(mode="wrap")
    def _own_settings(self, handler: Any) -> dict[str, Any]:
        """A record holds the method's own settings: those of other methods say nothing about the run."""
        return {name: value for name, value in handler(self).items() if self.method in methods_of(name)}


def methods_of(setting: str) -> tuple[str, ...]:
    """The methods that a setting of `adapter` belongs to."""
    fields = AdapterConfig.model_fields
    extra = fields[setting].json_schema_extra
    assert isinstance(extra, dict)
    return tuple(extra.get("methods", get_args(fields["method"].annotation)))  # type: ignore[arg-type]
