"""Writes docs/methods/: a page for each objective and sampler, from its docstring, its class and the published boards.

python docs/make_methods.py          (tests/test_method_pages.py holds that the pages are what this writes)
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from klbench import method

ROOT: Final = Path(__file__).parents[1]
OUT: Final = ROOT / "docs" / "methods"
BOARDS: Final = ("methods", "quick_all")  # quick_all: `klbench run quick --objective all`
SHORT: Final = 6  # points of a training curve that a page shows

# OBJECTIVES.md section B: the files that carry each entry, or why none does.
ENTRIES: Final[dict[str, tuple[str, tuple[str, ...], str]]] = {
    "B1.1": ("Filtered SFT, rejection-sampling fine-tuning", ("sft",), ""),
    "B1.2": ("Conditional training", ("conditional_training",), ""),
    "B1.3": ("Reward-weighted regression", ("rwr",), ""),
    "B2.1": ("REINFORCE without KL", ("reinforce",), ""),
    "B2.2": ("KL-regularised RL", ("kl_rl",), ""),
    "B2.3": ("KL estimators in the loss", ("kl_in_loss",), ""),
    "B2.4": ("Rao-Blackwellised KL gradient", ("rb_kl",), ""),
    "B2.5": ("PPO clip", ("ppo",), ""),
    "B2.6": ("Actor-critic with GAE", ("actor_critic",), ""),
    "B2.7": ("RLOO", ("rloo",), ""),
    "B2.8": ("GRPO", ("grpo",), ""),
    "B2.9": ("Dr. GRPO", ("dr_grpo",), ""),
    "B2.10": ("GRPO-Guard", ("grpo_guard",), ""),
    "B2.11": ("BNPO", ("bnpo",), ""),
    "B2.12": ("D3S down-sampling", ("d3s",), ""),
    "B2.13": ("Reward dropout", ("reward_dropout",), ""),
    "B2.14": ("Entropy-regularised policy optimisation", ("epo",), ""),
    "B2.15": ("Several rewards", (), "one reward made of several, as any other: klbench/rewards/several.py, task `combined`"),
    "B2.16": ("Policy internalisation, context distillation", (), "a reward, log p0(x|c, text) - log p0(x|c): klbench/rewards/several.py"),
    "B2.17": ("NFT", ("nft",), ""),
    "B2.18": ("TOPR", ("topr",), ""),
    "B2.19": ("Hybrid data", ("hnpg",), ""),
    "B2.20": ("OREAL", ("oreal",), ""),
    "B3.1": ("DPG, CDPG, GDC", ("dpg",), ""),
    "B3.2": ("f-DPG", ("fdpg",), ""),
    "B3.3": ("Trajectory balance, VarGrad", ("trajectory_balance", "vargrad"), ""),
    "B4.1": ("DPO", ("dpo",), ""),
    "B4.2": ("IPO", ("ipo",), ""),
    "B4.3": ("Conservative and robust DPO", ("robust_dpo",), ""),
    "B4.4": ("KTO", ("kto",), ""),
    "B4.5": ("EXO", ("exo",), ""),
    "B4.6": ("RPO", ("rpo",), ""),
    "B4.7": ("f-regularised RL", ("chi2_rl",), ""),
    "B4.8": ("Pairwise reward regression", ("rebel",), ""),
    "B4.9": ("INPO", ("inpo",), ""),
    "B4.10": ("Token-level DPO", ("token_dpo",), ""),
    "B4.11": ("Implicit process rewards", ("implicit_prm",), ""),
    "B4.12": ("Differential information", ("did",), ""),
    "B5.1": ("Unlikelihood", ("unlikelihood",), ""),
    "B5.2": ("NPO", ("npo",), ""),
    "B5.3": ("D2O", ("d2o",), ""),
    "B5.4": ("Targeted negative training", (), "it is told which token of an answer is at fault; a reward here judges whole answers"),
}  # fmt: skip


def boards() -> dict[str, dict[str, Any]]:
    """The published boards, by suite."""
    found = {}
    for suite in BOARDS:
        path = ROOT / "leaderboards" / suite / "board.json"
        if path.is_file():
            found[suite] = json.loads(path.read_text(encoding="utf-8"))
    return found


def figure(estimate: dict[str, Any] | None) -> str:
    """`0.021 (0.019 to 0.024)`, with the status where it is not certified."""
    if estimate is None or estimate["value"] is None:
        return "–"
    value, low, high = (None if estimate[k] is None else float(estimate[k]) for k in ("value", "low", "high"))
    assert value is not None
    text = "∞" if math.isinf(value) else f"{value:.3f}"
    if low is not None and high is not None and not math.isinf(value) and estimate["status"] != "exact":
        text += f" ({low:.3f} to {high:.3f})"
    return text + ("" if estimate["status"] == "certified" else f", {estimate['status']}")


def standing(name: str, every: dict[str, dict[str, Any]]) -> list[str]:
    """Where a method stands, a line a board and task; and its learning curves."""
    lines = []
    for suite, board in every.items():
        for table in board["tables"]:
            rows = [(m, f"{len(m['seeds'])} seeds") for m in table.get("methods", []) if m["method"] == name]
            rows = rows or [(r, f"seed {r['seed']}") for r in table["rows"] if r["method"].partition(":")[0] == name][:1]
            for found, who in rows:
                rank = "–" if found["rank"] is None else "–".join(map(str, dict.fromkeys(found["rank"])))
                columns = found["columns"]
                cells = [figure(columns.get(c)) for c in ("reverse_kl", "own_kl", "wasted_nats", "kl_prior")]
                lines.append(f"| {suite}, {table['task']} (β {table['beta']:g}) | {who} | {rank} | {' | '.join(cells)} |")
    if not lines:
        return ["On no published board."]
    head = ["| board | of | rank | reverse_kl | own_kl | wasted_nats | kl_prior |", "|---|---|---|---|---|---|---|"]
    return [*head, *lines]


def learning(name: str, every: dict[str, dict[str, Any]]) -> list[str]:
    out = []
    for suite, board in every.items():
        for table in board["tables"]:
            for found in table.get("methods", []):
                if found["method"] == name and found["curve"]:
                    out += [f"{suite}, {table['task']}, mean of {len(found['seeds'])} seeds:", ""]
                    out.append("| draws | " + " | ".join(f"{point[0]:,.0f}" for point in found["curve"]) + " |")
                    out.append("|---|" + "---|" * len(found["curve"]))
                    for row, column in ((1, "reverse_kl"), (2, "wasted_nats")):
                        out.append(f"| {column} | " + " | ".join(f"{point[row]:.3f}" for point in found["curve"]) + " |")
                    out.append("")
    return out


def defaults(made: Any) -> str:
    told = [f"`{f.name}={getattr(made, f.name)!r}`" for f in fields(made)]
    return ", ".join(told) if told else "none"


def passes(objective: method.Objective) -> str:
    """Model passes of a training step."""
    parts = ["draws" if objective.draws == "policy" else f"draws of {'the prior' if objective.draws == 'prior' else 'both'}"]
    if objective.needs_prior and objective.draws != "prior":
        parts.append("one pass of the prior")
    if objective.needs_kl:
        parts.append("one more of the prior with whole next-token laws")
    if objective.needs_features:
        parts.append("one of the prior for a critic's features")
    each = "two passes" if objective.controls else "one pass"
    parts.append(f"{each} of the policy with gradient{f', {objective.epochs} times' if objective.epochs > 1 else ''}")
    return "; ".join(parts)


OPTIMA: Final = {
    "target": "the posterior p*, scored as `reverse_kl`",
    "own": "a closed form of its own, scored as `own_kl`",
    "none": "none known in closed form",
}


def why_not_halved(name: str, optimum: str, every: dict[str, dict[str, Any]]) -> list[str]:
    """For a method that aims at p*: where on the quick board it is further than half of the prior's distance, with the way there."""
    quick = every.get("quick_all")
    if quick is None or optimum != "target":
        return []
    out = []
    for table in quick["tables"]:
        by = {row["method"]: row for row in table["rows"]}
        null, mine = by.get("ancestral"), by.get(name)
        if null is None or mine is None:
            continue
        first, last = (row["columns"]["reverse_kl"]["value"] for row in (null, mine))
        if float(last) > float(first) / 2:
            out += [
                f"On quick, {table['task']}: {float(last):.3f} nats after its draws, the prior {float(first):.3f}; more than half is left."
                f"{because(mine, name)}",
                "",
                *way(mine["id"], name),
                "",
            ]
    return out


