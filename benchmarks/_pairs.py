"""Equal work measured in turn, A B C A B C ..., and what the benchmarks beside this file share: models, tables, goals, result files.

A machine that others use slows all contestants of a round alike, so a ratio is taken within its round and its median over the rounds.
One thread is timed by the process's own CPU time, which neighbours hardly move; more threads by the wall clock, as threads that wait for
work burn CPU time too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, final

import numpy as np

RESULTS: Final = Path(__file__).with_name("results")
PACKAGES: Final = ("torch", "transformers", "trl", "lm_eval", "numpy")
EOS: Final = 2

Seconds = Mapping[str, Sequence[float]]
Work = Callable[[], object]
Timer = Callable[[], float]


def timer(threads: int) -> Timer:
    """CPU time of this process for one thread, wall time for more; seconds."""
    return time.process_time if threads == 1 else time.perf_counter


def in_turn(works: Mapping[str, Work], rounds: int, now: Timer, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each work in each round. `warm` rounds come before, unmeasured: caches fill and layouts are tried in them."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for done in range(warm + rounds):
        for name, work in works.items():
            start = now()
            work()
            took = now() - start
            if done >= warm:
                seconds[name].append(took)
        if sys.stderr.isatty():
            print(f"round {done + 1} of {warm + rounds}", end="\r", file=sys.stderr, flush=True)
    return seconds


@final
@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def times_as_fast(seconds: Seconds, name: str, base: str) -> Spread:
    """How many times as fast `name` is as `base`: time(base) / time(name) of each round."""
    return Spread.of([b / a for a, b in zip(seconds[name], seconds[base], strict=True)])


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log time over log size by least squares: k where time grows as size^k."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


@final
@dataclass(frozen=True)
class Goal:
    """What was to be reached and what was. sign: "at least" or "at most"."""

    what: str
    sign: str
    wanted: float
    reached: float
    unit: str = ""

    @property
    def kept(self) -> bool:
        return self.reached >= self.wanted if self.sign == "at least" else self.reached <= self.wanted


@final
@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column is text, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def compared(title: str, seconds: Seconds, base: str, amount: float, unit: str) -> Table:
    """Contestants beside `base`. amount: units of work in one round."""
    columns = ("", "s", f"{unit}/s", f"times {base}")
    rows = []
    for name, taken in seconds.items():
        spread = Spread.of(taken)
        rows.append((name, spread.text(3), f"{amount / spread.median:,.0f}", times_as_fast(seconds, name, base).text()))
    return Table(title, columns, tuple(rows))


@final
class Stepped:
    """A loop of somebody else's, run a step a call: it lives in a thread and waits wherever it calls `pause`.

    loop: called once with `pause`, which it is to call after each step; `pause` raises Stopped when no further step is wanted.
    """

    class Stopped(BaseException):
        """Ends the loop from within; no Exception, so that nobody's handler keeps it."""

    def __init__(self, loop: Callable[[Callable[[], None]], object], threads: int):
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._over = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(loop, threads), daemon=True)
        self._thread.start()

    def _run(self, loop: Callable[[Callable[[], None]], object], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)  # what a thread of Python inherits is the machine's number of cores
        self._go.acquire()
        try:
            if not self._over:
                loop(self._pause)
                self._error = RuntimeError("the loop ended before it was stopped")
        except Stepped.Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._done.release()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._over:
            raise Stepped.Stopped

    def __call__(self) -> None:
        """One step. Raises what the loop raised, and RuntimeError where it ended of itself."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._over = True
        self._go.release()
        self._thread.join(30)


@final
@dataclass(frozen=True)
class Shape:
    """A random Llama with tied embeddings: layers, width, heads, inner width, vocabulary. Its speed does not depend on what it says."""

    layers: int = 4
    width: int = 192
    heads: int = 6
    inner: int = 512
    vocabulary: int = 4096

    def text(self) -> str:
        return f"Llama, {self.layers} layers, width {self.width}, {self.heads} heads, inner {self.inner}, {self.vocabulary:,} words, random"

    def model(self, seed: int = 0) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, max_position_embeddings=1024, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=EOS,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


SMALL: Final = Shape()
TINY: Final = Shape(layers=1, width=16, heads=2, inner=24, vocabulary=64)


def words(vocabulary: int) -> Any:
    """A tokenizer whose words are w4, w5, ... behind four special ones: text and ids are one another, without a hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<pad>": 0, "<bos>": 1, "<eos>": EOS, "<unk>": 3} | {f"w{i}": i for i in range(4, vocabulary)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def single_words(tokenizer: Any) -> list[int]:
    """Ids that stay what they are when their text stands behind other such words: plain words, with their space where they carry one."""
    made = [i for word, i in tokenizer.get_vocab().items() if word.startswith("w") and word[1:].isdigit()]
    if len(made) < len(tokenizer) // 2:
        bare = {i: word[1:] for word, i in tokenizer.get_vocab().items() if word.startswith("\u0120")}
        made = [i for i, word in bare.items() if len(word) > 3 and word.isascii() and word.isalpha() and word.islower()]
    return sorted(made)


