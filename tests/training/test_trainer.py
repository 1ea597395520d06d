"""The training loop against a plain padded PEFT loop, and against itself cut otherwise."""

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainingArguments, get_linear_schedule_with_warmup

from lora_ft.core.errors import NumbersError
from lora_ft.data.batches import RowPacking, StepPlan
from lora_ft.methods.lora.inject import inject_lora, lora_layers, trainable
from lora_ft.nn.attention import Isolation
from lora_ft.training.optimizer import learn_b_faster
from lora_ft.training.trainer import LoRATrainer
from tests.helpers.families import tiny_model, token_ids

STEPS, RATE, WARMUP = 30, 1e-2, 3


def corpus(n: int = 40) -> datasets.Dataset:
    rows = []
    for i in range(n):
        ids = token_ids(1, 4 + 3 * (i % 7), seed=i)[0].tolist()
        prompt = len(ids) // 2
        labels = [-100] * prompt + ids[prompt:]
        counts = {"tokens": len(ids), "supervised": len(ids) - prompt}
        rows.append({"input_ids": ids, "labels": labels, "where": f"rows:{i}"} | counts)
    return datasets.Dataset.from_list(rows)


def run(model, folder, micro_batch_tokens=64, alone=False, dataset=None, ratio=None, **arguments) -> list[dict]:
    """Train `model` as the tool does; the log's lines."""
    plan = StepPlan(dataset or corpus(), 8, 1, STEPS, RowPacking(micro_batch_tokens, alone), seed=0)
    settings = dict(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=1, max_steps=STEPS, learning_rate=RATE,
        warmup_steps=WARMUP, logging_steps=1, remove_unused_columns=False, save_strategy="no", report_to=[],
        disable_tqdm=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    lines: list[dict] = []
    trainer = LoRATrainer(
        model=model,
        args=TrainingArguments(**settings | arguments),
        plan=plan,
        isolation=Isolation.detect(model, 64),
        evaluation=None,
        save=lambda state, best_step: None,
        log_line=lines.append,
    )
    if ratio:
        learn_b_faster(trainer.create_optimizer(), model, ratio)
    trainer.train_from(None)
    return lines


def adapted(family="llama", seed=0, **settings):
    model = tiny_model(family)
    inject_lora(model, **{"targets": ["q", "v"], "rank": 4, "alpha": 8, "seed": seed} | settings)
    return model


def plain_padded_training(model, rate: float, ratio=None):
    """Each step's loss and batch in a loop without the Trainer: padded batches of the plan's examples, plain AdamW, or PEFT's
    LoRA+ with a `ratio`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    if ratio:
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    plan, data = StepPlan(corpus(), 8, 1, STEPS, RowPacking(64), seed=0), corpus()
    for step in range(STEPS):
        rows = [data[i] for i in plan.examples(step)]
        width = max(len(r["input_ids"]) for r in rows)
        pad = [width - len(r["input_ids"]) for r in rows]
        batch = {
            "input_ids": torch.tensor([r["input_ids"] + [0] * p for r, p in zip(rows, pad, strict=True)]),
            "labels": torch.tensor([r["labels"] + [-100] * p for r, p in zip(rows, pad, strict=True)]),
            "attention_mask": torch.tensor([[1] * (width - p) + [0] * p for p in pad]),
        }
        loss = model(**batch).loss
        yield loss.item(), batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "ratio, settings, pefts", [(None, {}, {}), (4.0, {}, {}), (None, {"dora": True}, {"use_dora": True}),
                               (None, {"init": "pissa"}, {"init_lora_weights": "pissa"})]
)  # fmt: skip
def test_loss_curve_equals_that_of_peft_in_a_plain_padded_loop(ratio, settings, pefts, tmp_path):
    ours = adapted(**settings)
    start = {path: layer.lora_A[next(iter(layer.rows))].detach().clone() for path, layer in lora_layers(ours).items()}
    losses = [line["loss"] for line in run(ours, tmp_path, ratio=ratio)]

    pefts = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | pefts
    theirs = get_peft_model(tiny_model("llama"), LoraConfig(**pefts))
    for path, A in start.items() if settings.get("init") != "pissa" else ():  # theirs may have the other sign
        theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(A)
    for step, (ours_now, (loss, _)) in enumerate(zip(losses, plain_padded_training(theirs, RATE, ratio), strict=True)):
        assert ours_now == pytest.approx(loss, abs=1e-4), step
    assert losses[-1] < losses[0] - 0.3, "nothing was learned"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_cutting_a_batch_changes_nothing_beyond_rounding(family, tmp_path):
    def weights(micro_batch_tokens, alone=False):
        model = adapted(family)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        run(model, tmp_path, micro_batch_tokens, alone, max_steps=5)
        return trainable(model)

    whole, cut, alone = weights(10_000), weights(30), weights(30, alone=True)
    for name, p in whole.items():
        assert torch.allclose(p, cut[name], atol=1e-5, rtol=1e-4), name
        assert torch.allclose(p, alone[name], atol=1e-5, rtol=1e-4), name


def test_same_seed_same_bits_with_dropout_and_other_seed_other_bits(tmp_path):
    a, b, c = (adapted(dropout=0.2) for _ in range(3))
    first, second, other = run(a, tmp_path), run(b, tmp_path), run(c, tmp_path, seed=1)
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
    assert all(torch.equal(p, q) for p, q in zip(trainable(a).values(), trainable(b).values(), strict=True))
    assert [line["loss"] for line in first] != [line["loss"] for line in other]


def test_the_largest_seed_fits_torch_in_a_run_of_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ft.distributed.processes.world_size", lambda: 2)
    assert len(run(adapted(), tmp_path, max_steps=2, seed=2**32 - 1)) == 2


def test_only_the_adapter_moves(tmp_path):
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, tmp_path, max_steps=3, warmup_steps=0)  # A moves once B has
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable(model))


def test_the_logged_loss_is_the_mean_over_supervised_tokens_since_the_last_line(tmp_path):
    each, every_third = run(adapted(), tmp_path), run(adapted(), tmp_path, logging_steps=3)
    data, plan = corpus(), StepPlan(corpus(), 8, 1, STEPS, RowPacking(64), seed=0)
    supervised = [sum(sum(x >= 0 for x in data[i]["labels"]) for i in plan.examples(s)) for s in range(STEPS)]
    for n, line in enumerate(every_third):
        steps = range(3 * n, 3 * n + 3)
        mean = sum(each[s]["loss"] * supervised[s] for s in steps) / sum(supervised[s] for s in steps)
        assert line["loss"] == pytest.approx(mean, rel=1e-5)
        assert line["supervised_tokens"] == sum(supervised[: 3 * n + 3])
    assert {"step", "epoch", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "peak_memory_mb"} <= set(line)


def test_numbers_that_are_not_finite_stop_before_the_optimizer(tmp_path):
    model = adapted()
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    model.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(NumbersError, match=r"step 1: .*rows: rows:"):
        run(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    plain, checkpointed = adapted(dropout=0.1), adapted(dropout=0.1)
    a = run(plain, tmp_path, max_steps=4)
    b = run(checkpointed, tmp_path, max_steps=4, activation_checkpointing=True)
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-5)
    for name, p in trainable(plain).items():
        assert torch.allclose(p, trainable(checkpointed)[name], atol=1e-6), name


def evaluated(folder, metrics: dict[int, dict], best: str, greater: bool) -> tuple[int | None, list[int]]:
    """The best step of a run whose evaluations have these metrics, and the steps that were saved."""
    saved: list[int] = []
    settings = dict(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=1, max_steps=4, save_strategy="no", report_to=[],
        disable_tqdm=True, eval_strategy="steps", eval_steps=1, eval_on_start=0 in metrics, remove_unused_columns=False,
        metric_for_best_model=f"eval_{best}", greater_is_better=greater,
    )  # fmt: skip
    trainer = LoRATrainer(
        model=(model := adapted()),
        args=TrainingArguments(**settings),
        plan=StepPlan(corpus(), 8, 1, 4, RowPacking(64), seed=0),
        isolation=Isolation.detect(model, 64),
        evaluation=metrics.__getitem__,
        save=lambda state, best_step: saved.append(state.step),
        log_line=lambda line: None,
    )
    trainer.train_from(None)
    return trainer.state.best_global_step, saved


@pytest.mark.parametrize("name", ["", "dev_"])
def test_ties_of_the_best_step_go_to_the_lower_loss_then_to_the_later_step(name, tmp_path):
    def steps(*values):
        return {step: {f"{name}accuracy": a, f"{name}loss": loss} for step, (a, loss) in enumerate(values, 1)}

    key = f"{name}accuracy"
    assert evaluated(tmp_path, steps((0.5, 4.5), (0.75, 2.0), (0.75, 0.8), (0.75, 0.9)), key, True)[0] == 3
    assert evaluated(tmp_path, steps((0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.4, 0.1)), key, True) == (3, [1, 2, 3])
    assert evaluated(tmp_path, steps((0.1, 1.0), (0.2, 0.5), (0.3, 0.5), (0.4, 0.7)), f"{name}loss", False)[0] == 3


def test_the_untrained_model_is_never_the_best_step(tmp_path):
    metrics = {step: {"loss": 1.0 + step} for step in range(5)}
    assert evaluated(tmp_path, metrics, "loss", False) == (1, [1])
