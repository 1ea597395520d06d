"""`lora-ft generate`: a prompt, a file of prompts or a chat, answered by a base, an adapter or several on one base."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from lora_ft.commands.generate.chat import aloud, chat, visible
from lora_ft.commands.generate.prompts import read_prompts
from lora_ft.commands.generate.serving import BASE, Answer, Question, Served, load, override
from lora_ft.core.errors import ConfigError, DataError, ModelError
from lora_ft.core.messages import printable
from lora_ft.core.trust import NO_TRUST, Trust
from lora_ft.data.sources import SourceRow
from lora_ft.data.template import BadRow
from lora_ft.methods.trained import Trained, is_model


def generate_command(
    folders: Sequence[Path],
    *,
    adapters: Sequence[str] = (),
    base: str | None = None,
    prompt: str | None = None,
    prompts: str | None = None,
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
    """Print answers, or chat when neither a prompt nor prompts are given.

    Raises:
        UserError: the adapters don't share the base, a name that isn't there, a wrong row of the prompts file.
    """
    if prompt is not None and prompts is not None:
        raise ConfigError("--prompt and --prompts: give one; a prompt, or a file of them")
    if as_json and prompt is None and prompts is None:
        raise ConfigError("--json goes with --prompt or --prompts")
    named, base = find_adapters(folders, adapters, base)
    rows = list(read_prompts(prompts)) if prompts is not None else []  # what can't be read is told before all loading
    served = load(named, base, raw=raw, trust=trust)
    override(
        served.sampling,
        greedy=greedy,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    if seed is not None:
        torch.manual_seed(seed)
    first = next(iter(served.names), None)
    if prompts is not None:
        answer_file(served, questions_of(served, rows, prompts, first), batch_size, as_json)
    elif prompt is not None and as_json:
        answer_file(served, [served.question(first, prompt, "--prompt")], 1, as_json)
    elif prompt is not None:
        aloud(served, served.question(first, prompt, "--prompt"))
    else:
        chat(served, first)


def find_adapters(
    folders: Sequence[Path], adapters: Sequence[str], base: str | None
) -> tuple[dict[str, Trained], str | None]:
    """The adapters by name (that of their folder, unless NAME=DIR gives another), and the base if one is named.

    Raises:
        ConfigError: a name given twice, an option that is not NAME=DIR, or a complete model beside adapters.
        ModelError: nothing trained in a folder.
    """
    found: dict[str, Trained] = {}
    if not folders and not adapters and not base:
        folders = [Path("out")]
    pairs = [(folder.resolve().name, folder) for folder in folders]
    for text in adapters:
        name, _, given = text.partition("=")
        if not (name and given):
            raise ConfigError(f"--adapter {printable(text)}: give NAME=DIR, as in --adapter reviews=out/reviews")
        pairs.append((name, Path(given)))
    for name, folder in pairs:
        trained = None if is_model(folder) else Trained.open(folder)
        if trained is None or trained.method == "full":
            if len(pairs) > 1 or base:
                raise ConfigError(
                    f"{folder}: a complete model, not an adapter. Give it alone, or as the --base of adapters."
                )
            return {}, str(folder)
        if name in found or name == BASE:
            raise ConfigError(f"two adapters named {printable(name)}: give names with --adapter NAME=DIR")
        found[name] = trained
    return found, base


def questions_of(served: Served, rows: Sequence[SourceRow], source: str, default: str | None) -> list[Question]:
    """The questions of a prompts file's rows; a row's `adapter` says whom to ask, else it is `default`.

    Raises:
        DataError: a row that can't be asked, with its line. ModelError: the name of no adapter, likewise.
    """
    found = []
    for where, columns, problem in rows:
        name = columns.get("adapter", default)
        try:
            if problem:
                raise BadRow(problem)
            if not isinstance(name, str | None):
                raise BadRow("its adapter is no name")
            adapter = served.adapter(name)
            found.append(Question(adapter, *served.forms[adapter].of_row(columns), where))
        except BadRow as e:
            raise DataError(f"{where}: {e}.") from e
        except ModelError as e:
            raise ModelError(f"{where}: {e}") from e
        served.check_fits(found[-1])
    if not found:
        raise DataError(f"{printable(source)}: no prompts in it.")
    return found


def answer_file(served: Served, questions: list[Question], batch_size: int, as_json: bool) -> None:
    """Answer batch by batch, in the file's order; rows of different adapters share a batch."""
    for start in tqdm(
        range(0, len(questions), batch_size), "generating", unit="batch", delay=2, leave=False, disable=None
    ):
        batch = questions[start : start + batch_size]
        for asked, answer in zip(batch, served.answers(batch), strict=True):
            if as_json:
                print(json.dumps(as_object(asked, answer), ensure_ascii=False))
            else:
                print(f"--- {asked.where} ({asked.adapter or BASE})\n{visible(answer.text).strip()}")
        sys.stdout.flush()


def as_object(asked: Question, answer: Answer) -> dict:
    return {
        "where": asked.where,
        "adapter": asked.adapter or BASE,
        "prompt": asked.text,
        "answer": answer.text,
        "tokens": answer.tokens,
        "ended": answer.ended,
    }
