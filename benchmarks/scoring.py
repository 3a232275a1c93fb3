"""Log-likelihoods of many continuations of shared prompts: klbench's scorer against lm-eval's HFLM, and how far their values are apart.

    python benchmarks/scoring.py [--threads 2] [--model DIR] [--rounds 5]

lm-eval is asked through `loglikelihood`, on texts. klbench is measured from texts too, and from ids, as it scores what it drew. In fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from _pairs import Goal, compared, finish, in_turn, parser, ready, single_words, subject, timer, times_as_fast

PEER, TEXTS, IDS = "lm-eval HFLM", "klbench, from texts", "klbench, from ids"


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--prompts", type=int, help="[default: 32; with --model 8]")
    made.add_argument("--continuations", type=int, default=16, help="of each prompt  [default: 16]")
    made.add_argument("--new", type=int, default=12, help="tokens of a continuation  [default: 12]")
    made.add_argument("--length", type=int, default=24, help="tokens of a prompt  [default: 24]")
    made.add_argument("--batch", type=int, default=64, help="rows in a batch of lm-eval  [default: 64]")
    args = made.parse_args(words)
    args.prompts = args.prompts or (2 if args.tiny else 8 if args.model else 32)
    ready(args)
    logging.disable(logging.WARNING)  # lm-eval says how many cores it found, and the like
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from klbench.policies.causal_lm import wrap

    model, tokenizer, called = subject(args)
    policy = wrap("subject", model, tokenizer)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
    known, generator = torch.tensor(single_words(tokenizer)), torch.Generator().manual_seed(3)
    draw = lambda *shape: known[torch.randint(len(known), shape, generator=generator)]  # noqa: E731
    prompts = tokenizer.batch_decode(draw(args.prompts, args.length))
    tokens = draw(args.prompts, args.continuations, args.new)
    gap = " " if tokenizer.decode(tokens[0, 0])[:1] != " " else ""
    texts = [[gap + tokenizer.decode(row) for row in rows] for rows in tokens]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=(prompt, text), idx=0)
        for prompt, row in zip(prompts, texts, strict=True)
        for text in row
    ]
    said: dict[str, Any] = {}

    def theirs() -> None:
        said[PEER] = torch.tensor([value for value, _ in peer.loglikelihood(asked, disable_tqdm=True)], dtype=torch.float64)

    def from_texts() -> None:
        said[TEXTS] = policy.log_prob(prompts, *policy.spelled(prompts, texts)).double().sum(2).flatten()

    def from_ids() -> None:
        said[IDS] = policy.log_prob(prompts, tokens, mask).double().sum(2).flatten()

    seconds = in_turn({PEER: theirs, TEXTS: from_texts, IDS: from_ids}, args.rounds, timer(args.threads))
    apart = {name: float((values - said[PEER]).abs().max()) for name, values in said.items() if name != PEER}
    shape = f"{args.prompts} prompts of {args.length} tokens x {args.continuations} continuations of {args.new}; {called}"
    table = compared(f"Log-likelihoods: {shape}", seconds, PEER, tokens.numel(), "tokens")
    least = 2.8 if args.model else 3.2
    goals = [Goal("largest difference from lm-eval's log-likelihoods", "at most", 1e-4, max(apart.values()), " nats")]
    if not args.tiny:
        gain = times_as_fast(seconds, IDS, PEER).median
        goals.append(Goal("over lm-eval's HFLM on shared prompts, tokens per second", "at least", least, gain, " times"))
    finish(args, [table], goals, [f"largest difference from lm-eval, {name}: {value:.1e} nats" for name, value in apart.items()])


if __name__ == "__main__":
    main()
