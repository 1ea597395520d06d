"""The Trainer's settings, from a config."""

import os
from pathlib import Path

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from lora_ft.config.schema import Config
from lora_ft.core.errors import ConfigError, variable_behind
from lora_ft.core.messages import first_line
from lora_ft.core.metrics import metric_of

SAME_NAME = {  # settings of `train` that the Trainer has too
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("seed", "logging_steps", "eval_steps", "save_steps"),
}


def arguments(config: Config, device: str) -> TrainingArguments:
    """The Trainer's settings, except max_steps. What the step plan and our own files replace is switched off.

    Raises:
        ConfigError: the Trainer refuses a value, or a reporter is not installed.
    """
    train, output, evaluates = config.train, Path(config.output), config.data.eval is not None
    missing = set(train.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise ConfigError(
            f"train.report_to: {', '.join(sorted(missing))} is not installed. Install it, or leave it out."
        )
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    metric = train.metric_for_best_model
    settings = dict(
        output_dir=str(output),
        use_cpu=device == "cpu",
        per_device_train_batch_size=1,  # an item of the plan is a whole step
        gradient_accumulation_steps=1,
        max_steps=1,  # of the plan, once there is one
        remove_unused_columns=False,
        activation_checkpointing=train.gradient_checkpointing,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        save_strategy="steps",
        metric_for_best_model=f"eval_{metric}" if evaluates else None,
        greater_is_better=not metric_of(metric).lower_is_better,
        report_to=list(train.report_to),
        disable_tqdm=True,  # the bar is ours
    ) | train.model_dump(include=SAME_NAME)
    if train.learning_rate == "auto":  # in `check`: training has chosen one by now
        del settings["learning_rate"]
    try:
        args = TrainingArguments(**settings | config.trainer.model_dump(exclude={"fsdp"}))
        if args.n_gpu > 1:
            args._n_gpu = 1  # else the Trainer wraps the model in DataParallel, which would cut a row into pieces
    except (ValueError, RuntimeError, ImportError) as e:
        if variable_behind(e):
            raise
        raise ConfigError(f"the Trainer refuses these settings: {first_line(e)}") from e
    return args
