"""Batched generation equals generating one prompt at a time without cache or padding; what ends it; streaming and stopping."""

import pytest
import torch
from transformers import GenerationConfig

from lora_ft.core.errors import ModelError
from lora_ft.data.chats.format import end_tokens
from lora_ft.methods.lora.inject import inject_lora, trainable
from lora_ft.model.generate import generate, generate_in_batches, position_limit, to_text
from lora_ft.nn.adapted import bare
from tests.data.conftest import build as build_tokenizer
from tests.helpers.families import build, tiny_model, token_ids

EOS = 2
PROMPTS = [token_ids(1, n, seed=seed)[0].tolist() for seed, n in enumerate((3, 9, 5, 14, 14, 1, 30))]
GREEDY = GenerationConfig(max_new_tokens=10)
TOKENIZER = build_tokenizer()


def new_ids(model, prompts, config, ends, **options) -> list[list[int]]:
    return [row.ids for row in generate_in_batches(model, prompts, config, ends, **options)]


@torch.no_grad()
def alone(model, prompt: list[int], ends: list[int], new: int = 10) -> list[int]:
    """Greedy decoding by the definition: the whole text again for each token."""
    ids = list(prompt)
    for _ in range(new):
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


# learned positions, offset positions, rotary ones, alibi of two kinds, windows, a 3-D cache, experts
FAMILIES = ["gpt2", "opt", "llama", "bloom", "mpt", "falcon_new", "exaone4", "gemma2", "gpt_bigcode", "gpt_oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_in_batches_is_greedy_one_at_a_time(family):
    model = build(family)
    endless = [alone(model, prompt, []) for prompt in PROMPTS]
    assert len(set(map(tuple, endless))) > len(PROMPTS) / 2  # the prompts matter
    ends = sorted({EOS, endless[1][4], endless[3][0]})  # rows that end early, one at once
    wanted = [alone(model, prompt, ends) for prompt in PROMPTS]
    assert len({len(ids) for ids in wanted}) > 1
    for batch_size in (1, 4, 100):
        assert new_ids(model, PROMPTS, GREEDY, ends, batch_size=batch_size) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_common_beginning_is_read_once(family):
    model, head = build(family), token_ids(1, 20, seed=50)[0].tolist()
    prompts = [head + prompt for prompt in PROMPTS]
    wanted = [alone(model, prompt, [EOS]) for prompt in prompts]
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    try:
        assert new_ids(model, prompts, GREEDY, [EOS], batch_size=4) == wanted
    finally:
        hook.remove()
    in_the_row = {"exaone4", "gemma2", "gpt_oss", "bloom", "mpt"}  # windows, ALiBi: distances are measured there
    assert read.count(20) == (family not in in_the_row)


def test_the_models_own_settings_are_used_only_for_end_tokens():
    model = tiny_model("llama")
    wanted = [alone(model, prompt, [EOS]) for prompt in PROMPTS]
    own = model.generation_config
    own.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, max_length=3, eos_token_id=[EOS, wanted[0][2]])
    ends = end_tokens(TOKENIZER, own, None)
    assert ends == {EOS, wanted[0][2], TOKENIZER.eos_token_id}
    found = new_ids(model, PROMPTS, GREEDY, ends, batch_size=3)
    assert found == [alone(model, prompt, sorted(ends)) for prompt in PROMPTS]
    assert model.generation_config is own


def test_end_tokens_are_optional():
    model = tiny_model("gpt2")
    model.generation_config.eos_token_id = None
    assert [len(ids) for ids in new_ids(model, PROMPTS, GREEDY, [], batch_size=4)] == [10] * len(PROMPTS)


def log_probability(model, prompt, ids) -> float:
    with torch.no_grad():
        scores = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return sum(scores[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids))


def test_beams_in_batches_equal_beams_alone_and_beat_greedy():
    model = build("gpt2")
    beams = GenerationConfig(max_new_tokens=4, num_beams=8, no_repeat_ngram_size=2)
    found = new_ids(model, PROMPTS, beams, [], batch_size=4)
    assert found == [new_ids(model, [prompt], beams, [], batch_size=1)[0] for prompt in PROMPTS]
    for prompt, ids in zip(PROMPTS, found, strict=True):
        if EOS not in (greedy := alone(model, prompt, [], 4)) and len(ids) == 4 and len(set(greedy)) == 4:
            assert log_probability(model, prompt, ids) >= log_probability(model, prompt, greedy) - 1e-4


