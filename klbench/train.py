"""The training loop: draw, reward, loss, step, checkpoint.

One step of a batch that fits in one piece takes three passes and no more: the draws (log-probabilities kept as they fall), the prior's
teacher-forced pass (spared where the objective does not need it, or where the prior made the draws), and the policy's pass with gradient,
once an epoch of the objective.
Further ones are made for an objective that asks for more: next-token laws of both models, a critic's features, a second control prompt.
Every draw comes from a seed of the run and the step alone, so a run that was killed goes on bit for bit from its checkpoint.
A batch that does not fit goes through in parts (`gradient.py`), and several processes take a share of its prompts each (`processes.py`):
both with the gradient of one piece to rounding. With `train.shard` they share out the weights too (`sharded.py`).
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from klbench import method, streams
from klbench.batch import Batch
from klbench.errors import UserError
from klbench.gradient import Fitted, Said, free_memory, recomputed
from klbench.method import AbstractStatefulObjective, Objective, State, Watched
from klbench.offline import Offline
from klbench.policies import adapters
from klbench.policies.causal_lm import CausalLM, load
from klbench.policies.passes import Passes
from klbench.policies.vllm import CORRECTED, Engine, Told, log_weights, weighed, write
from klbench.priors import SHIPPED, prior_path
from klbench.processes import ALONE, Processes, watched
from klbench.record import Run, Train
from klbench.sharded import InStep, put, sharded, spread_as, whole
from klbench.target import Draws, TiltedPrior
from klbench.task import AbstractTask

Curve = list[dict[str, float]]
Report = Callable[[dict[str, Any]], None]
Measure = Callable[[CausalLM, int], dict[str, float]]
DRAWN: Final = ("tokens", "mask", "log_q")  # the fields of Draws


def train(
    run: Run, task: AbstractTask, prior: CausalLM, folder: Path, report: Report = lambda event: None, include: tuple[Path, ...] = (),
    measure: Measure | None = None, processes: Processes = ALONE, device: str | None = None,
) -> tuple[CausalLM, Curve]:  # fmt: skip
    """The policy of a run and its curve; `folder` holds both when this returns, or held them before.

    measure: what the curve has beside the step's own figures, at `train.curve` steps evenly spread and at the last.
    device: of the shards, where `train.shard` spreads the weights over the processes; else everything is where the prior is.

    Raises UserError when the loss is not finite (with the step), when the task has no train split, or when another process has died.
    """
    with watched(processes):
        there = torch.tensor(int(processes.first and (folder / "curve.jsonl").is_file()))
        processes.add(there)  # the first process alone looks: another may come when the files are being written
        if there:
            curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
            return load(folder, run.id, device=str(prior.device)), curve
        return _trained(run, task, prior, folder, report, include, measure, processes, device or str(prior.device))


def _trained(
    run: Run, task: AbstractTask, prior: CausalLM, folder: Path, report: Report, include: tuple[Path, ...], measure: Measure | None,
    processes: Processes, device: str,
) -> tuple[CausalLM, Curve]:  # fmt: skip
    settings = run.train
    assert settings is not None
    objective = method.objective(run.method, include)
    given = _given(objective, run, task)
    prompts = task.prompts("train") if given is None else list(given.prompts)
    model, tuner = _tunable(run, prior)
    policy, in_step, held = prior.with_model(run.id, model), None, prior
    if settings.shard:
        if processes.count == 1 or measure is not None:
            raise UserError("train.shard spreads a model over processes: start `klbench train` with torchrun or accelerate launch")
        if objective.needs_features:
            raise UserError(f"{run.method} reads hidden states, which no model gives whose weights are spread: leave train.shard out")
        policy, held = (_spread(lm, processes, device) for lm in (policy, prior))
        in_step = InStep(processes, held.model, policy.model)
        del model, tuner
    target = task.target(held, run.beta)
    _refuse(objective, run, target, prompts, given)
    if objective.controls is not None:
        policy = policy.prompted(run.id, objective.controls[0], ())
    width = held.passes.hidden if objective.needs_features else 0
    fresh: State = objective.init(len(prompts), width) if isinstance(objective, AbstractStatefulObjective) else {}
    state = {name: value.detach().to(held.device).requires_grad_(value.requires_grad) for name, value in fresh.items()}
    own = [t for t in state.values() if t.requires_grad]
    groups: list[dict[str, Any]] = [{"params": list(policy.model.parameters()), "scale": settings.lr}]
    if own:
        assert isinstance(objective, AbstractStatefulObjective)
        groups.append({"params": own, "scale": objective.state_lr})
    fused = policy.device.type in ("cpu", "cuda") and not settings.shard  # one pass over each tensor
    adam = torch.optim.Adam(groups, lr=settings.lr, betas=(0.9, 0.95), fused=fused)
    work = folder.with_name(f".{folder.name}.work")
    start, curve, sizes = _restore(work, policy, adam, state)
    said = Said(objective, policy, held, torch.bfloat16 if settings.dtype == "bfloat16" else None, in_step)
    drawing, fitted = Fitted(0, sizes[0]), Fitted(settings.micro, 1 if settings.shard else sizes[1])
    engine = _engine(run, objective, policy, tuner, processes, work) if settings.sampler else None
    loop = _Loop(run, said, target, prompts, given, adam, drawing, fitted, processes, engine)
    with recomputed(policy.model, settings.recompute):
        for step in range(start, settings.steps):
            for group in adam.param_groups:
                group["lr"] = group["scale"] * (1 - 0.9 * step / settings.steps)
            row, state = loop.step(state, step)
            row["tokens"] += curve[-1]["tokens"] if curve else 0.0
            if measure is not None and settings.curve and _measured_at(step, settings.steps, settings.curve):
                row |= measure(policy, step)
            curve.append(row)
            if processes.first:
                report({"phase": "train", "step": step + 1, "of": settings.steps, "reward": row["reward"]})
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                _checkpoint(work, step + 1, policy, adam, state, curve, (drawing.size, fitted.size), processes)
    if settings.shard:  # put together again, where the prior is
        model, tuner = _tunable(run, prior)
        into = model.state_dict()
        for name, value in whole(_moving(policy)):
            put(into[name], value)
        policy = prior.with_model(run.id, model)
        if objective.controls is not None:
            policy = policy.prompted(run.id, objective.controls[0], ())
    if tuner is not None:
        policy = policy.with_model(run.id, adapters.folded(tuner))
    if processes.first:
        _finish(folder, work, policy, curve)
    processes.wait()
    return policy, curve


def _tunable(run: Run, prior: CausalLM) -> tuple[Any, Any]:
    """A model that says what the prior says, with weights of its own: all of them, or those of an adapter, whose tuner comes second."""
    assert run.train is not None
    if not run.train.lora_rank:
        return copy.deepcopy(prior.model), None
    tuner = adapters.low_rank(prior.name, prior.model, run.train.lora_rank, streams.seed(run.seed, "train/lora"))
    return tuner.model, tuner


def _spread(lm: CausalLM, processes: Processes, device: str) -> CausalLM:
    """The same policy on weights spread over the processes. The model is called as a whole alone: its parts do not gather all they need."""
    model = sharded(lm.model, processes, device)
    layouts = tuple(layout for layout in lm.passes.layouts if layout != "static")
    passes = replace(lm.passes, model=model, layouts=layouts, split=False, shapes=Passes(model).shapes)
    return replace(lm, model=model, _passes=passes)


def _measured_at(step: int, steps: int, times: int) -> bool:
    """Whether this is the last step of one of `times` equal parts."""
    return (step + 1) * times // steps > step * times // steps


@final
@dataclass(frozen=True)
class _Data:
    """What a step learns from, [P, K, T] or [P, K]. draws.log_q: under what drew them."""

    draws: Draws
    reward: Tensor
    log_p0: Tensor
    features: Tensor | None
    log_weight: Tensor | None = None  # [P, K] towards the policy, of draws that another engine made
    share: float = 1.0  # their effective sample size


@final
@dataclass(frozen=True, eq=False)
class _Loop:
    """What stays the same from step to step. drawing, fitted: how many prompts are drawn at once, and go through with gradient at once."""

    run: Run
    said: Said
    target: TiltedPrior
    prompts: list[str]
    given: Offline | None
    adam: torch.optim.Optimizer
    drawing: Fitted
    fitted: Fitted
    processes: Processes
    engine: Callable[[list[str], int], Told] | None = None

    @property
    def settings(self) -> Train:
        assert self.run.train is not None
        return self.run.train

    def step(self, state: State, step: int) -> tuple[dict[str, float], State]:
        """The curve's row of a step, and the state after it."""
        objective, device = self.said.objective, self.said.policy.device
        chosen = batch_of(len(self.prompts), self.settings.prompts, self.run.seed, step)
        some = [self.prompts[i] for i in chosen]
        theirs = {"policy": 0, "both": self.settings.samples // 2, "prior": self.settings.samples}[objective.draws]
        data = self.drawing.tried(len(some), lambda: self._data(chosen, some, theirs, step))
        draws, reward = data.draws, data.reward
        told = self.given is not None and self.given.values is not None
        top = torch.full((len(some),), self.given.top) if told and self.given else torch.from_numpy(self.target.ceiling(some)).float()
        batch = Batch(
            tokens=draws.tokens.to(device), mask=draws.mask.to(device), log_q=draws.log_q.to(device), log_p0=data.log_p0.to(device),
            reward=reward.to(device), prompt=torch.tensor(chosen, device=device),
            log_weight=(torch.zeros_like(reward) if data.log_weight is None else data.log_weight).to(device),
            top=top.to(device), own=(torch.arange(reward.shape[1]) >= theirs).expand(reward.shape).to(device), features=data.features,
        )  # fmt: skip
        known = draws.log_q if objective.draws == "policy" and objective.controls is None else None  # fell under these very weights
        loss = 0.0
        for _ in range(objective.epochs):
            work = partial(self._gradient, some, draws, batch, known, state, step)
            batch, loss, after = self.fitted.tried(len(some), work)
            state = {k: v if state[k].requires_grad else v.detach() for k, v in after.items()}
            known = None
            torch.nn.utils.clip_grad_norm_(self.said.policy.model.parameters(), 1.0)
            self.adam.step()
        assert batch.old_log_q is not None
        total_q, total_0 = (batch.old_log_q.cpu() * draws.mask).sum(2), (data.log_p0 * draws.mask).sum(2)
        row = {
            "step": float(step + 1),
            "reward": float(reward.mean()),
            "entropy": float(-total_q.mean()),
            "loss": loss,
            "tokens": float(draws.mask.sum()),
            "samples": float((step + 1) * reward.numel()),
        }
        if isinstance(objective, Watched):
            row |= objective.watched(batch)
        if objective.needs_prior:
            row["kl_prior"] = float((total_q - total_0).mean())
        if data.log_weight is not None:
            row["ess"] = data.share
        return row, state

    def _data(self, chosen: list[int], some: list[str], theirs: int, step: int) -> _Data:
        """Draws, rewards and what the prior says, of each process's share and then of all."""
        run, samples, said, processes = self.run, self.settings.samples, self.said, self.processes
        whole_draws, told = None, None
        if self.given is not None:
            with said.low():
                whole_draws, told = self.given.drawn(said.prior, chosen, samples, run.max_new_tokens, run.seed, step)
        parts = []
        at_once = [slice(0, len(some))]  # an engine has memory of its own
        for part in at_once if self.engine is not None else self.drawing.parts(processes.share(len(some))):
            with said.low():
                log_weight, share = None, 1.0
                if self.engine is not None:
                    told_draws = self.engine(some, step)
                    log_q = said.policy.log_prob(some, told_draws.tokens, told_draws.mask)
                    log_weight, share = log_weights(log_q, told_draws)
                    draws = Draws(told_draws.tokens, told_draws.mask, log_q)
                elif whole_draws is None:
                    draws = _drawn(said.policy, said.prior, some, samples - theirs, theirs, run, step, part)
                else:
                    draws = Draws(*(getattr(whole_draws, name)[part] for name in DRAWN))
                if told is None:
                    reward = torch.from_numpy(self.target.rewards(some[part], said.prior.decode(draws.tokens, draws.mask))).float()
                else:
                    reward = told[part]
                if not said.objective.needs_prior:
                    log_p0 = torch.zeros_like(draws.log_q)
                elif said.objective.draws == "prior":
                    log_p0 = draws.log_q
                else:
                    log_p0 = said.prior.log_prob(some[part], draws.tokens, draws.mask)
                features = None
                if said.objective.needs_features:
                    features = said.prior.states(some[part], draws.tokens, draws.mask)[:, :, :-1].to(said.policy.device)
            parts.append(_Data(draws, reward, log_p0, features, log_weight, share))
        if said.in_step is not None:
            said.in_step.settle()
        if len(parts) == processes.count == 1:
            return parts[0]
        shape = (0, samples, run.max_new_tokens) if whole_draws is None else (0, *whole_draws.tokens.shape[1:])
        none = torch.zeros(shape)
        fields = [("tokens", none.long()), ("mask", none.bool()), ("log_q", none), ("reward", none[:, :, 0]), ("log_p0", none)]
        found = {
            name: processes.whole(torch.cat([empty, *(getattr(d if hasattr(d, name) else d.draws, name) for d in parts)]), len(some))
            for name, empty in fields
        }
        features = None
        if said.objective.needs_features:
            width = none.new_zeros(*shape, said.prior.passes.hidden)
            features = processes.whole(torch.cat([width, *(d.features.cpu() for d in parts if d.features is not None)]), len(some))
            features = features.to(said.policy.device)
        return _Data(Draws(*(found[name] for name in DRAWN)), found["reward"], found["log_p0"], features)

    def _gradient(
        self, some: list[str], draws: Draws, batch: Batch, known: Tensor | None, state: State, step: int
    ) -> tuple[Batch, float, State]:
        """The batch as the policy says it now, its loss and the state after it; the parameters have their gradients.

        A batch that comes without old_log_q is new. Raises UserError when the loss is not finite.
        """
        said, processes, fitted, device = self.said, self.processes, self.fitted, self.said.policy.device
        tokens, mask = draws.tokens, draws.mask
        if not fitted.size:
            lengths = [len(said.policy.encode(p)) + int(mask[i].sum()) for i, p in enumerate(some)]
            i = max(range(len(some)), key=lambda i: lengths[i])
            free = free_memory() if device.type == "cpu" else None  # a GPU says when it is full
            one = partial(said.kept, some[i], tokens[i : i + 1], mask[i : i + 1])
            fitted.measured(len(some), one, None if free is None else free // processes.count)
        at_once, mine = processes.count == 1 and fitted.size >= len(some), fitted.parts(processes.share(len(some)))
        if at_once:
            values = said.of(some, tokens, mask, known)
            if self.engine is not None:
                values["log_q"] = weighed(values["log_q"], batch.log_weight)
        else:
            if known is not None and not said.more:
                values = {"log_q": known}
            else:
                values = said.values(some, tokens, mask, mine)
                values = {name: processes.whole(value, len(some)) for name, value in values.items()}
            values = {name: value.detach().to(device, copy=True).requires_grad_() for name, value in values.items()}
        old = batch.old_log_q
        if old is None:  # what the prior drew is known under the prior's law
            assert batch.own is not None
            old = torch.where(batch.own[:, :, None], values["log_q"].detach(), draws.log_q.to(device))
        batch = replace(batch, old_log_q=old, **values)
        if isinstance(said.objective, AbstractStatefulObjective):
            loss, after = said.objective.loss(batch, self.run.beta, state)
        else:
            loss, after = said.objective.loss(batch, self.run.beta), state
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(f"{self.run.id}: the loss is {value} at step {step}; lower train.lr or raise beta")
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        if not at_once:
            weights = {name: leaf.grad for name, leaf in values.items() if leaf.grad is not None}
            if self.engine is not None:
                weights["log_q"] *= batch.log_weight.exp()[:, :, None].to(device)
            most = max(len(fitted.parts(Processes(rank, processes.count).share(len(some)))) for rank in range(processes.count))
            said.pull(weights, values["log_q"].detach(), some, tokens, mask, [*mine, *[None] * (most - len(mine))])
            if said.in_step is None and processes.count > 1:
                trained = [p for p in said.policy.model.parameters() if p.requires_grad]
                for p in trained:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                processes.add(*(p.grad for p in trained if p.grad is not None))
        return batch, value, after


def _drawn(policy: CausalLM, prior: CausalLM, prompts: list[str], own: int, theirs: int, run: Run, step: int, share: slice) -> Draws:
    """`theirs` draws of the prior, then `own` of the policy, of a share of the prompts."""
    parts = []
    for name, drawer, many in (("prior", prior, theirs), ("draws", policy, own)):
        if many:  # one kind alone has the seed that it always had
            key = "draws" if not (own and theirs) else name
            seed = streams.seed(run.seed, f"train/{key}/{run.task}/{step}")
            parts.append(drawer.sample(prompts, many, run.max_new_tokens, seed, share))
    return parts[0] if len(parts) == 1 else Draws(*(torch.cat([getattr(x, f) for x in parts], 1) for f in DRAWN))


def _engine(
    run: Run, objective: Objective, policy: CausalLM, tuner: Any, processes: Processes, work: Path
) -> Callable[[list[str], int], Told]:
    """Draws of vLLM for some prompts at a step, from the adapter as it is then.

    Raises UserError where its draws cannot be corrected for, or vLLM is not there.
    """
    settings = run.train
    assert settings is not None
    if method.base(run.method) not in CORRECTED:
        known = ", ".join(CORRECTED)
        raise UserError(f"train.sampler=vllm: its draws are not the policy's, and {run.method} cannot be corrected for that; {known} can")
    if tuner is None or processes.count > 1:
        raise UserError("train.sampler=vllm draws from an adapter, in one process: set train.lora_rank")
    source = prior_path(run.prior) if run.prior in SHIPPED else run.prior
    engine = Engine(source, settings.lora_rank, settings.dtype)

    def draw(prompts: list[str], step: int) -> Told:
        folder = work / "adapter" / str(step)  # an engine keeps what it has read of a folder
        write(tuner, folder)
        rows = [policy.encode(prompt) for prompt in prompts]
        seed = streams.seed(run.seed, f"train/draws/{run.task}/{step}")
        try:
            return engine.draw(rows, settings.samples, run.max_new_tokens, policy.stops, seed, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return draw


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


def _checkpoint(
    work: Path,
    step: int,
    policy: CausalLM,
    adam: torch.optim.Optimizer,
    state: State,
    curve: Curve,
    sizes: tuple[int, int],
    processes: Processes,
) -> None:
    """All that the next step needs, in a folder that appears whole under its final name; the first process writes it."""
    moments = {f"{i}.{k}": torch.as_tensor(v) for i, row in adam.state_dict()["state"].items() for k, v in row.items()}
    weights, moved = ({k: v.contiguous() for k, v in whole(x) if processes.first} for x in (_moving(policy), moments))
    if not processes.first:
        return
    part = work / f".{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({k: v.clone() for k, v in weights.items()}, part / "weights.safetensors")
    save_file(moved, part / "adam.safetensors")
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, part / "state.safetensors")
    (part / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    (part / "micro").write_text(" ".join(map(str, sizes)))  # fitted to this memory: another size moves the last bits
    part.rename(work / f"{step}")
    for old in work.iterdir():
        if old.name != f"{step}":
            shutil.rmtree(old, ignore_errors=True)


def _restore(work: Path, policy: CausalLM, adam: torch.optim.Optimizer, state: State) -> tuple[int, Curve, list[int]]:
    """Loads the newest checkpoint in place: its step, the curve up to it, prompts at once (`_Loop`); (0, [], [0, 0]) for none."""
    steps = sorted(int(p.name) for p in work.iterdir() if p.name.isdigit()) if work.is_dir() else []
    if not steps:
        return 0, [], [0, 0]
    at = work / str(steps[-1])
    weights = policy.model.state_dict()
    for name, value in load_file(at / "weights.safetensors").items():
        put(weights[name], value)
    params = [p for group in adam.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in load_file(at / "adam.safetensors").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = spread_as(params[int(index)], value) if value.dim() else value
    adam.load_state_dict({**adam.state_dict(), "state": moments})
    for name, value in load_file(at / "state.safetensors").items():
        put(state[name], value)
    size = at / "micro"
    curve = [json.loads(line) for line in (at / "curve.jsonl").read_text().splitlines()]
    return steps[-1], curve, [int(n) for n in size.read_text().split()] if size.is_file() else [0, 0]


def _finish(folder: Path, work: Path, policy: CausalLM, curve: Curve) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    policy.save(part)
    (part / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    shutil.rmtree(folder, ignore_errors=True)  # without its curve: left by a kill inside this function
    os.replace(part, folder)
    shutil.rmtree(work, ignore_errors=True)
