"""Convert the LoRA paper's E2E NLG data (lines `name : X | Type : pub||reference`) to JSON Lines for lora-ft.

    python scripts/e2e.py FOLDER data        FOLDER/{train,valid,test}.txt -> data/e2e_{train,valid,test}.jsonl

A row has the columns `meaning` and `reference`. Lines with the same meaning stay separate rows: training uses each, and
evaluation groups them as one prompt with several references.
"""

import json
import sys
from pathlib import Path

from lora_ft.core.storage import write_file


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of one file.

    Raises:
        ValueError: a line without `||`.
    """
    result = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        meaning, bars, reference = line.partition("||")
        if not bars:
            raise ValueError(f"{path}:{number}: no || between meaning and reference")
        result.append({"meaning": meaning.strip(), "reference": reference.strip()})
    return result


def main(source: Path, target: Path) -> None:
    """Convert the three splits in `source` to files in `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid", "test"):
        lines = rows(source / f"{split}.txt")
        path = target / f"e2e_{split}.jsonl"
        write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines))
        print(f"{path}: {len(lines):,} rows, {len({row['meaning'] for row in lines}):,} meanings")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/e2e.py FOLDER_WITH_TXT_FILES FOLDER_FOR_JSONL")
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (OSError, ValueError) as e:
        sys.exit(str(e))
