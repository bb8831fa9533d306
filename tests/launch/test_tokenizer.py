"""The published byte tokenizer reads text as runs are trained on it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.tokenizer import (
    ByteTokenizer,
    PublishedTokenizer,
    TokenizerError,
    byte_tokenizer,
    is_byte_tokenizer,
    published_tokenizer,
)

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return path


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40).filter(lambda text: text.isprintable() or text.isascii()))
def test_bytes_are_the_same_tokens_in_the_published_form(folder: Path, text: str) -> None:
    published = PublishedTokenizer(folder / "tokenizer.json", 256)
    content = text.encode()
    assert published.encode(content) == ByteTokenizer().encode(content) == list(content)
    assert published.decode(list(content)) == ByteTokenizer().decode(list(content)) == text
    assert published.size == ByteTokenizer.size


def test_every_byte_has_its_own_token(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    # Characters below U+0800 have between them every lead and continuation byte of two, and all of ASCII.
    text = "".join(map(chr, range(0x800)))
    assert PublishedTokenizer(folder / "tokenizer.json", 256).encode(text.encode()) == list(text.encode())


def test_the_published_form_is_recognised(folder: Path, tmp_path: Path) -> None:
    assert is_byte_tokenizer(folder / "tokenizer.json")
    assert isinstance(published_tokenizer(folder, {}), ByteTokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert not is_byte_tokenizer(tmp_path / "tokenizer.json")


def test_the_marks_of_fill_in_the_middle_are_published_too(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(byte_tokenizer(fill_in_middle=True)))
    assert is_byte_tokenizer(file) and isinstance(published_tokenizer(tmp_path, {}), ByteTokenizer)
    published = PublishedTokenizer(file, 256)
    assert published.sentinels == ByteTokenizer.sentinels
    marked = "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>c"  # noqa: RUF001, as DeepSeek writes them
    assert tokenizers.Tokenizer.from_file(str(file)).encode(marked).ids == [257, 97, 258, 98, 259, 99]


@pytest.mark.parametrize("special", [True, False])  # DeepSeek publishes the end as special, the marks as not
def test_text_cannot_write_an_end_or_a_mark_by_its_name(tmp_path: Path, special: bool) -> None:
    values = byte_tokenizer(fill_in_middle=True)
    for token in values["added_tokens"]:
        token["special"] = special
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(values))
    published = PublishedTokenizer(file, 256)
    text = "a<|end_of_document|><｜fim▁begin｜>b<｜fim▁hole｜><｜fim▁end｜>"  # noqa: RUF001
    assert published.encode(text.encode()) == list(text.encode())
    assert published.decode(published.encode(text.encode())) == text
    assert published.sentinels == (257, 258, 259)


def test_a_token_that_is_neither_special_nor_a_mark_stays_one(tmp_path: Path) -> None:
    values = byte_tokenizer(fill_in_middle=True)
    values["added_tokens"].append({**values["added_tokens"][0], "id": 260, "content": "    ", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert PublishedTokenizer(tmp_path / "tokenizer.json", 256).encode(b"a    b") == [97, 260, 98]


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        (None, {}, "tokenizer.json is missing"),
        ("{}", {"eos_token_id": 1}, "tokenizer.json is no tokenizer"),
        ("{}", {}, "eos_token_id=None must be a token"),
        ("{}", {"eos_token_id": []}, r"eos_token_id=\[\] must be a token"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(
    tmp_path: Path, content: str | None, values: dict[str, object], message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        published_tokenizer(tmp_path, values)
