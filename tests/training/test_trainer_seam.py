"""The private members of the Trainer that training/trainer_seam.py replaces, and the order of its public events."""

import inspect
import re

import pytest
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.nn.attention import Isolation
from lora_ft.training import trainer as trainer_module
from lora_ft.training.trainer import LoRATrainer
from lora_ft.training.trainer_seam import SeamTrainer
from tests.training.test_trainer import adapted, corpus

PRIVATE = {"_move_model_to_device", "_save_checkpoint"}  # each has a test below
METHODS = [
    "_move_model_to_device", "get_train_dataloader", "create_optimizer", "create_scheduler", "restore",
    "finish_stopped_step", "training_step", "log", "evaluate", "_save_checkpoint",
]  # fmt: skip
CALLBACKS = ["on_train_begin", "on_epoch_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step",
             "on_step_end", "on_log", "on_evaluate", "on_save", "on_epoch_end", "on_train_end"]  # fmt: skip


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.fixture
def events(tmp_path, monkeypatch) -> list[str]:
    """What happened, in order, in a run of two steps with an evaluation and a checkpoint after the second."""
    happened: list[str] = []

    def recorded(name):
        method = getattr(LoRATrainer, name)
        return lambda self, *args, **kwargs: (happened.append(name), method(self, *args, **kwargs))[1]

    for name in METHODS:
        monkeypatch.setattr(LoRATrainer, name, recorded(name))
    recorder = type("Recorder", (TrainerCallback,), {})
    for name in CALLBACKS:
        setattr(recorder, name, lambda self, *args, name=name, **kwargs: happened.append(name))
    get = StepPlan.__getitem__
    monkeypatch.setattr(StepPlan, "__getitem__", lambda self, i: (happened.append(f"read step {i}"), get(self, i))[1])

    model = adapted()
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=1, max_steps=2, logging_steps=2,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, metric_for_best_model="eval_loss",
        greater_is_better=False, report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = LoRATrainer(
        model=model,
        args=args,
        plan=StepPlan(corpus(), 8, 1, 2, RowPacking(64), seed=0),
        isolation=Isolation.detect(model, 64),
        evaluation=lambda step: {"loss": 1.0},
        save=lambda state, best_step: happened.append(f"saved step {state.step}, best {best_step}"),
        log_line=lambda line: None,
    )
    trainer.add_callback(recorder)
    trainer.train_from(None)
    return happened


def test_no_other_private_member_is_overridden():
    ours = {name for cls in (SeamTrainer, LoRATrainer) for name in vars(cls) if not name.startswith("__")}
    assert {name for name in ours & set(dir(Trainer)) if name.startswith("_")} == PRIVATE
    assert not re.findall(r"(?:self|trainer|super\(\))\._[a-z]\w*", inspect.getsource(trainer_module))


def test_move_model_to_device(events):
    """Called by Trainer.__init__, and nothing else moves the model: a sharded one cannot be moved."""
    assert parameters(Trainer._move_model_to_device) == ["self", "model", "device"]
    assert events[0] == "_move_model_to_device"


def test_save_checkpoint(events):
    """Called when should_save is set, after the evaluation of the same step, and followed by on_save."""
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    at = events.index("_save_checkpoint")
    assert events.index("evaluate") < at and events[at + 1 : at + 3] == ["saved step 2, best 2", "on_save"]
    assert events.count("_save_checkpoint") == 1


def test_create_accelerator_and_postprocess(monkeypatch, request):
    """The accelerator prepares the model through its prepare_model, which then neither moves nor wraps it."""
    assert parameters(Trainer.create_accelerator_and_postprocess) == ["self"]
    assert parameters(Accelerator.prepare_model) == ["self", "model", "device_placement", "evaluation_mode"]
    calls, prepare = [], Accelerator.prepare_model
    monkeypatch.setattr(
        Accelerator, "prepare_model", lambda self, model, **how: (calls.append(how), prepare(self, model, **how))[1]
    )
    request.getfixturevalue("events")
    assert calls == [{"device_placement": False, "evaluation_mode": True}]


def test_free_memory(monkeypatch, request):
    """The Trainer calls its accelerator's free_memory, without arguments or a use of what it returns, as training begins."""
    assert inspect.getsource(Trainer._inner_training_loop).count("\n        self.accelerator.free_memory()\n") == 1
    monkeypatch.setattr(Accelerator, "free_memory", lambda self, *objects: pytest.fail("a walk through all objects"))
    request.getfixturevalue("events")


def test_n_gpu(tmp_path):
    """training/arguments.py sets it, so that the Trainer does not wrap the model in DataParallel."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args._n_gpu = 7
    assert args.n_gpu == 7


def test_the_trainers_own_progress_is_removed(tmp_path):
    for tqdm_off, callback in ((True, PrinterCallback), (False, ProgressCallback)):
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=tqdm_off, report_to=[]
        )
        assert callback in map(type, Trainer(model=adapted(), args=args).callback_handler.callbacks)


def test_order_of_events(events):
    """Resuming relies on it: optimizer and schedule exist at on_train_begin, and steps are read after on_epoch_begin."""
    step = ["on_step_begin", "training_step", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert events == [
        "_move_model_to_device", "get_train_dataloader", "create_optimizer", "create_scheduler",
        "on_train_begin", "finish_stopped_step", "on_epoch_begin",
        "read step 0", *step,
        "read step 1", *step, "log", "on_log",
        "evaluate", "log", "on_log", "on_evaluate", "_save_checkpoint", "saved step 2, best 2", "on_save",
        "on_epoch_end", "log", "on_train_end",
    ]  # fmt: skip
