"""klbench against the machine: arithmetic over the matmul peak, bytes a decoded token over the memory bandwidth, memory of the scorer.

    python benchmarks/limit.py [--model DIR] [--rounds 5]

Arithmetic counts what the work needs and nothing else: 2 floating-point operations a weight and token read, 4 a pair of positions that
attend to one another and unit of width, a prompt read once for all its continuations, logits only where one is asked for, and twice as
much again for the gradient. The peak is the best of a few matrix products, measured in the same rounds. One thread is timed by CPU time,
two by the wall clock. Decoding one sequence reads all weights for each token; bandwidth is that of a matrix too large for the caches times
a vector, or of its sum, whichever is higher. The scorer's memory is that of fresh processes: the greatest resident size while scoring
above the resident size before it, weights and libraries being there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from _pairs import TINY, Goal, Shape, Spread, Table, Work, finish, in_turn, parser, ready, single_words, timer, words

WIDE: Final = Shape(layers=4, width=512, heads=8, inner=1408, vocabulary=8192)
LONG: Final = Shape(layers=8, width=1024, heads=16, inner=2816, vocabulary=8192)  # 110 M weights: no cache holds them
FEW, MANY = (4096, 16), (49152, 64)  # vocabulary, tokens


def needed(config: Any, prompts: int, length: int, draws: int, new: int) -> float:
    """Floating-point operations of log-probabilities of `draws` continuations of `new` tokens of each prompt of `length`."""
    width, head = config.hidden_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, shared = config.num_attention_heads * head, config.num_key_value_heads * head
    weights = config.num_hidden_layers * (2 * width * heads + 2 * width * shared + 3 * width * config.intermediate_size)
    read = length + draws * (new - 1)  # the last token is never read
    pairs = length * (length + 1) / 2 + draws * ((new - 1) * length + (new - 1) * new / 2)
    asked = 1 + draws * (new - 1)  # the prompt's last position speaks for the first token of all
    return prompts * (2 * read * weights + 4 * pairs * config.num_hidden_layers * heads + 2 * asked * width * config.vocab_size)


def products(sizes: Sequence[tuple[int, int, int]]) -> dict[tuple[int, int, int], Work]:
    import torch

    def product(m: int, k: int, n: int) -> Work:
        x, w = torch.randn(m, k), torch.randn(n, k)
        return lambda: torch.nn.functional.linear(x, w)

    return {size: product(*size) for size in sizes}


def given(tokenizer: Any, prompts: int, length: int, draws: int, new: int) -> tuple[list[str], Any, Any]:
    """Prompts as texts, continuations [P, K, T] and their mask."""
    import torch

    known, generator = torch.tensor(single_words(tokenizer)), torch.Generator().manual_seed(5)
    ids = known[torch.randint(len(known), (prompts, length), generator=generator)]
    tokens = known[torch.randint(len(known), (prompts, draws, new), generator=generator)]
    return tokenizer.batch_decode(ids), tokens, torch.ones_like(tokens, dtype=torch.bool)


def arithmetic(name: str, model: Any, tokenizer: Any, size: tuple[int, int, int, int], rounds: int) -> tuple[Table, dict[str, float]]:
    """Scoring, and forward with backward, on one thread and two; the share of the peak that each reaches."""
    import torch

    from klbench.policies.causal_lm import wrap

    texts, tokens, mask = given(tokenizer, *size)
    policy = wrap("subject", model, tokenizer)
    policy.model.requires_grad_(True)
    sizes = [(2048, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048)]
    counted = needed(model.config, *size)

    def scored() -> None:
        policy.log_prob(texts, tokens, mask)

    def learnt() -> None:
        (-policy.log_probs(texts, tokens).mean()).backward()
        policy.model.zero_grad(set_to_none=True)

    rows, shares = [], {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        bare = products(sizes)
        works: dict[str, Work] = {f"{m} x {k} x {n}": work for (m, k, n), work in bare.items()} | {"scoring": scored, "training": learnt}
        seconds = in_turn(works, rounds, timer(threads), warm=2)
        rates = {f"{m} x {k} x {n}": 2 * m * k * n / min(seconds[f"{m} x {k} x {n}"]) for m, k, n in sizes}
        peak = max(rates.values())
        for what, label, cost in (("scoring", "scoring", counted), ("training", "forward and backward", 3 * counted)):
            reached = Spread.of([cost / s / peak * 100 for s in seconds[what]])
            shares[f"{what}, {threads}"] = reached.median
            rate = cost / Spread.of(seconds[what]).median / 1e9
            rows.append(
                (f"{label}, {'one thread' if threads == 1 else 'two threads'}", f"{rate:.0f}", f"{peak / 1e9:.0f}", reached.text(0))
            )
    torch.set_num_threads(1)
    shape = f"{size[0]} prompts of {size[1]} tokens x {size[2]} continuations of {size[3]}"
    return Table(f"Arithmetic, fp32: {shape}; {name}", ("", "GFLOP/s", "peak, GFLOP/s", "% of the peak"), tuple(rows)), shares


def decoding(shape: Shape, rounds: int, new: int) -> Table:
    """Bytes that a token must read over the time it takes, beside the machine's bandwidth. One thread."""
    import torch

    from klbench.policies.causal_lm import settled

    model, tokenizer = shape.model(), words(shape.vocabulary)
    policy = settled("subject", model, tokenizer)
    texts, _, _ = given(tokenizer, 1, 8, 1, 1)
    matrix = torch.randn(8192, 8192)  # 256 MiB
    vector, weights = torch.randn(8192), sum(p.numel() for p in model.parameters())
    works: dict[str, Work] = {"product": lambda: matrix @ vector, "sum": matrix.sum}
    batches = (1, 4)
    for rows in batches:
        for tokens in (1, new + 1):
            works[f"{rows} {tokens}"] = lambda rows=rows, tokens=tokens: policy.sample(texts, rows, tokens, 0)
    seconds = in_turn(works, rounds, timer(1), warm=2)
    bandwidth = 4 * matrix.numel() / min(min(seconds["product"]), min(seconds["sum"]))
    lines = []
    for rows in batches:
        per_step = [(b - a) / new for a, b in zip(seconds[f"{rows} 1"], seconds[f"{rows} {new + 1}"], strict=True)]
        cached = 2 * 4 * shape.layers * shape.width * rows * (8 + new / 2)  # keys and values of what is read already, on average
        moved = 4 * weights + cached
        share = Spread.of([100 * moved / s / bandwidth for s in per_step])
        rate = moved / Spread.of(per_step).median / 1e9
        lines.append(
            (
                f"{rows} sequence{'s' if rows > 1 else ''}",
                f"{moved / rows / 1e6:.0f}",
                f"{rate:.1f}",
                f"{bandwidth / 1e9:.1f}",
                share.text(0),
            )
        )
    title = f"Decoding, one thread, fp32: {shape.text()}"
    return Table(title, ("", "MB a token", "GB/s", "bandwidth, GB/s", "% of the bandwidth"), tuple(lines))


