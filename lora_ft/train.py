"""`lora-ft train`: from a config to an adapter, top to bottom."""

import os
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from lora_ft import processes, run_folder
from lora_ft import resume as resuming
from lora_ft.adapter.files import initialize_from
from lora_ft.adapter.fit import check_base
from lora_ft.adapter.inject import inject_lora, trainable
from lora_ft.attention import Packing
from lora_ft.base import Base, resolve
from lora_ft.checkpoint import State
from lora_ft.config import AdapterConfig, Config
from lora_ft.data.batches import Cut, Plan, Share
from lora_ft.data.examples import largest_id
from lora_ft.data.prepare import prepare
from lora_ft.device import micro_batch_tokens, prepare_device, with_accelerate
from lora_ft.errors import ConfigError
from lora_ft.evaluation import evaluator
from lora_ft.generation_metrics import check_installed
from lora_ft.model import check_vocabulary, load_base, load_tokenizer, tokenizer_hash
from lora_ft.progress import say
from lora_ft.record import describe, read_record
from lora_ft.saving import Run
from lora_ft.sharding import load_sharded
from lora_ft.signals import Stopper
from lora_ft.trainer import LoRATrainer


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    other_base: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Train an adapter and leave it in `config.output`.

    Raises:
        UserError: as the exit codes say; nothing of an earlier run is touched before config, data, model and targets are
            good.
        Stopped: a signal came; what was done is saved.
    """
    output, begun, is_main = Path(config.output), time.perf_counter(), processes.is_main()
    with processes.only_main_talks(), Stopper() as stopper, run_folder.claimed(output) if is_main else nullcontext():
        stopper.hint = how_to_go_on(begun="--overwrite" not in sys.argv)
        config = with_accelerate(config)
        device = prepare_device(config)
        begin = processes.from_main(lambda: resuming.beginning(output, config, resume, overwrite))
        before = processes.from_main(lambda: resuming.read_run(begin) if begin else None)
        if before and before["kind"] == "adapter":
            say(f"already finished: {output} holds the adapter of this config. Nothing to do.")
            return

        args = arguments(config, device)
        if config.train.predict_with_generate:
            check_installed(config.generation.metrics)
        with processes.first_on_node():
            base = resolve(config.model.name, config.model.revision, allow_pickle)
            if before:
                check_base(before, base, other_base)
            tokenizer = load_tokenizer(base, trust_remote_code)
            train_set, eval_sets = prepare(config.data, tokenizer, config.train.seed)
        sets = [train_set, *eval_sets.values()]
        if before:
            resuming.check_data(before, tokenizer_hash(tokenizer), train_set, eval_sets)
        say(f"data: {train_set.report.summary()}")
        for name, examples in eval_sets.items():
            say(f"{f'eval {name}'.strip()}: {examples.report.summary()}")

        sharded = bool(config.trainer.get("fsdp")) and processes.count() > 1
        load = load_sharded if sharded else load_base
        model = load(base, config.model.dtype, trust_remote_code, device)
        check_vocabulary(model, base, max(map(largest_id, sets)))
        parameters = adapt(model, config.adapter, config.train.seed, base, other_base)
        packing = Packing.of(model, max(s.report.longest for s in sets))
        if packing.how == "alone":
            say("this model's RoPE follows the longest position in a row: each example gets a row of its own (slower)")
        state = processes.from_main(lambda: State.read(begin) if begin else None)
        at_most, share = micro_batch_tokens(config, device), Share(processes.rank(), processes.count(), even=sharded)
        if state and config.train.micro_batch_tokens == "auto":
            at_most = state.values["micro_batch_tokens"]  # as the run began
        plan = Plan(
            train_set.dataset,
            config.train.batch_size,
            config.train.num_train_epochs,
            config.train.max_steps,
            Cut(at_most, packing.how == "alone"),
            config.train.seed,
            share,
        )
        record = describe(config, base, tokenizer, model, train_set, eval_sets)
        record |= {"trainable_parameters": parameters, "planned_steps": len(plan), "machine": machine(device)}
        if before and is_main:
            resuming.go_on(before, record, state, len(plan), output)
        elif is_main:
            # with --overwrite a whole run, else at most the log of one that was killed before its first checkpoint
            run_folder.clear(output)

        stopper.hint = how_to_go_on(begun=True)
        run = Run(output, model, record, config.train.save_total_limit)
        if state and (best := state.values.get("best")):
            run.evaluations[best["step"]] = best["metrics"]
        if state and is_main:
            run.rotate(state.step, state.values["trainer"]["best_global_step"])  # killed right before it

        scored = evaluator(model, tokenizer, eval_sets, config, packing, at_most, stopper.check, share)

        def evaluation(step: int) -> dict:
            run.evaluations[step] = scored()
            return run.evaluations[step]

        def save(state: State, best_step: int | None) -> None:
            if is_main:
                state.values["micro_batch_tokens"] = at_most
                run.save(state, best_step)

        args.max_steps = len(plan)
        trainer = LoRATrainer(
            model=model,
            args=args,
            plan=plan,
            packing=packing,
            evaluation=evaluation if eval_sets else None,
            save=save,
            log_line=lambda line: run_folder.log_line(output, line) if is_main else None,
            patience=config.train.early_stopping_patience,
            stopper=stopper,
        )
        say(f"training: {len(plan)} steps of {config.train.batch_size} examples")
        trainer.train_from(state, begin)

        if not is_main:
            return
        last = trainer.state.global_step
        step = (trainer.state.best_global_step or last) if config.train.load_best_model_at_end else last
        seconds = time.perf_counter() - begun
        metrics = run.finish(step, last, {"seconds": round(seconds, 1)})
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, float))
        which = f"step {step}, the best of {last}" if step != last else f"step {step}"
        say(f"done in {seconds:.0f} s: {output} holds the adapter of {which}" + (f" ({shown})" if shown else ""))
        print(output)


def adapt(model: PreTrainedModel, adapter: AdapterConfig, seed: int, base: Base, other_base: bool) -> int:
    """Inject the config's adapter; its number of trainable parameters, which is also said."""
    adapted = inject_lora(
        model,
        adapter.targets,
        adapter.rank,
        adapter.alpha,
        dropout=adapter.dropout,
        rslora=adapter.rslora,
        modules=adapter.modules,
        layers=adapter.layers,
        seed=seed,
    )
    if adapter.init_from:
        check_base(read_record(Path(adapter.init_from)), base, other_base)
        initialize_from(model, Path(adapter.init_from))
    parameters = sum(p.numel() for p in trainable(model).values())
    share = parameters / sum(p.numel() for p in model.parameters())
    say(f"adapter: {len(adapted)} modules, {parameters:,} trainable parameters ({share:.2%} of the model)")
    return parameters


def arguments(config: Config, device: str) -> TrainingArguments:
    """The Trainer's settings but for max_steps. What the plan and this tool's own files take care of is switched off.

    Raises:
        ConfigError: the Trainer refuses a value, or a reporter isn't installed.
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
        greater_is_better=not metric.endswith("loss"),
        report_to=list(train.report_to),
        disable_tqdm=True,  # the bar is ours
    )
    try:
        args = TrainingArguments(**settings | {k: v for k, v in config.trainer.items() if k != "fsdp"})
        if args.n_gpu > 1:
            args._n_gpu = 1  # else the Trainer wraps the model in DataParallel, which would cut a row into pieces
    except (ValueError, RuntimeError, ImportError) as e:
        raise ConfigError(f"the Trainer refuses these settings: {str(e).splitlines()[0]}") from e
    return args


def machine(device: str) -> dict:
    return {"device": device, "threads": torch.get_num_threads(), "processes": processes.count()}


def how_to_go_on(begun: bool) -> str:
    """The command line that was typed, with --resume; until the run has begun, --overwrite still has something to replace."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return f"Go on with: {shlex.join(['lora-ft', *words, '--resume' if begun else '--overwrite'])}"
