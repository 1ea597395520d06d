"""Every field of transformers.TrainingArguments: ours, allowed under `trainer`, or refused with the reason.

A test holds the three tables against the installed version.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from lora_ft.core.messages import format_value, printable
from lora_ft.core.names import nearest

# field -> our setting that governs it
OURS = {
    "output_dir": "output",
    "per_device_train_batch_size": "train.batch_size",  # over all devices, and cut by train.micro_batch_tokens
    "num_train_epochs": "train.num_train_epochs",
    "max_steps": "train.max_steps",
    "learning_rate": "train.learning_rate",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing": "train.gradient_checkpointing",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "logging_steps": "train.logging_steps",
    "eval_steps": "train.eval_steps",
    "save_steps": "train.save_steps",
    "save_total_limit": "train.save_total_limit",
    "metric_for_best_model": "train.metric_for_best_model",
    "load_best_model_at_end": "train.load_best_model_at_end",
    "report_to": "train.report_to",
    "label_names": "data.label_names",
}


class Allowed(NamedTuple):
    kind: type | tuple[str, ...]  # a tuple lists the words to choose from
    resume: Literal["result", "rounding", "free"]  # what a change means for --resume
    low: float = -math.inf
    high: float = math.inf  # not included


_LEVELS = ("passive", "debug", "detail", "info", "warning", "error", "critical")

ALLOWED = {
    "lr_scheduler_kwargs": Allowed(dict, "result"),
    "optim": Allowed(("adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop"), "result"),
    "optim_args": Allowed(str, "result"),
    "adam_beta1": Allowed(float, "result", 0, 1),
    "adam_beta2": Allowed(float, "result", 0, 1),
    "adam_epsilon": Allowed(float, "result", 0),
    "bf16": Allowed(bool, "result"),
    "tf32": Allowed(bool, "result"),
    "eval_on_start": Allowed(bool, "result"),
    "eval_delay": Allowed(float, "result", 0),
    "full_determinism": Allowed(bool, "rounding"),
    "use_cpu": Allowed(bool, "rounding"),
    "ddp_backend": Allowed(("nccl", "gloo", "mpi", "xccl", "hccl"), "rounding"),
    "ddp_bucket_cap_mb": Allowed(int, "rounding", 1),
    "ddp_timeout": Allowed(int, "free", 1),
    "fsdp": Allowed(bool, "rounding"),
    "logging_first_step": Allowed(bool, "free"),
    "log_on_each_node": Allowed(bool, "free"),
    "log_level": Allowed(_LEVELS, "free"),
    "log_level_replica": Allowed(_LEVELS, "free"),
    "run_name": Allowed(str, "free"),
    "project": Allowed(str, "free"),
    "trackio_space_id": Allowed(str, "free"),
    "trackio_bucket_id": Allowed(str, "free"),
    "skip_memory_metrics": Allowed(bool, "free"),
}

_STEP = "a step here is a list of micro-batches cut by tokens, which this would break"
_PLAN = "which examples make a step is planned from train.seed, and the plan's batches are made in place"
_LOSS = "the loss is summed over supervised tokens and divided by their number in the whole batch"
_EVAL = "evaluation is lora-ft's own: it scores supervised tokens and keeps no predictions"
_WHEN = "the *_steps settings under train say when"
_STATE = "a checkpoint here is complete, written once and without pickles, so that a resumed run ends in the same bits"
_PUSH = "nothing is pushed while training; push the finished folder: `lora-ft export FOLDER --to peft --push REPO`"
_CODE = "it replaces parts of the model's own computation, which lora-ft relies on"
_KERNEL = "not supported: micro-batches have varying shapes"
_DDP = "set by lora-ft, so that each step is one all-reduce of the adapter"
_SHARD = "not supported: a run is several processes (--processes), with trainer.fsdp each keeps a share of the base"
_SCRIPT = "the commands say it: lora-ft train, lora-ft eval"

# field -> why it can't be set
REFUSED = {
    "disable_tqdm": "the bar is lora-ft's own, and shows on a terminal only",
    "gradient_accumulation_steps": f"{_STEP}; train.micro_batch_tokens lowers memory",
    "auto_find_batch_size": f"{_STEP}; train.micro_batch_tokens lowers memory",
    "torch_empty_cache_steps": _STEP,
    "average_tokens_across_devices": f"{_LOSS}, over all devices already",
    "label_smoothing_factor": f"{_LOSS}; label smoothing is not supported",
    "neftune_noise_alpha": "its noise is scaled by the row's length, and rows here hold several examples",
    "fp16": "float16 needs a loss scaler, which is not supported; use bf16 here, or model.dtype",
    "fp16_full_eval": "it would round the adapter itself; use model.dtype",
    "bf16_full_eval": "it would round the adapter itself; use model.dtype",
    "gradient_checkpointing_kwargs": "set by lora-ft; train.gradient_checkpointing turns it on",
    "activation_checkpointing_kwargs": "set by lora-ft; train.gradient_checkpointing turns it on",
    "optim_target_modules": "adapter.targets and adapter.modules say what is trained",
    "torch_compile": _KERNEL,
    "torch_compile_backend": _KERNEL,
    "torch_compile_mode": _KERNEL,
    "use_liger_kernel": _CODE,
    "liger_kernel_config": _CODE,
    "use_cache": "a cache would mix the examples that share a row",
    "logging_strategy": _WHEN,
    "logging_nan_inf_filter": "a loss that is no number stops the run, it is never hidden",
    "include_num_input_tokens_seen": "log.jsonl counts tokens already",
    "trackio_static_space_id": _PUSH,
    "eval_strategy": f"{_WHEN}, and data.eval whether",
    "per_device_eval_batch_size": f"{_EVAL}; train.micro_batch_tokens cuts its batches too",
    "prediction_loss_only": _EVAL,
    "eval_do_concat_batches": _EVAL,
    "eval_use_gather_object": _EVAL,
    "eval_accumulation_steps": _EVAL,
    "include_for_metrics": _EVAL,
    "batch_eval_metrics": _EVAL,
    "greater_is_better": "train.metric_for_best_model says it: less is better for loss, more for the others",
    "save_strategy": _WHEN,
    "save_only_model": _STATE,
    "save_on_each_node": _STATE,
    "enable_jit_checkpoint": f"{_STATE}; a stopped run writes one by itself",
    "ignore_data_skip": _STATE,
    "restore_callback_states_from_checkpoint": _STATE,
    "resume_from_checkpoint": "say `lora-ft train CONFIG --resume`",
    "push_to_hub": _PUSH,
    "hub_token": _PUSH,
    "hub_private_repo": _PUSH,
    "hub_model_id": _PUSH,
    "hub_strategy": _PUSH,
    "hub_always_push": _PUSH,
    "hub_revision": _PUSH,
    "accelerator_config": _PLAN,
    "dataloader_drop_last": _PLAN,
    "dataloader_num_workers": _PLAN,
    "dataloader_pin_memory": _PLAN,
    "dataloader_persistent_workers": _PLAN,
    "dataloader_prefetch_factor": _PLAN,
    "dataloader_multiprocessing_context": _PLAN,
    "dataloader_in_order": _PLAN,
    "remove_unused_columns": _PLAN,
    "train_sampling_strategy": _PLAN,
    "length_column_name": _PLAN,
    "ddp_find_unused_parameters": _DDP,
    "ddp_broadcast_buffers": _DDP,
    "ddp_static_graph": _DDP,
    "local_rank": "the launcher sets it",
    "parallelism_config": _SHARD,
    "fsdp_config": _SHARD,
    "deepspeed": _SHARD,
    "debug": "run `lora-ft train CONFIG --debug`",
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
}

# lr_scheduler_type -> what trainer.lr_scheduler_kwargs may hold for it. Schedules of the step alone: those that follow
# a metric (reduce_lr_on_plateau, greedy) can't be derived again for a longer run.
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}


def problems(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong and what to do) for each field of the config's `trainer` table that is not right."""
    for field, value in table.items():
        if field in OURS:
            yield field, f"set {OURS[field]} instead, which governs it"
        elif field in REFUSED:
            yield field, f"can't be set: {REFUSED[field]}"
        elif field not in ALLOWED:
            near = nearest(field, [*ALLOWED, *OURS, *REFUSED])
            yield field, "no field of TrainingArguments" + (f"; did you mean {near}?" if near else "; remove it")
        elif not _fits(value, ALLOWED[field]):
            yield field, f"{format_value(value)} does not fit; give {wanted(ALLOWED[field])}"


