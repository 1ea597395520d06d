"""Every command as Windows would run it, in a fork that hides what only Unix has and refuses what Windows refuses."""

import json
import signal
import sys
from pathlib import Path

import lora_ft.commands.merge  # noqa: F401 (imported once, before the forks)
from lora_ft.core.storage import sha256
from tests.helpers import windows
from tests.helpers.command import cli, start
from tests.helpers.tiny import CONFIG, write_run

SHORT = CONFIG.replace(
    "num_train_epochs: 2", "max_steps: 3, eval_steps: 1, save_steps: 1, evaluate_base: false, save_total_limit: 1"
)
COMMANDS = """
    init made.yaml --model base --data data\\train.jsonl
    check config.yaml
    train config.yaml
    train config.yaml --resume
    eval out
    generate --adapter mine=runs\\..\\out --prompt good --json
    merge --adapter out
    export out --to peft
    report out
    inspect out --html page.html
    combine out=0.5 --out half
    compress out --rank 2 --eval
    compare config.yaml --vary adapter.rank=4 --set train.max_steps=1 --output compared
    env
"""


def test_every_command(tmp_path):
    """Training that is stopped and resumed, with an adapter as of a run without a stop on another system."""
    (folder := tmp_path / "Größe 日本").mkdir()
    write_run(folder, config=SHORT)
    (folder / "data").mkdir()
    (folder / "runs").mkdir()
    for name in ("train.jsonl", "eval.jsonl"):
        (folder / name).rename(folder / "data" / name)
    with (folder / "data/train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "schöner Film 映画 █", "label": 1}\n')
    # as an editor there saves it
    text = SHORT.replace("train.jsonl", "data\\train.jsonl").replace("eval.jsonl", "'data\\eval.jsonl'")
    (folder / "config.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    logged = []

    def stop_after_a_step(path: Path) -> None:
        if path.name == "log.jsonl" and (logged.append(path) or len(logged) == 2):
            signal.raise_signal(signal.SIGINT)

    def run_all() -> None:
        windows.imitate(stop_after_a_step)
        codes = {line: windows.run(*line.split()) for line in COMMANDS.strip().splitlines()}
        (folder / "codes.json").write_bytes(json.dumps(list(codes.values())).encode())
        sys.exit()

    ended = start(folder, before=run_all).end()
    codes = json.loads((folder / "codes.json").read_text())
    assert codes == [0, 0, 130, *[0] * 11], ended.err
    uninterrupted = cli(folder, "train", "config.yaml", "--set", "output=elsewhere")
    assert uninterrupted.code == 0
    weights = "adapter_model.safetensors"
    assert sha256(folder / "out" / weights) == sha256(folder / "elsewhere" / weights)
    assert json.loads((folder / "out/lora_ft.json").read_text())["config"]["data"]["train"] == ["data/train.jsonl"]


def test_a_console_of_another_code_page_gets_escapes(tmp_path):
    folder = write_run(tmp_path, config=SHORT)
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "schöner Film 映画 ” –", "label": 1}\n')

    def run_all() -> None:
        windows.imitate(console="cp437")
        sys.exit(max(windows.run(*words) for words in (["check", "config.yaml"], ["check", "config.yaml", "--json"])))

    ended = start(folder, before=run_all).end()
    assert ended.code == 0, ended.err
