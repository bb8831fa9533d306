"""Every command of docs/data.md runs, on data such as it names, and says what the page says."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.config import ConfigError, load
from launch.data import open_dataset
from launch.evaluate import evaluate, summed_loss, tokens_of
from launch.model_folder import load_model
from launch.run_folder import RunFolder
from launch.yaml_strict import load_yaml
from model.transformer import Transformer, initialise
from tests.launch.corpora import parquet
from tests.launch.runs import CONFIG, ROOT, entries, train_forked
from tests.launch.test_data_megatron import write

PAGE = (ROOT / "docs" / "data.md").read_text()


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data that the page names, beside the project's configurations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "config.yaml").write_text(CONFIG.replace("DATA", "stdlib").replace("RUN", str(tmp_path / "run")))
    folder = tmp_path / "corpus"
    (folder / "code").mkdir(parents=True)
    for number in range(200):
        (folder / "code" / f"{number}.txt").write_text(f"x = {number}\n" * (2 + number % 9))
    lines = [json.dumps({"content": f"page {number} " * (1 + number % 7)}) for number in range(900)]
    (folder / "web.jsonl").write_text("\n".join(lines))
    parquet(folder / "text.parquet", [f"row {number} " * 30 for number in range(40)], name="text")
    write(folder / "indexed", [[[number] * 200, [256]] for number in range(20)])
    return folder


def overrides(*containing: str) -> list[str]:
    """Those of the page's one command that has all of these in it."""
    (found,) = [words[3:] for words in commands() if all(part in " ".join(words) for part in containing)]
    return found


def test_every_command_finds_its_data(corpus: Path) -> None:
    for words in commands():
        assert words[:3] == ["dualpipe", "train", "configs/tiny-cpu.yaml"]
        config = load(words[2], words[3:])
        assert open_dataset(config).visits(0, 2).shape == (2, 257)


def test_the_file_and_the_overrides_say_the_same_and_the_page_shows_the_start_of_that_run(corpus: Path) -> None:
    config = load("configs/tiny-cpu.yaml", overrides("data.sources="))
    (yaml,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    parts = [{"source": part.source, "weight": part.weight} for part in config.data.sources]
    assert load_yaml(yaml)["data"] == {"sources": parts, "text_field": config.data.text_field}
    (text,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    sequences = config.train.steps * config.train.global_batch_size
    assert list(open_dataset(config).summary(sequences)) == text.splitlines()


def test_a_run_mixes_keeps_apart_fills_in_and_says_so(corpus: Path, tmp_path: Path) -> None:
    """All options at once, absolute paths, through a pipeline of two: its first loss is that of the plain model on the
    same batch, with the boundaries, and what it leaves is evaluated with them."""
    sources = [f"{{source: {corpus / name}, weight: {weight}}}" for name, weight in (("code", 3), ("web.jsonl", 7))]
    options = [
        f"data.sources=[{', '.join(sources)}]",
        *overrides("data.sources=")[:1],
        *overrides("data.fill_in_middle"),
    ]
    options = [option.replace("middle=0.1", "middle=0.5") for option in options]
    small = ["layout.data=1", "layout.expert=1", "train.steps=2", "data.source=stdlib", "precision.compute=fp32"]
    small += ["train.sequence_length=64", "checkpoint.every=0", "train.threads=1"]
    done = train_forked(tmp_path / "config.yaml", *small, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    config = load(tmp_path / "run" / "config.yaml")
    data = open_dataset(config)
    assert all(line in done.stdout.splitlines() for line in data.summary(16)), done.stdout
    assert json.loads((tmp_path / "run" / "data.json").read_text())["fingerprint"] == data.fingerprint
    names = [str(corpus / name) for name in ("code", "web.jsonl")]
    for entry in entries(tmp_path / "run"):
        assert entry["source_tokens"] == data.source_tokens(8 * entry["step"]) and list(entry["source_tokens"]) == names
        assert sum(entry["source_tokens"].values()) == 64 * 8 * entry["step"]

    model = Transformer(config.model)
    initialise(model, config.train.seed)
    rows = torch.from_numpy(data.visits(0, 8))
    assert (rows == 258).any() and (rows == 256).any() and (rows[:, -1] != 256).any()
    with torch.no_grad():
        apart, crossing = (
            model(rows[:, :-1], rows[:, 1:], document_start=start).cross_entropy.item() / rows[:, 1:].numel()
            for start in (256, None)
        )
    first = entries(tmp_path / "run")[0]["cross_entropy"]
    assert first == pytest.approx(apart, rel=1e-5) and first != pytest.approx(crossing, rel=1e-5)

    loaded, texts = load_model(tmp_path / "run"), [b"stage", b"a bubble", b"x = 1"]
    alone = sum(summed_loss(loaded.model, tokens_of([text], loaded.tokenizer), 64) for text in texts)
    result = evaluate(loaded, texts, 64)
    assert result.loss * result.tokens == pytest.approx(alone, rel=1e-5)

    heavier = replace(config.data.sources[0], weight=4.0)
    other = replace(config, data=replace(config.data, sources=(heavier, config.data.sources[1])))
    with pytest.raises(ConfigError, match=r"data\.sources hold, or mix in other shares, other text than the run"):
        RunFolder(other).changes(other, open_dataset(other).fingerprint)
