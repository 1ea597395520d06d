"""The section `trainer` of a config: what is passed on to transformers' Trainer."""

from typing import Any, Literal

from pydantic import model_serializer

from lora_ft.config.section import Section, setting

LogLevel = Literal["passive", "debug", "detail", "info", "warning", "error", "critical"]


class TrainerConfig(Section):
    """Other fields of transformers.TrainingArguments, by their own names and with their own defaults."""

    # A field that is not given is None here and absent from `model_dump()`.
    lr_scheduler_kwargs: dict[str, Any] = setting(None, "arguments of train.lr_scheduler_type")
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop"] = setting(None, "the optimizer")
    optim_args: str = setting(None, "arguments of the optimizer")
    adam_beta1: float = setting(None, "decay rate of AdamW's first moment", ge=0, lt=1)
    adam_beta2: float = setting(None, "decay rate of AdamW's second moment", ge=0, lt=1)
    adam_epsilon: float = setting(None, "AdamW's epsilon", ge=0)
    bf16: bool = setting(None, "compute in bfloat16 (autocast)")
    tf32: bool = setting(None, "TF32 matrix products on GPUs that have it")
    eval_on_start: bool = setting(None, "evaluate before the first step")
    eval_delay: float = setting(None, "number of steps before the first evaluation", ge=0)
    full_determinism: bool = setting(None, "deterministic algorithms only (slower)", resume="rounding")
    use_cpu: bool = setting(None, "train on the CPU even if there is a GPU", resume="rounding")
    ddp_backend: Literal["nccl", "gloo", "mpi", "xccl", "hccl"] = setting(
        None, "the backend of torch.distributed", resume="rounding"
    )
    ddp_bucket_cap_mb: int = setting(None, "size of DDP's gradient buckets", ge=1, resume="rounding")
    ddp_timeout: int = setting(None, "seconds that processes wait for each other", ge=1, resume="free")
    fsdp: bool = setting(None, "shard the frozen base over the processes", resume="rounding")
    logging_first_step: bool = setting(None, "also log the first step", resume="free")
    log_on_each_node: bool = setting(None, "log on each node, not only on the first", resume="free")
    log_level: LogLevel = setting(None, "transformers' log level", resume="free")
    log_level_replica: LogLevel = setting(None, "transformers' log level in the other processes", resume="free")
    run_name: str = setting(None, "name of the run for report_to", resume="free")
    project: str = setting(None, "name of the project for report_to", resume="free")
    trackio_space_id: str = setting(None, "the Hugging Face Space for Trackio", resume="free")
    trackio_bucket_id: str = setting(None, "the Hugging Face bucket for Trackio", resume="free")
    skip_memory_metrics: bool = setting(None, "do not measure memory in the Trainer", resume="free")

    @model_serializer(mode="wrap")
    def _given(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}
