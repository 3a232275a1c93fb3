"""Drawing continuations: klbench's sampler against `generate` of transformers, the same rows, lengths, law and threads.

    python benchmarks/sampling.py [--threads 2] [--model DIR] [--batches 64 256] [--rounds 5]

A batch is of prompts with `samples` draws each, at temperature 1 with nothing truncated. klbench also gives the log-probability of each
token, which `generate` does not. Both stop a sequence at EOS, which a random model draws once in as many tokens as it has words.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from _pairs import Goal, Spread, Table, Work, finish, in_turn, parser, ready, single_words, subject, timer, times_as_fast

PEER, OURS = "generate", "klbench"


def works_of(model: Any, tokenizer: Any, ids: Any, samples: int, new: int) -> dict[str, Work]:
    """A call of each on prompts `ids` [P, L]."""
    import torch

    from klbench.policies.causal_lm import settled

    texts = tokenizer.batch_decode(ids)
    policy = settled("subject", model, tokenizer)
    if [policy.encode(text) for text in texts] != ids.tolist():
        raise SystemExit("the prompts are not read as they were written: not the same work")
    rows = ids.repeat_interleave(samples, 0)
    seeds = iter(range(10**9))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def generated() -> None:
        with torch.no_grad():
            model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=pad,
            )  # fmt: skip

    return {PEER: generated, OURS: lambda: policy.sample(texts, samples, new, next(seeds))}


def cells(taken: dict[str, list[float]], name: str, tokens: int) -> str:
    return f"{tokens / Spread.of(taken[name]).median:,.0f}"


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--batches", type=int, nargs="+", help="rows in flight  [default: 64 256; with --model 64]")
    made.add_argument("--samples", type=int, default=8, help="draws a prompt  [default: 8]")
    made.add_argument("--new", type=int, default=16, help="tokens a draw  [default: 16]")
    made.add_argument("--length", type=int, default=8, help="tokens of a prompt  [default: 8]")
    args = made.parse_args(words)
    batches = args.batches or ([16] if args.tiny else [64] if args.model else [64, 256])
    if min(batches) < args.samples:
        made.error(f"--batches: at least the {args.samples} draws of one prompt")
    ready(args)
    import torch

    model, tokenizer, called = subject(args)
    models = {"fp32": model, "bf16": copy.deepcopy(model).to(torch.bfloat16)}
    known = torch.tensor(single_words(tokenizer))
    rows, goals = [], []
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        ids = known[torch.randint(len(known), (batch // args.samples, args.length), generator=generator)]
        works = {
            f"{kind} {name}": work
            for kind, made_of in models.items()
            for name, work in works_of(made_of, tokenizer, ids, args.samples, args.new).items()
        }
        seconds = in_turn(works, args.rounds, timer(args.threads))
        tokens = len(ids) * args.samples * args.new
        for kind in models:
            ours, peer = f"{kind} {OURS}", f"{kind} {PEER}"
            gain = times_as_fast(seconds, ours, peer)
            rows.append(
                (f"{len(ids) * args.samples} rows, {kind}", cells(seconds, peer, tokens), cells(seconds, ours, tokens), gain.text())
            )
            if kind == "fp32" and batch == 64:
                goals.append(
                    Goal("fp32 at batch 64 over generate, tokens per second", "at least", 1.7 if args.model else 2.3, gain.median, " times")
                )
    title = f"Drawing {args.new} tokens, prompts of {args.length} with {args.samples} draws each; {called}"
    finish(args, [Table(title, ("", "generate, tokens/s", "klbench, tokens/s", "times generate"), tuple(rows))], goals)


if __name__ == "__main__":
    main()
