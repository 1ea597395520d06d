"""The Modelfile beside a GGUF: Ollama makes of it a model with the run's prompts, whose answers end where the run's do."""

import os
import shlex
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_ft.commands.export.ollama_template import ollama_template
from lora_ft.commands.generate.prompts import PromptFormat, prompt_format
from lora_ft.core import storage
from lora_ft.core.errors import UserError
from lora_ft.core.messages import echo, printable
from lora_ft.core.names import published_name
from lora_ft.core.run_folder import read_record
from lora_ft.data.chats.format import end_tokens
from lora_ft.methods.trained import run_config
from lora_ft.model.files import Base
from lora_ft.model.load import load_tokenizer, skeleton


def modelfile_of(target: Path) -> Path:
    """Where the Modelfile of a GGUF is: by its name, since a folder may have several."""
    return target.with_name(f"{target.name.removesuffix('.gguf')}.Modelfile")


def write_modelfile(target: Path, folder: Path, base: Base, *, alone: bool) -> None:
    """Write the Modelfile of a GGUF, and print how to use it. folder: what was exported. alone: an adapter without its base."""
    path = modelfile_of(target)
    lines, written = [f"# ollama create NAME -f {path.name}"], ""
    if alone:
        name = printable(Path(published_name(base.name)).name)
        beside = f"{name.removesuffix('.gguf')}.gguf"
        source = f"./{beside}" if base.gguf is None else os.path.abspath(base.gguf)
        lines += [f"# FROM is a GGUF of the adapter's base, {name}", f"FROM {source}", f"ADAPTER ./{target.name}"]
        if base.gguf is None:
            words = ["lora-ft", "export", str(base.folder), "--to", "gguf", "--output", str(path.with_name(beside))]
            written = shlex.join(words)
    else:
        lines.append(f"FROM ./{target.name}")
    try:
        tokenizer = load_tokenizer(base)
        form = prompt_format(run_config(folder, read_record(folder) or {}), tokenizer, raw=False)
    except UserError as e:
        note = f"no TEMPLATE: {e}"
    else:
        template, note = ollama_template(form)
        lines += [] if template is None else [f'TEMPLATE """{template}"""']
        lines += [f'PARAMETER stop "{stop}"' for stop in stops(form, base, tokenizer)]
    storage.write_file(path, "\n".join([lines[0], *([f"# {printable(note)}"] if note else []), *lines[1:], ""]))
    echo(f"  Ollama     ollama create NAME -f {shlex.quote(str(path))}")
    if written:
        echo(f"             after {written}")
    if note:
        echo(f"  note: {path}: {note}")


def stops(form: PromptFormat, base: Base, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that end an answer, as of `generate`, and a chat template's whether or not they are tokens."""
    ids = end_tokens(tokenizer, skeleton(base).generation_config, form.chat)
    ends = {*tokenizer.convert_ids_to_tokens(sorted(ids)), *(form.chat.stops if form.chat and form.is_chat else ())}
    return sorted(end for end in ends if end and '"' not in end and end.isprintable())
