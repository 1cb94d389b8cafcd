import itertools
import json
import random

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def rows():
    """120 small documents with prompts, some repeated, with characters of 1 to 4 bytes."""
    choose = random.Random(0)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "naïve",
        "東京",
        "🙂",
        "<|endoftext|>",
        "return",
        "x\n",
    ]
    made = [
        {
            "prompt": f"question {i}: ",
            "text": f"{i} " + " ".join(choose.choices(words, k=choose.randint(3, 40))),
        }
        for i in range(100)
    ]
    return made + made[:20]


@pytest.fixture
def jsonl(tmp_path, rows):
    path = tmp_path / "corpus" / "part.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def texts_of():
    def split(tokens, tokenizer):
        """The documents of a token array: each behind an end of text, and one more at the end."""
        ids, _ = tokens.read(0, len(tokens))
        marks = np.flatnonzero(ids == tokenizer.eot_id)
        assert marks[0] == 0 and marks[-1] == len(ids) - 1
        return [
            tokenizer.decode(ids[start + 1 : stop].tolist())
            for start, stop in itertools.pairwise(marks)
        ]

    return split
