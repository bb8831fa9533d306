"""``dualpipe generate RUN|HF_DIR --prompt TEXT``: how a model goes on from a text."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from launch.command import Parser, UsageError, reported
from launch.model_folder import load_model
from model.generate import bytes_a_token, generate
from model.speculative import DraftCounts, generate_speculatively
from model.transformer import Transformer

_EPILOG = """\
example:
  dualpipe generate runs/tiny-cpu --prompt "def main(" --tokens 100
  dualpipe generate models/v3 --prompt "Once" --speculative     the same text in fewer steps

The whole model is loaded into this process, on a GPU in BF16 where there is one, else on the CPU in FP32."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line about what was given."""
    return reported(lambda: _generate(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="dualpipe generate",
        description="Print a prompt and the model's continuation, up to the end of the document.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="RUN|HF_DIR", help="run folder or Hugging Face folder")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="may be empty: the beginning of a document")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="at most (default 200)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (the default) takes the most probable token, 1 draws from the model's own distribution",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draws (default 1)")
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of a run's weights (optimizer.ema_decay)"
    )
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="multi-token prediction drafts, the model verifies: the same greedy text, and how many drafts were right",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _generate(arguments: argparse.Namespace) -> None:
    _check(1 <= arguments.tokens < 2**31, "--tokens", arguments.tokens, "must be from 1 to 2**31 - 1")
    _check(
        0 <= arguments.temperature < float("inf"),
        "--temperature",
        arguments.temperature,
        "must be finite, not negative",
    )
    _check(0 <= arguments.seed < 2**63, "--seed", arguments.seed, "must be from 0 to 2**63 - 1")
    if arguments.speculative:
        _check(arguments.temperature == 0, "--temperature", arguments.temperature, "must be 0 with --speculative")
    loaded = load_model(arguments.model, arguments.ema)
    if arguments.speculative and loaded.model.mtp is None:
        raise UsageError(f"--speculative needs model.num_nextn_predict_layers=1, which {loaded.source} has not")
    tokenizer = loaded.tokenizer
    # Every document follows the end of another one, so a prompt does too.
    prompt = [tokenizer.end, *tokenizer.encode(os.fsencode(arguments.prompt))]
    _check_room(loaded.model, len(prompt), arguments.tokens, arguments.speculative)
    counts = DraftCounts()
    if arguments.speculative:
        drawn = generate_speculatively(loaded.model, prompt, arguments.tokens, tokenizer.end, counts)
    else:
        drawn = generate(loaded.model, prompt, arguments.tokens, arguments.temperature, arguments.seed, tokenizer.end)
    tokens = list(drawn)
    text = tokenizer.decode([*prompt[1:], *(token for token in tokens if token != tokenizer.end)])
    if arguments.json:
        speculative = {"speculative": _counted(counts)} if arguments.speculative else {}
        print(json.dumps({"source": loaded.source, "text": text, "tokens": tokens, **speculative}))
        return
    print(text)
    if arguments.speculative:
        print(
            f"{counts.tokens} tokens in {counts.passes} steps, {counts.tokens_per_step:.2f} a step; "
            f"{counts.accepted} of {counts.drafted} drafts accepted ({counts.acceptance_rate:.0%})",
            file=sys.stderr,
        )


def _check_room(model: Transformer, prompt: int, tokens: int, speculative: bool) -> None:
    """Room for every token is taken before the first."""
    device, each = next(model.parameters()).device, bytes_a_token(model, speculative)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    most = max(int(free / each) - prompt, 0)
    _check(
        tokens <= most,
        "--tokens",
        tokens,
        f"must be at most {most}: this model keeps {each:,} bytes a token, the prompt's {prompt:,} too, and the "
        f"{device.type} has {free / 1e9:.1f} GB free",
    )


def _counted(counts: DraftCounts) -> dict[str, float]:
    return {
        "steps": counts.passes,
        "tokens_per_step": counts.tokens_per_step,
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "acceptance_rate": counts.acceptance_rate,
    }


def _check(holds: bool, option: str, value: object, rule: str) -> None:
    if not holds:
        raise UsageError(f"{option}={value} {rule}")


if __name__ == "__main__":
    sys.exit(main())
