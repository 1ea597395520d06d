"""The schema of a config: every setting with its default, its bounds, its meaning, and the effect of a change on `--resume`.

The single source of the settings: error messages, the JSON Schema and the reference page are made from it. A config is read
by `lora_ft.config.load`, which also applies the rules between settings.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_serializer
from pydantic.fields import FieldInfo

from lora_ft.config import data_types, types
from lora_ft.config.section import Resume, Section, setting
from lora_ft.config.trainer_section import TrainerConfig


class ModelConfig(Section):
    """The base model."""

    name: types.Source = setting(..., "the base model: a hub id, a local folder, or a local .gguf file")
    revision: types.Name | None = setting(None, "a branch, tag or commit on the hub; the record pins the commit")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "the data type of the weights; auto: as stored, except that float16 becomes float32 on a CPU"
    )
    quantization: Literal["nf4", "int8"] | None = setting(
        None, "store the frozen linear weights of the blocks in four bits (nf4; needs bitsandbytes) or eight (int8)"
    )


class AdapterConfig(Section):
    """What is trained."""

    method: Literal["lora", "full", "bottleneck", "prompt"] = setting(
        "lora", "what is trained: LoRA's A and B, all weights (full), bottleneck layers, or virtual tokens (prompt)"
    )
    rank: int = setting(8, "number of rows of A and columns of B", ge=1, le=65536, methods="lora")
    alpha: float = setting(16.0, "the update B A is scaled by alpha / rank", gt=0, methods="lora")
    rank_pattern: types.Ranks = setting(
        {}, 'other ranks by role, layers or module; the first counts: {mlp: 4, "0-5": 16, lm_head: 8}', methods="lora"
    )
    alpha_pattern: types.Alphas = setting({}, "other alphas, as rank_pattern", methods="lora")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead", methods="lora")
    init: Literal["kaiming", "pissa"] = setting(
        "kaiming", "what A and B start as: random and zero, or the principal part of W (PiSSA)", methods="lora"
    )
    dora: bool = setting(False, "train the length of each row of W too (DoRA)", methods="lora")
    dropout: float = setting(0.0, "dropout probability of the adapter's input", ge=0, lt=1, methods="lora")
    targets: types.Targets = setting(
        ("q", "v"),
        "the adapted projections: roles q k v o gate up down, or groups attention (q k v o), mlp (gate up down), all (both)",
        methods="lora",
    )
    modules: types.Names = setting((), "other modules, by exact name or dotted suffix (lm_head)", methods="lora")
    train_modules: types.Names = setting(
        (), "modules trained in full beside A and B, by exact name or dotted suffix (lm_head, norm)", methods="lora"
    )
    train_tokens: types.Names = setting(
        (), "tokens whose rows of the embedding, and of a tied head, are trained beside A and B", methods="lora"
    )
    add_tokens: types.Names = setting(
        (), "new tokens, added to the tokenizer and the base, and trained as train_tokens", methods="lora"
    )
    layers: types.Layers = setting(
        None, 'the adapted layers: null for all, a list [0, 1, 2], or a range "6-11"', methods="lora bottleneck"
    )
    exclude: types.Names = setting(
        (), "what is not adapted: roles, layers or modules, as in rank_pattern", methods="lora"
    )
    init_from: types.LocalPath | None = setting(
        None, "an adapter (from lora-ft or PEFT) whose weights to start from", methods="lora bottleneck prompt"
    )
    bottleneck_size: int = setting(64, "width of the bottleneck", ge=1, le=65536, methods="bottleneck")
    placement: Literal["houlsby", "pfeiffer"] = setting(
        "houlsby", "adapter layers after attention and MLP (houlsby) or the MLP only (pfeiffer)", methods="bottleneck"
    )
    nonlinearity: Literal["relu", "gelu", "silu", "tanh"] = setting(
        "relu", "activation function in the bottleneck", methods="bottleneck"
    )
    virtual_tokens: int = setting(20, "learned vectors in front of each example", ge=1, le=65536, methods="prompt")
    init_text: types.Name | None = setting(
        None, "a text whose tokens initialize the virtual tokens; null: drawn from the vocabulary", methods="prompt"
    )

    @model_serializer(mode="wrap")
    def _of_this_method(self, handler: Any) -> dict[str, Any]:
        """Only the method's settings: the others have no effect on the run."""
        return {name: value for name, value in handler(self).items() if self.method in methods_of(name)}


