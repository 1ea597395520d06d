"""Write a tokenizer as llama.cpp reads it: tokens, their types, merges or scores, and the name of its pre-tokenizer.

llama.cpp has its own code for each way to split text before the merges; a GGUF names which one to use. A tokenizer that splits
in another way is not supported: text would become other tokens than those that the model was trained on.
"""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from lora_ft.core.errors import ModelError

WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + WORDS
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + WORDS
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# steps of a byte-level tokenizer's pre_tokenizer -> llama.cpp's name, whether a word in the vocabulary skips the merges
SPLITS: dict[tuple, tuple[str, bool]] = {
    ("bytes by GPT-2's words",): ("gpt-2", False),
    ("single digits", "bytes by GPT-2's words"): ("smollm", False),
    (LLAMA3, "bytes"): ("llama-bpe", True),
    (QWEN2, "bytes"): ("qwen2", False),
    (TEKKEN, "bytes"): ("tekken", True),
}
ALTERNATIVE = "Export the adapter alone (without --merged), for use with a GGUF of the base."


def write_vocabulary(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, chat_template: object
) -> None:
    """Add the tokenizer, its special tokens and a chat template (if it is a text); unused tokens fill it up to `size`.

    Raises:
        ModelError: the tokenizer is not supported.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF: tokenizers of type {model['type']} are not supported, only BPE. {ALTERNATIVE}")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    pieces = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    tokens = [pieces.get(i, f"[PAD{i}]") for i in range(size)]
    spm = bool(model.get("byte_fallback"))
    kinds = [_kind(i, tokens[i], pieces, added, spm, tokenizer.unk_token_id) for i in range(size)]
    writer.add_tokenizer_model("llama" if spm else "gpt2")
    if spm:
        ranks = {"".join(pair): -float(n) for n, pair in reversed(list(enumerate(merges)))}
        last = -float(len(merges))
        plain = [kind == gguf.TokenType.NORMAL for kind in kinds]
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([ranks.get(t, last) if p else 0.0 for t, p in zip(tokens, plain, strict=True)])
        writer.add_add_space_prefix(_prepends_space(state))
    else:
        writer.add_tokenizer_pre(_split_name(state))
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        if (token_id := getattr(tokenizer, name)) is not None:
            getattr(writer, f"add_{name}")(token_id)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    if isinstance(chat_template, str):
        writer.add_chat_template(chat_template)


def _kind(i: int, token: str, pieces: dict[int, str], added: dict[int, dict], spm: bool, unknown: int | None) -> int:
    """The token's type. added: id -> entry of the tokenizer's added tokens. spm: whether it is like sentencepiece's."""
    if i not in pieces:
        return gguf.TokenType.UNUSED
    if spm and i == unknown:
        return gguf.TokenType.UNKNOWN
    if i in added:
        return gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if spm and len(token) == 6 and token.startswith("<0x") else gguf.TokenType.NORMAL


def _split_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text; a ModelError if it has none."""
    split = SPLITS.get(tuple(map(_step, _steps(state["pre_tokenizer"]))))
    normalizers = [step["type"] for step in _steps(state["normalizer"])]
    if split is None or normalizers not in ([], ["NFC"]) or bool(state["model"].get("ignore_merges")) != split[1]:
        known = ", ".join(name for name, _ in SPLITS.values())
        raise ModelError(f"GGUF: the tokenizer splits text in none of llama.cpp's ways ({known}). {ALTERNATIVE}")
    return split[0]


def _step(step: dict[str, Any]) -> str:
    """A step of a pre_tokenizer as in the keys of SPLITS; an unknown step matches none of them."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return "bytes by GPT-2's words"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "single digits"
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return str(regex)
    return str(step)


def _prepends_space(state: dict[str, Any]) -> bool:
    """Whether a sentencepiece-like tokenizer puts a space before the text; a ModelError if llama.cpp lacks a step of it."""
    prepends = False
    for step in _steps(state["normalizer"]) + _steps(state["pre_tokenizer"]):
        match step:
            case {"type": "Prepend", "prepend": "▁"} | {"type": "Metaspace", "prepend_scheme": "first" | "always"}:
                prepends = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"} | {"type": "Metaspace"}:
                pass
            case _:
                raise ModelError(f"GGUF: the tokenizer's step {step['type']} is not supported. {ALTERNATIVE}")
    return prepends


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a Sequence of normalizers or pre-tokenizers; a single step, or none, as a list."""
    if step is None:
        return []
    return list(step.get("normalizers") or step["pretokenizers"]) if step["type"] == "Sequence" else [step]
