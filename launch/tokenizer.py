"""Text <-> tokens of one model: bytes, as runs are trained on, or a published ``tokenizer.json``.

``byte_tokenizer`` is the first in the form of the second, so that an exported model comes with the tokens that it was
trained on, and transformers, vLLM and SGLang read text as runs do.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

END_OF_DOCUMENT = 256
VOCABULARY = 257
FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
END_TEXT = "<|end_of_document|>"


_SENTINELS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001, as DeepSeek writes them
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
"""What published tokenizers call the marks of fill in the middle: DeepSeek's, Qwen's and StarCoder's."""


class Sentinels(NamedTuple):
    """The marks of fill in the middle, in order: before the prefix, before the suffix, before the middle."""

    prefix: int
    suffix: int
    middle: int


class TokenizerError(ValueError):
    """There is no usable tokenizer; one line that names the file, and why."""


class Tokenizer(Protocol):
    size: int
    """Tokens that there are: all are below it."""
    end: int
    """The token after, and before, every document."""
    sentinels: Sentinels | None
    """None: the tokenizer has none, or none of a known name."""

    def encode(self, text: bytes) -> list[int]:
        """``text``: UTF-8; what is not is an affair of the tokenizer."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def identity(self) -> str:
        """Equal for tokenizers that make the same tokens."""
        ...


class ByteTokenizer:
    """Token 0..255 is the byte of that value; any bytes are text. ``size`` leaves out the marks of fill in the middle,
    which come after it: few models have them."""

    size, end = VOCABULARY, END_OF_DOCUMENT
    sentinels: Sentinels | None = Sentinels(VOCABULARY, VOCABULARY + 1, VOCABULARY + 2)

    def encode(self, text: bytes) -> list[int]:
        return list(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")

    def identity(self) -> str:
        return "bytes"


class PublishedTokenizer:
    """A ``tokenizer.json`` through Hugging Face's ``tokenizers``. ``end`` is from the model's configuration.

    Text never becomes a special token, or the end of a document, or a mark of fill in the middle, by spelling its name:
    those are for whoever lays out documents, and text that could write them would split documents.
    """

    def __init__(self, path: Path, end: int) -> None:
        try:
            from tokenizers import Tokenizer as Rust
        except ImportError:
            raise TokenizerError(f"{path} needs the package 'tokenizers', and it is not installed") from None
        try:
            content = path.read_bytes()
            self._rust = Rust.from_str(json.dumps(_with_special_marks(json.loads(content), end)))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} is no tokenizer: {' '.join(str(error).split())}") from None
        self._rust.encode_special_tokens = True  # in spite of its name: encodes their names as any other text
        self.size, self.end = max(self._rust.get_vocab().values(), default=-1) + 1, end
        self._digest = hashlib.sha256(content).hexdigest()
        self.sentinels = self._find_sentinels()

    def encode(self, text: bytes) -> list[int]:
        # What is not UTF-8 is read as the replacement character: the vocabulary is one of characters.
        tokens: list[int] = self._rust.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._rust.decode(list(tokens))
        return text

    def _find_sentinels(self) -> Sentinels | None:
        for names in _SENTINELS:
            tokens = [token for name in names if (token := self._rust.token_to_id(name)) is not None]
            if len(tokens) == len(names):
                return Sentinels(*tokens)
        return None

    def identity(self) -> str:
        return f"{self._digest} {self.end} names of special tokens are text"


def token_array(tokenizer: Tokenizer, text: bytes) -> npt.NDArray[Any]:
    """The tokens of a text in the smallest type that holds them: bytes as they lie, others as int32."""
    if isinstance(tokenizer, ByteTokenizer):  # a list of every byte would take minutes, and eight bytes for each
        return np.frombuffer(text, np.uint8)
    return np.array(tokenizer.encode(text), np.int32)


def _with_special_marks(values: Any, end: int) -> Any:
    """``tokenizer.json`` with the end of a document and the marks of fill in the middle among its special tokens:
    DeepSeek publishes its marks as ordinary ones."""
    marks = {name for names in _SENTINELS for name in names}
    for token in values["added_tokens"]:
        token["special"] = token["special"] or token["content"] in marks or token["id"] == end
    return values


def open_tokenizer(name: str) -> Tokenizer:
    """What ``data.tokenizer`` names: ``bytes``, or a Hugging Face folder. Raises TokenizerError."""
    if name == "bytes":
        return ByteTokenizer()
    try:
        folder = Path(name).expanduser()
    except RuntimeError as error:
        raise TokenizerError(f"{name} must be readable: {error}") from None
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{folder / 'config.json'} must be readable: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder / 'config.json'} must be JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise TokenizerError(f"{folder / 'config.json'} must be a JSON object")
    return published_tokenizer(folder, values)


def published_tokenizer(folder: Path, values: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder whose ``config.json`` has these values. Raises TokenizerError."""
    if not (folder / FILE).is_file():
        raise TokenizerError(f"{folder / FILE} is missing: without it the model's tokens have no meaning")
    if is_byte_tokenizer(folder / FILE):
        return ByteTokenizer()
    end = values.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if type(end) is not int or end < 0:
        raise TokenizerError(f"{folder / 'config.json'}: eos_token_id={end!r} must be a token, the end of a document")
    return PublishedTokenizer(folder / FILE, end)


def byte_tokenizer(fill_in_middle: bool = False) -> dict[str, Any]:
    """``tokenizer.json`` for ``ByteTokenizer``: byte-level BPE without a single merge; with the marks of fill in the
    middle, under DeepSeek's names, for a model that has them."""
    characters = _byte_characters()
    names = [END_TEXT, *(_SENTINELS[0] if fill_in_middle else ())]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": True, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": END_OF_DOCUMENT + at, "content": name, **flags} for at, name in enumerate(names)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(characters)},
            "merges": [],
        },
    }


def tokenizer_config(context: int) -> dict[str, Any]:
    """``tokenizer_config.json`` beside ``byte_tokenizer``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_TEXT,
        "bos_token": END_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }


def is_byte_tokenizer(path: Path) -> bool:
    """Whether a ``tokenizer.json`` is the one above."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return found in (byte_tokenizer(), byte_tokenizer(fill_in_middle=True))


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: its own where Latin-1 prints one, and for the others,
    in order, those from U+0100 on (GPT-2's table)."""
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
