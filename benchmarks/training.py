"""One on-policy training step: klbench, TRL (GRPO and RLOO) and disco (CDPG) on the same model, prompts, lengths, reward and threads.

    python benchmarks/training.py [--disco DIR] [--threads 2] [--model DIR] [--rounds 5]

A step draws `samples` continuations of `new` tokens for each of `prompts` prompts, rewards them, scores them under the prior and steps all
weights once. klbench's step is that of klbench.train.train, TRL's that of its trainers' `train`, disco's that of its tuner's `tune`.
TRL is measured twice: in fp32 without gradient checkpointing, as the others compute, and as its configuration has it when nothing is said
(bf16 autocast, gradient checkpointing). disco turns autograd's anomaly detection on; it is measured so, and with that turned off.
disco (CC-BY-NC-SA) is not shipped: `git clone https://github.com/naver/disco DIR`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

from _pairs import Goal, Stepped, Table, Work, compared, finish, in_turn, parser, ready, single_words, subject, timer, times_as_fast

from klbench.target import Policy, Reward, TiltedPrior
from klbench.task import AbstractTask

BETA: Final = 0.05
LR: Final = 1e-5
ENDLESS: Final = 100_000  # steps: no loop ends before it is stopped
OURS, OURS_LOW = "klbench rloo, fp32", "klbench rloo, bf16"
TRL_RLOO, TRL_GRPO, TRL_DEFAULT = "TRL RLOO, fp32", "TRL GRPO, fp32", "TRL RLOO, its defaults"
DISCO, DISCO_CALM = "disco CDPG", "disco CDPG, anomaly detection off"

Loop = Callable[[Callable[[], None]], object]


def odd_share(prompts: list[str], completions: list[str], **ignored: object) -> list[float]:
    """The share of words with an odd number of letters, in [0, 1]: as cheap as a reward can be."""
    return [sum(len(word) % 2 for word in text.split()) / max(1, len(text.split())) for text in completions]


@final
@dataclass(frozen=True)
class Given(AbstractTask):
    """Prompts to train on and a reward: a task is what klbench trains for."""

    given: tuple[str, ...]

    name: ClassVar[str] = "given"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "words with an odd number of letters"
    max_new_tokens: ClassVar[int] = 16
    beta: ClassVar[float] = BETA

    def prompts(self, split: str) -> list[str]:
        return list(self.given) if split == "train" else []

    def target(self, prior: Policy, beta: float) -> TiltedPrior:
        return TiltedPrior(prior, odd_share, beta, 1.0)

    def gold(self) -> Reward | None:
        return None

    def features(self) -> tuple[Reward, float] | None:
        return None


@final
@dataclass(frozen=True)
class Case:
    """What all contestants share."""

    args: argparse.Namespace
    folder: Path  # the model, saved
    tokenizer: Any
    prompts: tuple[str, ...]
    scratch: Path

    def model(self) -> Any:
        """A copy of its own for whoever asks."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="float32").eval()


def klbench_loop(case: Case, dtype: str) -> Loop:
    """klbench's own training loop, told to call `pause` after each step."""
    from klbench.policies.causal_lm import wrap
    from klbench.record import Run, Score, Train
    from klbench.train import train

    args = case.args
    run = Run(
        task="given", task_version=1, method="rloo", kind="objective", prior="prior", beta=BETA, max_new_tokens=args.new, score=Score(),
        train=Train(steps=ENDLESS, prompts=args.prompts, samples=args.samples, lr=LR, dtype=dtype, checkpoint_every=ENDLESS),
    )  # fmt: skip
    prior = wrap("prior", case.model(), case.tokenizer)
    folder = case.scratch / f"klbench-{dtype}"
    return lambda pause: train(run, Given(case.prompts), prior, folder, lambda event: pause())


def trl_step(case: Case, kind: str, defaults: bool = False) -> Stepped:
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    args = case.args
    made, trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[kind]
    plain = {} if defaults else {"bf16": False, "gradient_checkpointing": False}
    config = made(
        output_dir=str(case.scratch / f"trl-{kind}-{defaults}"), per_device_train_batch_size=args.prompts * args.samples,
        num_generations=args.samples, max_completion_length=args.new, beta=BETA, learning_rate=LR, max_steps=ENDLESS, temperature=1.0,
        lr_scheduler_type="constant", report_to="none", logging_strategy="no", save_strategy="no", use_cpu=True, disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"}, **plain,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": list(case.prompts)})
    built = trainer(model=str(case.folder), reward_funcs=odd_share, args=config, processing_class=case.tokenizer, train_dataset=data)

    def loop(pause: Callable[[], None]) -> None:
        class After(TrainerCallback):
            def on_step_end(self, *ignored: Any, **also: Any) -> None:
                pause()

        built.add_callback(After())
        built.train()

    return Stepped(loop, args.threads)


