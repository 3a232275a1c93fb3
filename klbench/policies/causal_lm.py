"""Hugging Face causal language models as policies: prompts to ids, logits to a law, draws to texts.

    q(x_t | c, x_<t) = D_n( ... D_1( softmax(logits of the first `words` ids) ))       D: decodings, as temperature and top-p

Sequences end at a stop (the tokenizer's EOS, unless said otherwise) or at `max_new_tokens`; a sequence that is cut has no EOS factor.
Log-softmax is in float32 whatever the weights' type. Draws are by inverse CDF from uniforms that depend on the seed alone, so that
neither the batch size nor the device moves them. `passes.py` runs the model.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from klbench.errors import UserError
from klbench.method import AbstractDecoding
from klbench.policies.passes import HALF, LOGITS, Passes, checked
from klbench.target import Draws

SYSTEM_FILE: Final = "system_prompt.txt"  # beside the weights of a policy that was trained under one
ROWS = 1024  # sequences in flight while sampling
TOKENIZER_FILES: Final = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "tokenization_*.py", "tekken.json")


@dataclass(frozen=True)
class TokenLaws:
    """Per-token sums over the vocabulary along given sequences, each [P, N, T], 0 where the mask is False; nats.

    log_q, log_p0: of the token itself.  entropy: H(q(.|prefix)).  cross: H(q(.|prefix), p0(.|prefix)), so KL_t = cross - entropy.
    lost: KL(p0(.|prefix) || q(.|prefix)).
    """

    log_q: Tensor
    log_p0: Tensor
    entropy: Tensor
    cross: Tensor
    lost: Tensor


@final
@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal language model and its tokenizer as a Policy.

    stops: ids that end a sequence; empty for the tokenizer's EOS.  chat: a prompt is a user turn of the tokenizer's chat template, else it
    is encoded as the tokenizer does by default (with a BOS where it adds one).  system: a system message, or text on a line before the
    prompt.  decodings: applied in order to each next-token law.  words: ids from here on are left out of the law, which is renormalised
    over those before (None: all that the model has).  notes: what was done to a stranger's model, for people.
    """

    name: str
    model: Any
    tokenizer: Any
    stops: tuple[int, ...] = ()
    chat: bool = False
    system: str | None = None
    decodings: tuple[AbstractDecoding, ...] = ()
    words: int | None = None
    notes: tuple[str, ...] = ()
    _ids: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _passes: Passes | None = field(default=None, repr=False)
    _agreed: list[Any] = field(default_factory=list, repr=False)  # tokenizers found to write the same ids: asked at every piece of work

    def __post_init__(self) -> None:
        if not self.stops:
            object.__setattr__(self, "stops", stops_of(self.model, self.tokenizer, self.chat))
        if self._passes is None:
            object.__setattr__(self, "_passes", Passes(self.model))

    @property
    def passes(self) -> Passes:
        """What runs the model."""
        assert self._passes is not None
        return self._passes

    @property
    def device(self) -> torch.device:
        return self.passes.device

    @property
    def eos(self) -> int:
        """The first stop: what fills a row behind its end."""
        return self.stops[0]

    @property
    def columns(self) -> int:
        """Ids that the law speaks of."""
        return self.passes.width if self.words is None else self.words

    def with_stops(self, stops: Sequence[int]) -> CausalLM:
        """This policy with sequences that end at any of `stops`; itself where these are its stops already."""
        return self if tuple(stops) == self.stops else replace(self, stops=tuple(stops))

    def with_words(self, words: int) -> CausalLM:
        """This policy over the first `words` ids alone, renormalised; itself where it speaks of no more."""
        return self if words >= self.columns else replace(self, words=words)

    def with_model(self, name: str, model: Any) -> CausalLM:
        """Another model of the same architecture and vocabulary, prompted, decoded and stopped as this one."""
        return replace(self, name=name, model=model, _passes=replace(self.passes, model=model))

    def prompted(self, name: str, system: str | None, decodings: Sequence[AbstractDecoding]) -> CausalLM:
        """The same model under another system prompt (None: its own) and with further decodings."""
        system = self.system if system is None else system
        ids = self._ids if system == self.system else {}
        return replace(self, name=name, system=system, decodings=(*self.decodings, *decodings), _ids=ids)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt. Raises UserError when there are none, or when the chat template refuses it."""
        if prompt not in self._ids:
            ids = self._chat(prompt) if self.chat else self._open(prompt if self.system is None else f"{self.system}\n{prompt}")
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [int(self.tokenizer.bos_token_id)]
            if not ids:
                raise UserError(f"prompt {prompt!r} has no tokens under the tokenizer of {self.name}, and it has no BOS to start from")
            if max(ids) >= self.passes.readable:
                raise UserError(
                    f"prompt {prompt!r} has token {max(ids)}, and {self.name} reads {self.passes.readable} of them: wrong tokenizer?"
                )
            self._ids[prompt] = ids
        return self._ids[prompt]

    def _open(self, text: str) -> list[int]:
        ids, eos = list(self.tokenizer(text)["input_ids"]), self.tokenizer.eos_token_id
        while ids and ids[-1] == eos:  # some tokenizers close what they encode; a prompt is open
            ids.pop()
        return ids

    def _chat(self, prompt: str) -> list[int]:
        """The template writes its own BOS, so that none is added when its text is encoded."""
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": prompt})
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a stranger's program
            why = " ".join(str(error).split())[:200]
            raise UserError(f"the chat template of {self.name} does not take prompt {_short(prompt)}: {why}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encoded(self, prompts: Sequence[str], new: int) -> list[list[int]]:
        """Ids of prompts with room for `new` tokens. Raises UserError that names the first prompt for which there is none."""
        rows, context = [self.encode(p) for p in prompts], self.passes.context
        for prompt, ids in zip(prompts, rows, strict=True):
            if context is not None and len(ids) + new - 1 > context:  # the last token is never read
                raise UserError(
                    f"prompt {_short(prompt)} has {len(ids)} tokens: with {new} new ones that is more than the {context} of {self.name}"
                )
        return rows

    def spelled(self, prompts: Sequence[str], texts: Sequence[Sequence[str]], end: bool = False) -> tuple[Tensor, Tensor]:
        """tokens, mask [P, N, T] of continuations given as texts [P][N], the leading space included; `end`: with the stop behind each.

        A continuation has the ids that it has behind its prompt, unless prompt and text share an id there: then those it has alone.
        Raises UserError for a text without a token.
        """
        rows = [[self._continued(p, text) + ([self.eos] if end else []) for text in row] for p, row in zip(prompts, texts, strict=True)]
        for row, given in zip(rows, texts, strict=True):
            for ids, text in zip(row, given, strict=True):
                if not ids:
                    raise UserError(f"continuation {text!r} has no tokens under the tokenizer of {self.name}")
        widest = max((len(ids) for row in rows for ids in row), default=0)
        tokens = torch.tensor([[ids + [self.eos] * (widest - len(ids)) for ids in row] for row in rows], dtype=torch.int64)
        lengths = torch.tensor([[len(ids) for ids in row] for row in rows])
        return tokens, torch.arange(widest) < lengths[..., None]

    def _continued(self, prompt: str, text: str) -> list[int]:
        if not self.chat:
            whole, start = self._open(f"{self.system}\n{prompt}{text}" if self.system is not None else prompt + text), self.encode(prompt)
            if len(whole) > len(start) and whole[: len(start)] == start:
                return whole[len(start) :]
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """[P][N] texts of draws [P, N, T], special tokens and the stop left out."""
        rows = [row[keep].tolist() for row, keep in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)]
        rows = [r[:-1] if r and r[-1] in self.stops else r for r in rows]
        distinct = {tuple(r): "" for r in rows}
        texts = self.tokenizer.batch_decode([list(r) for r in distinct], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for key, text in zip(distinct, texts, strict=True):
            distinct[key] = text
        flat = [distinct[tuple(r)] for r in rows]
        n = tokens.shape[1]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def law(self, logits: Tensor) -> Tensor:
        """[..., V] float32 log-probabilities of the next token from logits [..., W]; V = columns."""
        logp = (logits if self.words is None else logits[..., : self.words]).float().log_softmax(-1)
        for decoding in self.decodings:
            logp = decoding.law(logp)
        return logp

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        """`draws` independent continuations of each prompt with their log-probabilities; [P, draws, max_new_tokens].

        Raises UserError for a prompt that leaves no room for them, and for a model whose probabilities are no numbers.
        """
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), draws, max_new_tokens, generator=generator, dtype=torch.float64)
        rows = self._encoded(prompts, max_new_tokens)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        if draws > ROWS:
            for p, row in enumerate(rows):
                pieces = [self._drawn([row], u) for u in uniform[p : p + 1].split(ROWS, 1)]
                parts.append(tuple(torch.cat(x, 1) for x in zip(*pieces, strict=True)))  # type: ignore[arg-type]
        else:
            step = max(1, ROWS // draws)
            parts = [self._drawn(rows[i : i + step], uniform[i : i + step]) for i in range(0, len(rows), step)]
        tokens, mask, log_q = (torch.cat(x) for x in zip(*parts, strict=True))
        return Draws(tokens, mask, self._sound(log_q))

    @torch.no_grad()
    def extend(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor, new: int, seed: int) -> Draws:
        """Draws [P, N, t] with up to `new` more tokens each; those that have ended stay. log_q is of the new tokens alone."""
        generator = torch.Generator().manual_seed(seed)
        P, N, t = tokens.shape
        uniform = torch.rand(P, N, new, generator=generator, dtype=torch.float64)
        ended = ~mask[:, :, -1] | torch.isin(tokens[:, :, -1], torch.tensor(self.stops)) if t else torch.zeros(P, N, dtype=torch.bool)
        more, kept, log_q = torch.full((P, N, new), self.eos), torch.zeros(P, N, new, dtype=torch.bool), torch.zeros(P, N, new)
        at = (~ended).nonzero()
        starts = self._encoded(prompts, t + new)
        rows = [starts[p] + tokens[p, n].tolist() for p, n in at.tolist()]
        for i in range(0, len(rows), ROWS):
            where = at[i : i + ROWS].unbind(1)
            drawn = self._drawn(rows[i : i + ROWS], uniform[where][:, None])
            for into, part in zip((more, kept, log_q), drawn, strict=True):
                into[where] = part[:, 0]
        return Draws(torch.cat([tokens, more], 2), torch.cat([mask, kept], 2), torch.cat([torch.zeros(P, N, t), self._sound(log_q)], 2))

    @torch.no_grad()
    def states(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T + 1, D] last hidden state before each token and after the last; behind the end of a draw that of its end, repeated.

        Raises UserError for a prompt that leaves no room: unlike a sampler, this reads the last token too.
        """
        padded = torch.cat([tokens, tokens.new_full((*tokens.shape[:2], 1), self.eos)], 2)
        head = self.model.get_output_embeddings()
        out: list[Tensor] = []
        for at in self._pieces(prompts, padded):
            rows = self._encoded(prompts[at[0]], padded.shape[2])
            self.passes.logits(rows, padded[at])  # decides on the layout by logits, before they are replaced
            handle = head.register_forward_hook(lambda module, given, found: given[0])
            try:
                out.append(self.passes.logits(rows, padded[at]).cpu())
            finally:
                handle.remove()
        P, N, T = tokens.shape
        joined = _placed(out, list(self._pieces(prompts, padded)), (P, N, T + 1))
        last = mask.sum(2, keepdim=True).expand(P, N, T + 1)
        where = torch.minimum(torch.arange(T + 1).expand(P, N, T + 1), last)
        return joined.gather(2, where[..., None].expand(-1, -1, -1, joined.shape[3]))

    def _drawn(self, rows: list[list[int]], uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.passes.sample(rows, uniform, self.law, self.stops)

    def logits(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """[P, K, T, W] next-token logits along continuations [P, K, T], float32; differentiable.

        Before `words` and `decodings`: `law` makes log-probabilities of them. Raises UserError for a prompt that leaves no room.
        """
        return self.passes.logits(self._encoded(prompts, tokens.shape[2]), tokens)

    def _sound(self, log_prob: Tensor) -> Tensor:
        """Raises UserError when there is NaN among log-probabilities: in the weights, or where an infinity met another."""
        if log_prob.isnan().any():
            raise UserError(f"{self.name}: its log-probabilities are not numbers (NaN): look for NaN or infinite weights")
        return log_prob

    def log_probs(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """[P, K, T] log-probability of each token, differentiable; positions after EOS are not masked here."""
        logits = self.logits(prompts, tokens)
        index = tokens.to(logits.device)
        if self.decodings or self.columns < logits.shape[3]:
            return _pick(self.law(logits), index)
        picked = logits.gather(3, index.clamp(max=logits.shape[3] - 1)[..., None])[..., 0] - logits.logsumexp(3)
        return picked.masked_fill(index >= logits.shape[3], -torch.inf)

    def prompt_log_prob(self, prompts: Sequence[str]) -> Tensor:
        """[P] log-probability of each prompt's tokens behind its first, differentiable; 0 for a prompt of one."""
        rows = [self.encode(p) for p in prompts]
        widest = max(len(ids) - 1 for ids in rows)
        if not widest:
            return torch.zeros(len(rows), device=self.device)
        tokens = torch.tensor([ids[1:] + [self.eos] * (widest + 1 - len(ids)) for ids in rows])
        there = torch.arange(widest) < torch.tensor([[len(ids) - 1] for ids in rows])
        logits = self.passes.logits([ids[:1] for ids in rows], tokens[:, None])
        return (_pick(self.law(logits), tokens[:, None].to(logits.device))[:, 0] * there.to(logits.device)).sum(1)

    @torch.no_grad()
    def log_prob(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T] float32 on the CPU, 0 where the mask is False, -inf where a decoding truncates. Raises UserError as `sample` does."""
        out = torch.zeros(tokens.shape)
        for at in self._pieces(prompts, tokens):
            out[at] = self.log_probs(prompts[at[0]], tokens[at]).cpu()
        return self._sound(out.masked_fill(~mask, 0.0))

    def _pieces(self, prompts: Sequence[str], tokens: Tensor) -> Iterator[tuple[slice, slice]]:
        """Index pairs (prompts, draws) whose logits fit LOGITS."""
        P, N, T = tokens.shape
        group = min(N, 16)
        rows = max(1, LOGITS // (group * T * self.passes.width))
        for p in range(0, P, rows):
            for n in range(0, N, group):
                yield slice(p, p + rows), slice(n, n + group)

    def weights_hash(self) -> str:
        """SHA-256 of the weights and the tokenizer, and of whatever else moves the law: names the distribution, wherever its files lie."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        if (self.stops, self.chat, self.system, self.decodings, self.words) != ((self.tokenizer.eos_token_id,), False, None, (), None):
            template = self.tokenizer.chat_template if self.chat else None
            law = [sorted(self.stops), self.chat, template, self.system, list(map(repr, self.decodings)), self.words]
            found.update(json.dumps(law).encode())
        return found.hexdigest()

    def save(self, folder: Path) -> None:
        """Weights as safetensors, configuration and tokenizer: what `from_pretrained` loads; and the system prompt, where there is one."""
        with _no_bars():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.system is not None:
            (folder / SYSTEM_FILE).write_text(self.system, encoding="utf-8")


def system_of(folder: str | Path) -> str | None:
    """The system prompt that a policy was saved with."""
    path = Path(folder) / SYSTEM_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _pick(law: Tensor, index: Tensor) -> Tensor:
    """[P, K, T] entries of laws [P, K, T, V] at ids [P, K, T]; -inf for an id beyond them."""
    return law.gather(3, index.clamp(max=law.shape[3] - 1)[..., None])[..., 0].masked_fill(index >= law.shape[3], -torch.inf)


def _placed(parts: Sequence[Tensor], places: Sequence[tuple[slice, slice]], shape: tuple[int, int, int]) -> Tensor:
    """[P, N, T, D] from the parts of `_pieces`."""
    out = torch.zeros(*shape, parts[0].shape[-1])
    for part, place in zip(parts, places, strict=True):
        out[place] = part
    return out


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else prompt[:57] + "...")


def stops_of(model: Any, tokenizer: Any, chat: bool = False) -> tuple[int, ...]:
    """The tokenizer's EOS; in a chat also what the model's generation configuration ends a turn with. Raises UserError where neither is."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if chat:
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        found += [int(i) for i in (named if isinstance(named, Sequence) else [named]) if i is not None]
    if not found:
        raise UserError("the tokenizer has no EOS token; set tokenizer.eos_token: sequences have to end somewhere")
    return tuple(dict.fromkeys(found))


@torch.no_grad()
def token_laws(q: CausalLM, p0: CausalLM, prompts: Sequence[str], tokens: Tensor, mask: Tensor, drawn: Tensor | None = None) -> TokenLaws:
    """What the estimators need along given sequences under both models, in one pass each; [P, N, T] float32 on the CPU.

    drawn [P, n, T]: log-probabilities of the first n sequences as q itself drew them. A token that a decoding kept when it was drawn, and
    that the rounding of another pass puts at the other side of the edge, keeps the value it was drawn with.
    cross is infinite where q has mass that p0 has not, lost where p0 has mass that q has not.
    Raises UserError when the two do not share a vocabulary, or end sequences elsewhere.
    """
    same_vocabulary(q, p0)
    shape = tokens.shape
    log_q, log_p0, entropy, cross, lost = (torch.zeros(shape) for _ in range(5))
    same_logits = p0.model is q.model and p0.tokenizer is q.tokenizer and (p0.chat, p0.system) == (q.chat, q.system)
    for at in q._pieces(prompts, tokens):
        some, rows = prompts[at[0]], tokens[at]
        index = rows.to(q.device)
        logits = q.logits(some, rows)
        lq = q.law(logits)
        law = lq.exp()
        log_q[at] = _pick(lq, index).cpu()
        entropy[at] = -torch.linalg.vecdot(law, lq.clamp(min=-1e30)).cpu()  # 0 times -inf is 0 here: a token nobody draws
        if p0 is q:
            log_p0[at], cross[at] = log_q[at], entropy[at]
            continue
        l0 = p0.law(logits if same_logits else p0.logits(some, rows)).to(lq.device)
        log_p0[at] = _pick(l0, index).cpu()
        lq, l0 = _as_wide(lq, l0), _as_wide(l0, lq)
        apart = ((l0 == -torch.inf) & (lq > -torch.inf)).any(-1)
        q_low, p_low = lq.clamp(min=-1e30), l0.clamp(min=-1e30)
        cross[at] = (-torch.linalg.vecdot(lq.exp(), p_low)).masked_fill(apart, torch.inf).cpu()
        gone = ((lq == -torch.inf) & (l0 > -torch.inf)).any(-1)
        lost[at] = torch.linalg.vecdot(l0.exp(), p_low - q_low).masked_fill(gone, torch.inf).cpu()
    if drawn is not None:
        part = log_q[:, : drawn.shape[1]]
        part.copy_(torch.where(part == -torch.inf, drawn, part))
    log_q, log_p0, entropy, cross, lost = (x.masked_fill(~mask, 0.0) for x in (log_q, log_p0, entropy, cross, lost))
    q._sound(log_q)
    p0._sound(log_p0)
    return TokenLaws(log_q, log_p0, entropy, cross, lost)


def log_probs_and_kl(q: CausalLM, p0: CausalLM, prompts: Sequence[str], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[P, K, T] log q of each token and KL(q(.|prefix) || p0(.|prefix)), both differentiable in q; nothing is masked here."""
    same_vocabulary(q, p0)
    lq = q.law(q.logits(prompts, tokens))
    with torch.no_grad():
        l0 = p0.law(p0.logits(prompts, tokens)).to(lq.device)
    lq, l0 = _as_wide(lq, l0), _as_wide(l0, lq)
    there = lq > -torch.inf
    gap = torch.where(there, lq, 0.0) - torch.where(there, l0, 0.0)
    return _pick(lq, tokens.to(lq.device)), (lq.exp() * gap).sum(-1)


def _as_wide(law: Tensor, other: Tensor) -> Tensor:
    """A law over as many ids as another: those that it does not know have no mass."""
    beyond = other.shape[-1] - law.shape[-1]
    return torch.nn.functional.pad(law, (0, beyond), value=-torch.inf) if beyond > 0 else law


def extra_words(q: Any, p0: Any) -> dict[str, int] | None:
    """Words that q's tokenizer has beyond p0's; None when the two read or write some id differently.

    Extra words may only follow the shared ones, as when a trainer adds a pad token.
    """
    ours, theirs = q.get_vocab(), p0.get_vocab()
    if ours == theirs:
        return {}
    shared = {i for word, i in theirs.items() if ours.get(word) == i}
    extra = {word: i for word, i in ours.items() if word not in theirs}
    lacking = {word: i for word, i in theirs.items() if word not in ours}
    moved = len(shared) + len(lacking) < len(theirs)
    if moved or not shared or min([*extra.values(), *lacking.values()]) < max(shared) or set(extra.values()) & set(lacking.values()):
        return None
    return extra


def same_vocabulary(q: CausalLM, p0: CausalLM) -> None:
    """Raises UserError unless both models read and write the same token ids, and end a sequence at the same ones."""
    if q is p0:
        return
    if not any(known is p0.tokenizer for known in (q.tokenizer, *q._agreed)):
        if extra_words(q.tokenizer, p0.tokenizer) is None:
            raise UserError(f"{q.name} and {p0.name} have different tokenizers: their log-probabilities do not speak of the same sequences")
        q._agreed.append(p0.tokenizer)
    if set(q.stops) != set(p0.stops):
        raise UserError(f"{q.name} ends a sequence at ids {sorted(q.stops)} and {p0.name} at {sorted(p0.stops)}: give both the same stops")


def wrap(
    name: str, model: Any, tokenizer: Any, device: str | None = "cpu", *, chat: bool = False, system: str | None = None,
    decodings: Sequence[AbstractDecoding] = (), notes: Sequence[str] = (),
) -> CausalLM:  # fmt: skip
    """A transformers model in memory as a policy. The model is left as it is: what runs is a copy in evaluation mode.

    The copy shares the weights where they are in float32 on `device` already (None: wherever they are), else it has its own, in float32.
    Raises UserError that names the model when it is no causal language model, has no EOS or no chat template, or cannot be scored.
    """
    return settled(name, _copied(name, model, device), tokenizer, chat=chat, system=system, decodings=decodings, notes=notes)


def settled(
    name: str, model: Any, tokenizer: Any, *, chat: bool = False, system: str | None = None, decodings: Sequence[AbstractDecoding] = (),
    notes: Sequence[str] = (),
) -> CausalLM:  # fmt: skip
    """A policy of a model of klbench's own, which is in evaluation mode where it is to stay. Raises UserError as `wrap` does."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{name}: its tokenizer has no chat template, which chat prompts need")
    try:
        stops = stops_of(model, tokenizer, chat)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return CausalLM(name, model, tokenizer, stops, chat, system, tuple(decodings), notes=tuple(notes), _passes=checked(name, model))


def _copied(name: str, model: Any, device: str | None) -> Any:
    """The same module tree in evaluation mode over the same tensors, or over float32 ones on another device."""
    _refuse_kind(name, model.config, type(model).__name__)
    if model.get_output_embeddings() is None:
        raise UserError(f"{name}: {type(model).__name__} has no language-model head; klbench scores causal language models")
    where = next(model.parameters()).device if device is None else device_of(device)
    half = any(p.dtype in HALF for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    if not half and all(t.device == where for t in tensors):
        return _twin(name, model, {id(t): t for t in tensors}).eval()
    made = (_renewed(model) if half and any(b.dtype in HALF for b in model.buffers()) else None) or _twin(name, model, {})
    return (made.float() if half else made).to(where).eval()


def _twin(name: str, model: Any, kept: dict[int, Any]) -> Any:
    """A copy of a module tree in which `kept`, by id, are the same objects."""
    try:
        return copy.deepcopy(model, kept)
    except Exception as error:
        kind = type(model).__name__
        raise UserError(f"{name}: {kind} cannot be copied ({type(error).__name__}: {error}); save it and give its directory") from None


def _renewed(model: Any) -> Any:
    """The model made anew from its configuration and weights, for position tables that were cast with the weights; None if it cannot be."""
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn and overwritten here moves nobody's random numbers
            fresh = type(model)(copy.deepcopy(model.config))
        fresh.load_state_dict(model.state_dict())
    except Exception:  # a wrapper around a model, with a constructor of its own
        return None
    return fresh


def device_of(device: str) -> torch.device:
    """Raises UserError for what is no device, or is not here."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r}: cpu, cuda, cuda:N or mps expected") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} asked for, and this machine has no CUDA device")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _refuse_kind(name: str, config: Any, kind: str = "") -> None:
    """Raises UserError for what is no causal language model, by its name."""
    kinds = [kind] if kind else list(getattr(config, "architectures", None) or [])
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {kinds[0] if kinds else config.model_type} is an encoder-decoder; klbench scores causal language models")
    for found in kinds:
        if found.endswith(("ForMaskedLM", "ForPreTraining")):
            raise UserError(f"{name}: {found} is a masked language model; klbench scores causal language models")


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' progress bars off for a while: a bar a worker would tear klbench's own display."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def has_tokenizer(folder: Path) -> bool:
    """Whether a directory holds files of a tokenizer. Asked first, as transformers makes an empty one up for some architectures."""
    return any(next(folder.glob(pattern), None) is not None for pattern in TOKENIZER_FILES)