def subject(args: argparse.Namespace) -> tuple[Any, Any, str]:
    """Model in float32, tokenizer, and what to call them: the directory of --model, else the small random one."""
    if args.model:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval(), tokenizer, args.model.name
    shape = TINY if args.tiny else SMALL
    return shape.model(), words(shape.vocabulary), shape.text()


def parser(doc: str | None, rounds: int = 5, model: bool = True) -> argparse.ArgumentParser:
    """The options that all have: --rounds, --threads, --tiny, --out, and --model where one can be given."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"measured rounds, after one that is not  [default: {rounds}]")
    made.add_argument("--threads", type=int, default=1, help="1 is timed by CPU time, more by the wall clock  [default: 1]")
    made.add_argument("--tiny", action="store_true", help="shapes of a few words: shows that it runs, measures nothing")
    made.add_argument("--out", type=Path, help="file for the result  [default: results/NAME.json beside this script, none for --tiny]")
    if model:
        made.add_argument("--model", type=Path, help="directory of a causal model in place of the small random one")
    return made


def ready(args: argparse.Namespace) -> None:
    """Threads and silence. Before torch does anything, as its thread pool is made once."""
    if args.rounds < 1 or args.threads < 1:
        raise SystemExit("--rounds and --threads: at least 1")
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "KINETO_LOG_LEVEL": "5"}
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    found = Path("/proc/cpuinfo")
    if found.is_file():
        cpu = next((line.partition(":")[2].strip() for line in found.read_text().splitlines() if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory), "load": round(os.getloadavg()[0], 1)}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command(words: Sequence[str]) -> str:
    """What to type for the same result: --out left out, directories of this machine as DIR."""
    said, rest = ["python", f"benchmarks/{Path(words[0]).name}"], iter(words[1:])
    for word in rest:
        if word == "--out":
            next(rest, "")
        elif word in ("--model", "--disco"):
            said += [word, "DIR"]
            next(rest, "")
        else:
            said.append(word)
    return shlex.join(said)


def finish(args: argparse.Namespace, tables: Sequence[Table], goals: Sequence[Goal] = (), notes: Sequence[str] = ()) -> None:
    """Prints tables, goals and notes, and writes them with machine, versions, date and command."""
    from klbench import terminal

    for table in tables:
        print(table.title)
        terminal.table(table.columns, table.rows, heading=True)
        print()
    for goal in goals:
        print(
            f"{'reached' if goal.kept else 'NOT reached'}: {goal.what}: {goal.reached:.3g}{goal.unit}, wanted {goal.sign} {goal.wanted:g}"
        )
    for note in notes:
        print(note)
    name = "-".join([Path(sys.argv[0]).stem, *([args.model.name] if getattr(args, "model", None) else [])])
    out = args.out or (None if args.tiny else RESULTS / f"{name}{'' if args.threads == 1 else f'-{args.threads}-threads'}.json")
    if out is None:
        return
    data = {
        "name": Path(sys.argv[0]).stem,
        "command": command(sys.argv),
        "model": args.model.name if getattr(args, "model", None) else "",
        "date": datetime.now(UTC).date().isoformat(),
        "clock": "CPU time" if args.threads == 1 else "wall time",
        "threads": args.threads,
        "rounds": args.rounds,
        "machine": machine(),
        "versions": versions(),
        "tables": [asdict(table) for table in tables],
        "goals": [asdict(goal) for goal in goals],
        "notes": list(notes),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
