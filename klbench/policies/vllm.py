"""Draws by vLLM, for training alone: an engine with kernels of its own, whose law is near the policy's and not the same.

    m: what vLLM draws from, by its own word;   q: the policy, by klbench's scorer
    w_k = min(q(y_k) / m(y_k), most)            a step's gradient is sum_k w_k (d loss / d log q(y_k)) grad log q(y_k)

Every draw is scored again, so that log q, which losses, curves and KL terms read, is never vLLM's. What remains is that the draws fell
under m: for a loss that is a mean over draws, each with a factor that its own tokens do not move (RLOO: a baseline of the other draws),
the weight makes the expectation that under q again, up to the truncation. It does so if vLLM's word is the law that it drew from, which
nothing here can check: a figure is never made of such draws.

The engine reads the prior's directory once; a policy is the adapter (`train.lora_rank`) that is saved for it anew at every step, which is
vLLM's public way to new weights. Written against vLLM 0.11's `LLM`, `SamplingParams` and `LoRARequest`; run against a stand-in alone.
Source of truncated weights: Ionides 2008, doi:10.1198/106186008X320456.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors.torch import save_file
from torch import Tensor

from klbench.errors import UserError
from klbench.policies.adapters import CONFIG, WEIGHTS

MOST: Final = 2.0  # of a weight: a rounding of bfloat16 is far below, a wrong adapter far above
# Objectives whose expected gradient the weights restore: a sum over all outcomes says of which that holds (tests/test_vllm.py). A division
# by the spread of the draws (grpo), a choice among them (d3s) or pairs of them (inpo) see the draws of m in more than one place.
CORRECTED: Final = ("chi2_rl", "dr_grpo", "kl_in_loss", "kl_rl", "reinforce", "reward_dropout", "rloo", "vargrad")


@final
@dataclass(frozen=True)
class Told:
    """tokens, mask [P, K, T] of draws, and log m of each token by the engine's own word; 0 where the mask is False. On the CPU."""

    tokens: Tensor
    mask: Tensor
    said: Tensor


@final
class Engine:
    """vLLM over the weights of a directory, or a hub name. Raises UserError where vLLM is not installed, or does not take the model."""

    def __init__(self, folder: str | Path, rank: int, dtype: str = "bfloat16"):
        """rank: of the adapters to come."""
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError:
            raise UserError("train.sampler is vllm, and vllm is not installed: pip install vllm") from None
        if rank < 1:
            raise UserError("train.sampler=vllm draws from an adapter: set train.lora_rank")
        self._made, self._request, self._adapters = vllm.SamplingParams, LoRARequest, 0
        try:  # its defaults of sampling come from a file beside the model unless it is told otherwise
            self._engine: Any = vllm.LLM(
                model=str(folder), enable_lora=True, max_lora_rank=rank, dtype=dtype, generation_config="vllm", max_loras=1
            )
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise UserError(f"vllm does not take {folder}: {' '.join(str(error).split())[:200]}") from None

    def draw(self, rows: Sequence[list[int]], draws: int, length: int, stops: Sequence[int], seed: int, adapter: Path | None) -> Told:
        """`draws` continuations of each row of ids under the adapter saved in a folder; None: under the prior.

        A sequence ends with its first stop, which is counted, or at `length`; the row is then filled with stops[0].
        """
        request = None
        if adapter is not None:  # an adapter is known by its number, and kept under it: new weights need a new one
            self._adapters += 1
            request = self._request(f"step{self._adapters}", self._adapters, str(adapter))
        found = self._engine.generate(
            [{"prompt_token_ids": row} for row in rows],
            self._made(
                n=draws, temperature=1.0, top_p=1.0, top_k=-1, max_tokens=length, seed=seed % 2**31, logprobs=0, ignore_eos=True,
                stop_token_ids=list(stops), detokenize=False,
            ),
            lora_request=request, use_tqdm=False,
        )  # fmt: skip
        shape = len(rows), draws, length
        tokens, said = torch.full(shape, stops[0]), torch.zeros(shape)
        mask = torch.zeros(shape, dtype=torch.bool)
        for p, answer in enumerate(found):
            for k, one in enumerate(answer.outputs):
                ids = list(one.token_ids)
                if not ids or len(ids) > length or (len(ids) < length and ids[-1] not in stops):
                    raise UserError(f"vllm gave {len(ids)} of {length} tokens to a draw that no stop ended")
                tokens[p, k, : len(ids)], mask[p, k, : len(ids)] = torch.tensor(ids), True
                said[p, k, : len(ids)] = torch.tensor([place[i].logprob for place, i in zip(one.logprobs, ids, strict=True)])
        return Told(tokens, mask, said)


def write(tuner: Any, folder: Path) -> None:
    """The adapter of a tuner of `adapters.low_rank` as PEFT saves one, which is what the engine reads."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in tuner.state_dict().items() if ".lora_" in name}
    save_file({f"base_model.{k.replace('.default.', '.')}": v.detach().cpu().contiguous() for k, v in own.items()}, folder / WEIGHTS)
    told = {k: sorted(v) if isinstance(v, set) else v for k, v in tuner.peft_config["default"].to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(told, indent=1), encoding="utf-8")


def log_weights(log_q: Tensor, told: Told, most: float = MOST) -> tuple[Tensor, float]:
    """[P, K] log w of draws, log_q [P, K, T] by klbench's scorer; and their effective sample size before truncation, a share of P K.

    Raises UserError where a draw has no mass under the policy: the engine did not draw from it.
    """
    log_ratio = ((log_q.detach().cpu().double() - told.said.double()) * told.mask).sum(2)
    if not bool(log_ratio.isfinite().all()):
        raise UserError("vllm drew a sequence that the policy gives no mass, or said no number of it: its model is another")
    flat = log_ratio.flatten()
    share = float((2 * flat.logsumexp(0) - (2 * flat).logsumexp(0)).exp()) / flat.numel()
    return log_ratio.clamp(max=torch.tensor(most, dtype=torch.float64).log()).float(), share


def weighed(log_q: Tensor, log_weight: Tensor) -> Tensor:
    """log_q [P, K, T] itself, whose gradient is times the weights exp(log_weight) [P, K]."""
    held = log_q.detach()
    return held + log_weight.exp()[:, :, None].to(log_q) * (log_q - held)
