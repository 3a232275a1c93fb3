"""The distinct prefixes of continuations: what begins alike is read once.

Draws of one prompt share much: all of them the empty prefix, and a policy that knows what it wants most of the rest. `Prefixes` finds the
prefixes that are followed by a token, once each, as trees; `pieces` hands them out in batches of rows, a row being a prompt and some of
its tree, side by side. What a model says of a prefix then goes to every draw that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WIDE: Final = 192  # nodes of a row: more make its attention, which is quadratic, the dearest part; fewer read the prompt too often

Ints = NDArray[np.int64]


@final
@dataclass(frozen=True)
class Piece:
    """B rows, each a prompt and n nodes at most beside it; R nodes in all, the roots (empty prefixes) included.

    prompt [B]                  of each row
    token, parent, depth [B, n] of each node that is no root: its last token, the column of the node before it (-1: the root), its length
    there [B, n]                False behind a row's last node
    nodes [R]                   places of the nodes among [B, 1 + n], roots first in each row
    place, node, next [M]       a token of the draws: where it stands in [P K T], the node before it among R, and which it is; by node
    """

    prompt: Ints
    token: Tensor
    parent: Tensor
    depth: Tensor
    there: Tensor
    nodes: Tensor
    place: Tensor
    node: Tensor
    next: Tensor

    def path(self, row: int) -> tuple[list[int], list[int]]:
        """A row's last prefix: its tokens, and the nodes along it among R, the root first."""
        at = int(self.there[row].sum()) - 1
        width, tokens, columns = self.there.shape[1] + 1, [], [0]
        while at >= 0:
            tokens.append(int(self.token[row, at]))
            columns.insert(1, at + 1)
            at = int(self.parent[row, at])
        where = {int(place): i for i, place in enumerate(self.nodes.tolist())}
        return tokens[::-1], [where[row * width + column] for column in columns]

    @property
    def deepest(self) -> int:
        """Length of the longest prefix."""
        return int(self.depth.max()) if self.depth.shape[1] else 0

    def sees(self) -> Tensor:
        """[B, n, n] whether a node (first index) has another, or itself, on its path."""
        rows, n = self.there.shape
        out = torch.eye(n, dtype=torch.bool).repeat(rows, 1, 1)
        for depth in range(2, self.deepest + 1):
            row, column = ((self.depth == depth) & self.there).nonzero(as_tuple=True)
            out[row, column] |= out[row, self.parent[row, column]]
        return out


@final
@dataclass(frozen=True)
class Prefixes:
    """Trees of the prefixes in continuations [P, K, T].

    row, token, parent, depth [N] of each node, those of a row together and in the order of a walk; a root has parent -1, depth 0.
    prompt [B] of each row.  node [P K T]: the prefix before each token, -1 where the mask is False.
    """

    row: Ints
    token: Ints
    parent: Ints
    depth: Ints
    prompt: Ints
    node: Ints
    said: Ints

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor | None = None, wide: int = WIDE) -> Prefixes:
        """Of tokens [P, K, T] under a mask that is False from some place on. wide: nodes of a row, about."""
        P, K, T = tokens.shape
        said = tokens.reshape(P * K, T).cpu().numpy()
        order = np.arange(T)
        asked = np.ones((P * K, T), bool) if mask is None else mask.reshape(P * K, T).cpu().numpy()
        length = np.where(asked, order + 1, 0).max(1, initial=0)
        # a path: the tokens that are read, all but a draw's last; -1 behind it sorts a path before those that go on from it
        read = np.where(order[: T - 1] < length[:, None] - 1, said[:, : max(T - 1, 0)], -1)
        paths, which = np.unique(np.column_stack([np.arange(P).repeat(K), read]), axis=0, return_inverse=True)
        prompt, path = paths[:, 0], paths[:, 1:]
        first = np.searchsorted(prompt, np.arange(P + 1))
        nodes = np.bincount(prompt, (path >= 0).sum(1), minlength=P)  # no fewer than there are: what is shared counts for each
        rows = np.maximum(1, np.ceil(nodes / wide)).astype(np.int64)
        many = -(-np.diff(first) // rows)  # paths of a row, as even as can be
        group = np.column_stack([prompt, (np.arange(len(prompt)) - first[prompt]) // np.maximum(many, 1)[prompt]])
        opens = np.ones(len(path), bool)
        opens[1:] = (group[1:] != group[:-1]).any(1)
        alike = np.zeros((len(path), T), bool)  # begins as the path before it, up to a node of this depth
        if T and len(path):
            alike[1:, 0] = ~opens[1:]
            alike[1:, 1:] = ~opens[1:, None] & np.logical_and.accumulate(path[1:] == path[:-1], axis=1)
        real = np.column_stack([np.ones(len(path), bool), path >= 0])[:, :T]
        new = real & ~alike
        number = np.where(new, new.reshape(-1).cumsum().reshape(new.shape) - 1, -1)
        at = np.where(real, np.maximum.accumulate(number, axis=0), -1) if len(path) else number
        i, t = new.nonzero()
        node = np.where(order < length[:, None], at[which.reshape(-1)], -1)
        row = opens.cumsum() - 1
        before = np.maximum(t - 1, 0)
        return cls(
            row=row[i],
            token=np.where(t > 0, path[i, before] if T > 1 else 0, 0),
            parent=np.where(t > 0, at[i, before], -1),
            depth=t,
            prompt=prompt[opens],
            node=node.reshape(-1),
            said=said.reshape(-1),
        )

    def pieces(self, lengths: Sequence[int], most: int) -> Iterator[Piece]:
        """All nodes and all tokens once, rows of like size together. lengths [P] of the prompts; most: positions of a piece, about."""
        rows = len(self.prompt)
        begin = np.searchsorted(self.row, np.arange(rows + 1))
        size = np.diff(begin) - 1
        long = np.asarray(lengths, dtype=np.int64)[self.prompt]
        order = np.lexsort((size, long))
        piece, number, columns = np.zeros(rows, np.int64), 0, 0
        taken: list[int] = []
        batches: list[list[int]] = []
        for b in order:
            wider = max(columns, int(long[b] + size[b]))
            if taken and wider * (len(taken) + 1) > most:
                batches.append(taken)
                taken, number, wider = [], number + 1, int(long[b] + size[b])
            columns, piece[b] = wider, number
            taken.append(int(b))
        batches.append(taken)
        of_token = np.where(self.node >= 0, piece[self.row[self.node]], -1)
        place = np.lexsort((self.node, of_token))
        bounds = np.searchsorted(of_token[place], np.arange(len(batches) + 1))
        local = np.zeros(len(self.row), np.int64)
        for k, some in enumerate(batches):
            if not some:
                continue
            n = int(size[some].max())
            inside = np.arange(1 + n) <= size[some][:, None]  # roots and nodes of each row
            flat = (begin[some][:, None] + np.arange(1 + n))[inside]
            local[flat] = np.arange(len(flat))
            shape, there = (len(some), n), inside[:, 1:]
            token, parent, depth = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, np.int64)
            inner = flat[self.depth[flat] > 0]
            token[there], depth[there] = self.token[inner], self.depth[inner]
            parent[there] = self.parent[inner] - begin[self.row[inner]] - 1
            here = place[bounds[k] : bounds[k + 1]]
            here = here[np.argsort(local[self.node[here]], kind="stable")]
            tensors = (token, parent, depth, there, inside.reshape(-1).nonzero()[0], here, local[self.node[here]], self.said[here])
            yield Piece(self.prompt[some], *map(torch.from_numpy, tensors))
