"""The training loop: draw, reward, loss, step, checkpoint.

One step takes three passes and no more: the draws (log-probabilities kept as they fall), the prior's teacher-forced pass (spared where
the objective does not need it, or where the prior made the draws), and the policy's pass with gradient, once an epoch of the objective.
Further ones are made for an objective that asks for more: next-token laws of both models, a critic's features, a second control prompt.
Every draw comes from a seed of the run and the step alone, so a run that was killed goes on bit for bit from its checkpoint.
With `train.lora_rank` the policy stands on the prior's own weights in memory; only the adapter is trained and checkpointed, and the policy
that comes out, and is saved, has it merged in: a directory like any other.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klbench import method, streams
from klbench.batch import Batch
from klbench.errors import UserError
from klbench.method import AbstractStatefulObjective, Objective, State, Watched
from klbench.offline import Offline
from klbench.policies import adapters
from klbench.policies.causal_lm import CausalLM, load, log_probs_and_kl
from klbench.record import Run
from klbench.target import Draws, TiltedPrior
from klbench.task import AbstractTask

Curve = list[dict[str, float]]
Report = Callable[[dict[str, Any]], None]
Measure = Callable[[CausalLM, int], dict[str, float]]


def train(
    run: Run, task: AbstractTask, prior: CausalLM, folder: Path, report: Report = lambda event: None, include: tuple[Path, ...] = (),
    measure: Measure | None = None,
) -> tuple[CausalLM, Curve]:  # fmt: skip
    """The policy of a run and its curve; `folder` holds both when this returns, or held them before.

    measure: what the curve has beside the step's own figures, at `train.curve` steps evenly spread and at the last.

    Raises UserError when the loss is not finite (with the step), or when the task has no train split.
    """
    if (folder / "curve.jsonl").is_file():
        curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        return load(folder, run.id, device=str(prior.device)), curve
    settings = run.train
    assert settings is not None
    objective = method.objective(run.method, include)
    given = _given(objective, run, task)
    prompts, target = task.prompts("train") if given is None else list(given.prompts), task.target(prior, run.beta)
    rank, tuner = settings.lora_rank, None
    if rank:
        tuner = adapters.low_rank(prior.name, prior.model, rank, streams.seed(run.seed, "train/lora"))
    policy = prior.with_model(run.id, tuner.model if tuner else copy.deepcopy(prior.model))
    _refuse(objective, run, target, prompts, given)
    if objective.controls is not None:
        policy = policy.prompted(run.id, objective.controls[0], ())
    width = prior.passes.hidden if objective.needs_features else 0
    fresh: State = objective.init(len(prompts), width) if isinstance(objective, AbstractStatefulObjective) else {}
    state = {name: value.detach().to(prior.device).requires_grad_(value.requires_grad) for name, value in fresh.items()}
    own = [t for t in state.values() if t.requires_grad]
    groups: list[dict[str, Any]] = [{"params": list(policy.model.parameters()), "scale": settings.lr}]
    if own:
        assert isinstance(objective, AbstractStatefulObjective)
        groups.append({"params": own, "scale": objective.state_lr})
    adam = torch.optim.Adam(groups, lr=settings.lr, betas=(0.9, 0.95))
    work = folder.with_name(f".{folder.name}.work")
    start, curve = _restore(work, policy, adam, state)
    for step in range(start, settings.steps):
        for group in adam.param_groups:
            group["lr"] = group["scale"] * (1 - 0.9 * step / settings.steps)
        row, state = _step(run, objective, policy, prior, target, prompts, given, state, adam, step)
        row["tokens"] += curve[-1]["tokens"] if curve else 0.0
        if measure is not None and settings.curve and _measured_at(step, settings.steps, settings.curve):
            row |= measure(policy, step)
        curve.append(row)
        report({"phase": "train", "step": step + 1, "of": settings.steps, "reward": row["reward"]})
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
            _checkpoint(work, step + 1, policy, adam, state, curve)
    if tuner:
        policy = policy.with_model(run.id, adapters.folded(tuner))
    _finish(folder, work, policy, curve)
    return policy, curve


def _measured_at(step: int, steps: int, times: int) -> bool:
    """Whether this is the last step of one of `times` equal parts."""
    return (step + 1) * times // steps > step * times // steps


def _step(
    run: Run, objective: Objective, policy: CausalLM, prior: CausalLM, target: TiltedPrior, prompts: list[str], given: Offline | None,
    state: State, adam: torch.optim.Optimizer, step: int,
) -> tuple[dict[str, float], State]:  # fmt: skip
    settings = run.train
    assert settings is not None
    device = policy.device
    chosen = batch_of(len(prompts), settings.prompts, run.seed, step)
    some = [prompts[i] for i in chosen]
    low = torch.autocast(device.type, torch.bfloat16) if settings.dtype == "bfloat16" else nullcontext()
    theirs = {"policy": 0, "both": settings.samples // 2, "prior": settings.samples}[objective.draws]
    with low:
        if given is None:
            draws, told = _drawn(policy, prior, some, settings.samples - theirs, theirs, run, step), None
        else:
            draws, told = given.drawn(prior, chosen, settings.samples, run.max_new_tokens, run.seed, step)
        reward = torch.from_numpy(target.rewards(some, prior.decode(draws.tokens, draws.mask))).float() if told is None else told
        top = torch.from_numpy(target.ceiling(some)).float() if given is None or told is None else torch.full((len(some),), given.top)
        if not objective.needs_prior:
            log_p0 = torch.zeros_like(draws.log_q)
        elif objective.draws == "prior":
            log_p0 = draws.log_q
        else:
            log_p0 = prior.log_prob(some, draws.tokens, draws.mask)
        features = prior.states(some, draws.tokens, draws.mask)[:, :, :-1].to(device) if objective.needs_features else None
    value = 0.0
    own = (torch.arange(reward.shape[1]) >= theirs).expand(reward.shape).to(device)
    fresh = draws.log_q if objective.draws == "policy" and objective.controls is None else None  # fell under these very weights
    first: Tensor | None = None
    for _ in range(objective.epochs):
        with low:
            kl_token, other = None, None
            if objective.needs_kl:
                log_q, kl_token = log_probs_and_kl(policy, prior, some, draws.tokens, draws.mask)
            else:
                log_q = policy.log_probs(some, draws.tokens, draws.mask, fresh if first is None else None)
            if objective.controls is not None:
                second = policy.prompted(run.id, objective.controls[1], ())
                other = second.log_probs(some, draws.tokens, draws.mask)
            asked = policy.prompt_log_prob(some) if objective.needs_prompt else None
        if first is None:
            first = log_q.detach()
            if theirs:  # what the prior drew is known under the prior's law
                first = torch.where(own[:, :, None], first, draws.log_q.to(device))
        batch = Batch(
            tokens=draws.tokens.to(device), mask=draws.mask.to(device), log_q=log_q, log_p0=log_p0.to(device), reward=reward.to(device),
            log_weight=torch.zeros_like(reward, device=device), old_log_q=first, prompt=torch.tensor(chosen, device=device),
            top=top.to(device), own=own, kl_token=kl_token, features=features, other_log_q=other,
            prompt_log_q=asked,
        )  # fmt: skip
        if isinstance(objective, AbstractStatefulObjective):
            loss, after = objective.loss(batch, run.beta, state)
            state = {k: v if state[k].requires_grad else v.detach() for k, v in after.items()}
        else:
            loss = objective.loss(batch, run.beta)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(f"{run.id}: the loss is {value} at step {step}; lower train.lr or raise beta")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        adam.step()
    assert first is not None
    total_q, total_0 = (first.cpu() * draws.mask).sum(2), (log_p0 * draws.mask).sum(2)
    row = {
        "step": float(step + 1),
        "reward": float(reward.mean()),
        "entropy": float(-total_q.mean()),
        "loss": value,
        "tokens": float(draws.mask.sum()),
        "samples": float((step + 1) * reward.numel()),
    }
    if isinstance(objective, Watched):
        row |= objective.watched(batch)
    if objective.needs_prior:
        row["kl_prior"] = float((total_q - total_0).mean())
    return row, state


def _drawn(policy: CausalLM, prior: CausalLM, prompts: list[str], own: int, theirs: int, run: Run, step: int) -> Draws:
    """`theirs` draws of the prior, then `own` of the policy."""
    parts = []
    for name, drawer, many in (("prior", prior, theirs), ("draws", policy, own)):
        if many:  # one kind alone has the seed that it always had
            key = "draws" if not (own and theirs) else name
            parts.append(drawer.sample(prompts, many, run.max_new_tokens, streams.seed(run.seed, f"train/{key}/{run.task}/{step}")))
    return parts[0] if len(parts) == 1 else Draws(*(torch.cat([getattr(x, f) for x in parts], 1) for f in ("tokens", "mask", "log_q")))


def _given(objective: Objective, run: Run, task: AbstractTask) -> Offline | None:
    """The run's data file. Raises UserError for an objective that trains on draws of its own, which no file holds."""
    assert run.train is not None
    if not run.train.data:
        return None
    if objective.draws != "prior":
        raise UserError(f"{run.method} trains on draws of its own: train.data is not for it")
    held_out = {prompt: split for split in ("dev", "score") for prompt in task.prompts(split)}
    return Offline.read(Path(run.train.data), objective.feedback, held_out)