def disco_step(case: Case) -> Stepped:
    import torch

    sys.path.insert(0, str(case.args.disco))
    if sys.version_info >= (3, 12):  # disco imports a module that Python 3.12 dropped, and uses nothing of it
        import types

        sys.modules.setdefault("imp", types.ModuleType("imp"))
    from disco.distributions import LMDistribution
    from disco.scorers import PositiveScorer
    from disco.tuners import CDPGTuner

    args = case.args
    prior = LMDistribution(model=case.model(), tokenizer=case.tokenizer, length=args.new)
    policy = LMDistribution(model=case.model(), tokenizer=case.tokenizer, length=args.new, freeze=False)
    # at beta = 0.05 its weights of importance span e^20 and are all on one draw: the work is the same at 0.5
    tilt = PositiveScorer(lambda sample, context: math.exp(odd_share([context], [sample.text])[0] / 0.5))
    tuner = CDPGTuner(
        policy, prior * tilt, context_dataset=list(case.prompts), n_contexts_per_step=args.prompts, n_samples_per_context=args.samples,
        sampling_size=args.samples, scoring_size=args.prompts * args.samples, n_gradient_steps=ENDLESS, optimizer="Adam",
        learning_rate=LR,
    )  # fmt: skip
    torch.autograd.set_detect_anomaly(False)  # for all that share this process

    def loop(pause: Callable[[], None]) -> None:
        tuner.metric_updated.enroll(lambda name, value: pause() if name == "timing/step" else None)
        tuner.tune()

    return Stepped(loop, args.threads)


def anomalies(step: Work, detected: bool) -> Work:
    """A step with autograd's anomaly detection on or off, and off after it."""
    import torch

    def stepped() -> None:
        torch.autograd.set_detect_anomaly(detected)
        try:
            step()
        finally:
            torch.autograd.set_detect_anomaly(False)

    return stepped


def spent(loop: Loop, most: int = 12) -> Table:
    """Where the CPU time of klbench's third step goes, by PyTorch operation; the profiler sees the thread that it runs in alone."""
    from torch.profiler import ProfilerActivity, profile

    found, done = profile(activities=[ProfilerActivity.CPU]), 0

    def pause() -> None:
        nonlocal done
        done += 1
        if done == 2:
            found.start()
        elif done == 3:
            found.stop()
            raise Stepped.Stopped

    try:
        loop(pause)
    except Stepped.Stopped:
        pass
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    rows = tuple((e.key, f"{100 * e.self_cpu_time_total / total:.1f} %", f"{e.count:,}") for e in events[:most])
    return Table(f"Where a step of {OURS} goes", ("operation", "CPU time", "calls"), rows)


def prompts_of(tokenizer: Any, number: int, length: int) -> tuple[str, ...]:
    import torch

    ids = torch.tensor(single_words(tokenizer))
    picked = ids[torch.randint(len(ids), (number, length), generator=torch.Generator().manual_seed(1))]
    return tuple(tokenizer.batch_decode(picked))


def goals_of(seconds: dict[str, list[float]], large: bool) -> list[Goal]:
    wanted = [(OURS, other, 2.0 if large else 2.7) for other in (TRL_RLOO, TRL_GRPO, DISCO_CALM, DISCO)]
    wanted += [] if large else [(OURS_LOW, TRL_DEFAULT, 3.7)]
    return [
        Goal(f"{ours} over {other}, samples per second", "at least", least, times_as_fast(seconds, ours, other).median, " times")
        for ours, other, least in wanted
        if other in seconds
    ]


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--disco", type=Path, help="checkout of naver/disco; without it disco is left out")
    for name, what in (("prompts", "prompts a step"), ("samples", "draws a prompt"), ("new", "tokens a draw"), ("length", "of a prompt")):
        made.add_argument(f"--{name}", type=int, help=what)
    args = made.parse_args(words)
    usual = (2, 2, 4, 3) if args.tiny else (4, 8, 16, 8) if args.model else (16, 8, 16, 8)
    for name, value in zip(("prompts", "samples", "new", "length"), usual, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    ready(args)
    model, tokenizer, called = subject(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        case = Case(args, folder, tokenizer, prompts_of(tokenizer, args.prompts, args.length), Path(scratch))
        loops = {
            TRL_RLOO: trl_step(case, "rloo"),
            TRL_GRPO: trl_step(case, "grpo"),
            TRL_DEFAULT: trl_step(case, "rloo", defaults=True),
            OURS: Stepped(klbench_loop(case, "float32"), args.threads),
            OURS_LOW: Stepped(klbench_loop(case, "bfloat16"), args.threads),
        }
        works: dict[str, Work] = dict(loops)
        if args.disco:
            loops[DISCO] = disco_step(case)
            works |= {DISCO: anomalies(loops[DISCO], True), DISCO_CALM: anomalies(loops[DISCO], False)}
        seconds = in_turn(works, args.rounds, timer(args.threads))
        for loop in loops.values():
            loop.close()
        profile = spent(klbench_loop(case, "float32"))
    shape = f"{args.prompts} prompts of {args.length} tokens x {args.samples} draws x {args.new} tokens; {called}"
    table = compared(f"A training step: {shape}", seconds, TRL_RLOO, args.prompts * args.samples, "samples")
    notes = [] if args.disco else ["disco is left out: --disco DIR names a checkout of it"]
    finish(args, [table, profile], [] if args.tiny else goals_of(seconds, bool(args.model)), notes)


if __name__ == "__main__":
    main()