class DataConfig(Section):
    """Training and evaluation data, and the text that is learned from each row."""

    train: Annotated[types.Sources, Field(min_length=1)] = setting(
        ..., "training data: a jsonl, json, csv, tsv or parquet file, a hub id[:config][@split], or a list of these"
    )
    eval: types.EvalSets = setting(
        None,
        "evaluation data: as for train, or a fraction (0.05) or number (500) of training rows to hold out; or several sets by "
        "name: {dev: 0.05, test: test.jsonl}",
    )
    format: data_types.Format = setting(
        None,
        'how text files are written, as {separator: ";", encoding: cp1252, quote: none, escape: "\\\\", header: [a, b]}',
    )
    max_train_examples: int | None = setting(None, "train on a random sample of this size (by train.seed)", ge=1)
    max_eval_examples: int | None = setting(None, "evaluate on a random sample of this size of each set", ge=1)
    prompt: types.TemplateText | None = setting(None, "first form: {column} names, [[optional parts]]; not supervised")
    completion: types.Supervised | None = setting(None, "the text after the prompt, supervised with its end token")
    text: types.Supervised | None = setting(None, "second form: a text with columns in braces, fully supervised")
    messages: data_types.Messages = setting(
        None, "third form: a column of chat messages; or a list of such columns and of turns {role: text}, to be joined"
    )
    chat_template: types.LocalPath | None = setting(None, "a file with a chat template to replace the tokenizer's")
    chat_template_kwargs: types.TemplateKwargs = setting(
        None,
        "settings of the chat template, as {enable_thinking: false}; used for training and for every generation prompt",
    )
    roles: types.Roles = setting(None, "roles in the rows -> roles of the chat template, as {prompter: user}")
    supervise: Literal["all", "last"] = setting("all", "for data.messages: learn all assistant turns, or only the last")
    reasoning: Literal["keep", "drop"] = setting("keep", "for data.messages: learn supervised turns' reasoning, or not")
    label_names: types.LabelNames = setting(
        None, "{label: [negative, positive]} maps class ids to words and makes the evaluation a classification"
    )
    max_length: int = setting(512, "maximum number of tokens of an example; longer ones are cut", ge=2, le=2**24)
    truncate: Literal["column", "start", "end"] = setting(
        "column",
        "what a row too long loses: the middle of its longest columns or turns, then first turns of a chat; its start; its end",
        resume="free",
    )
    long_text: Literal["truncate", "split"] = setting(
        "truncate", "for data.text: truncate long texts, or split them into pieces of max_length"
    )
    bad_rows: Literal["error", "skip"] = setting("error", "invalid rows: stop, or skip, count and list them")