def because(row: dict[str, Any], name: str) -> str:
    """What is missing, where the curve can tell: steps, or that what was learnt carries over to the score prompts."""
    if method.objective(name).draws != "policy":
        return " Its draws are the prior's, so that the curve has its loss alone:"
    curve = record(row["id"])["curve"]
    late = [point["reward"] for point in curve[-len(curve) // 4 :]]
    trained, scored, best = sum(late) / len(late), *(float(row["columns"][c]["value"]) for c in ("reward", "reward_target"))
    why = "what it learnt does not carry over to them" if trained > (scored + best) / 2 else "the budget ends before it arrives"
    return (
        f" In the last quarter of its steps it earned {trained:.2f} on the train prompts, when scored {scored:.2f} on others, where the "
        f"posterior earns {best:.2f}: {why}."
    )


def record(run: str) -> dict[str, Any]:
    """A record of `klbench run quick --objective all`."""
    found: dict[str, Any] = json.loads((ROOT / "leaderboards" / "quick_all" / "records" / f"{run}.json").read_text(encoding="utf-8"))
    return found


def way(run: str, name: str) -> list[str]:
    """A run's own training curve. Draws of the prior say nothing of the policy, so that a method that trains on them shows its loss."""
    curve = record(run)["curve"]
    points = [curve[round(i * (len(curve) - 1) / (SHORT - 1))] for i in range(SHORT)]
    own = method.objective(name).draws == "policy"
    out = ["| draws | " + " | ".join(f"{point['samples']:,.0f}" for point in points) + " |", "|---|" + "---|" * SHORT]
    for key in [k for k in (("reward", "kl_prior") if own else ("loss",)) if k in points[0]]:
        out.append(f"| {key} | " + " | ".join(f"{point[key]:.3f}" for point in points) + " |")
    return out


def page(name: str, package: str, every: dict[str, dict[str, Any]]) -> str:
    made: Any = method.objective(name) if package == "objectives" else method.sampler(name)
    doc = inspect.cleandoc(sys.modules[type(made).__module__].__doc__ or "")
    title, _, rest = doc.partition("\n")
    out = [f"# {name}", "", title, "", "```", *rest.strip("\n").splitlines(), "```", ""]
    if package == "objectives":
        out += [
            f"- Optimum: {OPTIMA[made.optimum]}",
            f"- Trained on: {method.needed(made)}",
            f"- A step costs: {passes(made)}",
        ]
    else:
        law, needs = method.described(made)
        out += [f"- Law: {law}", f"- Works on: {needs}"]
    out += [f"- Defaults: {defaults(made)}", f"- Source: {made.source}", f"- File: `klbench/{package}/{name}.py`", ""]
    out += ["## On the boards", "", *standing(name, every), ""]
    curves = learning(name, every)
    if curves:
        out += ["## Learning curve", "", *curves]
    if package == "objectives":
        short = why_not_halved(name, made.optimum, every)
        out += [*short, ""] if short else []
    return "\n".join(out).rstrip() + "\n"


def index() -> str:
    out = ["# Methods", "", "Made from the code by `python docs/make_methods.py`; not to be edited.", "", "## Objectives", ""]
    out += ["| entry | method | file | optimum | trained on |", "|---|---|---|---|---|"]
    for entry, (title, names, why) in ENTRIES.items():
        if not names:
            out.append(f"| {entry} | {title} | none: {why} | | |")
        for name in names:
            made = method.objective(name)
            out.append(f"| {entry} | {title} | [{name}]({name}.md) | {made.optimum} | {method.needed(made)} |")
    listed = {name for _, names, _ in ENTRIES.values() for name in names}
    for name in (n for n in method.names("objectives") if n not in listed):
        made = method.objective(name)
        out.append(f"| | | [{name}]({name}.md) | {made.optimum} | {method.needed(made)} |")
    out += ["", "## Samplers", "", "| sampler | law | works on |", "|---|---|---|"]
    out += [f"| [{name}]({name}.md) | {' | '.join(method.described(method.sampler(name)))} |" for name in method.names("samplers")]
    return "\n".join(out) + "\n"


def pages() -> dict[str, str]:
    """File name to text."""
    every = boards()
    found = {f"{name}.md": page(name, package, every) for package in ("objectives", "samplers") for name in method.names(package)}
    return {"README.md": index(), **found}


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for old in OUT.glob("*.md"):
        old.unlink()
    for file, text in pages().items():
        (OUT / file).write_text(text, encoding="utf-8")
    print(f"{len(pages())} pages in {OUT.relative_to(ROOT)}")
