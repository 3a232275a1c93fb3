"""How time grows: with batch, length and vocabulary in one pass, with policies and prompts in klbench.score, with records on a board.

    python benchmarks/growth.py [--full] [--rounds 5]

CPU time on one thread, children included. A point is measured `rounds` times, or as often as 20 s of it allow, at least once; all points of
a curve in turn. The exponent is the slope of log time over log size by least squares; "at the end" is that between the last two sizes,
where fixed costs weigh least. Models are tiny where the point is the growth. --full goes to 100,000 prompts, which takes ten minutes more.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, final

import numpy as np
from _pairs import TINY, Goal, Shape, Spread, Table, exponent, finish, parser, ready, words

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = "leaderboards/quick/records/bias-rloo-b1-s0-*.json"
PATIENCE: Final = 20.0  # seconds a point
NARROW: Final = Shape(layers=2, width=64, heads=4, inner=128, vocabulary=1024)


@final
@dataclass(frozen=True)
class Curve:
    """What grows, its sizes, and what makes the work of a size. most: exponent that was asked for, None where none was."""

    what: str
    sizes: tuple[int, ...]
    work: Callable[[int], Callable[[], object]]
    most: float | None = None


def processor() -> float:
    """User and system seconds of this process and of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in both)


def taken(curve: Curve, rounds: int) -> dict[int, list[float]]:
    """Seconds by size."""
    works = {size: curve.work(size) for size in curve.sizes}
    works[curve.sizes[0]]()  # what a first call loads
    seconds: dict[int, list[float]] = {size: [] for size in works}
    for _ in range(rounds):
        for size, work in works.items():
            spent = seconds[size]
            if not spent or sum(spent) + spent[-1] <= PATIENCE:
                start = processor()
                work()
                spent.append(processor() - start)
    return seconds


def scoring(shape: Shape, prompts: int, draws: int, new: int, length: int = 8) -> Callable[[], object]:
    """Log-probabilities of random continuations under a random model."""
    import torch

    from klbench.policies.causal_lm import wrap

    tokenizer = words(shape.vocabulary)
    policy = wrap("subject", shape.model(), tokenizer)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, shape.vocabulary, (prompts, length), generator=generator)
    tokens = torch.randint(4, shape.vocabulary, (prompts, draws, new), generator=generator)
    texts, mask = tokenizer.batch_decode(ids), torch.ones_like(tokens, dtype=torch.bool)
    return lambda: policy.log_prob(texts, tokens, mask)


def shortness(prompts: list[str], completions: list[str], **ignored: object) -> list[float]:
    return [max(0.0, 1.0 - len(text) / 40) for text in completions]


def scored(prompts: int, policies: int) -> Callable[[], object]:
    """`klbench.score` of tiny random models: draws, bank, pool and every column."""
    import klbench

    tokenizer, most = words(TINY.vocabulary), TINY.vocabulary - 4
    texts = [" ".join(f"w{4 + (i // most**k) % most}" for k in range(3)) for i in range(prompts)]
    models = {f"policy{i}": TINY.model(i + 1) for i in range(policies)}
    return lambda: klbench.score(
        prior=TINY.model(), policies=models, prompts=texts, reward=shortness, beta=0.5, reward_max=1.0, max_new_tokens=4, samples=16,
        tokenizer=tokenizer,
    )  # fmt: skip


def board(folder: Path, records: int) -> Callable[[], object]:
    """`klbench leaderboard build` of varied copies of one published record: 10 methods at 5 seeds a table."""
    from klbench.page import site
    from klbench.record import Record

    (path,) = ROOT.glob(MODEL)
    kept = Record.model_validate_json(path.read_bytes())
    rng, here = np.random.default_rng(0), folder / str(records)
    (here / "records").mkdir(parents=True)
    for number in range(records):
        table, row = divmod(number, 50)
        run = kept.run.model_copy(update={"method": f"method_{row // 5}", "seed": row % 5, "task": f"family_{table}/variant"})
        free = [x + float(rng.normal(0, 0.2)) for x in kept.prompts["free"]]
        record = kept.model_copy(update={"run": run, "prompts": {**kept.prompts, "free": free}})
        (here / "records" / f"{run.id}.json").write_text(record.to_json(), encoding="utf-8")
    return lambda: site.build(here)


def curves(tiny: bool, full: bool, scratch: Path) -> list[Curve]:
    sizes = lambda *all_: all_[:2] if tiny else all_  # noqa: E731
    small = TINY if tiny else NARROW
    return [
        Curve("continuations scored", sizes(16, 64, 256, 1024, 4096), lambda n: scoring(small, n // 16, 16, 16)),
        Curve("tokens of a continuation", sizes(8, 16, 32, 64, 128, 256), lambda n: scoring(small, 4, 8, n)),
        Curve("words of the vocabulary", sizes(1024, 4096, 16384, 65536), lambda n: scoring(replace(small, vocabulary=n), 8, 8, 8)),
        Curve("policies on a board", sizes(1, 3, 10, 30, 100), lambda n: scored(4, n), most=1.1),
        Curve("prompts", sizes(10, 100, 1000, 10_000, *([100_000] if full else [])), lambda n: scored(n, 1), most=1.1),
        Curve("records on a board", sizes(10, 100, 1000, 10_000), lambda n: board(scratch, n), most=1.1),
    ]


def rows_of(curve: Curve, seconds: dict[int, list[float]]) -> tuple[tuple[str, ...], float]:
    """The curve's line of the table, and its exponent at the end."""
    sizes = list(seconds)
    middle = [Spread.of(seconds[size]).median for size in sizes]
    last = exponent(sizes[-2:], middle[-2:])
    points = ", ".join(f"{size:,}: {s:.3g}" for size, s in zip(sizes, middle, strict=True))
    return (curve.what, points, f"{exponent(sizes, middle):.2f}", f"{last:.2f}", f"{min(map(len, seconds.values()))}"), last


def main(words_: Sequence[str] | None = None) -> None:
    made = parser(__doc__, model=False)
    made.add_argument("--full", action="store_true", help="to 100,000 prompts")
    made.add_argument("--only", nargs="+", metavar="WORD", help="curves whose name begins so")
    args = made.parse_args(words_)
    ready(args)
    rows: list[tuple[str, ...]] = []
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as scratch:
        for curve in curves(args.tiny, args.full, Path(scratch)):
            if args.only and not curve.what.startswith(tuple(args.only)):
                continue
            line, last = rows_of(curve, taken(curve, args.rounds))
            rows.append(line)
            if curve.most is not None and not args.tiny:
                goals.append(Goal(f"{curve.what}: exponent at the end", "at most", curve.most, last))
    columns = ("", "seconds by size", "exponent", "at the end", "times, at least")
    finish(args, [Table("How time grows", columns, tuple(rows))], goals)


if __name__ == "__main__":
    main()