def scheduler_problem(scheduler: str, kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with `trainer.lr_scheduler_kwargs` for this `train.lr_scheduler_type`, if anything."""
    known = SCHEDULERS[scheduler]
    for name in kwargs:
        if name not in known:
            return f"{printable(name)} means nothing to {scheduler}; it takes " + (", ".join(known) or "no arguments")
    for name, value in kwargs.items():
        text = name in ("warmup_type", "decay_type")
        if text and value not in ("linear", "cosine", "1-sqrt"):
            return f"{name} is {format_value(value)}; give linear, cosine or 1-sqrt"
        if not text and not _fits(value, Allowed(float, "result", 0)):
            return f"{name} is {format_value(value)}; give a number from 0"
    if "min_lr_rate" in known and ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        return f"{scheduler} needs one of min_lr and min_lr_rate"
    if scheduler == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        return f"{scheduler} needs num_decay_steps"
    return None


def wanted(allowed: Allowed) -> str:
    """What a field takes, in words."""
    if isinstance(allowed.kind, tuple):
        return "one of " + ", ".join(allowed.kind)
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        dict: "a mapping (key: value)",
    }
    low = f" from {allowed.low:g}" if allowed.low > -math.inf else ""
    return words[allowed.kind] + low + (f" up to, not including, {allowed.high:g}" if allowed.high < math.inf else "")


def _fits(value: Any, allowed: Allowed) -> bool:
    if isinstance(allowed.kind, tuple):
        return value in allowed.kind
    if allowed.kind in (int, float):
        number = isinstance(value, int) or (allowed.kind is float and isinstance(value, float))
        return number and not isinstance(value, bool) and allowed.low <= value < allowed.high
    return isinstance(value, allowed.kind)
