"""`lora-ft train`: from a config to an adapter, top to bottom."""

import shlex
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_ft.config.load import AdapterConfig, Config
from lora_ft.core import run_folder
from lora_ft.core.errors import ModelError, NumbersError
from lora_ft.core.messages import info
from lora_ft.core.metrics import format_metrics
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.data.batches import RowPacking, Shard, StepPlan
from lora_ft.data.examples import largest_id
from lora_ft.data.prepare import prepare
from lora_ft.distributed import processes
from lora_ft.distributed.sharding import load_sharded
from lora_ft.evaluation.evaluate import evaluator
from lora_ft.evaluation.samples import generate_samples
from lora_ft.evaluation.texts import check_installed
from lora_ft.methods.interface import inject, load_into, method_of, virtual_ids
from lora_ft.methods.lora.compatibility import check_base
from lora_ft.methods.lora.inject import trainable
from lora_ft.model.device import meet_others, micro_batch_tokens, prepare_device, with_accelerate
from lora_ft.model.files import Base, resolve
from lora_ft.model.load import check_length, check_vocabulary, load_base, load_tokenizer, skeleton, tokenizer_hash
from lora_ft.nn.attention import Isolation
from lora_ft.training import resume as resuming
from lora_ft.training import run_log
from lora_ft.training.arguments import arguments
from lora_ft.training.checkpoint import State
from lora_ft.training.progress import trackers
from lora_ft.training.record import describe, read_record
from lora_ft.training.saving import Run
from lora_ft.training.trainer import LoRATrainer


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
    with (
        processes.silence_other_ranks(),
        Stopper() as stopper,
        run_folder.claimed(output) if is_main else nullcontext(),
    ):
        stopper.hint = resume_hint(begun="--overwrite" not in sys.argv)
        config = with_accelerate(config)
        device = prepare_device(config)
        meet_others(config, device)
        begin = processes.broadcast(lambda: resuming.find_starting_point(output, config, resume, overwrite))
        before = processes.broadcast(lambda: resuming.read_run(begin) if begin else None)
        if before and before["kind"] == "adapter":
            info(f"already finished: {output} holds the adapter of this config. Nothing to do.")
            return

        args = arguments(config, device)
        if config.train.predict_with_generate:
            check_installed(config.generation.metrics)
        with processes.local_main_first():
            base = resolve(config.model.name, config.model.revision, allow_pickle)
            if before:
                check_base(before, base, other_base)
            tokenizer = load_tokenizer(base, trust_remote_code)
            dry_run(config, base, tokenizer, other_base, trust_remote_code)
            train_set, eval_sets = prepare(config.data, tokenizer, config.train.seed)
        sets = [train_set, *eval_sets.values()]
        if before:
            resuming.check_data(before, tokenizer_hash(tokenizer), train_set, eval_sets)
        info(f"data: {train_set.report.summary()}")
        for name, examples in eval_sets.items():
            info(f"{f'eval {name}'.strip()}: {examples.report.summary()}")

        sharded = bool(config.trainer.get("fsdp")) and processes.world_size() > 1
        load = load_sharded if sharded else load_base
        model = load(base, config.model.dtype, trust_remote_code, device)
        check_vocabulary(model, base, max(map(largest_id, sets)))
        adapted = inject(model, config.adapter, config.train.seed, tokenizer)
        parameters = sum(p.numel() for p in trainable(model).values())
        whole = sum(p.numel() for p in model.parameters())
        info(
            f"{config.adapter.method}: {adapted}, {parameters:,} trainable parameters ({parameters / whole:.2%} of the model)"
        )
        prefix = virtual_ids(model)
        longest = max(s.report.longest for s in sets) + len(prefix)
        check_length(model, base, longest)
        train_set = train_set.with_prefix(prefix)
        isolation = Isolation.detect(model, longest)
        if isolation is Isolation.ONE_PER_ROW:
            info("this model's RoPE follows the longest position in a row: each example gets a row of its own (slower)")
        state = processes.broadcast(lambda: State.read(begin) if begin else None)
        at_most, shard = (
            micro_batch_tokens(config, device),
            Shard(processes.rank(), processes.world_size(), padded=sharded),
        )
        if state and config.train.micro_batch_tokens == "auto":
            at_most = state.values["micro_batch_tokens"]  # as the run began
        plan = StepPlan(
            train_set.dataset,
            config.train.batch_size,
            config.train.num_train_epochs,
            config.train.max_steps,
            RowPacking(at_most, isolation is Isolation.ONE_PER_ROW),
            config.train.seed,
            shard,
        )
        record = describe(config, base, tokenizer, model, train_set, eval_sets)
        record |= {"trainable_parameters": parameters, "parameters": whole}
        record |= {"planned_steps": len(plan), "machine": machine(device)}
        scored = evaluator(model, tokenizer, eval_sets, config, isolation, at_most, shard)
        if eval_sets and before and "base_metrics" in before:
            record |= {k: before[k] for k in ("base_metrics", "base_seconds")}
        elif eval_sets and config.train.evaluate_base:
            scoring = time.perf_counter()
            record["base_metrics"] = scored(base=True)
            record["base_seconds"] = round(time.perf_counter() - scoring, 1)
            info(f"the base's eval, {record['base_seconds']:.0f} s: {format_metrics(record['base_metrics'])}")
        load_initial_adapter(model, config.adapter)  # after the base was scored: some methods change its own weights
        if before and is_main:
            resuming.announce_resume(before, record, state, len(plan), output)
        elif is_main:
            # with --overwrite a whole run, else at most the log of one that was killed before its first checkpoint
            run_folder.clear(output)

        stopper.hint = resume_hint(begun=True)
        run = Run(output, model, tokenizer, record, config.train.save_total_limit)
        if state and (best := state.values.get("best")):
            run.evaluations[best["step"]] = best["metrics"]
        if state and is_main:
            run.rotate(state.step, state.values["trainer"]["best_global_step"])  # killed right before it

        def evaluation(step: int) -> dict:
            run.evaluations[step] = scored(stopper.check)
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
            isolation=isolation,
            evaluation=evaluation if eval_sets else None,
            save=save,
            log_line=lambda line: run_log.write_line(output, line) if is_main else None,
            patience=config.train.early_stopping_patience,
            stopper=stopper,
        )
        info(f"training: {len(plan)} steps of {config.train.batch_size} examples")
        try:
            with trackers(config.train.report_to):
                trainer.train_from(state, begin)
        except (Stopped, NumbersError) as ended:
            if is_main:
                run.report(str(ended))
            raise

        processes.destroy_process_group()
        if not is_main:
            return
        last = trainer.state.global_step
        if last < len(plan):
            patience = config.train.early_stopping_patience
            info(f"stopped early at step {last}: no improvement in the last {patience} evaluations")
        step = (trainer.state.best_global_step or last) if config.train.load_best_model_at_end else last
        seconds = time.perf_counter() - begun
        samples = None
        first = next(iter(eval_sets.values()), None)
        # a classification has its confusion table; and only LoRA can be switched off once it is trained
        if first and not first.label_words and not sharded and config.adapter.method == "lora":
            samples = partial(generate_samples, model, tokenizer, first, max(10.0, 0.05 * seconds))
        metrics = run.finish(step, last, {"seconds": round(seconds, 1)}, samples)
        which = f"step {step}, the best of {last}" if step != last else f"step {step}"
        info(
            f"done in {seconds:.0f} s: {output} holds the adapter of {which}"
            + (f" ({format_metrics(metrics)})" if metrics else "")
        )
        print(output)


