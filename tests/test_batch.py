"""The one shape check of training batches, and the sum over the tokens that count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from klbench.batch import Batch

P, K, T = 2, 3, 4


def fields() -> dict[str, Tensor]:
    length = torch.tensor([[4, 1, 2], [3, 0, 4]])
    return {
        "tokens": torch.zeros(P, K, T, dtype=torch.int64),
        "mask": torch.arange(T) < length[:, :, None],
        "log_q": torch.zeros(P, K, T),
        "log_p0": torch.zeros(P, K, T),
        "reward": torch.zeros(P, K),
        "log_weight": torch.zeros(P, K),
        "old_log_q": torch.zeros(P, K, T),
        "kl_token": torch.zeros(P, K, T),
        "values": torch.zeros(P, K, T),
        "prompt": torch.zeros(P, dtype=torch.int64),
    }


def test_masked_tokens_do_not_count_and_the_gradient_passes() -> None:
    batch = Batch(**fields())
    per_token = torch.arange(1.0, P * K * T + 1).reshape(P, K, T).requires_grad_()
    total = batch.total(per_token)
    assert total.tolist() == [[10.0, 5.0, 19.0], [42.0, 0.0, 90.0]]  # 1+2+3+4, 5, 9+10 | 13+14+15, nothing, 21+22+23+24
    total.sum().backward()
    assert per_token.grad is not None and torch.equal(per_token.grad, batch.mask.float())


def test_the_optional_fields_may_be_missing() -> None:
    batch = Batch(**{k: v for k, v in fields().items() if k not in ("old_log_q", "kl_token", "values", "prompt")})
    assert batch.old_log_q is batch.kl_token is batch.values is batch.prompt is None


@pytest.mark.parametrize("name", [name for name in fields() if name != "tokens"])
def test_a_wrong_shape_names_its_field(name: str) -> None:
    given = fields()
    for wrong in (given[name][:1], given[name][None], given[name].mT if given[name].dim() > 1 else given[name][:, None]):
        with pytest.raises(ValueError, match=f"^{name}: .* expected, got"):
            Batch(**{**given, name: wrong})


def test_tokens_have_three_axes_and_masks_are_boolean() -> None:
    with pytest.raises(ValueError, match=r"tokens: \[P, K, T\] expected"):
        Batch(**{**fields(), "tokens": torch.zeros(P, K)})
    with pytest.raises(ValueError, match="mask: bool expected, got torch.float32"):
        Batch(**{**fields(), "mask": torch.ones(P, K, T)})
