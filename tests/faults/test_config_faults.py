"""Rows 1 to 9 of the fault matrix: the config and the names in it. In depth in test_config.py and test_strict_yaml.py."""

import shutil
import time

import pytest

from tests.helpers.command import refused, refused_untouched, train, training
from tests.helpers.tiny import write_base

BOMB = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(12))


def with_line(folder, line: str) -> int:
    """Put `line` in the place of its section's, at the config's end; its number."""
    key = line.split(":")[0]
    lines = [old for old in (folder / "config.yaml").read_text().splitlines() if not old.startswith(f"{key}:")]
    (folder / "config.yaml").write_text("\n".join([*lines, line]) + "\n")
    return len(lines) + 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        # 1: an unknown key
        ("train: {lerning_rate: 1}", ["lerning_rate", "learning_rate"]),
        ("adaptor: {rank: 4}", ["adaptor", "adapter"]),
        # 3: a word where a number belongs
        ("train: {learning_rate: fast}", ["train.learning_rate", "fast"]),
        # 4: ranks
        ("adapter: {rank: 0}", ["adapter.rank", "1", "65536"]),
        ("adapter: {rank: -1}", ["adapter.rank", "1", "65536"]),
        ("adapter: {rank: true}", ["adapter.rank", "true"]),
        ("adapter: {rank: 1000000000000}", ["adapter.rank", "65536"]),
        # 5: numbers that make no sense
        ("train: {learning_rate: .nan}", ["train.learning_rate"]),
        ("train: {learning_rate: .inf}", ["train.learning_rate"]),
        ("train: {learning_rate: -1.0}", ["train.learning_rate"]),
        ("adapter: {dropout: 1.5}", ["adapter.dropout"]),
        # 6: three in one run
        ("adapter: {rank: 0, dropout: 1.5, alpha: .nan}", ["adapter.rank", "adapter.dropout", "adapter.alpha"]),
        # 7: attacks
        ("output: " + "[" * 10_000, []),
        ("output: " + "{a: " * 10_000, []),
        ("output: !!python/object/apply:os.mkdir [ran]", ["python/object"]),
        (BOMB.strip(), []),
        # 8: a word that is no role
        ("adapter: {targets: [q_proj]}", ["q_proj", "did you mean q?", "modules"]),
    ],
)
def test_configs(fresh, line, words):
    number = with_line(fresh, line)
    began = time.monotonic()
    refused_untouched(fresh, 2, f"config.yaml:{number}", *words)
    assert time.monotonic() - began < 1
    assert not list(fresh.rglob("ran"))


def test_a_key_given_twice_names_both_lines(fresh):
    path = fresh / "config.yaml"
    path.write_text("output: one\n" + path.read_text() + "output: two\n")
    last = len(path.read_text().splitlines())
    refused_untouched(fresh, 2, f"config.yaml:{last}", "output", f"lines 1 and {last}")


def test_1e_4_is_a_number(fresh):
    with_line(fresh, "train: {learning_rate: 1e-4, max_steps: 1, batch_size: 8, report_to: []}")
    assert train(fresh).code == 0
    refused_untouched(fresh, 2, "--set", "train.learning_rate", command=training("train.learning_rate=quick"))


def test_roles_and_modules_that_the_model_lacks(fresh):
    refused_untouched(fresh, 4, "q_prj", "q_proj", "lm_head", command=training("adapter.modules=[lm_head, q_prj]"))
    shutil.rmtree(fresh / "base")
    write_base(fresh / "base", "gpt2")
    refused_untouched(fresh, 4, "gate", "c_attn", command=training("adapter.targets=[gate]"))


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["train", "no.yaml"], 2, ["no.yaml"]),
        (["train", "base"], 2, ["base"]),
        (training("data.train=no.jsonl"), 3, ["no.jsonl"]),
        (training("data.eval=no.jsonl"), 3, ["no.jsonl"]),
        (training("model.name=./no"), 4, ["./no"]),
        (training("model.name=a/b/c"), 4, ["a/b/c"]),
        (training("model.name=some/model"), 4, ["some/model", "HF_HOME", "model.name=FOLDER"]),
        (training("data.train=some/data@train"), 3, ["some/data", "HF_HOME", "data.train=FILE"]),
        (training("data.train=base"), 3, ["base", "folder"]),
        (["eval", "nowhere"], 4, ["nowhere", "lora-ft train CONFIG"]),
        (["merge", "--adapter", "nowhere"], 4, ["nowhere"]),
    ],
)
def test_names_that_lead_nowhere(fresh, command, code, words):
    refused_untouched(fresh, code, *words, command=command)


@pytest.mark.parametrize(
    ("kind", "words"), [("gated", ["hf auth login", "huggingface.co/some/model"]), ("private", ["hf auth login"])]
)
def test_a_hub_that_says_no(fresh, kind, words):
    """401 and 403, as the hub's client reports them."""

    def hub():
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        kinds = {"gated": GatedRepoError, "private": RepositoryNotFoundError}

        def refuse(*_, **__):
            raise kinds[kind].__new__(kinds[kind])  # without the response of a server, which they are made from

        huggingface_hub.snapshot_download = refuse

    refused(train(fresh, "model.name=some/model", before=hub), 4, *words)
    assert not (fresh / "out").exists()


def test_a_local_name_is_never_asked_of_the_network(fresh):
    def no_network():
        import socket

        def refuse(*_, **__):
            raise AssertionError("the network was asked")

        socket.socket.connect = refuse
        socket.getaddrinfo = refuse

    ended = train(fresh, "train.max_steps=1", before=no_network)
    assert ended.code == 0, ended


@pytest.mark.parametrize("option", ["--vary", "--tune"])
def test_values_of_a_comparison_that_share_a_folder(fresh, option):
    more = () if option == "--vary" else ("--vary", "adapter.rank=2,4")
    command = ("compare", "config.yaml", option, "adapter.targets=[q],q", *more)
    refused_untouched(fresh, 2, option, "targets=q", command=command)
