"""`lora-ft generate`: answers to a prompt or a file of prompts, or a chat, by a base and any number of its adapters."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from lora_ft.commands.generate.chat import escape, run_chat, stream_answer
from lora_ft.commands.generate.prompts import read_prompts
from lora_ft.commands.generate.serving import BASE, Prompt, Served, load, override
from lora_ft.core.errors import ConfigError, DataError, ModelError
from lora_ft.core.messages import echo, echo_json, printable
from lora_ft.core.paths import local_path
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.sources import SourceRow
from lora_ft.methods.trained import Trained, is_model

PROMPT = "--prompt"  # where a prompt of the command line is, for messages


def generate_command(
    folders: Sequence[Path],
    *,
    adapters: Sequence[str] = (),
    base: str | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
    columns: Sequence[str] = (),
    raw: bool = False,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    greedy: bool = False,
    seed: int | None = None,
    batch_size: int = 16,
    as_json: bool = False,
    trust: Trust = NO_TRUST,
) -> None:
    """Print the answer of each adapter to `prompt`, or to each row of the file `prompts`; without either, chat.

    columns: NAME=TEXT, values of the templates' columns for every prompt that has none of its own.

    Raises:
        UserError: the adapters don't share a base, there is no such adapter, or a row of the file is malformed.
    """
    if prompt is not None and prompts is not None:
        raise ConfigError("--prompt and --prompts: give only one, a prompt or a file of prompts")
    if as_json and prompt is None and prompts is None:
        raise ConfigError("--json needs --prompt or --prompts")
    named, base = find_adapters(folders, adapters, base)
    config = next((trained.config for trained in named.values()), None)
    rows = list(read_prompts(prompts, config)) if prompts is not None else []  # before loading: a bad file fails early
    served = load(named, base, raw=raw, trust=trust)
    override(served.sampling, greedy, max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    if seed is not None:
        torch.manual_seed(seed)
    for column in columns:
        served.set_column(column, "--column")
    first = next(iter(served.names), None)
    if prompts is not None:
        print_answers(served, prompts_of(served, rows, prompts, first), batch_size, as_json)
    elif prompt is None:
        run_chat(served, first)
    elif as_json or len(served.names) > 1:
        answering: list[str | None] = [*served.names] or [None]
        asked = [served.prompt(name, prompt, PROMPT) for name in answering]
        print_answers(served, asked, batch_size, as_json)
    else:
        stream_answer(served, served.prompt(first, prompt, PROMPT))


def find_adapters(
    folders: Sequence[Path], adapters: Sequence[str], base: str | None
) -> tuple[dict[str, Trained], str | None]:
    """The adapters by name (NAME=DIR, or that of their folder if no other has it), and the base if one is named.

    Raises ConfigError if they don't go together; ModelError as `Trained.open`.
    """
    found: dict[str, Trained] = {}
    if not folders and not adapters and not base:
        folders = [Path("out")]
    names = [folder.resolve().name for folder in folders]
    unclear = {BASE, *(name for name in names if names.count(name) > 1)}  # such a folder goes by its path
    pairs = [(str(folder) if name in unclear else name, folder) for name, folder in zip(names, folders, strict=True)]
    for text in adapters:
        name, _, given = text.partition("=")
        if not (name and given):
            raise ConfigError(f"--adapter {printable(text)}: give NAME=DIR, as in --adapter reviews=out/reviews")
        pairs.append((name, local_path(given)))
    for name, folder in pairs:
        trained = None if is_model(folder) else Trained.open(folder)
        if trained is None or trained.method == "full":
            if len(pairs) > 1 or base:
                problem = "a complete model, not an adapter. Give it alone, or as the --base of adapters."
                raise ConfigError(f"{folder}: {problem}")
            return {}, str(folder)
        if name == BASE:
            raise ConfigError(
                f"{folder}: an adapter named {BASE}, as the bare base is. Name it with --adapter NAME={folder}"
            )
        if name in found:
            raise ConfigError(f"two adapters named {printable(name)}: give names with --adapter NAME=DIR")
        found[name] = trained
    return found, base


def prompts_of(served: Served, rows: Sequence[SourceRow], source: str, default: str | None) -> list[Prompt]:
    """The prompts of a file's rows, each for the adapter that the row names, else for `default`.

    Raises DataError if there are none. It names the line of a row that can't be one, ModelError that of an unknown adapter.
    """
    prompts = []
    for where, columns, problem in rows:
        name = columns.get("adapter", default)
        if problem or not isinstance(name, str | None):
            raise DataError(f"{where}: {problem or 'its adapter is not a name'}.")
        try:
            adapter = served.find_adapter(name)
        except ModelError as e:
            raise ModelError(f"{where}: {e}") from e
        prompts.append(served.prompt(adapter, columns, where))
    if not prompts:
        raise DataError(f"{printable(source)}: contains no prompts.")
    return prompts


def print_answers(served: Served, prompts: Sequence[Prompt], batch_size: int, as_json: bool) -> None:
    """Print the answers batch by batch, in order; a batch may mix adapters."""
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, "generating", unit="batch", delay=2, leave=False, disable=None):
        batch = prompts[start : start + batch_size]
        for prompt, answer in zip(batch, served.answer(batch), strict=True):
            adapter = prompt.adapter or BASE
            if as_json:
                line = {"where": prompt.where, "adapter": adapter, "prompt": prompt.text, "answer": answer.text}
                echo_json(line | {"tokens": answer.tokens, "ended": answer.ended})
            else:
                heading = printable(adapter) if prompt.where == PROMPT else f"{prompt.where} ({printable(adapter)})"
                echo(f"--- {heading}\n{escape(answer.text).strip()}")
        sys.stdout.flush()