def _refuse(objective: Objective, run: Run, target: TiltedPrior, prompts: list[str], given: Offline | None) -> None:
    """Raises UserError where the task cannot give what the objective is told of a draw, or a group is too small to be split."""
    if given is not None and given.values is not None:
        return  # the file tells it, whatever the task's reward says
    if objective.feedback == "success" and not np.isfinite(target.ceiling(prompts)).all():
        raise UserError(f"{run.method} learns from right and wrong, and the reward of {run.task} has no declared ceiling (reward_max)")
    if objective.draws == "both" and run.train is not None and run.train.samples < 4:
        raise UserError(f"{run.method} trains on prior and own draws: train.samples of at least 4, got {run.train.samples}")


def batch_of(prompts: int, size: int, seed: int, step: int) -> list[int]:
    """Indices of a step's prompts: an endless shuffle of the train split, a function of seed and step alone."""
    size = min(size, prompts)
    out: list[int] = []
    for at in range(step * size, (step + 1) * size):
        epoch, place = divmod(at, prompts)
        generator = torch.Generator().manual_seed(streams.seed(seed, f"train/prompts/{epoch}"))
        out.append(int(torch.randperm(prompts, generator=generator)[place]))
    return out


def _moving(policy: CausalLM) -> dict[str, Tensor]:
    """The weights of a policy that training can move, and its buffers."""
    still = {name for name, p in policy.model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in policy.model.state_dict().items() if name not in still}


