"""The gate: on every family a flat padding-free step has the gradients of a plain padded PEFT step, to 1e-5 in float32."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_ft.data.batches import micro_batch
from lora_ft.methods.lora.expert_files import unpacked
from lora_ft.methods.lora.experts import packed
from lora_ft.methods.lora.inject import inject_lora, lora_layers
from lora_ft.methods.lora.stacked import to_peft_matrices
from lora_ft.model.load import fuse_gelu
from lora_ft.model.quantize import quantize
from lora_ft.nn.adapted import with_weight
from lora_ft.nn.attention import Isolation, shares
from lora_ft.nn.expert_names import parameter_of
from lora_ft.nn.loss import supervised_loss
from lora_ft.nn.mlp import keep_gate_and_up
from lora_ft.nn.quantized import Form, QuantizedLinear
from tests.helpers.families import CANNOT_SHARE, FAMILIES, tiny_model, token_ids

RANK, SCALING = 2, 2.0


def apart() -> list[dict]:
    rows = []
    for n, prompt in ((23, 9), (9, 1), (37, 30)):
        ids = token_ids(1, n, seed=n)[0].tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def sharing() -> list[dict]:
    """Common beginnings of up to three levels, of which the last tokens and one more are supervised."""
    start, middle, late = (token_ids(1, n, seed=n)[0].tolist() for n in (11, 8, 16))
    rows = []
    for i, head in enumerate((start, start + middle, start + middle + late, start + middle + late)):
        ids = head + [i, *token_ids(1, 4 + i, seed=90 + i)[0].tolist()]
        rows.append(
            {"input_ids": ids, "labels": [-100] * 10 + ids[10:11] + [-100] * (len(head) - 11) + ids[len(head) :]}
        )
    return rows


def peft_twin(family: str, ours) -> tuple[torch.nn.Module, dict[str, int], list[str]]:
    """PEFT on the same base with the same weights, its ranks by module or parameter, and its target_parameters.

    Where ours adapts slices, it has one block-structured A and B.
    """
    layers = lora_layers(ours)
    pairs = {path: to_peft_matrices(layer, RANK * len(layer.rows)) for path, layer in layers.items()}
    ranks = {parameter_of(path): len(A) for path, (A, _) in pairs.items()}
    pairs, parameters = packed(pairs)
    alphas = {name: SCALING * rank for name, rank in ranks.items()}
    modules = [path for path in pairs if path in layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out for Conv1D itself, and says so
        config = LoraConfig(
            r=RANK, target_modules=modules, target_parameters=parameters, rank_pattern=ranks, alpha_pattern=alphas
        )
        theirs = get_peft_model(tiny_model(family), config).eval()
    for path, (A, B) in pairs.items():
        module = theirs.base_model.model.get_submodule(path)
        module.lora_A["default"].weight.data.copy_(A)
        module.lora_B["default"].weight.data.copy_(B)
    return theirs, ranks, parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("examples", [apart, sharing])
def test_gradients_equal_a_plain_padded_peft_step(family, examples):
    ours = tiny_model(family)
    fuse_gelu(ours)  # as when it is loaded
    inject_lora(ours, ["all"], RANK, alpha=RANK * SCALING, seed=0)
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(ours).values():
        for B in layer.lora_B.values():
            torch.nn.init.normal_(B, std=0.3, generator=generator)
    theirs, ranks, parameters = peft_twin(family, ours)
    keep_gate_and_up(ours)  # as when it is trained

    isolation = Isolation.detect(ours, 64)
    row = micro_batch(examples(), shares(ours, isolation))
    assert (row["input_ids"].numel() < sum(len(e["input_ids"]) for e in examples())) == (
        examples is sharing and family not in CANNOT_SHARE
    )
    with isolation.row(ours, row.pop("segments")):
        loss = supervised_loss(ours, **row) / len(row["keep"])
        loss.backward()

    width = max(len(e["input_ids"]) for e in examples())
    gaps = [width - len(e["input_ids"]) for e in examples()]
    padded = theirs(
        input_ids=torch.tensor([e["input_ids"] + [0] * g for e, g in zip(examples(), gaps, strict=True)]),
        labels=torch.tensor([e["labels"] + [-100] * g for e, g in zip(examples(), gaps, strict=True)]),
        attention_mask=torch.tensor([[1] * (width - g) + [0] * g for g in gaps]),
    ).loss
    padded.backward()

    assert loss.item() == pytest.approx(padded.item(), rel=1e-6)
    gradients = {
        path: (module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad)
        for path, module in theirs.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }
    gradients = unpacked(Path(), gradients, parameters, ranks.__getitem__)
    assert gradients.keys() == lora_layers(ours).keys()
    for path, layer in lora_layers(ours).items():
        dA, dB = gradients[path]
        for n, (part, rows) in enumerate(layer.rows.items()):
            mine = slice(n * RANK, (n + 1) * RANK)
            assert_equal(layer.lora_A[part].grad, dA[mine], f"{path} {part} A")
            assert_equal(layer.lora_B[part].grad.T, rows.of(dB[:, mine].T).flatten(-2), f"{path} {part} B")


def dequantized(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with dense weights, which are the dequantized ones."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(path, with_weight(layer, layer.weight))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_over_a_quantized_base_are_those_over_its_dequantized_weights(family):
    form: Form = "int8" if list(FAMILIES).index(family) % 2 else "nf4"
    losses, gradients = [], []
    for make in (lambda model: model, dequantized):
        model = make(quantize(tiny_model(family), form))
        fuse_gelu(model)
        inject_lora(model, ["all"], RANK, alpha=RANK * SCALING, seed=0)
        for layer in lora_layers(model).values():
            for B in layer.lora_B.values():
                torch.nn.init.constant_(B, 0.1)
        keep_gate_and_up(model)
        isolation = Isolation.guess_from_config(model, 64)
        row = micro_batch(apart(), shares(model, isolation))
        with isolation.row(model, row.pop("segments")):
            loss = supervised_loss(model, **row) / len(row["keep"])
            loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        assert_equal(gradient, gradients[1][name], name)


def assert_equal(got: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert wanted.norm() > 0, name
    assert (got - wanted).norm() <= 1e-5 * wanted.norm(), name
