"""``dualpipe simulate``: what it prints, the files it writes, and what it refuses in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dualpipe.lower import lower
from dualpipe.program import dump, parse
from dualpipe.schedules import SCHEDULES, generate, stages
from launch.simulate import main

ROOT = Path(__file__).parents[2]
SMALL = ["--ranks", "4", "--microbatches", "10"]


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main([*SMALL, *options]) == 0
    return capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(answer(capsys, "--json", "--cost", "F=1,I=1,W=1,FB=3,bytes=100"))
    assert result["schedule"] == "dualpipe"
    assert (result["ranks"], result["stages"], result["microbatches"]) == (4, 4, 10)
    assert (result["makespan"], result["busy"], result["bubble"]) == (32, [30] * 4, [2] * 4)
    assert result["bubble_fraction"] == pytest.approx(2 / 32)
    assert result["peak_activations"] == [5, 5, 5, 5]
    assert result["peak_bytes"] == [500] * 4
    assert result["operations"][0] == {"F": 5, "B": 2, "I": 3, "W": 3, "FB": 5}
    causes = result["bubble_by_cause"]
    assert [sum(rank.values()) for rank in causes] == result["bubble"]
    assert set(causes[0]) == {"warmup", "dependency", "communication", "drain", "step_end"}


def test_picture_table_and_program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "66")
    lines = answer(capsys).splitlines()
    assert lines[0] == "0 F0F1F2F5I5W5F63&6---  7&0---4&7---8&1---B8--  9&2---B9--I3W3I4W4"
    assert {len(line) for line in lines[:4]} == {66}
    assert lines[7].split() == "rank stages F B I W FB busy bubble warm-up dependency peak".split()
    assert lines[-1] == "dualpipe: 4 ranks, 10 micro-batches, makespan 32, bubble 6.25%"
    assert parse(answer(capsys, "--text")) == lower(generate("dualpipe", 4, 10))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_simulates(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(answer(capsys, "--schedule", name, "--microbatches", "12", "--json"))
    assert (result["schedule"], result["stages"]) == (name, stages(name, 4))


def test_message_time_comes_from_either_option(capsys: pytest.CaptureFixture[str]) -> None:
    one = answer(capsys, "--json", "--p2p", "0.5")
    other = answer(capsys, "--json", "--cost", "F=1,I=1,W=1,FB=3,p2p=0.5")
    assert one == other and json.loads(one)["makespan"] > 32


def test_a_comparison_has_a_row_for_every_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--compare", "--ranks", "6", "--microbatches", "14", "--cost", "F=1,I=1,W=1,bytes=8"]
    rows = {row["schedule"]: row for row in json.loads(answer(capsys, *options, "--json"))}
    assert list(rows) == list(SCHEDULES)
    table = {words[0]: words[1:] for line in answer(capsys, *options).splitlines() if (words := line.split())}
    for name, row in rows.items():
        if "error" in row:
            assert " ".join(table[name]).startswith("cannot run: ") and row["error"] in " ".join(table[name])
        else:
            assert row["stage_share"] == 6 / stages(name, 6)
            # The same model and micro-batches: every schedule has as much to compute.
            assert sum(row["busy"]) == pytest.approx(6 * 14 * 3)
            assert table[name][:2] == [str(row["stages"]), f"{row['makespan']:g}"]
    assert "interleaved" in table and rows["interleaved"]["error"]
    assert (rows["dualpipe"]["parameters"], rows["1f1b"]["parameters"]) == (2, 1)
    assert rows["dualpipev"]["parameters"] == 1


def test_the_schedule_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "tiny-cpu.yaml")
    assert main([config, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["schedule"], result["ranks"], result["microbatches"]) == ("dualpipe", 4, 8)
    assert main([config, "--microbatches", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["microbatches"] == 12


@pytest.mark.parametrize("form", ["compute order", "lowered"])
def test_a_program_from_a_file(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = generate("dualpipe", 4, 10)
    path = tmp_path / "program.txt"
    path.write_text(dump(order if form == "compute order" else lower(order)))
    assert main(["--program", str(path), "--json"]) == 0
    assert capsys.readouterr().out == answer(capsys, "--json")


def test_pictures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, html, trace = (tmp_path / name for name in ("a.svg", "a.html", "a.json"))
    answer(capsys, "--svg", str(svg), "--html", str(html), "--trace", str(trace))
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(trace.read_text())["traceEvents"]
    answer(capsys, "--compare", "--trace", str(trace))
    processes = {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert len(processes) > 1


SEARCH = ["--schedule", "search", "--cost", "F=1,I=1,W=1,p2p=0.2", "--budget", "300"]


def test_a_search_says_what_it_found_and_beat(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(answer(capsys, *SEARCH, "--memory-limit", "4", "--json"))
    assert (result["schedule"], result["ranks"], result["microbatches"]) == ("search", 4, 10)
    found = result["search"]
    assert found["peak"] == max(result["peak_activations"]) * result["stage_share"] <= 4
    assert found["tried"] == 300
    compared = json.loads(answer(capsys, "--compare", "--cost", "F=1,I=1,W=1,p2p=0.2", "--json"))
    by_name = {row["schedule"]: row for row in compared}
    fitting = [
        row["makespan"]
        for row in compared
        if "error" not in row and max(row["peak_activations"]) * row["stage_share"] <= 4
    ]
    assert found["best_named_makespan"] == min(fitting) == by_name[found["best_named"]]["makespan"]
    assert found["gain"] == pytest.approx(1 - result["makespan"] / min(fitting)) and found["gain"] >= 0
    assert [row["schedule"] for row in found["named"]] == list(SCHEDULES)
    assert [row["fits"] for row in found["named"] if row["schedule"] == "gpipe"] == [False]
    lines = answer(capsys, *SEARCH, "--memory-limit", "4").splitlines()
    assert lines[-4].startswith(f"search: 4 ranks, 10 micro-batches, makespan {result['makespan']:g}")
    assert lines[-3].startswith(f"placement {found['placement']}, parameters {result['parameters']:g}x, peak ")
    assert lines[-2].startswith(
        f"best named schedule that fits: {found['best_named']}, makespan {min(fitting):g}; gain"
    )
    assert lines[-1].startswith("300 orders tried; ")
    assert "no named schedule fits; " in answer(capsys, *SEARCH, "--memory-limit", "2")


def test_a_found_program_is_a_file_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.txt"
    path.write_text(answer(capsys, *SEARCH, "--placement", "linear,twins", "--seed", "3", "--text"))
    found = json.loads(answer(capsys, *SEARCH, "--placement", "linear,twins", "--seed", "3", "--json"))
    assert main(["--program", str(path), "--cost", "F=1,I=1,W=1,p2p=0.2", "--json"]) == 0
    played = json.loads(capsys.readouterr().out)
    assert played == {key: found[key] for key in played}


def test_a_search_shows_its_progress_to_a_terminal_only() -> None:
    import pty

    code = "import sys; from launch.simulate import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, *SMALL, *SEARCH, "--json"]
    near, far = pty.openpty()
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=far, check=False)
    os.close(far)
    shown = os.read(near, 10_000).decode()
    os.close(near)
    assert done.returncode == 0 and json.loads(done.stdout)["schedule"] == "search"
    assert "searching: 101 orders tried, makespan " in shown and shown.endswith("\r\x1b[K")
    assert process(code, *words[3:]).stderr == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--schedule", "search", "--memory-limit", "0.5"], "memory limit 0.5 must be at least 1"),
        (["--schedule", "search", "--budget", "10m"], "budget 10m must be a number of orders to try"),
        (["--schedule", "search", "--placement", "w"], "placement w must be one of linear, twins, v, interleaved"),
        (["--schedule", "search", "--chunks", "2"], "--chunks 2 and --schedule search exclude each other"),
        (["--schedule", "search", "--microbatches", "100000"], "at most 25000 for their product"),
        (["--schedule", "search", "--cost", "F@8=1"], "cost F@8: the stages are 0 .. 7"),
        (["--memory-limit", "2"], "--memory-limit is for --schedule search only"),
        (["--compare", "--budget", "2s"], "--budget is for --schedule search only"),
        (["--ranks", "3"], "layout.pipeline=3 must be 1 or even for schedule dualpipe"),
        (["--ranks", "many"], "--ranks"),
        (["--ranks", "-1"], "layout.pipeline=-1"),
        (["--microbatches", "14"], "at least 2 x layout.pipeline (16)"),
        (["--microbatches", "100000000000"], "must make at most 1000000"),
        (["--schedule", "dualpip"], "did you mean dualpipe?"),
        (["--chunks", "3"], "dualpipe"),
        (["--cost", "F=-1,I=1,W=1"], "cost F=-1"),
        (["--cost", "F=1"], "cost I, W missing"),
        (["--cost", "F@8=1"], "cost F@8: the stages are 0 .. 7"),
        (["--p2p", "-1"], "cost p2p=-1"),
        (["--p2p", "nan"], "cost p2p=nan"),
        (["--p2p", "2", "--cost", "p2p=1"], "--p2p 2 and p2p in --cost p2p=1 exclude each other"),
        (["--jsn"], "--jsn"),
        (["--json", "--text"], "not allowed with"),
        (["--svg", "/"], "--svg / cannot be written: Is a directory"),
        (["--html", "no/such/place"], "--html no/such/place cannot be written: No such file"),
        (["--trace", "no/such/place"], "--trace no/such/place cannot be written"),
        (["--program", "no-such-file"], "no-such-file: must be a readable program"),
        (["--program", "f", "--ranks", "4"], "--program f and --ranks exclude each other"),
        (["--program", "f", "--compare"], "--program f and --compare exclude each other"),
        (["--compare", "--schedule", "1f1b"], "--compare and --schedule exclude each other"),
        (["--compare", "--svg", "f"], "--compare and --svg exclude each other"),
        (["--text", "--html", "f"], "--text and --html exclude each other"),
        (["--compare", "--ranks", "0"], "layout.pipeline=0"),
        (["--compare", "--cost", "F@0=2"], "stages of one schedule are not those of another"),
        (["no-such.yaml"], "no-such.yaml must be a readable YAML file"),
    ],
)
def test_bad_input_is_one_line_and_two(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: expected 'program NAME"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0 X\n", "line 2: 'X' is not a slot"),
        ("program p stages=1 microbatches=1 routes=0\n0: F0.0\nmore\n", "line 3: expected '1: ...'"),
        ("program p stages=2 microbatches=1 routes=0,1\n0: F0.0\n1:\n", "F1.0"),
    ],
)
def test_a_bad_program_is_one_line_with_its_number(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "program.txt"
    path.write_text(text)
    assert main(["--program", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}: ") and err.count("\n") == 1 and words in err


def test_help_names_every_cost(capsys: pytest.CaptureFixture[str]) -> None:
    from dualpipe.cost import KEYS

    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    words = capsys.readouterr().out.replace("=N", "").split()
    assert not [key for key in KEYS if key not in words]
    assert "dualpipe simulate --schedule dualpipe --ranks 8" in " ".join(words)


def process(code: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more}
    words = (sys.executable, "-c", code, *words)
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [[], ["--compare"], ["--json"], ["--html", os.devnull, "--trace", os.devnull]])
def test_the_command_loads_no_heavy_package(options: list[str]) -> None:
    code = "import sys; from launch.cli import main; main(['simulate', *sys.argv[1:]])\n"
    code += "print(*{'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules), file=sys.stderr)"
    done = process(code, *options)
    assert (done.returncode, done.stderr) == (0, "\n")


def test_a_configuration_needs_no_torch() -> None:
    code = "import sys; from launch.cli import main; main(['simulate', 'configs/tiny-cpu.yaml'])\n"
    done = process(code + "print(*{'torch', 'numpy', 'rich'} & set(sys.modules), file=sys.stderr)")
    assert (done.returncode, done.stderr) == (0, "\n")


def test_a_terminal_gets_colours_as_wide_as_it_is() -> None:
    import pty

    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": "70", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    environment.pop("NO_COLOR", None)
    words = [sys.executable, "-m", "launch.simulate", *SMALL]
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=slave) as running:
        os.close(slave)
        text = b""
        while True:
            try:
                part = os.read(master, 1 << 16)
            except OSError:  # how a pseudo-terminal ends
                break
            if not part:
                break
            text += part
    os.close(master)
    assert running.returncode == 0
    first = text.decode().splitlines()[0]
    assert "\x1b[30;48;2;86;180;233mF0" in first  # black on the colour of forwards
    plain = subprocess.run([*words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in plain
    assert len(plain.splitlines()[0]) == 70


def test_a_reader_that_leaves_is_no_error() -> None:
    code = f"{sys.executable} -m launch.simulate --ranks 16 --microbatches 200 --text | head -c 10"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {code}"], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"program du", b"")


def documented() -> list[tuple[str, str | None]]:
    """The commands of docs/simulate.md, each with the output that the page prints for it, if any."""
    text = (ROOT / "docs" / "simulate.md").read_text().replace("\\\n", " ")
    found = []
    for block, output in re.findall(r"```sh\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, flags=re.DOTALL):
        commands = block.splitlines()
        found += [(command, None) for command in commands[:-1]] + [(commands[-1], output or None)]
    return found


def test_what_the_page_says_is_what_the_command_does(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "100"}
    for command, expected in documented():
        words = ["bash", "-c", command]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
        if expected is not None:
            assert [line.rstrip() for line in done.stdout.splitlines()] == [
                line.rstrip() for line in expected.splitlines()
            ]
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "step.svg", "step.html", "step.json", "step.txt"}