def _checkpoint(work: Path, step: int, policy: CausalLM, adam: torch.optim.Optimizer, state: State, curve: Curve) -> None:
    """All that the next step needs, in a folder that appears whole under its final name."""
    part = work / f".{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in _moving(policy).items()}, part / "weights.safetensors")
    moments = {f"{i}.{k}": torch.as_tensor(v).cpu().contiguous() for i, row in adam.state_dict()["state"].items() for k, v in row.items()}
    save_file(moments, part / "adam.safetensors")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, part / "state.safetensors")
    (part / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    part.rename(work / f"{step}")
    for old in work.iterdir():
        if old.name != f"{step}":
            shutil.rmtree(old, ignore_errors=True)


def _restore(work: Path, policy: CausalLM, adam: torch.optim.Optimizer, state: State) -> tuple[int, Curve]:
    """Loads the newest checkpoint in place; (0, []) when there is none."""
    steps = sorted(int(p.name) for p in work.iterdir() if p.name.isdigit()) if work.is_dir() else []
    if not steps:
        return 0, []
    at = work / str(steps[-1])
    policy.model.load_state_dict({**policy.model.state_dict(), **load_file(at / "weights.safetensors")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(at / "adam.safetensors").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = value
    adam.load_state_dict({**adam.state_dict(), "state": moments})
    with torch.no_grad():
        for name, value in load_file(at / "state.safetensors").items():
            state[name].copy_(value)
    return steps[-1], [json.loads(line) for line in (at / "curve.jsonl").read_text().splitlines()]


def _finish(folder: Path, work: Path, policy: CausalLM, curve: Curve) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    policy.save(part)
    (part / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    shutil.rmtree(folder, ignore_errors=True)  # without its curve: left by a kill inside this function
    os.replace(part, folder)
    shutil.rmtree(work, ignore_errors=True)
