"""`lora-ft train`: from a config to an adapter, top to bottom."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from lora_ft import checkpoint, run_folder
from lora_ft.adapter.files import CONFIG, WEIGHTS, initialize_from, save_adapter, slices, write_record
from lora_ft.adapter.inject import inject_lora, trainable
from lora_ft.attention import Packing
from lora_ft.base import resolve
from lora_ft.config import Config, TrainConfig
from lora_ft.data.batches import Cut, Plan
from lora_ft.data.prepare import prepare
from lora_ft.errors import ConfigError, FilesError
from lora_ft.model import load_base, load_tokenizer
from lora_ft.model_card import model_card
from lora_ft.record import describe
from lora_ft.scoring import score
from lora_ft.storage import staged_folder, write_file, write_json, write_tensors
from lora_ft.trainer import LoRATrainer

CARD = "README.md"
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # what `auto` means; fixed, so that a run can be repeated


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    other_base: bool = False,
    trust_remote_code: bool = False,
    config_path: str = "",
) -> None:
    """Train an adapter and leave it in `config.output`.

    Raises:
        UserError: as the exit codes say; nothing of an earlier run is touched before config, data, model and targets are good.
    """
    output, begun = Path(config.output), time.perf_counter()
    if resume:
        raise ConfigError("--resume: not built yet. Start anew with --overwrite, or with another output.")
    with run_folder.claimed(output):
        if not overwrite and (run_folder.has_adapter(output) or run_folder.checkpoints(output)):
            raise FilesError(
                f"output {output}: holds a run already. Add --overwrite to replace it, or name another: --set output=FOLDER."
            )
        device = "cuda" if torch.cuda.is_available() and not config.trainer.get("use_cpu") else "cpu"
        torch.set_flush_denormal(True)  # before the first parallel region, so that all of torch's threads have it
        base = resolve(config.model.name, config.model.revision)
        tokenizer = load_tokenizer(base, trust_remote_code)
        train_set, eval_set = prepare(config.data, tokenizer, config.train.seed)
        say(f"data: {train_set.report.summary()}")
        if eval_set:
            say(f"eval: {eval_set.report.summary()}")

        model = load_base(base, config.model.dtype, trust_remote_code, device)
        adapter = config.adapter
        adapted = inject_lora(
            model,
            adapter.targets,
            adapter.rank,
            adapter.alpha,
            dropout=adapter.dropout,
            rslora=adapter.rslora,
            modules=adapter.modules,
            layers=adapter.layers,
            seed=config.train.seed,
        )
        if adapter.init_from:
            initialize_from(model, Path(adapter.init_from))
        parameters = sum(p.numel() for p in trainable(model).values())
        share = parameters / sum(p.numel() for p in model.parameters())
        say(f"adapter: {len(adapted)} modules, {parameters:,} trainable parameters ({share:.2%} of the model)")

        longest = max(s.report.longest for s in (train_set, eval_set) if s)
        packing = Packing.of(model, longest)
        if packing.how == "alone":
            say("this model's RoPE follows the longest position in a row: each example gets a row of its own (slower)")
        cut = Cut(micro_batch_tokens(config.train, device), packing.how == "alone")
        plan = Plan(
            train_set.dataset,
            config.train.batch_size,
            config.train.num_train_epochs,
            config.train.max_steps,
            cut,
            config.train.seed,
        )
        record = describe(config, base, tokenizer, model, train_set, eval_set) | {"trainable_parameters": parameters}
        if overwrite:
            run_folder.clear(output)

        evaluations: dict[int, dict] = {}  # step -> metrics

        def evaluation() -> dict:
            assert eval_set is not None
            metrics = score(model, eval_set.dataset, packing, cut.micro_batch_tokens, progress=True).metrics()
            evaluations[trainer.state.global_step] = metrics
            return metrics

        def save(state: checkpoint.State) -> None:
            with staged_folder(run_folder.checkpoint_of(output, state.step)) as folder:
                write_tensors(folder / checkpoint.TENSORS, state.tensors)
                write_json(folder / checkpoint.JSON, state.values)
                about = {"kind": "checkpoint", "step": state.step, "metrics": evaluations.get(state.step, {})}
                land(folder, record | about, model, [checkpoint.TENSORS, checkpoint.JSON])
            best = trainer.state.best_global_step
            run_folder.rotate(output, config.train.save_total_limit, keep={state.step} | ({best} if best else set()))

        trainer = LoRATrainer(
            model=model,
            args=arguments(config, len(plan), device, bool(eval_set)),
            plan=plan,
            packing=packing,
            evaluation=evaluation if eval_set else None,
            save=save,
            log_line=lambda line: run_folder.log_line(output, line),
            patience=config.train.early_stopping_patience,
        )
        say(f"training: {len(plan)} steps of {config.train.batch_size} examples")
        trainer.train()
        finish(config, output, model, record, trainer, evaluations, time.perf_counter() - begun)


def finish(
    config: Config,
    output: Path,
    model: PreTrainedModel,
    record: dict,
    trainer: LoRATrainer,
    evaluations: dict[int, dict],
    seconds: float,
) -> None:
    """Leave the best adapter (or the last) in `output`, its record last, and say so."""
    last = trainer.state.global_step
    step = (trainer.state.best_global_step or last) if config.train.load_best_model_at_end else last
    if step != last:
        initialize_from(model, run_folder.checkpoint_of(output, step))
    metrics = evaluations.get(step, {})
    about = {
        "kind": "adapter",
        "step": step,
        "steps": last,
        "metrics": metrics,
        "timings": {"seconds": round(seconds, 1), "training_seconds": round(trainer.training_seconds, 1)},
    }
    land(output, record | about, model, mentions=[run_folder.LOG, "tensorboard"])
    shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
    which = f"the best of {last} steps, step {step}" if step != last else f"step {step}"
    say(f"done in {seconds:.0f} s: {output} holds the adapter of {which}" + (f" ({shown})" if shown else ""))
    print(output)


def land(
    folder: Path, record: dict, model: PreTrainedModel, state: Sequence[str] = (), mentions: Sequence[str] = ()
) -> None:
    """Write an adapter's four files into `folder`, the record last; its manifest covers the `state` files that are there."""
    save_adapter(model, folder, record["base"]["name"])
    write_file(folder / CARD, model_card(record))
    write_record(folder, record | {"slices": slices(model)}, [WEIGHTS, CONFIG, *state], [CARD, *mentions])


def arguments(config: Config, steps: int, device: str, evaluates: bool) -> TrainingArguments:
    """The Trainer's settings. What the plan and this tool's own files take care of is switched off."""
    train, output = config.train, Path(config.output)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output / "tensorboard"))
    metric = train.metric_for_best_model
    settings = dict(
        output_dir=str(output),
        use_cpu=device == "cpu",
        per_device_train_batch_size=1,  # an item of the plan is a whole step
        gradient_accumulation_steps=1,
        max_steps=steps,
        remove_unused_columns=False,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        seed=train.seed,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=train.eval_steps,
        save_strategy="steps",
        save_steps=train.save_steps,
        metric_for_best_model=f"eval_{metric}" if evaluates else None,
        greater_is_better=metric not in ("loss", "perplexity"),
        report_to=list(train.report_to),
        disable_tqdm=True,  # the bar is ours
    )
    return TrainingArguments(**settings | config.trainer)


def micro_batch_tokens(train: TrainConfig, device: str) -> int:
    return MICRO_BATCH_TOKENS[device] if train.micro_batch_tokens == "auto" else train.micro_batch_tokens


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
