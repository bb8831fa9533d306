"""Which files and documents a source is, and what is refused by name."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from launch.data import END_OF_DOCUMENT, DataError
from launch.data_source import find_source
from tests.launch.corpora import TEXTS, configured, corpus, documents, opened, parquet

pytestmark = pytest.mark.usefixtures("cache")


def test_jsonl_and_txt_hold_the_same_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": number}) for number, text in enumerate(TEXTS)]
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, "", json.dumps({"text": ""})]) + "\n")
    from_lines = opened(configured(tmp_path / "texts.jsonl"))
    from_files = opened(configured(corpus(tmp_path / "texts", TEXTS)))
    assert from_lines.fingerprint == from_files.fingerprint
    assert from_lines.documents == len(TEXTS)


def test_a_folder_a_glob_and_the_order_of_creation_agree(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "texts", TEXTS)
    (folder / "notes.md").write_text("not a document")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for path in sorted(folder.glob("*.txt"), reverse=True):
        (mirror / path.name).write_bytes(path.read_bytes())
    prints = {
        opened(configured(source)).fingerprint for source in (folder, f"{folder}/*", mirror, f"{folder}/**/*.txt")
    }
    assert len(prints) == 1


def test_bytes_that_are_not_utf8_are_tokens_too(tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_bytes(bytes(range(256)))
    data = opened(configured(tmp_path / "raw.txt"))
    assert [*data.train, *data.validation] == [*range(256), END_OF_DOCUMENT]


def test_the_standard_library_needs_no_network_and_leaves_packages_and_tests_out(tmp_path: Path) -> None:
    data = opened(configured("stdlib", sequence_length=256, validation_fraction=0.05))
    texts = set(documents(data.train)) | set(documents(data.validation))
    assert Path(json.__file__).read_bytes() in texts
    assert Path(pytest.__file__).read_bytes() not in texts
    assert len(data.train) > 5_000_000
    assert 0.01 < len(data.validation) / len(data.train) < 0.2


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("empty.txt", b"", "must hold text"),
        ("short.txt", b"seventeen tokens", "at least 18 tokens"),
        ("image.png", b"x" * 100, "must be a .txt, .jsonl or .parquet file"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": }\n', "bad.jsonl:2 must be one JSON object"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1 must be a JSON object with a string 'text'"),
        ("number.jsonl", b'\n{"text": 3}\n', "number.jsonl:2 must be a JSON object with a string 'text'"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "latin.jsonl:1 must be one JSON object"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path: Path, name: str, content: bytes, rule: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        opened(configured(path))
    assert f"data.source={str(path)!r}" in str(refused.value)
    assert rule in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_source_that_names_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "only.md").write_text("not a document")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    absent = (tmp_path / "absent.txt", tmp_path / "*.txt", "~nobody-of-this-name/x.txt")
    for source in (*absent, tmp_path, tmp_path / "pipe", "/dev/null", "nul\0.txt"):
        with pytest.raises(DataError, match=re.escape(f"data.source={str(source)!r}")):
            opened(configured(source))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="regular file"):
        opened(configured(tmp_path / "pipe.txt"))


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "texts", TEXTS)
    (folder / "0003.txt").chmod(0)
    with pytest.raises(DataError, match=r"data\.source=.*0003\.txt: Permission denied"):
        opened(configured(folder))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = corpus(tmp_path / "texts", TEXTS)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DataError, match=r"data\.source=.*0000\.txt: Permission denied"):
        opened(configured(folder))


def test_parquet_and_jsonl_hold_the_same_documents_under_any_name(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"content": text}) for text in TEXTS[30:]))
    parquet(tmp_path / "a.parquet", [*TEXTS[:30], ""], id=list(range(31)))
    mixed = opened(configured(tmp_path, text_field="content"))
    assert mixed.fingerprint == opened(configured(corpus(tmp_path / "texts", TEXTS))).fingerprint
    assert mixed.documents == len(TEXTS)


def test_of_a_parquet_file_a_part_of_a_row_group_is_in_memory(tmp_path: Path) -> None:
    """Forty groups of 1 MB each of text that compresses badly; pyarrow counts what it holds."""
    pyarrow = pytest.importorskip("pyarrow")
    path = parquet(tmp_path / "a.parquet", [os.urandom(5000).hex() for _ in range(4000)], rows=100)
    before, most, total = pyarrow.total_allocated_bytes(), 0, 0
    for text in find_source(str(path), text_field="content").documents():
        most, total = max(most, pyarrow.total_allocated_bytes() - before), total + len(text)
    assert total == 40_000_000
    assert most < 8_000_000


@pytest.mark.parametrize(
    ("texts", "field", "rule"),
    [
        (["a", None], "content", "row 2: 'content' must not be null"),
        (["a"], "text", "data.text_field='text' must be a column of text in "),
        (["a"], "id", "its columns of text are content"),
    ],
)
def test_parquet_without_text_is_refused(tmp_path: Path, texts: list[str | None], field: str, rule: str) -> None:
    path = parquet(tmp_path / "a.parquet", texts, id=list(range(len(texts))))
    with pytest.raises(DataError) as refused:
        opened(configured(path, text_field=field))
    assert str(refused.value).startswith(f"data.source={str(path)!r}") and rule in str(refused.value)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet must be a whole \.parquet file"):
        opened(configured(path))


def test_parquet_without_pyarrow_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the package 'pyarrow'.*pip install 'dualpipe-trainer\[parquet\]'"):
        opened(configured(tmp_path / "a.parquet"))
