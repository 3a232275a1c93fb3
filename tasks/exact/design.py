"""The reward of exact/design: a sequence has to be feasible, and is worth as much as it holds of every motif.

    r(x) = feasible(x) prod_m share_m(x)       feasible: no word is followed by one of those that BANNED has for it
    share_m(x) = the largest share, over places i, of a motif's words that stand there: x_i = first, x_(i+2) = second; 0 without a place

Two motifs of two words, so that a share is 0, 1/2 or 1 and r is 0, 1/4, 1/2 or 1. The motifs only fit into four words interleaved, in two
orders, one of which is infeasible. The prior has seen neither rule. In the manner of the closed-form test functions of Stanton et al. 2024,
arXiv:2407.00236, on which Chen et al. 2024, arXiv:2410.22296, set language models to design sequences.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

BANNED: Final = {
    "sun": ("rain", "cold"),
    "warm": ("sun",),
    "calm": ("fog",),
    "fog": ("warm",),
    "rain": ("snow",),
    "wind": ("wind",),
    "snow": ("rain",),
    "cold": ("sun",),
}
MOTIFS: Final = (("rain", "warm"), ("sun", "wind"))
GAP: Final = 2  # places from a motif's first word to its second


def feasible(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """1 where no two neighbours are banned: the held-out reward of the design."""
    words = [c.split() for c in completions]
    return [float(not any(b in BANNED.get(a, ()) for a, b in pairwise(w))) for w in words]


def share(words: list[str], motif: tuple[str, str]) -> float:
    """The largest share of the motif that stands at one place."""
    return max((((a == motif[0]) + (b == motif[1])) / 2 for a, b in zip(words, words[GAP:], strict=False)), default=0.0)


def design(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """Product of the motifs' shares, in quarters, 0 for what is infeasible."""
    first, second = ([share(c.split(), motif) for c in completions] for motif in MOTIFS)
    return [f * a * b for f, a, b in zip(feasible(prompts, completions), first, second, strict=True)]