class TrainConfig(Section):
    """The training loop."""

    num_train_epochs: float = setting(1.0, "passes over the data; max_steps overrides it", gt=0, resume="longer")
    max_steps: int | None = setting(None, "number of optimizer steps", ge=1, resume="longer")
    batch_size: int = setting(16, "examples per optimizer step, over all devices", ge=1)
    micro_batch_tokens: types.MicroBatchTokens = setting(
        "auto", "tokens per micro-batch: affects memory, speed, rounding and dropout masks only", resume="rounding"
    )
    share_prefixes: types.AutoOrOff = setting(
        "auto", "compute what examples of a micro-batch begin with alike once; or off", resume="rounding"
    )
    learning_rate: types.LearningRate = setting(
        5e-4, "the schedule's maximum; auto: found by five short runs, scored on a held-out part of train"
    )
    loraplus_ratio: float | None = setting(None, "LoRA+: how many times A's learning rate B's is; null: the same", gt=0)
    lr_scheduler_type: types.Scheduler = setting("linear", "the learning rate schedule, by its name in transformers")
    warmup_steps: types.StepsOrZero = setting(0.06, "below 1 a fraction of the run, from 1 a number of steps; 0: none")
    weight_decay: float = setting(0.0, "weight decay of AdamW", ge=0)
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0: do not clip", ge=0)
    gradient_checkpointing: bool = setting(False, "recompute activations: less memory, slower", resume="rounding")
    seed: int = setting(0, "seed of A's initialization, the order of the data, samples and dropout", ge=0, lt=2**32)
    logging_steps: types.Steps = setting(10, "logging interval: fraction of the run or number of steps", resume="free")
    eval_steps: types.Steps = setting(0.25, "evaluation interval: fraction of the run or number of steps")
    save_steps: types.Steps = setting(0.25, "steps between checkpoints, or fraction of the run", resume="free")
    save_total_limit: int | None = setting(2, "checkpoints to keep besides the best; null for all", ge=1, resume="free")
    metric_for_best_model: types.Name = setting(
        "loss",
        "metric on the evaluation data: loss; with label_names accuracy or macro_f1; with predict_with_generate one of "
        "generation.metrics. With several sets that of the first, or by name as in dev_loss",
    )
    predict_with_generate: bool = setting(False, "generate texts for generation.metrics in each evaluation (slow)")
    evaluate_base: bool = setting(True, "evaluate the base first, for the report (one more evaluation)", resume="free")
    load_best_model_at_end: bool = setting(True, "with evaluation data: output gets the best adapter, not the last")
    early_stopping_patience: int | None = setting(None, "stop after this many evaluations without improvement", ge=1)
    report_to: types.Reporters = setting(("tensorboard",), "where metrics are reported; [] for nowhere", resume="free")


class GenerationConfig(Section):
    """Generated texts and their metrics."""

    metrics: types.TextMetrics = setting((), "how `lora-ft eval` compares generated texts with the completions")
    max_prompts: int | None = setting(None, "generate for a random sample of this number of distinct prompts", ge=1)
    max_new_tokens: int = setting(128, "maximum number of tokens of a generated text", ge=1)
    batch_size: int = setting(32, "prompts per batch", ge=1, resume="rounding")
    num_beams: int = setting(1, "number of beams of a beam search; 1: greedy", ge=1)
    length_penalty: float = setting(1.0, "in a beam search, above 0 favors longer texts, below 0 shorter ones")
    no_repeat_ngram_size: int = setting(0, "no sequence of this number of tokens is repeated; 0: no limit", ge=0)
    do_sample: bool = setting(False, "sample, with train.seed as the seed")
    temperature: float = setting(1.0, "sampling temperature; below 1 is less random", gt=0)
    top_k: int = setting(0, "sample from this number of most likely tokens; 0: from all", ge=0)
    top_p: float = setting(1.0, "sample from the most likely tokens that add up to this probability", gt=0, le=1)


class Config(Section):
    """The settings of one fine-tuning run."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    trainer: TrainerConfig = TrainerConfig()
    output: types.LocalPath = setting("out", "the folder for the adapter, its checkpoints and logs", resume="free")


SECTIONS = {
    name: section
    for name, field in Config.model_fields.items()
    if isinstance(section := field.annotation, type) and issubclass(section, Section)
}
CHAT_SETTINGS = ("chat_template_kwargs", "roles", "supervise", "reasoning")  # of data, besides chat_template


def methods_of(name: str) -> tuple[str, ...]:
    """The values of adapter.method that use this setting of `adapter`."""
    fields = AdapterConfig.model_fields
    return tuple(_extra(fields[name])["methods"].split()) or get_args(fields["method"].annotation)


def resume_class(section: str, name: str = "") -> Resume:
    """The effect on `--resume` of changing a setting of a section, or one outside; "result" where it is not known."""
    fields = SECTIONS[section].model_fields if section in SECTIONS else {}
    return _extra(fields.get(name) if name else Config.model_fields.get(section)).get("resume", "result")


def _extra(field: FieldInfo | None) -> dict[str, Any]:
    """The `resume` and `methods` of a setting; {} of another field."""
    extra = field and field.json_schema_extra
    return extra if isinstance(extra, dict) else {}


def eval_sets(value: types.EvalSets) -> dict[str, types.EvalSet]:
    """data.eval as a mapping of names to sets; a single set without a name is called ""."""
    return value if isinstance(value, dict) else {} if value is None else {"": value}
