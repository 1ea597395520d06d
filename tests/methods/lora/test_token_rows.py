"""Embedding rows of single tokens trained beside A and B: against PEFT's trainable_token_indices, merged, and refused."""

import json
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_ft.commands.export.command import export_command
from lora_ft.commands.generate.command import generate_command
from lora_ft.commands.inspect.command import inspect_command
from lora_ft.commands.merge import merge_command
from lora_ft.core.errors import ConfigError, ModelError
from lora_ft.methods.lora import files, merge
from lora_ft.methods.lora.derived import open_part
from lora_ft.methods.lora.inject import merge as merge_in_place
from lora_ft.methods.lora.inject import trainable, unmerge
from lora_ft.methods.lora.peft import read_adapter
from lora_ft.methods.lora.peft_config import ROWS
from lora_ft.methods.lora.token_rows import token_ids as ids_of
from lora_ft.methods.lora.token_rows import train_rows
from lora_ft.methods.trained import Trained
from lora_ft.model.files import resolve
from lora_ft.nn import loss
from lora_ft.nn.adapted import bare
from tests.helpers.tiny import CONFIG, tiny_tokenizer, write_run
from tests.methods.lora.test_whole import adapt, model_of, saved, shaken, train_side_by_side
from tests.methods.lora.test_whole_runs import refused_where_a_base_is_shared
from tests.methods.test_runs import evaluated, run, weights
from tests.training.test_resume import log, until_done

