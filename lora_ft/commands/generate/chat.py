"""The interactive chat of `lora-ft generate`: answers are streamed, and adapters can be switched in between.

Answers go to stdout, everything else to stderr. Lines come from a terminal or a pipe.
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
from lora_ft.commands.generate.serving import BASE, Answer, Prompt, Served
from lora_ft.core.errors import UserError
from lora_ft.core.messages import info, printable
from lora_ft.core.names import nearest
from lora_ft.core.terminal import doing, is_terminal
from lora_ft.data.chats.turns import Turn

HELP = """\
/adapter NAME   switch to this adapter; without a name, list all
/base           switch to the bare base
/both           base and adapter side by side, on the adapter's prompt; again for one alone
/set NAME=TEXT  fill another column of the template from here on; without a name, list them
/reset          forget the chat so far
\"""             start or end a message of several lines
/help           show this help
/quit           end (or Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
BLOCK = '"""'  # a line that starts or ends a message of several lines


@dataclass
class Chat:
    """The state of a chat.

    adapter: the active one, None for the base. beside: the adapter that `/both` compares with the base. turns: the chat so
    far, whichever adapter gave the answers; none are kept where each line is a prompt by itself (see `PromptFormat`).
    """

    served: Served
    adapter: str | None
    beside: str | None
    both: bool = False
    turns: list[Turn] = field(default_factory=list)

    @property
    def active(self) -> str:
        """The name of whatever answers the next message."""
        return printable(f"{BASE} | {self.adapter}" if self.both else self.adapter or BASE)

    def describe(self) -> str:
        """The active model, and how it takes a line."""
        return f"{self.active}: {self.served.formats[self.adapter].describe(self.served.columns)}"

    def handle_command(self, command: str, argument: str) -> None:
        """Execute a line such as `/adapter NAME`; a ModelError if there is no such adapter."""
        if command == "/reset":
            self.turns.clear()
        elif command == "/set" and argument:
            self.served.set_column(argument, "/set")
            info(self.describe())
        elif command == "/set":
            form, given = self.served.formats[self.adapter], self.served.columns
            info("\n".join(f"{name}={given.get(name, '')!r}" for name in form.columns) or "the template has no columns")
        elif command == "/both" and self.beside is None:
            info("there is no adapter to compare with the base")
        elif command == "/both":
            self.adapter, self.both = self.beside, not self.both
        elif command == "/base" or (command == "/adapter" and argument):
            self.adapter, self.both = self.served.find_adapter(argument if command == "/adapter" else None), False
            self.beside = self.adapter or self.beside
            info(self.describe())
        elif command == "/adapter":
            names = [*self.served.names, BASE]
            info("\n".join(f"{'*' if name == (self.adapter or BASE) else ' '} {name}" for name in names))
        elif command == "/help":
            info(HELP)
        else:
            near = nearest(command, COMMANDS)
            info(f"Unknown command {command}. " + (f"Did you mean {near}?" if near else "Try /help"))

    def handle_message(self, text: str) -> None:
        """Print the answer to a message and keep both as turns; a DataError if it doesn't fit, see `Served.prompt`."""
        prompt = self.served.prompt(self.adapter, text, "this message", self.turns)
        answer = (print_both if self.both else stream_answer)(self.served, prompt)
        if self.served.formats[self.adapter].is_chat:
            self.turns += [{"role": USER, "content": text}, {"role": ASSISTANT, "content": answer.text}]


def run_chat(served: Served, adapter: str | None) -> None:
    """Chat with `adapter` (None: the base) until the input ends or a line is /quit."""
    chat = Chat(served, adapter, beside=adapter)
    info(f"{chat.describe()}; /help lists the commands")
    for line in read_messages(lambda: f"{chat.active}> "):
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command.startswith("/") and "\n" not in line:
                chat.handle_command(command, argument.strip())
            else:
                chat.handle_message(line)
        except UserError as e:
            info(str(e))
        except KeyboardInterrupt:
            print(flush=True)
            info("Stopped. The chat continues without this message and its answer.")


def stream_answer(served: Served, prompt: Prompt) -> Answer:
    """Print an answer while it is generated, without leading white space."""
    printed = 0

    def show(texts: list[str]) -> None:
        nonlocal printed
        text = texts[0].rstrip("\ufffd").lstrip()  # an incomplete character: its other bytes come with the next token
        print(escape(text[printed:]), end="", flush=True)
        printed = max(printed, len(text))

    (answer,) = served.answer([prompt], show)
    print(escape(answer.text.lstrip()[printed:]), flush=True)
    return answer


def print_both(served: Served, prompt: Prompt) -> Answer:
    """Print the base's and the adapter's answers to the adapter's prompt, side by side in a terminal; return the adapter's."""
    prompts, names = [prompt._replace(adapter=None), prompt], [BASE, prompt.adapter or BASE]
    console = Console(highlight=False)
    if not console.is_terminal:
        answers = served.answer(prompts)
        for name, answer in zip(names, answers, strict=True):
            print(f"{printable(name)}: {escape(answer.text).strip()}", flush=True)
        return answers[-1]
    with Live(_columns(names, ["", ""]), console=console, auto_refresh=False) as live:
        return served.answer(prompts, lambda texts: live.update(_columns(names, texts), refresh=True))[-1]


def _columns(names: list[str], texts: list[str]) -> Table:
    table = Table(expand=True)
    for name in names:
        table.add_column(Text(printable(name)), ratio=1)
    table.add_row(*(Text(escape(text).strip()) for text in texts))
    return table


def read_messages(prompt: Callable[[], str]) -> Iterator[str]:
    """Messages from the terminal or a pipe: each a line that is not blank, pasted lines, or the lines between two BLOCK.

    Ctrl-C at the terminal's prompt ends the command.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # so that Ctrl-C stops an answer, not the chat
    block: list[str] | None = None
    try:
        for line in _typed_lines(prompt) if sys.stdin.isatty() else sys.stdin:
            if line.strip() == BLOCK:
                message, block = "\n".join(block or []), [] if block is None else None
            elif block is not None:
                block.append(line.rstrip("\r\n"))
                continue
            else:
                message = line
            if message.strip():
                yield message.strip()
        if block:
            yield "\n".join(block).strip()
    finally:
        signal.signal(signal.SIGINT, before)


def _typed_lines(prompt: Callable[[], str]) -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # gives input() a line editor and a history

        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    while True:
        try:
            with doing(None):
                if is_terminal(sys.stdout):
                    line = input(prompt())
                else:  # stdout is for answers alone
                    print(prompt(), end="", file=sys.stderr, flush=True)
                    line = input()
            yield line
        except EOFError:
            print(file=sys.stderr)
            return


def escape(text: str) -> str:
    """Generated text, safe for a terminal: line ends and tabs stay, other control characters are escaped."""
    return printable(text, len(text), keep="\n\t")