def resident(key: str) -> int:
    """A size of this process in KiB, as /proc/self/status has it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def peak_of_scoring(vocabulary: int, new: int, prompts: int, draws: int, tiny: bool) -> dict[str, float]:
    """In this process: MiB at the peak of scoring above what was resident before it, and MiB of weights."""
    import torch

    from klbench.policies.causal_lm import wrap

    torch.set_num_threads(1)
    shape = replace(TINY if tiny else Shape(), vocabulary=vocabulary)
    model, tokenizer = shape.model(), words(vocabulary)
    policy = wrap("subject", model, tokenizer)
    texts, tokens, mask = given(tokenizer, prompts, 8, draws, new)
    policy.log_prob(texts[:1], tokens[:1, :2, :2], mask[:1, :2, :2])  # libraries load what they load at a first call
    before, reset = resident("VmRSS"), False
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        reset = resident("VmHWM") <= before * 1.01
    except OSError:
        pass
    policy.log_prob(texts, tokens, mask)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"above": (resident("VmHWM") - before) / 1024, "weights": weights / 2**20, "exact": float(reset)}


def memory(args: argparse.Namespace) -> tuple[Table, float]:
    """The table, and by how many per cent the greater case needs more than the smaller one. Raises SystemExit where a child fails."""
    found: list[Spread] = []
    rows = []
    few, many = ((64, 4), (256, 8)) if args.tiny else (FEW, MANY)
    for vocabulary, new in (few, many):
        each = []
        for _ in range(args.rounds):
            command = [sys.executable, __file__, "--scorer", f"{vocabulary} {new} 16 8 {int(args.tiny)}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"MALLOC_ARENA_MAX": "2"})
            if done.returncode:
                raise SystemExit(done.stderr)
            each.append(json.loads(done.stdout))
        above = Spread.of([e["above"] for e in each])
        found.append(above)
        rows.append((f"{vocabulary:,} words, {new} tokens", f"{each[0]['weights']:.0f}", above.text(0)))
    growth = 100 * (found[1].median / found[0].median - 1)
    title = "Memory of the scorer, 16 prompts x 8 continuations, small model"
    return Table(title, ("", "weights, MiB", "peak above them, MiB"), tuple(rows)), growth


def main(words_: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--scorer", help=argparse.SUPPRESS)  # what a child process measures
    args = made.parse_args(words_)
    if args.threads != 1:
        made.error("--threads: one and two are measured in any case")
    if args.scorer:
        print(json.dumps(peak_of_scoring(*(int(x) for x in args.scorer.split()[:4]), tiny=args.scorer.endswith("1"))))
        return
    os.environ["OMP_NUM_THREADS"] = "2"
    ready(args)
    start = time.perf_counter()
    tables, goals = [], []
    shapes = {"small": Shape(), "wide": WIDE} if not args.tiny else {"tiny": TINY}
    size = (2, 4, 2, 3) if args.tiny else (8, 32, 8, 32)
    for name, shape in shapes.items():
        table, shares = arithmetic(shape.text(), shape.model(), words(shape.vocabulary), size, args.rounds)
        tables.append(table)
        if name == "wide":
            for key, least in (("scoring, 1", 65), ("training, 1", 65), ("scoring, 2", 50), ("training, 2", 50)):
                what, threads = key.split(", ")
                goals.append(
                    Goal(
                        f"{what} on {threads} thread{'s' if threads == '2' else ''}, share of the matmul peak",
                        "at least",
                        least,
                        shares[key],
                        " %",
                    )
                )
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
        table, _ = arithmetic(args.model.name, model, AutoTokenizer.from_pretrained(args.model), (4, 32, 8, 16), args.rounds)
        tables.append(table)
    tables.append(decoding(TINY if args.tiny else LONG, args.rounds, 4 if args.tiny else 16))
    table, growth = memory(args)
    tables.append(table)
    if not args.tiny:
        goals.append(Goal("scorer's peak above the weights, 49 k x 64 over 4 k x 16", "at most", 10, growth, " % more"))
    finish(args, tables, goals, [f"took {time.perf_counter() - start:.0f} s"] if args.tiny else [])


if __name__ == "__main__":
    main()