def dry_run(
    config: Config, base: Base, tokenizer: PreTrainedTokenizerBase, other_base: bool, trust_remote_code: bool
) -> tuple[PreTrainedModel, str]:
    """The adapted model without its weights, and what was adapted: what training would refuse is refused before any data
    is read.

    Raises:
        ModelError: targets that aren't there; adapter.init_from is missing, doesn't fit, or is another base's.
    """
    model = skeleton(base, trust_remote_code)
    with torch.device("meta"):
        adapted = inject(model, config.adapter, config.train.seed, tokenizer)
        load_initial_adapter(model, config.adapter)
    if config.adapter.init_from:
        check_base(read_record(Path(config.adapter.init_from)), base, other_base)
    return model, adapted


def load_initial_adapter(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    """Into a model that was injected into, the weights of adapter.init_from, if there is any."""
    if adapter.init_from:
        start = Path(adapter.init_from)
        if not start.is_dir():
            raise ModelError(
                f"adapter.init_from: {start}: no such folder. Give the folder that a training run or PEFT wrote."
            )
        if (found := method_of(start)) != adapter.method:
            raise ModelError(f"adapter.init_from: {start} is of method {found}, this run's is {adapter.method}.")
        load_into(model, start)


def machine(device: str) -> dict:
    return {"device": device, "threads": torch.get_num_threads(), "processes": processes.world_size()}


def resume_hint(begun: bool) -> str:
    """The command line that was typed, with --resume; until the run has begun, --overwrite still has something to replace."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return f"Go on with: {shlex.join(['lora-ft', *words, '--resume' if begun else '--overwrite'])}"
