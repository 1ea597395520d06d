"""A run of `lora-ft train` in four acts: open, load, begin, finish."""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from lora_ft.config.schema import Config, eval_sets
from lora_ft.config.tuning import TUNING_SET
from lora_ft.core.errors import NumbersError
from lora_ft.core.messages import echo, info
from lora_ft.core.metrics import format_difference, format_metric, format_metrics, metric_of, scalars, verdict
from lora_ft.core.run_folder import LOG, REPORT
from lora_ft.core.signals import Stopped, Stopper
from lora_ft.core.storage import append_line
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.prepare import find_chat
from lora_ft.distributed import processes
from lora_ft.evaluation.evaluate import Evaluator
from lora_ft.evaluation.samples import generate_samples
from lora_ft.evaluation.telling_rows import describe_rows
from lora_ft.evaluation.texts import check_installed
from lora_ft.model.device import prepare_device
from lora_ft.report.runs import evaluation_steps, read_log
from lora_ft.report.write import write_report
from lora_ft.training import resume as resuming
from lora_ft.training.checkpoint import State
from lora_ft.training.lock import locked
from lora_ft.training.optimizer import learn_b_faster
from lora_ft.training.output import clear
from lora_ft.training.pause import Pause, last_step
from lora_ft.training.progress import trackers
from lora_ft.training.record import new_record
from lora_ft.training.saving import Saver
from lora_ft.training.setup import RunSetup
from lora_ft.training.together import Together
from lora_ft.training.trainer import LoRATrainer


def train_run(
    config: Config,
    stopper: Stopper,
    *,
    resume: bool = False,
    overwrite: bool = False,
    until: float | None = None,
    trial_of: Path | None = None,
    trust: Trust = NO_TRUST,
    together: Together | None = None,
    facts: dict | None = None,
) -> None:
    """Train an adapter; together: with the other runs of this process.

    until: stop after this step, or below 1 after this part of the run; resuming goes on from there. trial_of: the output of the
    run whose learning rate this one tries; it ends with the last checkpoint, which has the score, and without an adapter.
    facts: what else its record is to say.

    Raises:
        UserError: as the exit codes say; an earlier run is left alone until config, data, model and targets are checked.
        Stopped: a signal came; what was done is saved.
    """
    output, started, is_main = Path(config.output), time.perf_counter(), processes.is_main()
    with locked(output) if is_main else nullcontext():
        # ---- open: the processes, and what the output holds ----
        stopper.hint = resume_hint(started="--overwrite" not in sys.argv or bool(facts))  # facts: of trials
        device = prepare_device(config.trainer.use_cpu)
        processes.init_process_group(device, config.trainer.ddp_timeout, config.trainer.ddp_backend)
        checkpoint = processes.broadcast(lambda: resuming.find_starting_point(output, config, resume, overwrite))
        before = processes.broadcast(lambda: resuming.read_run(checkpoint) if checkpoint else None)
        if before and before["kind"] == "adapter":
            info(f"already finished: {output} holds the adapter of this config. Nothing to do.")
            return

        # ---- load: files and data, then the model and its steps ----
        setup = RunSetup(config, device, trust, checkpoint, before, together, TUNING_SET if trial_of else None)
        args = setup.arguments
        if config.train.predict_with_generate:
            check_installed(config.generation.metrics)
        with processes.local_main_first():
            setup.read_files()
        model, plan, state = setup.model, setup.plan, setup.state
        last, is_tuning = last_step(until, len(plan)), TUNING_SET in eval_sets(config.data.eval)
        pauses = trial_of is not None or last < len(plan)
        if state and before and pauses and state.step >= last and not _owes_scores(state, before, last):
            info(f"already at step {state.step} of {len(plan)}: nothing to do until step {last}")
            return
        setup.print_summary()
        evaluate = Evaluator(
            model,
            setup.tokenizer,
            setup.eval_sets,
            config,
            setup.isolation,
            setup.packing,
            setup.shard,
            setup.base.fingerprint,
            partial(together.log_probabilities, setup.isolation) if together else None,
        )
        record = new_record(setup) | _base_scores(setup, evaluate) | (facts or {})
        if together:  # time and memory are not this run's alone
            record["machine"] = record["machine"] | {"runs_together": together.count}
        setup.load_initial_adapter(model)  # after scoring the base: some methods change its own weights

        # ---- begin: from here on the output changes ----
        if together:
            together.wait_for_others(model, last - (state.step if state else 0), setup.isolation, args.bf16)
        if is_main and before:
            resuming.announce_resume(before, record, state, len(plan), output)
        elif is_main:
            for folder in filter(None, (output, trial_of)):
                clear(folder)  # with --overwrite a run; else at most the log of one killed before its first checkpoint
        stopper.hint = resume_hint(started=True)
        saver = Saver(output, setup, record, partial(evaluate, stopper.check), evaluate.base_rows)
        args.max_steps = len(plan)
        trainer = LoRATrainer(
            model=model,
            args=args,
            plan=plan,
            isolation=setup.isolation,
            evaluation=saver.evaluate if setup.eval_sets else None,
            save=saver.save,
            log_line=lambda line: append_line(output / LOG, line) if is_main else None,
            patience=config.train.early_stopping_patience,
            stopper=stopper,
            together=together,
        )
        if config.train.loraplus_ratio:
            learn_b_faster(trainer.create_optimizer(), model, config.train.loraplus_ratio)
        if pauses:
            trainer.add_callback(Pause(last, evaluates=is_tuning))
        info(f"training: {len(plan)} steps of {config.train.batch_size} examples")
        try:
            with trackers(config.train.report_to, output):
                trainer.train_from(state, checkpoint)
        except (Stopped, NumbersError) as end:
            if is_main:
                write_report(output, record, str(end))
            raise

        # ---- finish: the best step's adapter, the report, the record ----
        if together is None and until is None and not trial_of:  # else there may be more to train
            processes.destroy_process_group()
        if not is_main:
            return
        ended = trainer.state.global_step
        if pauses and ended == last:
            why = f"stopped after step {last}, as --until asked"
            write_report(
                output, record, "A trial of a learning rate, which ends without an adapter." if trial_of else why
            )
            if not is_tuning:  # what tunes goes on by itself
                info(f"stopped after step {last} of {len(plan)}, which is saved. Continue with --resume.")
            return
        if ended < len(plan):
            patience = config.train.early_stopping_patience
            info(f"stopped early at step {ended}: no improvement in the last {patience} evaluations")
        step = (trainer.state.best_global_step or ended) if config.train.load_best_model_at_end else ended
        seconds = time.perf_counter() - started
        result = saver.load_best(step, ended) | {"timings": {"seconds": round(seconds, 1)}}
        write_report(output, record | result, samples=_samples(setup, result["metrics"], max(10.0, 0.05 * seconds)))
        saver.finish(result)
        info(f"done in {seconds:.0f} s: {output} holds the adapter of step {step}{_chosen(config, output)}")
        info("\n".join(closing_lines(output, record | result, with_next=together is None)))
        echo(output)


