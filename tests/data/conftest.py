"""Small tokenizers, with and without BOS, and data files."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "Review: a fine film, warm and funny\nSentiment: positive",
    "Review: dull and far too long\nSentiment: negative",
    "user assistant system hello there, how are you today? fine thanks.",
    "def f(x):\n    return x + 1\n\nSo it goes... [INST] [/INST]",
] * 4
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def build(bos: bool = False, eos: bool = False, **kwargs) -> PreTrainedTokenizerFast:
    """Byte-level BPE; `bos` and `eos`: the tokens it adds to a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    single = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single=single, special_tokens=ids)
    # As in many real tokenizers, ByteLevel's post-processing strips white space from the offsets.
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **kwargs)


@pytest.fixture(scope="session")
def plain():
    return build()


@pytest.fixture(scope="session")
def with_bos():
    return build(bos=True)


@pytest.fixture
def write(tmp_path):
    """Write a file, bytes and text unchanged, a list of objects as JSON Lines; returns its path as a str."""

    def write(name: str, content) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_bytes(content.encode())
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A separate cache for each test, so that no test reads another's entries."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def make_tokenizer():
    return build
