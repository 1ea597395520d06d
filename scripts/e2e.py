"""The E2E NLG data in the LoRA paper's form (lines `name : X | Type : pub||reference`) as JSON Lines that lora-ft reads.

    python scripts/e2e.py FOLDER data        FOLDER/{train,valid,test}.txt -> data/e2e_{train,valid,test}.jsonl

A row has the columns `meaning` and `reference`. Lines with one meaning stay several rows: training learns from each, and
evaluation takes them as one prompt with several references.
"""

import json
import sys
from pathlib import Path

from lora_ft.core.storage import write_file


def rows(path: Path) -> list[dict[str, str]]:
    """Raises ValueError with the line that has no `||`."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        meaning, bars, reference = line.partition("||")
        if not bars:
            raise ValueError(f"{path}:{number}: no || between meaning and reference")
        found.append({"meaning": meaning.strip(), "reference": reference.strip()})
    return found


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        lines = rows(source / f"{split}.txt")
        written = target / f"e2e_{split}.jsonl"
        write_file(written, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))
        print(f"{written}: {len(lines):,} rows, {len({row['meaning'] for row in lines}):,} meanings")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/e2e.py FOLDER_WITH_TXT_FILES FOLDER_FOR_JSONL")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError) as e:
        sys.exit(str(e))
