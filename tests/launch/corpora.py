"""Small texts to train on, and the configurations that name them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from launch.config import Config, from_dict
from launch.data import END_OF_DOCUMENT, open_dataset
from launch.data_corpus import Corpus

TEXTS = [f"document {number} says {'word ' * (number % 5)}" for number in range(60)]


def configured(source: object, **changes: object) -> Config:
    train = {"steps": 1, "sequence_length": 8, "global_batch_size": 4, **changes}
    fraction = train.pop("validation_fraction", 0.3)
    tokenizer = str(train.pop("tokenizer", "bytes"))
    field = train.pop("text_field", "text")
    return from_dict(
        {
            "train": train,
            "model": {"vocab_size": train.pop("vocab_size", 257)},
            "data": {
                "source": str(source),
                "validation_fraction": fraction,
                "tokenizer": tokenizer,
                "text_field": field,
            },
            "run": {"dir": "unused"},
        }
    )


def corpus(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_bytes(text.encode())
    return folder


def documents(tokens: np.ndarray) -> list[bytes]:
    """The documents in a split, from its tokens."""
    ends = np.flatnonzero(tokens == END_OF_DOCUMENT)
    starts = [0, *(ends[:-1] + 1)]
    return [bytes(tokens[start:end].astype(np.uint8)) for start, end in zip(starts, ends, strict=True)]


def opened(config: Config) -> Corpus:
    """The one corpus of a configuration."""
    (only,) = open_dataset(config).corpora
    return only


def words(folder: Path, end: int, offset: int = 0) -> Path:
    """A Hugging Face folder whose tokens are words; ``offset`` moves their numbers up."""
    folder.mkdir()
    known = ["?", "document", "says", "word", *map(str, range(60))]
    model = {"type": "WordLevel", "vocab": {w: offset + n for n, w in enumerate(known)}, "unk_token": "?"}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": end}))
    return folder


def parquet(
    path: Path, texts: Sequence[str | None], rows: int = 7, name: str = "content", **columns: list[int]
) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({name: texts, **columns}), path, row_group_size=rows)
    return path