def test_sampling_follows_the_seed_and_restores_the_random_state():
    model = build("llama")
    how = GenerationConfig(max_new_tokens=10, do_sample=True, temperature=1.5, top_k=0)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = new_ids(model, PROMPTS, how, [], batch_size=3, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    assert first == new_ids(model, PROMPTS, how, [], batch_size=3, seed=1)
    assert first != new_ids(model, PROMPTS, how, [], batch_size=3, seed=2)


def test_an_adapter_can_be_switched_off():
    model = tiny_model("gpt2")
    base = [alone(model, prompt, [EOS]) for prompt in PROMPTS]
    inject_lora(model, ["q", "v"], rank=4, alpha=64, dropout=0.5)
    for name, parameter in trainable(model).items():
        torch.nn.init.normal_(parameter, std=0.3 if "lora_B" in name else 0.1)
    model.train()
    adapted = new_ids(model, PROMPTS, GREEDY, [EOS], batch_size=4)
    assert model.training
    with bare(model):
        assert new_ids(model, PROMPTS, GREEDY, [EOS], batch_size=4) == base
    model.eval()
    assert adapted == [alone(model, prompt, [EOS]) for prompt in PROMPTS] != base


def test_check_stops_between_tokens():
    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        new_ids(model, PROMPTS, GREEDY, [], batch_size=100, check=check)
    assert model.generation_config.max_new_tokens is None  # its own again


def test_every_token_is_reported_with_the_rows_so_far():
    model, steps = tiny_model("llama"), []
    endless = [alone(model, prompt, []) for prompt in PROMPTS]
    ends = {endless[1][4]}
    rows = generate(model, PROMPTS, GREEDY, ends, on_token=steps.append)
    assert steps[-1] == rows
    for step, so_far in enumerate(steps, 1):
        for row, last in zip(so_far, rows, strict=True):
            assert row.ids == last.ids[:step] and row.ended == (last.ended and len(last.ids) < step)
    assert {row.ended for row in rows} == {True, False}
    beams = GenerationConfig(max_new_tokens=4, num_beams=2)
    assert len(generate(model, PROMPTS, beams, ends, on_token=lambda _: pytest.fail("beams have no final tokens"))) == 7


def test_the_positions_of_a_config():
    assert position_limit(tiny_model("gpt2")) == 128 == position_limit(tiny_model("llama"))
    unlimited = tiny_model("bloom")
    del unlimited.config.max_position_embeddings
    assert position_limit(unlimited) is None


def test_text_is_not_tidied_up():
    tidying = build_tokenizer(clean_up_tokenization_spaces=True)
    ids = tidying("<s>The end . It 's over .</s>")["input_ids"]
    assert to_text(tidying, ids) == "The end . It 's over ."


def test_a_config_of_wrong_types_is_the_models_fault():
    config = GenerationConfig(max_new_tokens=2, bos_token_id="x")
    with pytest.raises(ModelError, match=r"nothing can be generated .*generation_config.json"):
        generate(tiny_model("llama"), PROMPTS[:1], config, [EOS])


def test_what_a_config_wants_returned_has_no_effect():
    config, ends = GenerationConfig(max_new_tokens=2), [EOS]
    expected = generate(tiny_model("llama"), PROMPTS[:1], config, ends)
    config.output_hidden_states, config.return_dict_in_generate = 1e308, True
    assert generate(tiny_model("llama"), PROMPTS[:1], config, ends) == expected


@pytest.mark.parametrize("error", [TypeError("a bug"), RuntimeError("a bug"), KeyError("a bug")])
def test_an_error_of_the_model_is_not_the_configs_fault(error):
    model = tiny_model("llama")

    def fails(*_):
        raise error

    model.model.layers[0].mlp.forward = fails
    with pytest.raises(type(error), match="a bug"):
        generate(model, PROMPTS[:1], GenerationConfig(max_new_tokens=2), [EOS])
