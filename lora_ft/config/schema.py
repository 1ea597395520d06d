"""The config's schema: every setting with its default, range, meaning, and what changing it means for `--resume`.

The one source of the settings: help, the JSON Schema and the reference come from these descriptions. `lora_ft.config.load`
is the door: it reads files, and adds the rules between settings.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from lora_ft.config.adapter_settings import AdapterConfig
from lora_ft.config.data_types import Column, EvalSet, EvalSets, LabelNames, Supervised, Template
from lora_ft.config.section import FREE, LONGER, RESULT, ROUNDING, Section
from lora_ft.config.types import (
    Dtype,
    LocalPath,
    MicroBatch,
    Name,
    Names,
    Reporters,
    Scheduler,
    Steps,
    StepsOrNone,
    TextMetrics,
)


def eval_sets(value: EvalSets) -> dict[str, EvalSet]:
    """data.eval as a mapping of names to sets; a single set without a name is called ""."""
    return value if isinstance(value, dict) else {} if value is None else {"": value}


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


class DataConfig(Section):
    train: Annotated[Names, Field(min_length=1)] = Field(
        description="a local jsonl, json, csv, tsv or parquet file, or a hub id[:config][@split]; or a list of them",
        json_schema_extra=RESULT,
    )
    eval: EvalSets = Field(
        None,
        description="the same as train, or a fraction (0.05) or count (500) held out of train by seed, or null; "
        "or several such, by name: {dev: 0.05, test: test.jsonl}",
        json_schema_extra=RESULT,
    )
    max_train_examples: int | None = Field(
        None, ge=1, description="train on a seeded sample of so many", json_schema_extra=RESULT
    )
    max_eval_examples: int | None = Field(
        None, ge=1, description="evaluate on a seeded sample of so many, of each set", json_schema_extra=RESULT
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
    chat_template: LocalPath | None = Field(
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
    metric_for_best_model: Name = Field(
        "loss",
        description="on the eval data: loss, with label_names accuracy and macro_f1, with predict_with_generate one of "
        "generation.metrics; of several sets the first's, or by name as in dev_loss",
        json_schema_extra=RESULT,
    )
    predict_with_generate: bool = Field(
        False,
        description="evaluations in training generate too, for generation.metrics: slow, so off",
        json_schema_extra=RESULT,
    )
    evaluate_base: bool = Field(
        True,
        description="score the base before the first step, for the report: takes as long as any evaluation",
        json_schema_extra=FREE,
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


class GenerationConfig(Section):
    metrics: TextMetrics = Field(
        (),
        description="scores of generated texts against the completions, by lora-ft eval: bleu, rouge_l, exact_match",
        json_schema_extra=RESULT,
    )
    max_prompts: int | None = Field(
        None, ge=1, description="generate for a seeded sample of so many distinct prompts", json_schema_extra=RESULT
    )
    max_new_tokens: int = Field(128, ge=1, description="tokens of a generated text at most", json_schema_extra=RESULT)
    batch_size: int = Field(32, ge=1, description="prompts decoded at a time", json_schema_extra=ROUNDING)
    num_beams: int = Field(1, ge=1, description="beam search, from 2; 1: greedy", json_schema_extra=RESULT)
    length_penalty: float = Field(
        1.0, description="beams: above 0 favours longer texts, below 0 shorter ones", json_schema_extra=RESULT
    )
    no_repeat_ngram_size: int = Field(
        0, ge=0, description="no sequence of so many tokens comes twice; 0: no such rule", json_schema_extra=RESULT
    )
    do_sample: bool = Field(False, description="sample, by train.seed", json_schema_extra=RESULT)
    temperature: float = Field(1.0, gt=0, description="do_sample: below 1 is less random", json_schema_extra=RESULT)
    top_k: int = Field(
        0, ge=0, description="do_sample: among so many likeliest tokens; 0: all", json_schema_extra=RESULT
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="do_sample: among the likeliest of this share", json_schema_extra=RESULT
    )


class Config(Section):
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    trainer: dict[str, Any] = Field(
        {}, description="any other field of transformers.TrainingArguments", json_schema_extra=FREE
    )
    output: LocalPath = Field("out", description="the folder that gets the adapter", json_schema_extra=FREE)
