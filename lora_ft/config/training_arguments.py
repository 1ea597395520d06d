"""The fields of transformers.TrainingArguments: governed by another setting, allowed under `trainer`, or refused.

A test compares the three with the installed version of transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from lora_ft.core.messages import format_value, printable

_SAME_NAME = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
    *("max_grad_norm", "gradient_checkpointing", "seed", "logging_steps", "eval_steps", "save_steps"),
    *("save_total_limit", "metric_for_best_model", "load_best_model_at_end", "report_to"),
)
# field -> the setting of lora-ft that governs it
OWN_SETTING = {name: f"train.{name}" for name in _SAME_NAME} | {
    "output_dir": "output",
    "per_device_train_batch_size": "train.batch_size",  # over all devices, divided by train.micro_batch_tokens
    "activation_checkpointing": "train.gradient_checkpointing",
    "data_seed": "train.seed",
    "label_names": "data.label_names",
}

_STEP = "lora-ft divides a batch into micro-batches by tokens"
_LOSS = "the loss is the mean over the supervised tokens of the batch"
_EVAL = "lora-ft has its own evaluation, which scores supervised tokens and keeps no predictions"
_WHEN = "set by the *_steps settings of train"
_STATE = "checkpoints are always complete and contain no pickles, so that a resumed run is reproduced exactly"

# why fields cannot be set, and what to use instead -> these fields
_REASONS = {
    "lora-ft has its own progress bar, shown on a terminal only": "disable_tqdm",
    _STEP: "torch_empty_cache_steps",
    f"{_STEP}; lower train.micro_batch_tokens to save memory": "gradient_accumulation_steps auto_find_batch_size",
    f"{_LOSS}, over all devices": "average_tokens_across_devices",
    f"{_LOSS}; label smoothing is not supported": "label_smoothing_factor",
    "it scales noise by the length of a row, and rows hold several examples": "neftune_noise_alpha",
    "float16 needs a loss scaler, which is not supported; use trainer.bf16 or model.dtype": "fp16",
    "it would round the adapter; use model.dtype": "fp16_full_eval bf16_full_eval",
    "set by lora-ft (train.gradient_checkpointing)": "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    "use adapter.targets and adapter.modules": "optim_target_modules",
    "not supported: micro-batches have varying shapes": "torch_compile torch_compile_backend torch_compile_mode",
    "it replaces parts of the model that lora-ft relies on": "use_liger_kernel liger_kernel_config",
    "a cache would mix examples that share a row": "use_cache",
    _WHEN: "logging_strategy save_strategy",
    f"{_WHEN}; without data.eval there is no evaluation": "eval_strategy",
    "a loss of NaN or infinity stops the run": "logging_nan_inf_filter",
    "log.jsonl already counts tokens": "include_num_input_tokens_seen",
    "nothing is uploaded during training; upload the result with `lora-ft export FOLDER --to peft --push REPO`": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "trackio_static_space_id"
    ),
    _EVAL: (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
        "batch_eval_metrics"
    ),
    f"{_EVAL}; its batches follow train.micro_batch_tokens too": "per_device_eval_batch_size",
    "follows from train.metric_for_best_model: lower is better for loss, higher for the others": "greater_is_better",
    _STATE: "save_only_model save_on_each_node ignore_data_skip restore_callback_states_from_checkpoint",
    f"{_STATE}; an interrupted run writes one automatically": "enable_jit_checkpoint",
    "use `lora-ft train CONFIG --resume`": "resume_from_checkpoint",
    "lora-ft plans the batches of all steps from train.seed and builds them itself": (
        "accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
        "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
        "remove_unused_columns train_sampling_strategy length_column_name"
    ),
    "each step is one all-reduce of the adapter": "ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph",
    "the launcher sets it": "local_rank",
    "use --processes, with trainer.fsdp to shard the base": "parallelism_config fsdp_config deepspeed",
    "use `lora-ft train CONFIG --debug`": "debug",
    "use the commands `lora-ft train` and `lora-ft eval`": "do_train do_eval do_predict",
}
REFUSED = {field: reason for reason, fields in _REASONS.items() for field in fields.split()}

# lr_scheduler_type -> the arguments it accepts in trainer.lr_scheduler_kwargs. Only schedules that depend on the step alone:
# those that follow a metric (reduce_lr_on_plateau, greedy) cannot be recomputed for a longer run.
SCHEDULERS = {
    "linear": "",
    "cosine": "num_cycles",
    "cosine_with_restarts": "num_cycles",
    "polynomial": "lr_end power",
    "constant": "",
    "constant_with_warmup": "",
    "inverse_sqrt": "timescale",
    "cosine_with_min_lr": "num_cycles min_lr min_lr_rate",
    "cosine_warmup_with_min_lr": "num_cycles min_lr min_lr_rate warmup_lr_rate",
    "warmup_stable_decay": "num_decay_steps num_stable_steps warmup_type decay_type min_lr_ratio num_cycles",
}


def scheduler_problem(scheduler: str, kwargs: Mapping[str, Any]) -> str | None:
    """What is wrong with `trainer.lr_scheduler_kwargs` for this `train.lr_scheduler_type`; None if nothing is."""
    known = SCHEDULERS[scheduler].split()
    for name in kwargs:
        if name not in known:
            return f"{scheduler} does not accept {printable(name)}; it accepts {', '.join(known) or 'no arguments'}"
    for name, value in kwargs.items():
        text = name in ("warmup_type", "decay_type")
        if text and value not in ("linear", "cosine", "1-sqrt"):
            return f"{name} is {format_value(value)}; give linear, cosine or 1-sqrt"
        if not text and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf):
            return f"{name} is {format_value(value)}; give a number from 0"
    if "min_lr_rate" in known and ("min_lr" in kwargs) == ("min_lr_rate" in kwargs):
        return f"{scheduler} needs one of min_lr and min_lr_rate"
    if scheduler == "warmup_stable_decay" and "num_decay_steps" not in kwargs:
        return f"{scheduler} needs num_decay_steps"
    return None
