"""The house: imports point down, files stay readable, and the light rooms import no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import lora_ft

ROOT = Path(lora_ft.__file__).parent
# From the ground up. A room imports rooms of floors below, and of its own floor where the floor says so.
FLOORS = [
    "errors signals",
    "names metric_names",
    "strict_yaml trainer_args setting_types data_types section adapter_settings schema",  # config, top to bottom
    "config_problems config_rules config config_changes json_schema",
    "layers.lora layers.activation layers.gated layers.many layers.bottleneck layers.prompt loss storage run_folder run_log",
    "hub base model",
    "attention progress processes",
    "adapter.roles adapter.targets adapter.inject adapter.many",
    "adapter.peft_config adapter.peft adapter.fit adapter.files",
    "adapter.disk adapter.prove adapter.shards adapter.merge",
    "data.delimited data.hub data.sources data.template data.chat data.cache data.tokens data.examples data.texts data.encode",
    "data.labels data.suggest",
    "data.batches data.prepare data.references",
    "methods.files methods.switch",
    "methods.lora methods.full methods.bottleneck methods.prompt methods.bias methods.verbs methods.merge",
    "arguments device decoding generation_metrics scoring samples score_table evaluation checkpoint record model_card sharding",
    "report.runs report.scores report.charts report.curves report.figures report.png report.write",
    "saving resume step",
    "trainer memory findings",
    "train",
    "prompts serving chat",
    "preview timing look check shapes evaluate generate environment starter",
    "exits launch",
    "export.portable export.gguf_layout export.gguf_file export.gguf_vocabulary export.gguf_adapter export.gguf_model",
    "export.hub export.command",
    "compare.variants compare.runs compare.summary compare.show compare.page compare.latency compare.command",
    "cli.app cli.prepare cli.run cli.use",
]
HEIGHT = {room: (floor, place) for floor, rooms in enumerate(FLOORS) for place, room in enumerate(rooms.split())}


def rooms() -> dict[str, Path]:
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    return {room: path for room, path in found.items() if not room.endswith(("__init__", "__main__"))}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_ft":
            inner = node.module.removeprefix("lora_ft").lstrip(".")
            names |= {inner} if inner in HEIGHT else {f"{inner}.{a.name}".lstrip(".") for a in node.names}
    return names & HEIGHT.keys()


def test_every_room_has_a_floor():
    assert rooms().keys() == HEIGHT.keys()


def test_imports_point_down():
    wrong = [
        f"{room} imports {other}"
        for room, path in rooms().items()
        for other in imported(path)
        if HEIGHT[other] >= HEIGHT[room] and HEIGHT[other][0] >= HEIGHT[room][0]
    ]
    assert not wrong, wrong


def test_no_file_grows_past_250_lines():
    assert {room: n for room, p in rooms().items() if (n := len(p.read_text().splitlines())) > 250} == {}


def test_help_and_config_errors_import_no_heavy_library():
    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys, lora_ft.cli, lora_ft.config.load; assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_imports_no_passenger():
    """What torch, transformers and datasets import themselves is theirs; nothing else of weight before the first step."""
    heavy = "{'sklearn', 'scipy', 'matplotlib', 'tensorboard', 'tensorflow', 'torchvision', 'trl', 'sacrebleu', 'gguf'}"
    code = f"import sys, lora_ft.commands.train; assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
