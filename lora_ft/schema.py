"""The config's schema: every setting with its default, range, meaning, and what changing it means for `--resume`.

The one source of the settings: help, the JSON Schema and the reference come from these descriptions. `lora_ft.config`
is the door: it reads files, and adds the rules between settings.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from lora_ft.setting_types import (
    Column,
    Dtype,
    HeldOut,
    LabelNames,
    Layers,
    Metric,
    MicroBatch,
    Name,
    Names,
    Reporters,
    Scheduler,
    Steps,
    StepsOrNone,
    Supervised,
    Targets,
    Template,
)

# What changing a setting means for a run that is resumed.
RESULT: dict[str, Any] = {"resume": "result"}  # another result: refused
ROUNDING: dict[str, Any] = {"resume": "rounding"}  # only rounding, and where dropout masks fall: a warning
FREE: dict[str, Any] = {"resume": "free"}  # nothing
LONGER: dict[str, Any] = {"resume": "longer"}  # more of it goes on, with the schedule derived again


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    name: Name = Field(
        description="the base: a hub id, a local folder, or a local .gguf file", json_schema_extra=RESULT
    )
    revision: Name | None = Field(
        None,
        description="branch, tag or commit on the hub; the record pins it",
        json_schema_extra=RESULT,
    )
    dtype: Dtype = Field(
        "auto", description="auto: as stored, but float16 becomes float32 on a CPU", json_schema_extra=RESULT
    )


def of(*methods: str) -> dict[str, Any]:
    """A setting of these methods alone."""
    return RESULT | {"methods": list(methods)}


class AdapterConfig(Section):
    method: Literal["lora", "full", "bottleneck", "prompt", "bias"] = Field(
        "lora",
        description="what trains: LoRA's A and B, every weight, adapter layers, virtual tokens, or the bias terms",
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
    init_from: Name | None = Field(
        None,
        description="begin from this adapter's weights (lora-ft's or PEFT's) instead of the method's own start",
        json_schema_extra=of("lora", "bottleneck", "prompt", "bias"),
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


class DataConfig(Section):
    train: Annotated[Names, Field(min_length=1)] = Field(
        description="a local jsonl, json, csv, tsv or parquet file, or a hub id[:config][@split]; or a list of them",
        json_schema_extra=RESULT,
    )
    eval: HeldOut = Field(
        None,
        description="the same as train, or a fraction (0.05) or count (500) held out of train by seed, or null",
        json_schema_extra=RESULT,
    )
    max_train_examples: int | None = Field(
        None, ge=1, description="train on a seeded sample of so many", json_schema_extra=RESULT
    )
    max_eval_examples: int | None = Field(
        None, ge=1, description="evaluate on a seeded sample of so many", json_schema_extra=RESULT
    )
    prompt: Template | None = Field(
        None, description="first form: a text with columns in braces, not supervised", json_schema_extra=RESULT
    )
    completion: Supervised | None = Field(
        None, description="what follows the prompt: supervised, and so is its end", json_schema_extra=RESULT
    )
    text: Supervised | None = Field(
        None, description="second form: a text with columns in braces, all of it supervised", json_schema_extra=RESULT
    )
    messages: Column | None = Field(
        None, description="third form: a column of role/content or from/value turns", json_schema_extra=RESULT
    )
    chat_template: Name | None = Field(
        None, description="a file with the chat template, instead of the tokenizer's own", json_schema_extra=RESULT
    )
    label_names: LabelNames = Field(
        None,
        description="{label: [negative, positive]} turns class ids into words; makes eval a classification",
        json_schema_extra=RESULT,
    )
    max_length: int = Field(
        512, ge=2, le=2**24, description="tokens of an example at most; longer ones are cut", json_schema_extra=RESULT
    )
    long_text: Literal["truncate", "split"] = Field(
        "truncate",
        description="text only: cut a long text, or split it into pieces of max_length",
        json_schema_extra=RESULT,
    )
    bad_rows: Literal["error", "skip"] = Field(
        "error", description="rows that are wrong: stop, or skip them, counted and listed", json_schema_extra=RESULT
    )


class TrainConfig(Section):
    num_train_epochs: float = Field(
        1.0, gt=0, description="passes over the data; max_steps, when given, beats it", json_schema_extra=LONGER
    )
    max_steps: int | None = Field(None, ge=1, description="optimizer steps", json_schema_extra=LONGER)
    batch_size: int = Field(16, ge=1, description="examples per step, over all devices", json_schema_extra=RESULT)
    micro_batch_tokens: MicroBatch = Field(
        "auto",
        description="how a batch is cut: memory and speed, never the gradient (without dropout)",
        json_schema_extra=ROUNDING,
    )
    learning_rate: float = Field(5e-4, gt=0, description="the schedule's peak", json_schema_extra=RESULT)
    lr_scheduler_type: Scheduler = Field(
        "linear", description="the schedule, by transformers' name", json_schema_extra=RESULT
    )
    warmup_steps: StepsOrNone = Field(
        0.06, description="below 1 a fraction of the run, from 1 a count; 0 for none", json_schema_extra=RESULT
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's", json_schema_extra=RESULT)
    max_grad_norm: float = Field(1.0, ge=0, description="clips gradients; 0: never", json_schema_extra=RESULT)
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice: less memory, slower", json_schema_extra=ROUNDING
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="of A, the order of the data, samples, dropout", json_schema_extra=RESULT
    )
    logging_steps: Steps = Field(10, description="when to log: a fraction or a count", json_schema_extra=FREE)
    eval_steps: Steps = Field(0.25, description="when to evaluate: a fraction or a count", json_schema_extra=RESULT)
    save_steps: Steps = Field(0.25, description="when to save: a fraction or a count", json_schema_extra=FREE)
    save_total_limit: int | None = Field(
        2, ge=1, description="checkpoints kept, beside the best; null for all", json_schema_extra=FREE
    )
    metric_for_best_model: Metric = Field(
        "loss", description="on the eval data; accuracy and macro_f1 with label_names", json_schema_extra=RESULT
    )
    load_best_model_at_end: bool = Field(
        True, description="with eval data: the output gets the best adapter, not the last", json_schema_extra=RESULT
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without improvement", json_schema_extra=RESULT
    )
    report_to: Reporters = Field(
        ("tensorboard",), description="where metrics go; [] for nowhere", json_schema_extra=FREE
    )


class Config(Section):
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    trainer: dict[str, Any] = Field(
        {}, description="any other field of transformers.TrainingArguments", json_schema_extra=FREE
    )
    output: Name = Field("out", description="the folder that gets the adapter", json_schema_extra=FREE)
