"""The chat of `lora-ft generate`: a person's lines in, answers out as they grow, adapters switched on the way.

Answers go to stdout, all else to stderr. Lines come from a terminal, or from a pipe with nobody to look on.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_ft.commands.generate.prompts import ASSISTANT, USER
from lora_ft.commands.generate.serving import BASE, Answer, Question, Served
from lora_ft.core.errors import UserError
from lora_ft.core.messages import printable
from lora_ft.core.names import nearest
from lora_ft.data.chat import Turn

HELP = """\
/adapter NAME   go on with this adapter; without a name, list them
/base           go on with the bare base
/both           base and adapter side by side, on the adapter's prompt; again for one alone
/reset          forget the chat so far
/help           this
/quit           end (or Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = [line.split()[0] for line in HELP.splitlines()]


@dataclass
class Chat:
    """A chat as it stands. Adapters may change in the middle of it: the turns so far are everyone's.

    adapter: who answers, None for the base. beside: whose answers `/both` puts beside the base's. Where a text is no turn
    (see `Form`), each line is answered by itself and no turns are kept.
    """

    served: Served
    adapter: str | None
    beside: str | None
    both: bool = False
    turns: list[Turn] = field(default_factory=list)

    @property
    def who(self) -> str:
        return f"{BASE} | {self.adapter}" if self.both else self.adapter or BASE

    def told(self, command: str, rest: str) -> None:
        """Do what a command says. ModelError: no such adapter."""
        if command == "/reset":
            self.turns.clear()
        elif command == "/both" and self.beside is None:
            note("there is no adapter to put beside the base")
        elif command == "/both":
            self.adapter, self.both = self.beside, not self.both
        elif command == "/base" or (command == "/adapter" and rest):
            self.adapter, self.both = self.served.adapter(rest if command == "/adapter" else None), False
            self.beside = self.adapter or self.beside
            note(f"{self.who}: {manner(self.served, self.adapter)}")
        elif command == "/adapter":
            names = [*self.served.names, BASE]
            note("\n".join(f"{'*' if name == (self.adapter or BASE) else ' '} {printable(name)}" for name in names))
        else:
            near = nearest(command, COMMANDS)
            note(HELP if command == "/help" else f"no command {printable(command)}; {near or '/help'} is one")

    def asked(self, text: str) -> None:
        """Answer a line. DataError: it can't be asked, or is too long with the turns before it."""
        answer = reply(self.served, [None, self.adapter] if self.both else [self.adapter], text, self.turns)
        if self.served.forms[self.adapter].talks:
            self.turns += [{"role": USER, "content": text}, {"role": ASSISTANT, "content": answer.text}]


def chat(served: Served, adapter: str | None) -> None:
    """Talk until the lines end, or one says /quit."""
    now = Chat(served, adapter, beside=adapter)
    note(f"{now.who}: {manner(served, adapter)}; /help has the commands")
    for line in lines(lambda: f"{now.who}> "):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command.startswith("/"):
                now.told(command, rest.strip())
            else:
                now.asked(line)
        except UserError as e:
            note(str(e))
        except KeyboardInterrupt:
            print(flush=True)
            note("stopped; that answer is no part of the chat")


def reply(served: Served, adapters: list[str | None], text: str, turns: list[Turn]) -> Answer:
    """The last one's answer, when all have given theirs to the prompt that the last one is used to."""
    question = served.question(adapters[-1], text, "this message", turns)
    if len(adapters) == 1:
        return aloud(served, question)
    asked = [question._replace(adapter=adapter) for adapter in adapters]
    names = [adapter or BASE for adapter in adapters]
    console = Console(highlight=False)
    if not console.is_terminal:
        answers = served.answers(asked)
        for name, answer in zip(names, answers, strict=True):
            print(f"{name}: {visible(answer.text).strip()}", flush=True)
        return answers[-1]
    with Live(columns(names, [""] * len(names)), console=console, auto_refresh=False) as live:
        return served.answers(asked, lambda texts: live.update(columns(names, texts), refresh=True))[-1]


def aloud(served: Served, question: Question) -> Answer:
    """Answer one question and print the text as it grows, without the white space before it."""
    printed = 0

    def show(texts: list[str]) -> None:
        nonlocal printed
        text = texts[0].rstrip("\ufffd").lstrip()  # half a character: its other bytes come with the next token
        print(visible(text[printed:]), end="", flush=True)
        printed = max(printed, len(text))

    (answer,) = served.answers([question], show)
    print(visible(answer.text.lstrip()[printed:]), flush=True)
    return answer


def columns(names: list[str], texts: list[str]) -> Table:
    table = Table(expand=True)
    for name in names:
        table.add_column(Text(printable(name)), ratio=1)
    table.add_row(*(Text(visible(text).strip()) for text in texts))
    return table


def lines(prompt: Callable[[], str]) -> Iterator[str]:
    """The lines a person types, or that a pipe holds, none of them blank. Ctrl-C while typing ends the command."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # an answer can be stopped, and the chat goes on
    try:
        for line in typed(prompt) if sys.stdin.isatty() else sys.stdin:
            if line.strip():
                yield line.strip()
    finally:
        signal.signal(signal.SIGINT, before)


def typed(prompt: Callable[[], str]) -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() a line editor and a history)
    while True:
        try:
            if sys.stdout.isatty():
                yield input(prompt())
            else:  # stdout is for answers alone
                print(prompt(), end="", file=sys.stderr, flush=True)
                yield input()
        except EOFError:
            print(file=sys.stderr)
            return


def manner(served: Served, adapter: str | None) -> str:
    """How a line becomes a prompt, in a few words."""
    form = served.forms[adapter]
    if form.talks:
        return "a chat through the chat template"
    if form.template.prompt is not None:
        return f"each line fills the run's template {printable(repr(form.template.prompt), 60)}, by itself"
    return "each line is a prompt as it is, by itself"


def visible(text: str) -> str:
    """What a model says, safe for a terminal: lines stay, escape codes are shown."""
    return printable(text, len(text), keep="\n\t")


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