def tokenizer_of(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a directory or on a hub. Raises UserError when there is none."""
    local = Path(folder).is_dir()
    if local and not has_tokenizer(Path(folder)):
        raise UserError(f"no tokenizer in {folder}: save one there with tokenizer.save_pretrained, or pass tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=local)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"no tokenizer could be loaded from {folder}: {' '.join(str(error).split())[:300]}") from None


def model_of(folder: str | Path, name: str, dtype: str = "float32", trust_remote_code: bool = False) -> Any:
    """The causal language model in a local directory, or on a hub by `owner/name`. Safetensors only.

    Raises UserError that names the directory when there is no model in it, when it is of another kind, when weights are missing from it
    (transformers would draw them at random), or when it cannot be loaded.
    """
    path = Path(folder)
    local = path.is_dir()
    if local and not (path / "config.json").is_file():
        steps = sorted((p for p in path.glob("checkpoint-*") if (p / "config.json").is_file()), key=lambda p: p.stat().st_mtime)
        raise UserError(f"no model in {path}: config.json is missing" + (f"; did you mean {steps[-1]}?" if steps else ""))
    if not local and (path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/"))):
        raise UserError(f"no model directory at {folder}")
    try:
        with _no_bars():
            _refuse_kind(name, AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=local))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=local,
                output_loading_info=True,
            )  # fmt: skip
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError) as error:
        raise UserError(f"no model could be loaded from {folder}: {' '.join(str(error).split())[:300]}") from None
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"{folder} holds no whole {type(model).__name__}: {len(missing)} weights are missing, {missing[0]} among them")
    return model


def load(
    folder: str | Path, name: str | None = None, device: str | None = "cpu", dtype: str = "float32", trust_remote_code: bool = False, *,
    tokenizer: Any = None, chat: bool = False, system: str | None = None, decodings: Sequence[AbstractDecoding] = (),
    notes: Sequence[str] = (),
) -> CausalLM:  # fmt: skip
    """A policy from a local directory, or from a hub by `owner/name`, with the tokenizer beside it unless one is given.

    Raises UserError as `model_of`, `tokenizer_of` and `wrap` do.
    """
    name = name or Path(folder).name
    where = device_of(device or "cpu")
    model = model_of(folder, name, dtype, trust_remote_code)
    words = tokenizer_of(folder, trust_remote_code) if tokenizer is None else tokenizer
    system = system_of(folder) if system is None else system
    return settled(name, model.to(where).eval(), words, chat=chat, system=system, decodings=decodings, notes=notes)
