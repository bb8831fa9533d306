"""``dualpipe evaluate RUN|HF_DIR --data FILE``: how well a model predicts a text, in nats a token and bits per byte.

The documents stand in a row, each with the end of a document before and after it, and are cut into windows of
``sequence_length`` tokens; every token but the first is predicted once, from those before it in its window (and in its
document, if the run was trained so). Bits per byte divide by the bytes of the text, the end of each document counting
as one: so models with other tokens compare.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.command import Parser, UsageError, reported
from launch.config import load, show
from launch.data_corpus import check_vocabulary
from launch.data_megatron import find_megatron, open_indexed, text_bytes
from launch.data_source import DataError, find_source
from launch.model_folder import RUN_FILE, LoadedModel, load_model
from launch.tokenizer import Tokenizer, token_array
from model.transformer import Transformer

BATCH_TOKENS = 8192
"""Tokens that go through the model at once, unless one window has more."""

_EPILOG = """\
example:
  dualpipe evaluate runs/tiny-cpu --data book.txt

The whole model is loaded into this process, on a GPU in BF16 where there is one, else on the CPU in FP32."""


@dataclass(frozen=True)
class Evaluation:
    """``loss``: mean cross-entropy, nats a token. ``bytes``: of text, with one for each document's end."""

    source: str
    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    sequence_length: int
    """Tokens that the model saw at once."""
    precision: str
    """In which the model computed, whatever it was trained in."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what was given."""

    def command() -> None:
        arguments = _parser().parse_args(argv)
        length = arguments.sequence_length
        if length is not None and not 1 <= length < 2**31:
            raise UsageError(f"--sequence-length={length} must be from 1 to 2**31 - 1")
        prefix = find_megatron(arguments.data)
        if prefix is None:
            documents = _documents(arguments.data, arguments.text_field or _own_field(arguments.model))
            result = evaluate(load_model(arguments.model, arguments.ema), documents, length)
        else:
            setting = f"--data={show(arguments.data)}"
            result = evaluate_indexed(load_model(arguments.model, arguments.ema), prefix, setting, length)
        print(json.dumps(asdict(result)) if arguments.json else _text(result))

    return reported(command)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe evaluate",
        description="Score a text with a model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="RUN|HF_DIR", help="run folder or Hugging Face folder")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="a .txt, .jsonl or .parquet file, a folder or a glob of them, what Megatron's .bin and .idx begin with, "
        "or 'stdlib'",
    )
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        help="what holds the text in a .jsonl or .parquet file (default: data.text_field of the run, or 'text')",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens that the model sees at once (default: those of the run, or the smaller of 1024 and its context)",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of a run's weights (optimizer.ema_decay)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _own_field(model: Path) -> str:
    """What held the text in what a run was trained on."""
    file = model / RUN_FILE
    return load(file).data.text_field if file.is_file() else "text"


def _documents(data: str, text_field: str) -> list[bytes]:
    source = find_source(data, "--data", text_field, "--text-field")
    documents = [text for text in source.documents() if text]
    if not documents:
        raise DataError(f"--data={data} must hold text, and every document in it is empty")
    return documents


def evaluate(loaded: LoadedModel, documents: Sequence[bytes], sequence_length: int | None) -> Evaluation:
    """Score documents with a model; ``sequence_length`` None is the model's own."""
    size = sum(map(len, documents)) + len(documents)
    return _scored(loaded, tokens_of(documents, loaded.tokenizer), size, len(documents), sequence_length)


def evaluate_indexed(loaded: LoadedModel, prefix: Path, setting: str, sequence_length: int | None) -> Evaluation:
    """Score Megatron's tokens; ``setting`` begins messages. Raises DataError."""
    vocabulary, tokenizer = loaded.model.config.vocab_size, loaded.tokenizer
    indexed = open_indexed(prefix, setting, tokenizer, vocabulary)
    if not len(indexed.tokens):
        raise DataError(f"{setting} must hold text, and every document in it is empty")
    check_vocabulary(indexed.tokens, vocabulary, setting)
    tokens = torch.from_numpy(np.concatenate([[tokenizer.end], indexed.tokens], dtype=np.int32))
    return _scored(loaded, tokens, text_bytes(indexed.tokens, tokenizer), indexed.documents, sequence_length)


def _scored(loaded: LoadedModel, tokens: Tensor, size: int, documents: int, sequence_length: int | None) -> Evaluation:
    """``size``: bytes of the text that ``tokens`` stand for, with one for each document's end."""
    length = sequence_length or loaded.sequence_length
    loss_sum = summed_loss(loaded.model, tokens, length, loaded.document_start)
    count = len(tokens) - 1
    return Evaluation(
        source=loaded.source,
        loss=loss_sum / count,
        bits_per_byte=loss_sum / math.log(2) / size,
        tokens=count,
        bytes=size,
        documents=documents,
        sequence_length=length,
        precision=loaded.precision,
    )


def tokens_of(documents: Sequence[bytes], tokenizer: Tokenizer) -> Tensor:
    """All documents in a row, int32: a large text has many times more tokens than a window."""
    end = np.array([tokenizer.end], np.int32)
    parts = [end, *(part for text in documents for part in (token_array(tokenizer, text), end))]
    return torch.from_numpy(np.concatenate(parts, dtype=np.int32))


@torch.no_grad()
def summed_loss(model: Transformer, tokens: Tensor, length: int, document_start: int | None = None) -> float:
    """Sum of the cross-entropy, in nats, over all tokens but the first; ``document_start`` as for the model."""
    device = next(model.parameters()).device
    total = 0.0
    for windows_BS in windows(tokens, length):
        windows_BS = windows_BS.to(device)
        loss = model(windows_BS[:, :-1], windows_BS[:, 1:], document_start=document_start)
        total += loss.cross_entropy.item()
    return total


def windows(tokens: Tensor, length: int) -> Iterator[Tensor]:
    """Batches [B, length + 1], int64, of windows that share one token with the next, then the rest as a shorter one."""
    targets = len(tokens) - 1
    whole = targets // length
    if whole:
        found = tokens[: whole * length + 1].unfold(0, length + 1, length)
        for windows_BS in found.split(max(BATCH_TOKENS // length, 1)):
            yield windows_BS.long()
    if targets % length:
        yield tokens[whole * length :].unsqueeze(0).long()


def _text(result: Evaluation) -> str:
    documents = "1 document" if result.documents == 1 else f"{result.documents:,} documents"
    return "\n".join(
        [
            f"loss           {result.loss:.4f} nats a token",
            f"bits per byte  {result.bits_per_byte:.4f}",
            f"text           {documents}, {result.bytes:,} bytes, {result.tokens:,} tokens",
            f"sequences      of {result.sequence_length:,} tokens at most",
            f"model          {result.source}",
            f"computed in    {result.precision.upper()}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
