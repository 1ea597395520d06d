"""A flat row gives every example the logits (and the adapter the gradients) that it gets alone, on every family."""

import contextlib
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_ft.methods.lora.inject import inject_lora, trainable
from lora_ft.nn import attention
from lora_ft.nn.attention import Isolation, isolates, shares
from lora_ft.nn.layout import Layout
from lora_ft.nn.rows import Segment, Tree, flat_row
from tests.helpers.families import CANNOT_SHARE, COMMON, FAMILIES, build, tiny_model, token_ids

LENGTHS = (23, 9, 37, 1)


def examples() -> list[list[int]]:
    return [token_ids(1, n, seed=n)[0].tolist() for n in LENGTHS]


def logits(model, isolation: Isolation, sequences: list[list[int]], share: bool = False) -> torch.Tensor:
    """Of each sequence's tokens, one sequence after the other."""
    row = flat_row(sequences, share)
    with isolation.row(model, row.segments):
        computed = model(**row.inputs, use_cache=False).logits[0]
    return computed[torch.cat(row.places)]


def with_common_beginnings() -> list[list[int]]:
    """Three levels: all share 20 tokens, three of them 18 more, two of these again 17; and one that is alone."""
    start, middle, late = (token_ids(1, n, seed=n)[0].tolist() for n in (20, 18, 17))
    a, b, c, d, e = ([i, *token_ids(1, 4, seed=90 + i)[0].tolist()] for i in range(5))
    return [start + a, start + middle + late + b, e, start + middle + c, start + middle + late + d, start + middle]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_after_common_beginnings_equal_solo_logits(family):
    model, sequences = build(family), with_common_beginnings()
    isolation = Isolation.detect(model, longest=64)
    assert shares(model, isolation) == (family not in CANNOT_SHARE)
    if family in CANNOT_SHARE:
        return
    assert len(Tree.of(sequences).spans) == 8
    alone = torch.cat([model(torch.tensor([s]), use_cache=False).logits[0] for s in sequences])
    assert torch.allclose(logits(model, isolation, sequences, share=True), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_logits_equal_solo_logits(family):
    model = build(family)
    isolation = Isolation.detect(model, longest=max(LENGTHS))
    assert isolation in (Isolation.ATTENTION, Isolation.MASK)
    # the oracle is the model as transformers runs it: one example, its own attention
    alone = torch.cat([model(torch.tensor([e]), use_cache=False).logits[0] for e in examples()])
    assert torch.allclose(logits(model, isolation, examples()), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen2", "gpt_neo", "cohere2", "phi3"]
)
@torch.no_grad()
def test_sliding_windows_shorter_than_an_example_are_honoured(family):
    model_type, settings = FAMILIES[family]
    wide, narrow = (
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                model_type,
                **COMMON
                | settings
                | {"sliding_window": w, "window_size": w, "use_sliding_window": True, "max_window_layers": 0},
            )
        ).eval()
        for w in (64, 5)
    )
    wide.load_state_dict(build(family).state_dict(), strict=False)
    narrow.load_state_dict(build(family).state_dict(), strict=False)
    isolation = Isolation.detect(narrow, longest=max(LENGTHS))
    of_examples = torch.cat([narrow(torch.tensor([e]), use_cache=False).logits[0] for e in examples()])
    assert torch.allclose(logits(narrow, isolation, examples()), of_examples, atol=1e-5, rtol=1e-4)
    if shares(narrow, isolation):
        alone = torch.cat([narrow(torch.tensor([s]), use_cache=False).logits[0] for s in with_common_beginnings()])
        shared = logits(narrow, isolation, with_common_beginnings(), share=True)
        assert torch.allclose(shared, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(wide, isolation, examples()), of_examples, atol=1e-3), (
        "the window does nothing here"
    )


@pytest.mark.parametrize("family", ["opt", "bloom", "xglm", "mpt", "llama"])
def test_without_isolation_the_check_says_so(family):
    """Plain rows with restarting positions leak on these (llama: with a cache); the check must be able to fail."""
    model = tiny_model(family)
    if family == "llama":
        forward = model.forward
        model.forward = lambda **kw: forward(**kw | {"use_cache": True})
    assert not isolates(model, NoIsolation())


class NoIsolation:
    def row(self, model, segments):
        return contextlib.nullcontext()


