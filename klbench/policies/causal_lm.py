"""Hugging Face causal language models as policies: load, draw, score.

Two layouts carry all the work, for any decoder that takes position ids and a 4-D attention mask (checked once at loading):

- *sampling*: the prompts' keys and values are computed once and shared by their K draws; log-probabilities are kept as tokens fall;
- *tree*: a prompt and K continuations in one row, each continuation seeing the prompt and itself. One pass, with or without gradient.

Sequences end at the tokenizer's EOS or at `max_new_tokens`; a sequence that is cut has no EOS factor. Log-softmax is in float32
whatever the weights' type. Draws are by inverse CDF from uniforms that depend on the seed alone, so that neither the batch size nor
the device moves them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from klbench.errors import UserError
from klbench.target import Draws

ROWS = 1024  # sequences in flight while sampling
LOGITS = 6_000_000  # floats of logits held at once by a scoring pass: larger buffers cost page faults and gain nothing


@final
class _Shared(DynamicLayer):
    """Keys and values of one layer in a buffer of the final length, which starts as the prompt's, repeated for its draws."""

    def __init__(self, keys: Tensor, values: Tensor, draws: int, room: int):
        super().__init__()
        prompts, heads, length, width = keys.shape
        self.buffers = []
        for part in (keys, values):
            buffer = part.new_empty(prompts * draws, heads, length + room, width)
            buffer.view(prompts, draws, heads, length + room, width)[:, :, :, :length] = part[:, None]
            self.buffers.append(buffer)
        self.length = length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = (b[:, :, :length] for b in self.buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        self.keys, self.values = (b[:, :, :end] for b in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


@dataclass(frozen=True)
class TokenLaws:
    """Per-token sums over the vocabulary along given sequences, each [P, N, T], 0 where the mask is False; nats.

    log_q, log_p0: of the token itself.  entropy: H(q(.|prefix)).  cross: H(q(.|prefix), p0(.|prefix)), so KL_t = cross - entropy.
    """

    log_q: Tensor
    log_p0: Tensor
    entropy: Tensor
    cross: Tensor


@final
@dataclass(frozen=True, eq=False)
class CausalLM:
    """A causal language model and its tokenizer as a Policy.

    The EOS is the tokenizer's. Prompts are encoded as the tokenizer does by default (with a BOS where it adds one).
    """

    name: str
    model: Any
    tokenizer: Any
    _ids: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt. Raises UserError when there are none."""
        if prompt not in self._ids:
            ids = list(self.tokenizer(prompt)["input_ids"])
            while ids and ids[-1] == self.eos:  # some tokenizers close what they encode; a prompt is open
                ids.pop()
            if not ids and self.tokenizer.bos_token_id is not None:
                ids = [int(self.tokenizer.bos_token_id)]
            if not ids:
                raise UserError(f"prompt {prompt!r} has no tokens under the tokenizer of {self.name}, and it has no BOS to start from")
            self._ids[prompt] = ids
        return self._ids[prompt]

    def decode(self, tokens: Tensor, mask: Tensor) -> list[list[str]]:
        """[P][N] texts of draws [P, N, T], special tokens left out."""
        rows = [row[keep].tolist() for row, keep in zip(tokens.flatten(0, 1), mask.flatten(0, 1), strict=True)]
        distinct = {tuple(r): "" for r in rows}
        texts = self.tokenizer.batch_decode([list(r) for r in distinct], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for key, text in zip(distinct, texts, strict=True):
            distinct[key] = text
        flat = [distinct[tuple(r)] for r in rows]
        n = tokens.shape[1]
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    @torch.no_grad()
    def sample(self, prompts: Sequence[str], draws: int, max_new_tokens: int, seed: int) -> Draws:
        """`draws` independent continuations of each prompt with their log-probabilities; [P, draws, max_new_tokens]."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(len(prompts), draws, max_new_tokens, generator=generator, dtype=torch.float64)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        if draws > ROWS:
            for p, prompt in enumerate(prompts):
                pieces = [self._sample([prompt], u) for u in uniform[p : p + 1].split(ROWS, 1)]
                parts.append(tuple(torch.cat(x, 1) for x in zip(*pieces, strict=True)))  # type: ignore[arg-type]
        else:
            step = max(1, ROWS // draws)
            parts = [self._sample(prompts[i : i + step], uniform[i : i + step]) for i in range(0, len(prompts), step)]
        tokens, mask, log_q = (torch.cat(x) for x in zip(*parts, strict=True))
        return Draws(tokens, mask, log_q)

    def _sample(self, prompts: Sequence[str], uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        P, K, T = uniform.shape
        device = self.device
        ids, pad = self._prompts(prompts)
        length = ids.shape[1]
        real = torch.arange(length, device=device) >= pad[:, None]
        position = (torch.arange(length, device=device) - pad[:, None]).clamp(min=0)
        out = self.model(ids, attention_mask=real.long(), position_ids=position, use_cache=True, logits_to_keep=1)
        cache = Cache(layers=[_Shared(layer.keys, layer.values, K, T - 1) for layer in out.past_key_values.layers])
        logits = out.logits[:, -1].repeat_interleave(K, 0)
        seen = torch.cat([real.repeat_interleave(K, 0), real.new_ones(P * K, T)], 1).long()
        start = (length - pad).repeat_interleave(K)[:, None]
        uniform = uniform.view(P * K, T).to(device)
        tokens = torch.full((P * K, T), self.eos, dtype=torch.long, device=device)
        mask = torch.zeros(P * K, T, dtype=torch.bool, device=device)
        log_q = torch.zeros(P * K, T, device=device)
        alive = torch.ones(P * K, dtype=torch.bool, device=device)
        for t in range(T):
            token, logp = _draw(logits, uniform[:, t])
            tokens[:, t] = torch.where(alive, token, self.eos)
            mask[:, t] = alive
            log_q[:, t] = torch.where(alive, logp, 0.0)
            alive = alive & (token != self.eos)
            if t + 1 == T or not bool(alive.any()):
                break
            step = self.model(
                tokens[:, t : t + 1],
                attention_mask=seen[:, : length + t + 1],
                position_ids=start + t,
                past_key_values=cache,
                use_cache=True,
            )
            logits = step.logits[:, -1]
        return tokens.view(P, K, T).cpu(), mask.view(P, K, T).cpu(), log_q.view(P, K, T).cpu()

    def _prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Left-padded ids [P, L] and the number of pads [P]."""
        rows = [self.encode(p) for p in prompts]
        length = max(len(r) for r in rows)
        ids = torch.tensor([[self.eos] * (length - len(r)) + r for r in rows], device=self.device)
        return ids, torch.tensor([length - len(r) for r in rows], device=self.device)

    def logits(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """[P, K, T, V] next-token logits along continuations [P, K, T], by one tree pass; differentiable."""
        P, K, T = tokens.shape
        ids, pad = self._prompts(prompts)
        length, device = ids.shape[1], ids.device
        inner = tokens[:, :, :-1].reshape(P, K * (T - 1)).to(device)
        order = torch.arange(length, device=device)
        position = torch.cat(
            [(order - pad[:, None]).clamp(min=0), ((length - pad)[:, None] + torch.arange(T - 1, device=device).repeat(K))], 1
        )
        branch = torch.cat([torch.full((length,), -1, device=device), torch.arange(K, device=device).repeat_interleave(T - 1)])
        depth = torch.cat([order, length + torch.arange(T - 1, device=device).repeat(K)])
        see = (depth[:, None] >= depth[None]) & ((branch[None] == -1) | (branch[:, None] == branch[None]))
        hidden = torch.arange(length + K * (T - 1), device=device) < pad[:, None]  # padding: seen by nobody but itself
        see = (see[None] & ~hidden[:, None, :]) | torch.eye(len(depth), dtype=torch.bool, device=device)
        dtype = self.model.dtype
        mask = torch.zeros(see.shape, dtype=dtype, device=device).masked_fill_(~see, torch.finfo(dtype).min)[:, None]
        out = self.model(
            torch.cat([ids, inner], 1),
            attention_mask=mask,
            position_ids=position,
            use_cache=False,
            logits_to_keep=1 + K * (T - 1),
        ).logits
        first = out[:, :1, None].expand(P, 1, K, out.shape[-1]).transpose(1, 2)  # the prompt's last position predicts all K
        rest = out[:, 1:].view(P, K, T - 1, -1)
        return torch.cat([first, rest], 2).float()

    def log_probs(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """[P, K, T] log-probability of each token, differentiable; positions after EOS are not masked here."""
        logits = self.logits(prompts, tokens)
        picked = logits.gather(3, tokens.to(logits.device)[..., None])[..., 0]
        return picked - logits.logsumexp(3)

    @torch.no_grad()
    def log_prob(self, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> Tensor:
        """[P, N, T] float32 on the CPU, 0 where the mask is False."""
        out = torch.zeros(tokens.shape)
        for at in self._pieces(prompts, tokens):
            out[at] = self.log_probs(prompts[at[0]], tokens[at]).cpu()
        return out * mask

    def _pieces(self, prompts: Sequence[str], tokens: Tensor) -> Iterator[tuple[slice, slice]]:
        """Index pairs (prompts, draws) whose logits fit LOGITS."""
        P, N, T = tokens.shape
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        group = min(N, 16)
        rows = max(1, LOGITS // (group * T * vocabulary))
        for p in range(0, P, rows):
            for n in range(0, N, group):
                yield slice(p, p + rows), slice(n, n + group)

    def weights_hash(self) -> str:
        """SHA-256 of the weights and the tokenizer: names the distribution, wherever its files lie."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found.update(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())
        return found.hexdigest()

    def save(self, folder: Path) -> None:
        """Weights as safetensors, configuration and tokenizer: what `from_pretrained` loads."""
        with _no_bars():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] and their log-probabilities from logits [R, V], by inverse CDF at uniforms [R] in [0, 1)."""
    logp = logits.float().log_softmax(1)
    cumulative = logp.exp().cumsum(1)
    total = cumulative[:, -1:]
    point = torch.minimum(uniform[:, None].to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.shape[1] - 1)
    return token[:, 0], logp.gather(1, token)[:, 0]


@torch.no_grad()
def token_laws(q: CausalLM, p0: CausalLM, prompts: Sequence[str], tokens: Tensor, mask: Tensor) -> TokenLaws:
    """What the estimators need along given sequences under both models, in one pass each; [P, N, T] float32 on the CPU.

    Raises UserError when the two models do not share a vocabulary.
    """
    same_vocabulary(q, p0)
    shape = tokens.shape
    log_q, log_p0, entropy, cross = (torch.zeros(shape) for _ in range(4))
    for at in q._pieces(prompts, tokens):
        some, rows = prompts[at[0]], tokens[at]
        index = rows[..., None].to(q.device)
        lq = q.logits(some, rows).log_softmax(3)
        law = lq.exp()
        l0 = lq if p0 is q else p0.logits(some, rows).log_softmax(3).to(lq.device)
        log_q[at] = lq.gather(3, index)[..., 0].cpu()
        log_p0[at] = l0.gather(3, index)[..., 0].cpu()
        entropy[at] = -torch.linalg.vecdot(law, lq.clamp(min=-1e30)).cpu()  # 0 times -inf is 0 here: a token nobody draws
        cross[at] = entropy[at] if p0 is q else -torch.linalg.vecdot(law, l0.clamp(min=-1e30)).cpu()
    return TokenLaws(*(x * mask for x in (log_q, log_p0, entropy, cross)))


def same_vocabulary(q: CausalLM, p0: CausalLM) -> None:
    """Raises UserError unless both models read and write the same token ids."""
    if q is p0 or q.tokenizer is p0.tokenizer:
        return
    if q.tokenizer.get_vocab() != p0.tokenizer.get_vocab() or q.eos != p0.eos:
        raise UserError(f"{q.name} and {p0.name} have different tokenizers: their log-probabilities do not speak of the same sequences")


def wrap(name: str, model: Any, tokenizer: Any, device: str = "cpu") -> CausalLM:
    """A transformers model in memory as a policy, in evaluation mode. Raises UserError for an EOS-less tokenizer or a strange layout."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no EOS token; set tokenizer.eos_token: sequences have to end somewhere")
    policy = CausalLM(name, model.eval().to(device), tokenizer)
    _check_layout(policy)
    return policy


@torch.no_grad()
def _check_layout(policy: CausalLM) -> None:
    """The tree pass must say what a plain pass says; models for which it does not (recurrent ones, say) are refused."""
    size = policy.model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(5, device=policy.device) % size
    policy._ids["\0layout"] = ids[:2].tolist()
    tree = policy.logits(["\0layout"], torch.stack([ids[2:5], ids[2:5].flip(0)])[None])[0, 0]
    del policy._ids["\0layout"]
    plain = policy.model(ids[None, :4], use_cache=False).logits[0, 1:].float()
    gap = float((tree.log_softmax(1) - plain.log_softmax(1)).abs().max())
    if not gap < (1e-3 if policy.model.dtype == torch.float32 else 0.2):
        raise UserError(
            f"{policy.name}: this architecture ignores a 4-D attention mask (off by {gap:.2g} nats); klbench cannot score it yet"
        )


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


def tokenizer_of(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a directory or on a hub. Raises UserError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=Path(folder).is_dir())
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"no tokenizer could be loaded from {folder}: {' '.join(str(error).split())[:300]}") from None


def load(
    folder: str | Path, name: str | None = None, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False
) -> CausalLM:
    """A policy from a local directory, or from a hub by `owner/name`. Safetensors only.

    Raises UserError that names the directory when there is no model in it, or when it cannot be loaded.
    """
    path = Path(folder)
    name = name or path.name
    local = path.is_dir()
    if local and not (path / "config.json").is_file():
        raise UserError(f"no model in {path}: config.json is missing")
    if not local and (path.exists() or str(folder).count("/") != 1 or str(folder).startswith((".", "/"))):
        raise UserError(f"no model directory at {folder}")
    if not torch.cuda.is_available() and str(device).startswith("cuda"):
        raise UserError(f"device {device!r} asked for, and this machine has no CUDA device")
    kind = getattr(torch, dtype)
    try:
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=kind, use_safetensors=True, trust_remote_code=trust_remote_code, local_files_only=local
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"no model could be loaded from {folder}: {' '.join(str(error).split())[:300]}") from None
    return wrap(name, model, tokenizer_of(folder, trust_remote_code), device)
