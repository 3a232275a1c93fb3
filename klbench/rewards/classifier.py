"""Sequence classifiers of transformers as rewards.

    one output         a reward model: its value for prompt + completion, through the tokenizer's chat template where it has one
    several            of the completion alone: P(LABEL), or log P/(1 - P) with `log_odds`; `-LABEL` for 1 - P(LABEL)

P is a softmax over labels, or a sigmoid a label where the configuration says `multi_label_classification`. A prompt is left out for a
classifier because it can decide the verdict by itself. Texts that the model cannot hold lose their end, those of a reward model their
beginning. Weights are read from safetensors only and run in float32; no code that lies beside them is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from klbench.errors import UserError, unknown
from klbench.estimate import Array
from klbench.rewards.calling import messages_of, texts_of

ROWS: Final = 64  # texts in one pass
LOG_ODDS: Final = "log_odds"


@final
@dataclass(frozen=True, eq=False)
class Network:
    """A classifier and its tokenizer. rows of ids in, outputs [n, K] out."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def longest(self) -> int:
        """Tokens that it can hold."""
        said = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        return int(min(said, self.tokenizer.model_max_length, 1 << 20))

    def ids(self, text: str, special: bool = True) -> list[int]:
        """Of a text; where there is none, the token that stands for nothing."""
        found = list(self.tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"])
        if found:
            return found
        nothing = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return [next((int(i) for i in nothing if i is not None), 0)]

    def joined(self, prompt: Any, completion: Any) -> list[int]:
        """Of prompt and completion, cut in front to what the model holds."""
        if getattr(self.tokenizer, "chat_template", None):
            turns = [*messages_of([prompt], "user")[0], *messages_of([completion], "assistant")[0]]
            return self.ids(self.tokenizer.apply_chat_template(turns, tokenize=False), special=False)[-self.longest :]
        prompt, completion = texts_of([prompt, completion])
        return self.ids(prompt + completion)[-self.longest :]

    def outputs(self, rows: Sequence[Sequence[int]]) -> Array:
        """[n, K] logits. Rows of one length go together, so that nothing is padded; equal rows are run once."""
        import torch

        distinct = sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row))
        found: dict[tuple[int, ...], Any] = {}
        start = 0
        while start < len(distinct):
            end = start
            while end < len(distinct) and end - start < ROWS and len(distinct[end]) == len(distinct[start]):
                end += 1
            ids = torch.tensor(distinct[start:end], device=self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            found.update(zip(distinct[start:end], logits.double().cpu().numpy(), strict=True))
            start = end
        return np.stack([found[tuple(row)] for row in rows])


@final
@dataclass(frozen=True, eq=False)
class Classified:
    """A classifier's verdict as a reward. label: its column, None for a reward model; sign -1 for the verdict that it is not that."""

    network: Network
    name: str
    label: int | None = None
    sign: int = 1
    log_odds: bool = False
    reward_max: float = field(default=math.inf)

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: object) -> list[float]:
        """Raises UserError for an output that is no number, by the texts it was given."""
        if not len(completions):
            return []
        network = self.network
        if self.label is None:
            rows = [network.joined(p, c) for p, c in zip(prompts, completions, strict=True)]
            return [float(x) for x in network.outputs(rows)[:, 0]]
        rows = [network.ids(text)[: network.longest] for text in texts_of(completions)]
        logits = network.outputs(rows)
        if getattr(network.model.config, "problem_type", None) == "multi_label_classification":
            margin = logits[:, self.label]
        else:
            others = np.delete(logits, self.label, 1)
            margin = logits[:, self.label] - np.logaddexp.reduce(others, 1)
        margin = self.sign * margin
        return [float(x) for x in (margin if self.log_odds else 1.0 / (1.0 + np.exp(-margin)))]


@contextmanager
def quietly() -> Iterator[None]:
    """transformers without progress bars and remarks for a while: bars tear klbench's own display, and a new head is what is wanted."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def network_of(folder: str | Path, name: str, device: str = "cpu") -> Network:
    """The classifier in a directory, or on a hub by `owner/name`. Raises UserError that names it for whatever is none."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    from klbench.policies import causal_lm

    path = Path(folder)
    local = path.is_dir()
    if local and not (path / "config.json").is_file():
        raise UserError(f"no classifier in {path}: config.json is missing")
    if not local and (path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/"))):
        raise UserError(f"no directory of a classifier at {folder}, which is no hub name owner/name either")
    where = causal_lm.device_of(device)
    try:
        with quietly():
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=local, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(f"no classifier could be loaded from {folder}: {' '.join(str(error).split())[:300]}") from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{folder} holds no whole classifier: {len(missing)} weights are missing, {missing[0]} among them")
    return Network(name, model.to(where).eval(), causal_lm.tokenizer_of(folder))


def open_classifier(words: str, device: str = "cpu") -> Classified:
    """`NAME_OR_PATH[:[-]LABEL[:log_odds]]`. Raises UserError for an unknown label with the nearest, and for one that is needed."""
    place, label, odds = words, "", False
    if not Path(place).exists() and place.endswith(f":{LOG_ODDS}"):
        place, odds = place.removesuffix(f":{LOG_ODDS}"), True
    if not Path(place).exists() and ":" in place:
        place, _, label = place.rpartition(":")
    network = network_of(place, place, device)
    labels = [str(network.model.config.id2label[i]) for i in range(network.model.config.num_labels)]
    if len(labels) == 1:
        if label or odds:
            raise UserError(f"hf:{words}: a reward model of one output has no labels: write hf:{place}")
        return Classified(network, f"hf:{place}")
    known = {x.lower(): i for i, x in enumerate(labels)}
    negated = label.startswith("-") and label.lower() not in known
    wanted = label.lower()[negated:]
    if not label:
        raise UserError(f"hf:{words}: which label? write hf:{place}:LABEL with one of {', '.join(labels)}, or :-LABEL for what is not that")
    if wanted not in known:
        raise unknown(f"label of {place}", label[negated:], labels)
    return Classified(network, f"hf:{words}", known[wanted], -1 if negated else 1, odds, math.inf if odds else 1.0)
