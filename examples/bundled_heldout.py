"""Write the text that the bundled model never saw: `python examples/bundled_heldout.py` makes bundled/heldout.txt."""

from __future__ import annotations

import random
from pathlib import Path

from bundled_eval import held_out_documents
from bundled_files import segments

PATH = Path(__file__).resolve().parents[1] / "src" / "ropeway" / "bundled" / "heldout.txt"


def held_out_text(per_kind: int = 40) -> str:
    """Documents of every kind in a fixed random order, with the special tokens that they have in training."""
    documents = [document for kind in held_out_documents(per_kind).values() for document in kind]
    random.Random(1).shuffle(documents)
    return "\n".join("".join(text for text, _ in segments(document)) for document in documents)


if __name__ == "__main__":
    PATH.write_text(held_out_text(), encoding="utf-8")
