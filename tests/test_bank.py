"""Banks travel as bytes: the same draws the same bytes, and what is no bank is refused by name, unopened where it is pickled."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from klbench.bank import Bank
from klbench.errors import UserError


def f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)


def bank(seed: int = 0, top: int = 900, gold: bool = True, feature: bool = False) -> Bank:
    rng = np.random.default_rng(seed)
    P, N, T = 3, 16, 5
    mask = np.arange(T) < rng.integers(1, T + 1, (P, N))[:, :, None]
    return Bank(
        tokens=(rng.integers(0, top, (P, N, T)) * mask).astype(np.int32),
        mask=mask,
        log_p0=f32(-rng.exponential(9, (P, N))),
        reward=f32(rng.normal(size=(P, N))),
        gold=f32(rng.normal(size=(P, N))) if gold else None,
        feature=f32(rng.normal(size=(P, N))) if feature else None,
        meta={"task": "toy", "version": 3, "draws": N},
    )


def same(a: Bank, b: Bank) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert other.dtype == value.dtype
            np.testing.assert_array_equal(other, value)
        else:
            assert other == value


@pytest.mark.parametrize("change", [{}, {"gold": False}, {"feature": True}, {"top": 150_000}])
def test_round_trip(change: dict[str, Any]) -> None:
    there = bank(**change)
    back = Bank.from_bytes(there.to_bytes(), "here")
    same(there, back)
    assert back.hash == there.hash


def test_equal_banks_are_equal_bytes_whenever_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bank().to_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert bank().to_bytes() == first == Bank.from_bytes(first, "here").to_bytes()
    assert bank(seed=1).to_bytes() != first


def test_the_hash_sees_draws_rewards_and_where_they_come_from() -> None:
    there = bank()
    reward, tokens, mask, log_p0 = there.reward.copy(), there.tokens.copy(), there.mask.copy(), there.log_p0.copy()
    reward[2, 3] += 1
    tokens[0, 0, 0] += 1
    mask[1, 1, 0] ^= True
    log_p0[2, 15] -= 1
    changed = [
        replace(there, **x) for x in ({"reward": reward}, {"tokens": tokens}, {"mask": mask}, {"log_p0": log_p0}, {"meta": {"task": "t"}})
    ]
    assert len({there.hash, *(other.hash for other in changed)}) == 6


def test_first_cuts_prompts_and_zero_means_all() -> None:
    there = bank(feature=True)
    cut = there.first(2)
    assert there.first(0) is there
    for name in ("tokens", "mask", "log_p0", "reward", "gold", "feature"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(there, name)[:2])
    assert cut.meta == there.meta and there.first(7).reward.shape == (3, 16)
    assert bank(gold=False).first(1).gold is None


def test_token_lists_drop_the_end_the_mask_and_what_is_not_kept() -> None:
    tokens = np.array([[[5, 0, 0], [6, 7, 0], [8, 8, 8]], [[0, 0, 0], [9, 0, 0], [1, 2, 3]]], dtype=np.int32)
    mask = np.array([[[1, 1, 0], [1, 1, 1], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 0]]], dtype=bool)
    zeros = np.zeros((2, 3))
    there = Bank(tokens, mask, zeros, zeros, None, None, {})
    keep = np.array([[True, True, False], [True, False, True]])
    assert there.token_lists(keep, [0]) == [[[5], [6, 7]], [[], [1, 2]]]
    assert there.token_lists(keep, []) == [[[5, 0], [6, 7, 0]], [[0], [1, 2]]]


@pytest.mark.parametrize("keep", [0, 1, 40, 0.5, -1])
def test_a_truncated_bank_is_refused_by_name(keep: float) -> None:
    data = bank().to_bytes()
    cut = data[: int(len(data) * keep) if isinstance(keep, float) else keep]
    with pytest.raises(UserError, match=r"^runs/b.npz is not a bank: ") as error:
        Bank.from_bytes(cut, "runs/b.npz")
    assert "\n" not in str(error.value)


def test_a_flipped_byte_is_refused() -> None:
    data = bytearray(bank().to_bytes())
    at = data.index(b"reward.npy") + 60
    data[at] ^= 0xFF
    with pytest.raises(UserError, match="b.npz is not a bank"):
        Bank.from_bytes(bytes(data), "b.npz")


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_bank_is_never_opened(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    out = io.BytesIO()
    np.savez_compressed(out, tokens=np.array([Bomb(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="evil.npz is not a bank: .*allow_pickle"):
        Bank.from_bytes(out.getvalue(), "evil.npz")
    assert not trap.exists()
    np.load(io.BytesIO(out.getvalue()), allow_pickle=True)["tokens"]  # the trap works
    assert trap.exists()


def test_other_archives_are_no_banks() -> None:
    empty, plain = io.BytesIO(), io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    np.savez(plain, tokens=np.zeros((2, 2)))
    alone = io.BytesIO()
    np.save(alone, np.zeros(3))
    for data in (empty, plain, alone):
        with pytest.raises(UserError, match="x.npz is not a bank"):
            Bank.from_bytes(data.getvalue(), "x.npz")