TOKENS = [3, 7, 50]
IDS = torch.tensor([[5, 3, 7, 9, 50, 3], [8, 9, 10, 11, 12, 7]])
CASES = [("gpt2", True), ("llama", False), ("llama", True), ("gemma2", True), ("gpt_neox", False)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def with_rows(family: str, tied: bool, tokens=TOKENS, **settings):
    model = adapt(model_of(family, tied), [], **settings)
    train_rows(model, tokens)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, tied", CASES)
def test_peft_computes_what_we_save_and_we_what_it_saves(tmp_path, family, tied):
    plain = logits(model_of(family, tied))
    model = with_rows(family, tied)
    assert torch.allclose(logits(model), plain, atol=1e-6)
    expected = logits(shaken(model))
    if tied:  # the second row begins without a trained token: its logits move by A and B and the head's rows
        assert (expected - plain)[1, 0, TOKENS].abs().min() > 1e-3
    with bare(model):
        assert torch.equal(logits(model), plain)
    folder = saved(model, tmp_path / "ours")
    assert json.loads((folder / files.CONFIG).read_text())["trainable_token_indices"] == TOKENS
    theirs = peft.PeftModel.from_pretrained(model_of(family, tied), folder).eval()
    assert torch.allclose(logits(theirs), expected, atol=1e-5)
    again = model_of(family, tied)
    files.load_adapter(again, folder, trainable=True)
    assert all(torch.equal(a, b) for a, b in zip(trainable(again).values(), trainable(model).values(), strict=True))
    assert torch.equal(logits(again), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family, tied", [("gpt2", True), ("llama", False)])
@pytest.mark.parametrize("as_table", [False, True])
def test_pefts_rows_in_its_own_order(tmp_path, family, tied, as_table):
    name = "wte" if family == "gpt2" else "embed_tokens"
    tokens = {name: [50, 3, 7]} if as_table else [50, 3, 7]
    config = peft.LoraConfig(r=2, init_lora_weights=False, trainable_token_indices=tokens)
    theirs = peft.get_peft_model(model_of(family, tied), config).eval()
    for key, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in key:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    theirs.save_pretrained(tmp_path)
    ours = model_of(family, tied)
    files.load_adapter(ours, tmp_path)
    assert not trainable(ours) and torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    target = with_rows(family, tied, targets=[], modules=["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"])
    files.initialize_from(target, read_adapter(Trained.open(tmp_path)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", [256, 8])
@pytest.mark.parametrize("family, tied", [("gpt2", True), ("llama", False)])
def test_twenty_steps_have_pefts_losses(monkeypatch, family, tied, chunk):
    monkeypatch.setattr(loss, "CHUNK", chunk)  # with 8 the gradient of the head's rows is summed over chunks
    module = ["c_attn" if family == "gpt2" else "q_proj"]
    ours = with_rows(family, tied, targets=[], modules=module)
    config = peft.LoraConfig(r=2, lora_alpha=16, target_modules=module, trainable_token_indices=TOKENS)
    theirs = peft.get_peft_model(model_of(family, tied), config).eval()
    for path, layer in files.lora_layers(ours).items():
        theirs.base_model.model.get_submodule(path).lora_A["default"].weight.data.copy_(layer.lora_A["all"].data)
    train_side_by_side(ours, theirs, TOKENS)


@pytest.mark.parametrize("family, tied", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_models_compute_the_same_and_stay_tied(tmp_path, family, tied, dtype):
    model = model_of(family, tied).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    base = resolve(str(tmp_path / "base"))
    train_rows(adapt(model, []), TOKENS)
    shaken(model)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    before = model.get_input_embeddings().base.weight
    report = merge.merge_adapter(base, read_adapter(Trained.open(saved(model, tmp_path / "a", base))), tmp_path / "out")
    assert report["whole"] == ["the rows of 3 tokens"] and not report["untied"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    table = plain.get_input_embeddings().weight
    assert (table is plain.get_output_embeddings().weight) == tied
    changed = [i for i in range(len(table)) if not torch.equal(table[i], before[i])]
    assert changed == TOKENS and torch.equal(table[TOKENS], model.get_input_embeddings().trained.weight.to(dtype))
    expected = logits(model)
    layers = merge_in_place(model)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert torch.allclose(logits(plain), logits(model), atol=1e-5 if dtype == torch.float32 else 0.1)
    unmerge(model, layers)
    assert torch.equal(logits(model), expected) and model.config.tie_word_embeddings == tied


@pytest.mark.filterwarnings("ignore")
def test_texts_become_tokens():
    tokenizer = tiny_tokenizer()
    film = tokenizer.convert_tokens_to_ids("Ġfilm")
    assert ids_of(tokenizer, ["Ġfilm", "</s>", "Ġfilm", " good"]) == sorted(
        [film, 2, *tokenizer(" good", add_special_tokens=False)["input_ids"]]
    )
    with pytest.raises(ModelError, match=r"'<\|tool\|>' is no token of the base's tokenizer .it is '<'"):
        ids_of(tokenizer, ["<|tool|>"])
    with pytest.raises(ConfigError, match="adapter.add_tokens: a shape has no tokenizer"):
        ids_of(None, ["film"])


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(names=["wte"]), "the embedding is trained or adapted already"),
        (dict(names=["lm_head"]), "the tied head is trained or adapted already"),
        (dict(names=[], modules=["lm_head"]), "the tied head is trained or adapted already"),
    ],
)
def test_what_is_trained_already_is_named(settings, words):
    model = adapt(model_of("gpt2", True), **settings)
    with pytest.raises(ModelError, match=words):
        train_rows(model, TOKENS)


@pytest.mark.parametrize(
    "tensors, config, words",
    [
        (lambda t: t, dict(trainable_token_indices=[3, 7]), "has shape (3, 32), the model needs (2, 32)"),
        (lambda t: t, dict(trainable_token_indices=[3, 7, 500]), "and its 100 rows up to 500"),
        (lambda t: t, dict(trainable_token_indices=[3, 3, 7]), "a list of different token ids"),
        (lambda t: t, dict(trainable_token_indices={"wte": [1], "lm_head": [2]}), "other tokens for each module"),
        (lambda t: t, dict(trainable_token_indices=None), "of 0 tokens. One embedding's can be applied"),
        (lambda t: {k: v for k, v in t.items() if ROWS not in k}, {}, "rows of no embedding, of 3 tokens"),
        (
            lambda t: {k.replace("wte.", "wpe."): v for k, v in t.items()},
            {},
            "only rows of the model's input embedding",
        ),
        (lambda t: {k: v * torch.nan if ROWS in k else v for k, v in t.items()}, {}, "contains NaN or inf"),
    ],
)
def test_files_that_can_not_be_applied_are_refused(tmp_path, tensors, config, words):
    folder = saved(shaken(with_rows("gpt2", True)), tmp_path / "a")
    (folder / files.RECORD).unlink()
    save_file(tensors(load_file(folder / files.WEIGHTS)), folder / files.WEIGHTS)
    settings = json.loads((folder / files.CONFIG).read_text()) | config
    (folder / files.CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ModelError) as error:
        files.load_adapter(model_of("gpt2", True), folder)
    assert words in str(error.value), error.value


def test_what_holds_a_and_b_alone_refuses_them(tmp_path):
    model = model_of("llama", False)
    model.save_pretrained(tmp_path / "base")
    train_rows(adapt(model, []), TOKENS)
    folder = saved(model, tmp_path / "a", resolve(str(tmp_path / "base")))
    with pytest.raises(ModelError, match="has trained embedding rows; this form holds A and B alone. Use --to merged"):
        export_command(folder, to="peft")
    with pytest.raises(ModelError, match="A and B alone are combined and compressed"):
        open_part(folder)
    with pytest.raises(ModelError, match="Load it alone"):
        files.load_adapter(model_of("llama", False), folder, "a")
    with pytest.raises(ModelError, match="Make adapter.train_tokens the same"):
        files.initialize_from(adapt(model_of("llama", False), []), read_adapter(Trained.open(folder)))


NEW = [f"<new_{i}>" for i in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that trains the rows of five tokens, which were added to its base as docs/models.md says."""
    config = CONFIG.replace("rank: 4, alpha: 8", f"rank: 4, alpha: 8, train_tokens: [{', '.join(NEW)}, Ġgood]")
    folder = write_run(tmp_path_factory.mktemp("rows"), "gpt2", config.replace("Review:", NEW[0]))
    tokenizer, model = (of.from_pretrained(folder / "base") for of in (AutoTokenizer, AutoModelForCausalLM))
    tokenizer.add_tokens(NEW)
    model.resize_token_embeddings(len(tokenizer))
    for made in (tokenizer, model):
        made.save_pretrained(folder / "base")
    run(folder)
    return folder


def test_a_run_ends_in_the_same_bits_is_scored_and_merged(folder, monkeypatch, capsys):
    assert until_done(partial(run, folder, "output=again"), monkeypatch, 17) > 1
    assert log(folder / "again") == log(folder / "out")
    assert weights(folder / "again").read_bytes() == weights(folder / "out").read_bytes()
    record = json.loads((folder / "out/lora_ft.json").read_text())
    scores = evaluated(folder, "out", capsys, again=True)
    assert scores["adapter"]["loss"] == pytest.approx(record["metrics"]["loss"], rel=1e-6)
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    monkeypatch.chdir(folder)
    generate_command([Path("out")], prompt="good", greedy=True, max_new_tokens=3)
    answer = capsys.readouterr().out
    merge_command(Path("out"))
    assert "the rows of 6 tokens" in capsys.readouterr().out
    generate_command([], base="out-merged", prompt="good", greedy=True, max_new_tokens=3)
    assert capsys.readouterr().out == answer
    tokenizer = AutoTokenizer.from_pretrained("out-merged")
    table = AutoModelForCausalLM.from_pretrained("out-merged").get_input_embeddings().weight
    ids = tokenizer("".join(NEW))["input_ids"]
    rows = load_file(weights(folder / "out"))[f"base_model.model.transformer.wte{ROWS}"]
    assert ids == tokenizer.convert_tokens_to_ids(NEW) and torch.equal(table[ids], rows[-5:])


@pytest.fixture(scope="module", params=[("gpt2", True, 0), ("llama", False, 0), ("llama", False, 64)])
def added(request, tmp_path_factory):
    """A run that adds the five tokens itself: of a tied base, an untied one, and one with rows to spare."""
    family, tied, spare = request.param
    config = CONFIG.replace("rank: 4, alpha: 8", f"rank: 4, alpha: 8, add_tokens: [{', '.join(NEW)}]")
    folder = write_run(tmp_path_factory.mktemp("added"), family, config.replace("Review:", NEW[0]))
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if spare:
        model.resize_token_embeddings(model.config.vocab_size + spare)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    (folder / "base/model.safetensors").unlink()
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    run(folder)
    return folder


def by_hand(folder: Path) -> Path:
    """The base with the same tokens, added with transformers; their rows are the mean of the others."""
    target = folder / "by_hand/base"
    tokenizer, model = (of.from_pretrained(folder / "base") for of in (AutoTokenizer, AutoModelForCausalLM))
    before = len(tokenizer)
    tokenizer.add_tokens(NEW)
    model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings), mean_resizing=False)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        end.weight.data[before : before + 5] = end.weight.data[:before].mean(0)
    for made in (tokenizer, model):
        made.save_pretrained(target)
    return target


@pytest.mark.filterwarnings("ignore")
def test_tokens_that_a_run_adds_are_as_those_of_a_base_that_has_them(added, monkeypatch, capsys):
    """The same bits of the adapter; stopped and resumed too; scored, merged, and read by PEFT."""
    assert until_done(partial(run, added, "output=again"), monkeypatch, 17) > 1
    assert weights(added / "again").read_bytes() == weights(added / "out").read_bytes()
    base = by_hand(added)
    changes = [f"model.name={base}", "adapter.add_tokens=[]", f"adapter.train_tokens=[{', '.join(NEW)}]"]
    run(added, "output=hand", *changes)
    assert weights(added / "hand").read_bytes() == weights(added / "out").read_bytes()

    monkeypatch.chdir(added)
    scores = evaluated(added, "out", capsys, again=True)
    record = json.loads(Path("out/lora_ft.json").read_text())
    assert scores["adapter"]["loss"] == pytest.approx(record["metrics"]["loss"], rel=1e-6)
    merge_command(Path("out"))
    capsys.readouterr()
    plain = AutoModelForCausalLM.from_pretrained("out-merged").eval()
    tokenizer = AutoTokenizer.from_pretrained("out-merged")
    assert tokenizer.convert_tokens_to_ids(NEW) == AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(NEW)
    ids = tokenizer(f"good {NEW[1]} bad{NEW[4]}", return_tensors="pt")["input_ids"]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "out").eval()
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits, plain(input_ids=ids).logits
    assert expected.shape == found.shape and torch.allclose(found, expected, atol=1e-5)
    assert evaluated(added, "out-merged", capsys, again=True)["model"]["loss"] == pytest.approx(
        scores["adapter"]["loss"], abs=1e-5
    )
    inspect_command([Path("out")])
    assert "no problem found" in capsys.readouterr().out
    generate_command([Path("out")], prompt="good", greedy=True, max_new_tokens=3)


def test_a_token_that_is_there_is_not_new(added, monkeypatch):
    monkeypatch.chdir(added)
    with pytest.raises(ModelError, match=r"add_tokens: 'Ġgood' is a token .* already. Name it in adapter.train_tokens"):
        run(added, "output=x", "adapter.add_tokens=[Ġgood]")
    refused_where_a_base_is_shared(added, monkeypatch, "trained embedding rows", "add_tokens")


def test_what_shares_a_base_refuses_it(folder, monkeypatch):
    refused_where_a_base_is_shared(folder, monkeypatch, "trained embedding rows", "train_tokens")
