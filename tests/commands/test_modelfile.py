"""The Modelfile beside a GGUF: its template, as Ollama fills it, gives the prompts of the run, or there is none."""

import copy
import re
import shlex
from pathlib import Path

import pytest
from tokenizers import AddedToken

from lora_ft.commands.export.command import export_command
from lora_ft.commands.export.ollama_template import ollama_template
from lora_ft.commands.generate.prompts import prompt_format
from lora_ft.config.load import parse_config
from lora_ft.core.errors import FilesError
from tests.commands.test_export_gguf import BYTES, bpe, write_adapter, write_model
from tests.data.conftest import build
from tests.data.test_chat_templates import TEMPLATES, TOKENS

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # its system message is part of the first user's
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set ms = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}{% for m in ms %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index ~ m.role ~ m.content }}\n{% endfor %}"
SYSTEM = {"role": "system", "content": "Be brief.\n\nAnd kind."}
TURNS = [
    {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(("Hi {x}", 'A "b"', "c", "d", "e"))
]


def filled(template: str, turns: list[dict]) -> str:
    """What Ollama makes of a template with these turns: Go's text/template with .System and .Messages, or .Prompt."""
    pieces = re.split(r"\{\{ (.+?) \}\}", template)  # text, action, text, ...

    def block(i: int, scope: dict) -> tuple[str, int, str]:
        """(text, place after it, the action that ends it)."""
        out = ""
        while i < len(pieces):
            word, i = pieces[i], i + 1
            if i % 2:
                out += word
            elif word.startswith(("end", "else")):
                return out, i, word
            elif word == "range .Messages":
                start = i
                for turn in turns:
                    text, i, _ = block(start, scope | {".Role": turn["role"], ".Content": turn["content"]})
                    out += text
            elif word.startswith("if "):
                done = False
                while word != "end":
                    name, _, value = word.partition("if ")[2].removeprefix("eq ").partition(" ")
                    holds = word == "else" or (scope[name] == value.strip('"') if value else bool(scope[name]))
                    text, i, word = block(i, scope)
                    out, done = out + text * (holds and not done), done or holds
            else:
                out += (
                    re.sub(r"\\U(\w{8})", lambda m: chr(int(m[1], 16)), word[1:-1]) if word[0] == '"' else scope[word]
                )
        return out, i, ""

    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    return block(0, {".System": system, ".Prompt": turns[-1]["content"]})[0]


def form_of(tokenizer, **data):
    return prompt_format(parse_config({"model": {"name": "m"}, "data": {"train": "x"} | data}), tokenizer, raw=False)


@pytest.fixture(scope="module")
def tokenizer():
    return build()


def with_template(tokenizer, template: str):
    tokenizer = copy.deepcopy(tokenizer)
    words = sorted(set(re.findall(TOKENS, template)))
    tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    tokenizer.chat_template = template
    return tokenizer


REAL = {path.stem: path.read_text() for path in sorted(TEMPLATES.glob("*.jinja")) if "_training" not in path.stem}
TAKEN = {
    "llama3",
    "llama3_2",
    "gemma",
    "gemma3",
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "phi3",
    "chatml",
    "mistral",
}


@pytest.mark.parametrize("name", [*REAL, "chatml", "mistral", "numbered"])
def test_a_template_is_given_only_where_it_says_the_same(tokenizer, name):
    tokenizer = with_template(tokenizer, (REAL | {"chatml": CHATML, "mistral": MISTRAL, "numbered": NUMBERED})[name])
    form = form_of(tokenizer, messages="messages")
    template, note = ollama_template(form)
    assert template is not None or name not in TAKEN
    assert (template is None) == note.startswith("no TEMPLATE") and (template is None or name != "numbered")
    has_system = bool(template) and ".System" in template
    assert has_system or note
    for turns in [TURNS[:n] for n in (1, 3, 5)] * bool(template):
        assert filled(template, turns) == form.from_turns(turns)[0]
        if has_system:
            assert filled(template, [SYSTEM, *turns]) == form.from_turns([SYSTEM, *turns])[0]


def test_what_the_tokenizer_puts_before_every_text_is_not_in_it():
    with_bos = with_template(build(bos=True), "{{ bos_token }}" + CHATML)
    template, _ = ollama_template(form_of(with_bos, messages="messages"))
    for turns in (TURNS[:3], [SYSTEM, *TURNS[:3]]):
        assert "<s>" + filled(template, turns) == form_of(with_bos, messages="messages").from_turns(turns)[0]
    assert ollama_template(form_of(with_template(build(bos=True), CHATML), messages="messages"))[0] is None


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"text": "{a}"}, "{{ .Prompt }}"),
        ({"prompt": "Review: {a}\nSentiment:", "completion": " {b}"}, "Review: {{ .Prompt }}\nSentiment:"),
        ({"prompt": "{a}[[ ({c})]]:", "completion": " {b}"}, "{{ .Prompt }}:"),
        ({"prompt": '{{{a}}} "', "completion": " {b}"}, '{{ "\\U0000007b" }}{{ .Prompt }}} {{ "\\U00000022" }}'),
        ({"prompt": "\u00a0{a}", "completion": " {b}"}, '{{ "\\U000000a0" }}{{ .Prompt }}'),
        ({"prompt": "{a} and {c}", "completion": " {b}"}, "{{ .Prompt }}"),
    ],
)
def test_a_run_that_is_no_chat_has_its_prompt(tokenizer, data, expected):
    template, note = ollama_template(form_of(tokenizer, **data))
    assert template == expected and bool(note) == (data.get("prompt") == "{a} and {c}")


def test_the_file_of_an_adapter_of_a_chat(tmp_path, capsys):
    tokenizer = bpe(BYTES)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    write_model(tmp_path / "base", "llama", tokenizer)
    write_adapter(tmp_path / "out", tmp_path / "base", targets=["q"])
    export_command(tmp_path / "out", "gguf")
    path, printed = tmp_path / "out-lora.Modelfile", capsys.readouterr().out
    assert (
        path.read_text()
        == '''# ollama create NAME -f out-lora.Modelfile
# FROM is a GGUF of the adapter's base, base
FROM ./base.gguf
ADAPTER ./out-lora.gguf
TEMPLATE """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}{{ end }}<|im_start|>assistant
"""
PARAMETER stop "</s>"
PARAMETER stop "<|im_end|>"
'''
    )
    assert f"ollama create NAME -f {path}" in printed
    words = shlex.split(re.search(r"after lora-ft (.*)", printed)[1])  # writes the file that FROM names
    export_command(Path(words[1]), words[3], output=Path(words[5]), verify=False)
    assert (tmp_path / "base.gguf").exists() and "FROM ./base.gguf\nTEMPLATE" in (
        tmp_path / "base.Modelfile"
    ).read_text()
    (tmp_path / "out-lora.gguf").unlink()
    with pytest.raises(FilesError, match="out-lora.Modelfile: already exists"):
        export_command(tmp_path / "out", "gguf")


def test_the_file_of_a_merged_model(tmp_path):
    write_model(tmp_path / "base", "llama")
    write_adapter(tmp_path / "out", tmp_path / "base", targets=["q"])
    export_command(tmp_path / "out", "gguf", merged=True, verify=False)
    assert (tmp_path / "out-merged.Modelfile").read_text().splitlines()[1:] == [
        "FROM ./out-merged.gguf",
        'TEMPLATE """{{ .Prompt }}"""',
        'PARAMETER stop "</s>"',
    ]
