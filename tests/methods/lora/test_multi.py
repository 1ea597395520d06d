"""Many adapters on one base: switching, and batches whose rows name different adapters, against each row alone and PEFT."""

import peft
import pytest
import torch

from lora_ft import load_adapter, merge, mixed, use
from lora_ft.core.errors import ModelError
from lora_ft.methods.lora.inject import inject_lora
from lora_ft.methods.lora.multi import adapter_names, shared_layers
from lora_ft.nn.adapted import bare
from tests.helpers.families import tiny_model, token_ids
from tests.methods.lora.test_files import saved

# family -> adapters that differ in rank, scaling, targets, layers
ADAPTERS = {
    "small": dict(rank=1, alpha=3.0, targets=("q",), seed=1),
    "usual": dict(rank=3, alpha=7.0, targets=("q", "v"), seed=2),
    "wide": dict(rank=5, alpha=2.0, rslora=True, targets=("all",), seed=3),
    "last": dict(rank=2, alpha=4.0, targets=("v", "down"), layers=[1], seed=4),
}
FAMILIES = ["gpt2", "llama", "llama_mqa", "gpt_neox", "phi3", "bloom", "opt", "falcon_new", "codegen", "gemma2", "mpt"]
NAMES = ["wide", None, "small", "usual", "last", "wide", "usual"]


def served(tmp_path, family, settings=ADAPTERS):
    """A tiny model with the adapters loaded by name, from files."""
    model = tiny_model(family)
    for name, own in settings.items():
        saved(family, tmp_path / name, **own)
        load_adapter(model, tmp_path / name, name)
    return model


@torch.no_grad()
def logits(model, ids, **inputs) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **inputs).logits


def solo(model, name, ids, **inputs) -> torch.Tensor:
    use(model, name)
    found = logits(model, ids, **inputs)
    use(model, None)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_mixed_batch_is_as_alone(tmp_path, family):
    dora = {"lengths": dict(rank=2, alpha=4.0, targets=("q", "v", "o"), dora=True, seed=5)}
    names = [*NAMES, "lengths", "lengths"]
    model, ids = served(tmp_path, family, ADAPTERS | dora), token_ids(rows=len(names), length=9)
    alone = torch.cat([solo(model, name, ids[i : i + 1]) for i, name in enumerate(names)])
    assert (alone - logits(model, ids)).abs().amax((1, 2))[[0, 2, 3, 4, 7]].min() > 0.01  # each adapter does something
    with mixed(model, names):
        assert torch.allclose(logits(model, ids), alone, rtol=0, atol=1e-5)
    assert torch.equal(logits(model, ids), logits(tiny_model(family), ids))  # the bare base afterwards


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_switching_is_loading_that_one_alone(tmp_path, family):
    model, ids = served(tmp_path, family), token_ids(rows=2, length=9)
    for name in [*ADAPTERS, "small"]:
        one = tiny_model(family)
        load_adapter(one, tmp_path / name)
        assert torch.equal(solo(model, name, ids), logits(one, ids))
    base = logits(tiny_model(family), ids)
    assert torch.equal(solo(model, None, ids), base)
    use(model, "wide")
    with bare(model):
        assert torch.equal(logits(model, ids), base)
    assert not torch.equal(logits(model, ids), base), "afterwards the adapter is in use again"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_mixed_batch_is_what_peft_computes(tmp_path, family):
    model, ids = served(tmp_path, family), token_ids(rows=len(NAMES), length=9)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "small", adapter_name="small")
    for name in list(ADAPTERS)[1:]:
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    names = [name or "__base__" for name in NAMES]
    with mixed(model, NAMES):
        assert torch.allclose(logits(model, ids), logits(theirs.eval(), ids, adapter_names=names), atol=1e-5)


@pytest.mark.parametrize("beams, family", [(1, f) for f in FAMILIES] + [(3, f) for f in ("gpt2", "llama", "gpt_neox")])
def test_generation_with_padding_and_cache(tmp_path, family, beams):
    model = served(tmp_path, family)
    lengths = [4, 9, 6, 2, 7, 5, 9]
    prompts = [token_ids(rows=1, length=n, seed=n) for n in lengths]
    ids, mask = torch.zeros(7, 9, dtype=torch.long), torch.zeros(7, 9, dtype=torch.long)
    for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        ids[i, 9 - n :], mask[i, 9 - n :] = prompt, 1
    how = dict(max_new_tokens=6, do_sample=False, num_beams=beams, eos_token_id=None, pad_token_id=0)
    with mixed(model, NAMES):
        together = model.generate(input_ids=ids, attention_mask=mask, **how)[:, 9:]
    for i, name in enumerate(NAMES):
        use(model, name)
        assert torch.equal(model.generate(input_ids=prompts[i], **how)[0, lengths[i] :], together[i])


