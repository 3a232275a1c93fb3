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
        "other_log_q": torch.zeros(P, K, T),
        "features": torch.zeros(P, K, T, 5),
        "prompt": torch.zeros(P, dtype=torch.int64),
        "top": torch.ones(P),
        "own": torch.ones(P, K, dtype=torch.bool),
    }


def test_masked_tokens_do_not_count_and_the_gradient_passes() -> None:
    batch = Batch(**fields())
    per_token = torch.arange(1.0, P * K * T + 1).reshape(P, K, T).requires_grad_()
    total = batch.total(per_token)
    assert total.tolist() == [[10.0, 5.0, 19.0], [42.0, 0.0, 90.0]]  # 1+2+3+4, 5, 9+10 | 13+14+15, nothing, 21+22+23+24
    total.sum().backward()
    assert per_token.grad is not None and torch.equal(per_token.grad, batch.mask.float())


def test_the_optional_fields_may_be_missing() -> None:
    optional = ("old_log_q", "kl_token", "other_log_q", "features", "prompt", "top", "own")
    batch = Batch(**{k: v for k, v in fields().items() if k not in optional})
    assert all(getattr(batch, name) is None for name in optional)


def test_success_is_a_reward_at_its_ceiling() -> None:
    given = {**fields(), "reward": torch.tensor([[1.0, 0.999, 1.0 - 1e-7], [2.0, 0.0, -1.0]]), "top": torch.tensor([1.0, 2.0])}
    assert Batch(**given).success().tolist() == [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    for top in (None, torch.tensor([1.0, torch.inf])):
        with pytest.raises(ValueError, match="declared ceiling"):
            Batch(**{**given, "top": top}).success()


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