def _owes_scores(state: State, before: dict, last: int) -> bool:
    """Whether a run was stopped while its step `last` was evaluated; before: the record of its checkpoint."""
    return state.step == last and state.values["owed"]["evaluate"] and not before["metrics"]


def _chosen(config: Config, output: Path) -> str:
    """By what the adapter's step was chosen: `, the best of 4 evaluations by loss`; "" if by nothing."""
    evaluations = len(evaluation_steps(read_log(output)))
    if not config.train.load_best_model_at_end or evaluations < 2:
        return ""
    return f", the best of {evaluations} evaluations by {metric_of(config.train.metric_for_best_model).title}"


def closing_lines(output: Path, record: dict, with_next: bool = True) -> list[str]:
    """What came of a run: its scores beside the base's, where its report is, and the next commands."""
    base, own = record.get("base_metrics", {}), record["metrics"]
    keys = [key for key in scalars(own) if not key.endswith("perplexity")]
    width = max((len(metric_of(key).title) for key in keys), default=0)
    lines = []
    for key in keys:
        before = f"{format_metric(key, base[key])} -> " if key in base else ""
        compared = f", {format_difference(key, own)}, {verdict(key, own)}" if verdict(key, own) else ""
        lines.append(f"  {metric_of(key).title:{width}}  {before}{format_metric(key, own[key])}{compared}")
    if lines and base:
        lines.insert(0, "base -> adapter on the eval data, the difference and its 95% interval:")
    folder, method = shlex.quote(str(output)), record["config"]["adapter"]["method"]
    last = f"lora-ft merge --adapter {folder}" if method == "lora" else f"lora-ft eval {folder}"
    usable = [f"lora-ft generate {folder}", last]
    report = [f"report: {output / REPORT}"] if (output / REPORT).is_file() else []
    return [*lines, *report, *(["next:   " + "\n        ".join(usable)] if with_next else [])]


def resume_hint(started: bool) -> str:
    """The command line as it was typed, with --resume; until the run has started, --overwrite still has work to do."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return f"Continue with: {shlex.join(['lora-ft', *words, '--resume' if started else '--overwrite'])}"


def _base_scores(setup: RunSetup, evaluate: Evaluator) -> dict:
    """The record's scores of the base: those of the resumed run, or new ones if `train.evaluate_base` asks for them."""
    if setup.before and "base_metrics" in setup.before:
        evaluate.base_rows = setup.state.base_rows() if setup.state else {}
        return {key: setup.before[key] for key in ("base_metrics", "base_seconds")}
    if not setup.eval_sets or not setup.config.train.evaluate_base:
        return {}
    started = time.perf_counter()
    metrics = evaluate(base=True)
    seconds = round(time.perf_counter() - started, 1)
    how = "from an earlier run" if evaluate.base_was_kept else f"{seconds:.0f} s"
    info(f"base model evaluation ({how}): {format_metrics(metrics)}")
    return {"base_metrics": metrics, "base_seconds": seconds}


def _samples(setup: RunSetup, metrics: dict, seconds: float) -> Callable[[], dict]:
    """Makes what the report shows of the eval rows: `rows` of classifications that tell something, else `samples`.

    No samples where the base is not kept (full) or the model is sharded.
    """
    sets = setup.eval_sets
    first = next(iter(sets.values()), None)

    def make() -> dict:
        samples: list[dict] = []
        if first and not (first.label_words or setup.is_sharded or setup.config.adapter.method == "full"):
            chat, of_chats = find_chat(setup.config.data, setup.tokenizer), bool(setup.config.data.messages)
            samples = generate_samples(setup.model, setup.tokenizer, first, seconds, chat, of_chats)
        return {"samples": samples, "rows": describe_rows(metrics, sets)}

    return make