def test_bfloat16_rows(tmp_path):
    """As near to float32 as each row alone in bfloat16 is."""
    model, ids = served(tmp_path, "llama"), token_ids(rows=len(NAMES), length=9)

    def alone():
        return torch.cat([solo(model, name, ids[i : i + 1]) for i, name in enumerate(NAMES)]).float()

    exact = alone()
    model.to(torch.bfloat16)
    rounding = (alone() - exact).pow(2).mean().sqrt()
    with mixed(model, NAMES):
        assert (logits(model, ids).float() - exact).pow(2).mean().sqrt() < 1.25 * rounding


def test_the_base_is_there_once_and_an_adapter_costs_its_own_size(tmp_path):
    model = served(tmp_path, "gpt2")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny_model("gpt2").parameters())
    size = {name: 0 for name in ADAPTERS}
    for layer in shared_layers(model).values():
        for name, own in layer.adapters.items():
            assert own.base is layer.base
            size[name] += sum(p.numel() for p in [*own.lora_A.values(), *own.lora_B.values()])
    assert size["small"] == 2 * 1 * (32 + 32) and size["usual"] == 2 * 2 * 3 * (32 + 32)


def test_the_adapter_in_use_is_no_part_of_the_module_tree(tmp_path):
    model = served(tmp_path, "llama")
    before = list(model.state_dict())
    use(model, "wide")
    assert list(model.state_dict()) == before
    with pytest.raises(ModelError, match="no LoRA layers to merge"):
        merge(model)
    load_adapter(model, tmp_path / "small", "another")  # while one is in use
    assert "another" in adapter_names(model)


def test_no_loop_over_rows(tmp_path):
    """As many products for 64 rows as for 4."""
    model, names = served(tmp_path, "llama"), list(ADAPTERS)
    counts = []
    for copies in (1, 16):
        ids = token_ids(rows=4 * copies, length=3)
        with mixed(model, names * copies), torch.profiler.profile() as profile:
            logits(model, ids)
        counts.append({e.key: e.count for e in profile.key_averages() if e.key in ("aten::bmm", "aten::linear")})
    assert counts[0] == counts[1] and counts[0]["aten::bmm"] > 0


def test_an_unknown_name_is_told_the_nearest(tmp_path):
    model = served(tmp_path, "llama")
    with pytest.raises(
        ModelError, match="no adapter usuall; loaded are small, usual, wide, last. Did you mean usual\?"
    ):
        use(model, "usuall")
    with pytest.raises(ModelError, match="no adapter x"), mixed(model, ["x", None]):
        pass
    with pytest.raises(ValueError, match="a batch of 3 rows is not a multiple of the 2"), mixed(model, ["small", None]):
        logits(model, token_ids(rows=3, length=4))
    assert sorted(adapter_names(model)) == sorted(ADAPTERS)


def test_named_and_unnamed_adapters_keep_apart(tmp_path):
    model = served(tmp_path, "llama")
    for refused in (
        lambda: load_adapter(model, tmp_path / "small"),
        lambda: load_adapter(model, tmp_path / "small", "small"),
        lambda: inject_lora(model),
        lambda: merge(model),
    ):
        with pytest.raises(ModelError, match=r"adapter|LoRA layers"):
            refused()
    with pytest.raises(ValueError, match="without a name"):
        load_adapter(model, tmp_path / "small", "more", trainable=True)
    one = tiny_model("llama")
    load_adapter(one, tmp_path / "small")
    with pytest.raises(ModelError, match="has an adapter already"):
        load_adapter(one, tmp_path / "usual", "usual")


def test_names_may_hold_anything_and_the_checks_see_the_bare_base(tmp_path):
    model = tiny_model("llama")
    saved("llama", tmp_path / "a", targets=("q", "v"), modules=("lm_head",))
    for name in ("v1.2", "train", "weight"):
        load_adapter(model, tmp_path / "a", name)
    saved("gpt2", tmp_path / "other")
    with pytest.raises(ModelError, match="another model's adapter"):
        load_adapter(model, tmp_path / "other", "other")
    assert sorted(adapter_names(model)) == ["train", "v1.2", "weight"]
    ids = token_ids(rows=2, length=4)
    assert torch.equal(solo(model, "v1.2", ids), solo(model, "train", ids))