def test_frequencies_that_follow_the_longest_position_put_examples_alone():
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert Isolation.detect(model, longest=129) is Isolation.ONE_PER_ROW  # beyond its 128 positions
    assert Isolation.detect(model, longest=128) is Isolation.ATTENTION


def test_outside_of_a_row_the_model_is_untouched():
    model = tiny_model("llama")
    ids = token_ids(2, 11)
    before = model(ids).logits
    usual = model.config._attn_implementation
    with pytest.raises(RuntimeError), Isolation.ATTENTION.row(model, [Segment(5)]):
        raise RuntimeError
    assert model.config._attn_implementation == usual
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon_multi_query", "gemma2", "phi3", "bloom"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_a_padded_batch(family, checkpointing):
    model = tiny_model(family)
    inject_lora(model, ["all"], rank=2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, p in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(p.data, std=0.3, generator=generator)
    rows = examples()[:3]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {} if family in ("bloom", "falcon_multi_query") else {"position_ids": position}
    padded = model(ids, attention_mask=mask, use_cache=False, **extra).logits[mask.bool()]
    weight = torch.randn(padded.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((padded * weight).sum(), list(trainable(model).values()))
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for module in model.modules():
            for name in ("attention_dropout", "attn_pdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    row = flat_row(rows)
    with Isolation.detect(model, 64).row(model, row.segments):
        computed = model(**row.inputs, use_cache=False).logits[0]
        (computed * weight).sum().backward()
    for (name, p), g in zip(trainable(model).items(), wanted, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-4, atol=1e-5 * g.abs().max()), name


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("parents", [(None,) * 4, (None, 0, 1, 0)])
def test_one_variable_length_call_is_asked_for_what_the_calls_one_by_one_compute(parents, window, monkeypatch):
    """The GPU's path, with torch's kernel replaced by its documentation: it needs a GPU itself."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        out = torch.zeros_like(query)  # (tokens, heads, head_dim)
        for (start, end), (first, last) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
            assert end - start <= max_q and last - first <= max_k
            q, k, v = (
                x[a:b].transpose(0, 1) for x, a, b in ((query, start, end), (key, first, last), (value, first, last))
            )
            distance = torch.arange(last - first - (end - start), last - first)[:, None] - torch.arange(last - first)
            left, right = window_size
            allowed = ((left < 0) | (distance <= left)) & (-distance <= right)
            k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v)) if enable_gqa else (k, v)
            scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
            out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    q, k, v = (torch.randn(1, heads, sum(LENGTHS), 8) for heads in (6, 2, 2))
    layout = Layout([Segment(n, parent) for n, parent in zip(LENGTHS, parents, strict=True)])
    monkeypatch.setattr(attention, "_layout", layout)
    one_by_one, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, 0.3, sliding_window=window)
    at_once = attention._attention_in_one_call(q, k, v, layout, 0.3, window)
    assert torch.allclose(at_once, one_by_one, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_torchs_own_variable_length_call_takes_what_it_is_given(window):
    """On tensors without values, for which it has shapes both ways; on values it needs a GPU."""
    like = dict(dtype=torch.bfloat16, device="meta", requires_grad=True)
    q, k, v = (torch.empty(1, heads, sum(LENGTHS), 64, **like) for heads in (6, 2, 2))
    out = attention._attention_in_one_call(q, k, v, Layout([Segment(n) for n in LENGTHS]), None, window)
    assert (out.shape, out.dtype) == ((1, sum(LENGTHS), 6, 64), torch.bfloat16)
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


def test_only_what_flash_attention_has_a_kernel_for_goes_into_one_call(monkeypatch):
    """A GPU that is too old, a head that is too large: torch says so, and the examples go one by one."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    q, k = (torch.randn(1, heads, 15, 16).as_subclass(OnGPU) for heads in (6, 2))
    asked = []
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: asked.append(params) or True)
    assert attention._flash_supports(q, k, k)
    assert asked[0].enable_gqa and asked[0].is_causal and asked[0].query.shape == q.shape
    assert not attention._flash_supports(q[..., :12], k[..., :12], k[..., :12])
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda params: False)
    assert not attention._flash_supports(q, k, k)
    assert not attention._flash_supports(*(x.as_subclass(torch.Tensor) for x in (q, k, k)))
