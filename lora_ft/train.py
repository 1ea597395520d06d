"""`lora-ft train`: from a config to an adapter, top to bottom."""

import os
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from lora_ft import processes, run_folder
from lora_ft import resume as resuming
from lora_ft.adapter.fit import check_base
from lora_ft.adapter.inject import trainable
from lora_ft.attention import Packing
from lora_ft.base import Base, resolve
from lora_ft.checkpoint import State
from lora_ft.config import AdapterConfig, Config
from lora_ft.data.batches import Cut, Plan, Share
from lora_ft.data.examples import largest_id
from lora_ft.data.prepare import prepare
from lora_ft.device import micro_batch_tokens, prepare_device, with_accelerate
from lora_ft.errors import ConfigError, ModelError
from lora_ft.methods.verbs import inject, method_of, read_by, restore
from lora_ft.model import check_vocabulary, load_base, load_tokenizer, tokenizer_hash
from lora_ft.progress import say
from lora_ft.record import describe, read_record
from lora_ft.saving import Run
from lora_ft.scoring import score
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
        with processes.first_on_node():
            base = resolve(config.model.name, config.model.revision, allow_pickle)
            if before:
                check_base(before, base, other_base)
            tokenizer = load_tokenizer(base, trust_remote_code)
            train_set, eval_set = prepare(config.data, tokenizer, config.train.seed)
        if before:
            resuming.check_data(before, tokenizer_hash(tokenizer), train_set, eval_set)
        say(f"data: {train_set.report.summary()}")
        if eval_set:
            say(f"eval: {eval_set.report.summary()}")

        sharded = bool(config.trainer.get("fsdp")) and processes.count() > 1
        load = load_sharded if sharded else load_base
        model = load(base, config.model.dtype, trust_remote_code, device)
        check_vocabulary(model, base, max(largest_id(s) for s in (train_set, eval_set) if s))
        parameters = adapt(model, config.adapter, config.train.seed, tokenizer, base, other_base)
        train_set, eval_set = read_by(model, train_set), eval_set and read_by(model, eval_set)
        packing = Packing.of(model, max(s.report.longest for s in (train_set, eval_set) if s))
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
        record = describe(config, base, tokenizer, model, train_set, eval_set)
        record |= {"trainable_parameters": parameters, "planned_steps": len(plan), "machine": machine(device)}
        if before and is_main:
            resuming.go_on(before, record, state, len(plan), output)
        elif is_main:
            # with --overwrite a whole run, else at most the log of one that was killed before its first checkpoint
            run_folder.clear(output)

        stopper.hint = how_to_go_on(begun=True)
        run = Run(output, model, tokenizer, record, config.train.save_total_limit)
        if state and (best := state.values.get("best")):
            run.evaluations[best["step"]] = best["metrics"]
        if state and is_main:
            run.rotate(state.step, state.values["trainer"]["best_global_step"])  # killed right before it

        def evaluation(step: int) -> dict:
            assert eval_set is not None
            scores = score(model, eval_set.dataset, packing, at_most, stopper.check, share)
            run.evaluations[step] = scores.metrics()
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
            evaluation=evaluation if eval_set else None,
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


def adapt(
    model: PreTrainedModel,
    adapter: AdapterConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    base: Base,
    other_base: bool,
) -> int:
    """Inject what the config says; its number of trainable parameters, which is also said."""
    adapted = inject(model, adapter, seed, tokenizer)
    if adapter.init_from:
        start = Path(adapter.init_from)
        if (found := method_of(start)) != adapter.method:
            raise ModelError(f"adapter.init_from: {start} is of method {found}, this run's is {adapter.method}.")
        check_base(read_record(start), base, other_base)
        restore(model, start)
    parameters = sum(p.numel() for p in trainable(model).values())
    share = parameters / sum(p.numel() for p in model.parameters())
    say(f"{adapter.method}: {adapted}, {parameters:,} trainable parameters ({share:.2%} of the model)")
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
        greater_is_better=metric != "loss",
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
