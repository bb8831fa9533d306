"""Tokens a step of speculative decoding, on a text that the model was not trained on.

Two figures. *Generated*: prompts are cut out of the text and continued greedily, and drafts are counted as
``dualpipe generate --speculative`` does. A small model soon repeats itself, and repetitions are easy to draft; so,
*on the text itself*: for how many positions the module's choice, given the text so far, is the main model's choice. One
plus that share is what a step would give if the model wrote that text.

    python -m benchmarks.speculative RUN|HF_DIR --data FILE ...
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from launch.evaluate import tokens_of, windows
from launch.model_folder import LoadedModel, load_model
from model.exchange import LocalExchange
from model.generate import features_of
from model.speculative import DraftCounts, generate_speculatively
from model.transformer import Transformer


def generated(loaded: LoadedModel, row: Sequence[int], prompts: int, prompt_tokens: int, tokens: int) -> DraftCounts:
    """Counts of the continuations of ``prompts`` prompts, evenly spaced in the row of tokens."""
    total = DraftCounts()
    for number in range(prompts):
        start = number * (len(row) - prompt_tokens) // prompts
        prompt, counts = list(row[start : start + prompt_tokens]), DraftCounts()
        for _ in generate_speculatively(loaded.model, prompt, tokens, loaded.tokenizer.end, counts):
            pass
        for key, value in vars(counts).items():
            setattr(total, key, getattr(total, key) + value)
    return total


@torch.no_grad()
def agreement(model: Transformer, row: torch.Tensor, length: int) -> float:
    """The share of positions of the text at which the module chooses what the main model chooses one position later."""
    assert model.mtp is not None and model.head is not None
    exchange, same, positions = LocalExchange(model.config.n_routed_experts), 0, 0
    for part_BS in windows(row, length):
        inputs_BS, next_BS = part_BS[:, :-1], part_BS[:, 1:]
        features_BSD = features_of(model, inputs_BS)
        x_BSD = model.mtp.enter(features_BSD, model.embed_next(next_BS))
        x_BSD, _ = model.mtp.block(x_BSD, model.positions(None, x_BSD, None), exchange)
        drafts_BS = model.head(model.mtp.norm(x_BSD)).argmax(-1)[:, :-1]
        chosen_BS = model.head(features_BSD).argmax(-1)[:, 1:]
        same += int((drafts_BS == chosen_BS).sum())
        positions += chosen_BS.numel()
    return same / positions


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.speculative",
        description="Tokens a step of speculative decoding on held-out text.",
        epilog="example: python -m benchmarks.speculative runs/mtp --data dualpipe/*.py",
    )
    parser.add_argument("model", type=Path, metavar="RUN|HF_DIR")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE", help="text that the model was not trained on"
    )
    parser.add_argument("--prompts", type=int, default=20, metavar="N", help="prompts (default 20)")
    parser.add_argument("--prompt-tokens", type=int, default=96, metavar="N", help="of each (default 96)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="generated after each (default 32)")
    parser.add_argument("--text-tokens", type=int, default=50_000, metavar="N", help="text compared (default 50000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    loaded = load_model(options.model)
    if loaded.model.mtp is None:
        parser.error(f"{loaded.source} must have a multi-token-prediction module")
    row = tokens_of([path.read_bytes() for path in options.data], loaded.tokenizer)[: options.text_tokens]
    counts = generated(loaded, row.tolist(), options.prompts, options.prompt_tokens, options.tokens)
    share = agreement(loaded.model, row, loaded.sequence_length)
    if options.json:
        print(
            json.dumps(
                {**vars(counts), "tokens_per_step": counts.tokens_per_step, "tokens_per_step_on_text": 1 + share}
            )
        )
        return
    accepted = f"{counts.acceptance_rate:.0%} of {counts.drafted} drafts accepted"
    print(f"model          {loaded.source}")
    print(f"generated      {counts.tokens_per_step:.2f} tokens a step, {accepted}, {options.prompts} prompts")
    print(f"on the text    {1 + share:.2f} tokens a step, {share:.0%} of {len(row):,} tokens")


if __name__ == "__main__":
    main()
