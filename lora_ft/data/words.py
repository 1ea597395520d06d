"""Whether prompt and completion have the same tokens together as each alone, so that equal completions are tokenized once.

They have with a tokenizer that splits a text into words by a pattern, and those into tokens: a completion that starts with a
space, after a prompt that ends with something else, starts a word. The patterns below have no match across such a place, and
look only at the character after a match, and at that only if the match is white space. So the words of the prompt are those
without the completion, and the other way round. Unicode's composition (NFC) leaves a space as it is, too.
"""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

# the end of the patterns of Llama 3, Qwen 2 and many others; they differ in the digits and marks of a word
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPACES = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = (
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _SPACES,
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _SPACES,
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _SPACES,
)


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether `tokenizer` is known to start a word at each space after another character; other tokenizers may as well."""
    parts = json.loads(tokenizer.to_str())
    normalizer, model = parts["normalizer"] or {"type": "NFC"}, parts["model"]
    return (
        normalizer == {"type": "NFC"}
        and model["type"] == "BPE"
        and not model.get("dropout")
        and not any(_reaches_further(token) for token in parts["added_tokens"])
        and _known(parts["pre_tokenizer"] or {})
    )


def ends_word(prompt: str) -> bool:
    """Whether a prompt ends with something else than white space."""
    return bool(prompt) and not prompt[-1].isspace()


def start_words(completions: Iterable[str]) -> bool:
    """Whether all completions start with a space."""
    return all(text.startswith(" ") for text in completions)


def _reaches_further(token: dict[str, Any]) -> bool:
    """Whether an added token may be found by what is around it, or reach across a space."""
    return token["single_word"] or token["rstrip"] or any(map(str.isspace, token["content"]))


def _known(pre_tokenizer: dict[str, Any]) -> bool:
    """GPT-2's words, with or without digits apart, or those of a pattern above."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part.get("type") for part in parts]
    last = parts[-1] if parts else {}
    if kinds[-1:] != ["ByteLevel"] or last["add_prefix_space"]:
        return False
    if last["use_regex"]:
        return kinds in (["ByteLevel"], ["Digits", "ByteLevel"])
    split = parts[0]
    return (
        kinds == ["Split", "ByteLevel"]
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and split["pattern"].get("Regex") in PATTERNS
    )
