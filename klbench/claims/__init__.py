"""The literature's statements rerun: 48 claims and 12 that need a qualifier, each an experiment with a verdict (OBJECTIVES.md C and F).

`run` measures them, in worker processes; what comes out is a `Result`, which `klbench.claims.report` shows, writes and turns into a page.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from klbench import executors
from klbench.claims.contract import CLAIMS, Claim, Verdict
from klbench.errors import UserError, unknown

TIERS: Final = ("exact", "quick")
NOT_EXPERIMENTS: Final = ("contract", "toys", "report")


def catalogue(tier: str = "exact") -> dict[str, Claim]:
    """Every claim of a tier by id, C01 to C48, then F01 to F12."""
    for module in pkgutil.iter_modules(__path__):
        if module.name not in NOT_EXPERIMENTS:
            importlib.import_module(f"klbench.claims.{module.name}")
    return {i: claim for (at, i), claim in sorted(CLAIMS.items()) if at == tier}


def chosen(ids: Sequence[str], tier: str) -> list[Claim]:
    """Claims of a tier, all or those named. Raises UserError with the nearest id."""
    if tier not in TIERS:
        raise unknown("tier", tier, TIERS)
    every = catalogue(tier)
    for i in ids:
        if i.upper() not in every:
            raise unknown(f"claim of the {tier} tier", i, every)
    wanted = {i.upper() for i in ids}
    return [c for i, c in every.items() if not ids or i in wanted]


@dataclass(frozen=True)
class Part:
    """One claim as a piece of work. `id` is the claim's."""

    id: str
    tier: str


def work(part: Part, report: Callable[[dict[str, Any]], None]) -> None:
    """One claim in a worker: its verdict, and the verdict with the wrong ingredient."""
    claim = catalogue(part.tier)[part.id]
    report({"phase": "verdict", "right": _plain(claim.run()), "wrong": claim.run(wrong=True).verdict})


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {"verdict": verdict.verdict, "checks": [vars(check) for check in verdict.checks]}


@dataclass(frozen=True)
class Line:
    """A claim as it came out. with_wrong: the verdict with the wrong ingredient."""

    claim: Claim
    verdict: Verdict
    with_wrong: str

    @property
    def sound(self) -> bool:
        """The expected verdict, and not with the wrong ingredient."""
        return self.verdict.as_expected and self.with_wrong != ("fails" if self.claim.refutes else "holds")


def run(
    ids: Iterable[str] = (),
    tier: str = "exact",
    workers: int | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> list[Line]:
    """The verdicts, in order of id. workers 0: in this process. Raises UserError for an unknown id and where an experiment breaks."""
    from klbench.claims.contract import Check

    claims = chosen(list(ids), tier)
    found: dict[str, dict[str, Any]] = {}

    def listen(event: dict[str, Any]) -> None:
        if event["phase"] == "verdict":
            found[event["run"]] = event
        else:
            on_event(event)

    parts = [Part(c.id, tier) for c in claims]
    listen({"phase": "plan", "cells": len(parts), "kept": 0})
    if workers == 0:
        for part in parts:
            listen({"phase": "start", "run": part.id})
            work(part, lambda event, name=part.id: listen({"run": name, **event}))  # type: ignore[misc]
            listen({"phase": "done", "run": part.id})
    else:
        failures = executors.load("local")(parts, work, workers or os.cpu_count() or 1, listen)
        if failures:
            raise UserError(f"{len(failures)} of {len(parts)} experiments broke; {failures[0].id}: {failures[0].reason}")
    lines = []
    for claim in claims:
        right = found[claim.id]["right"]
        verdict = Verdict(claim, tuple(Check(**check) for check in right["checks"]), right["verdict"])
        lines.append(Line(claim, verdict, found[claim.id]["wrong"]))
    return lines
