"""Two ways of calling one reward: klbench's, with texts, and that of TRL's trainers, with texts or with turns of a chat.

    f(prompts, completions, **kwargs) -> one float a completion

On chat data TRL hands over lists of messages, {"role": ..., "content": ...}; its own reward functions read nothing else, or read token
ids. A function says which it wants by its signature: `completions` annotated as lists of dicts are messages, a parameter `completion_ids`
is token ids. Whatever the caller has is turned into that.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from klbench.errors import UserError

GIVEN: Final = ("prompts", "completions", "completion_ids")


def text_of(turns: Any) -> str:
    """A text as it is; of a list of messages the content of the last."""
    if isinstance(turns, str):
        return turns
    if isinstance(turns, Sequence) and turns and isinstance(turns[-1], Mapping) and isinstance(turns[-1].get("content"), str):
        return str(turns[-1]["content"])
    raise UserError(f"a reward reads texts or lists of messages with a text as content, not {turns!r:.80}")


def texts_of(many: Sequence[Any]) -> list[str]:
    """Each as a text."""
    return [text_of(one) for one in many]


def messages_of(many: Sequence[Any], role: str) -> list[Any]:
    """Each as a list of messages; a text becomes one turn of that role."""
    return [[{"role": role, "content": one}] if isinstance(one, str) else one for one in many]


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """By name, annotations resolved where that can be done. What does not tell, as some functions written in C, takes anything."""
    for resolved in (True, False):
        try:
            return dict(inspect.signature(function, eval_str=resolved).parameters)
        except Exception:  # an annotation is an expression, and may raise whatever it likes
            continue
    return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


@final
@dataclass(frozen=True, eq=False)
class Called:
    """A function as a reward for both callers. `name` and `reward_max` (inf: none is declared) are the function's own.

    messages: it reads messages.  ids: it reads token ids.  accepts: the keywords it takes, None for any.  tokenizer: what writes the ids of
    a text that comes without them, so that a reward of token ids is a function of the text.
    """

    function: Callable[..., Any]
    name: str
    reward_max: float
    messages: bool
    ids: bool
    accepts: frozenset[str] | None
    tokenizer: Any = None

    @property
    def __name__(self) -> str:
        return self.name

    def reading(self, tokenizer: Any) -> Called:
        """The same with the words in which token ids are counted."""
        return replace(self, tokenizer=tokenizer)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Raises UserError for a reward of token ids that got neither ids nor a tokenizer."""
        if self.messages:
            given: dict[str, Any] = {"prompts": messages_of(prompts, "user"), "completions": messages_of(completions, "assistant")}
        else:
            given = {"prompts": texts_of(prompts), "completions": texts_of(completions)}
        if self.ids and "completion_ids" not in kwargs:
            if self.tokenizer is None:
                raise UserError(f"reward {self.name} reads token ids: it needs the tokenizer that klbench.score has")
            given["completion_ids"] = [list(self.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts_of(completions)]
        given |= kwargs
        found = self.function(**(given if self.accepts is None else {k: v for k, v in given.items() if k in self.accepts}))
        values: list[float] = asyncio.run(found) if inspect.iscoroutine(found) else found
        return values


def called(function: Callable[..., Any]) -> Called:
    """Raises UserError for a function that needs what klbench does not have, as a column of a training set."""
    plain = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = str(getattr(plain, "__name__", type(plain).__name__))
    parameters = _parameters(function)
    named = {k: p for k, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    lacking = [k for k, p in named.items() if p.default is p.empty and k not in GIVEN]
    if lacking:
        raise UserError(f"reward {name} needs {', '.join(lacking)}, and a reward here is a function of prompts and completions alone")
    says = str(named["completions"].annotation) if "completions" in named else ""
    ceiling = getattr(plain, "reward_max", None)
    return Called(
        function, name, math.inf if ceiling is None else float(ceiling), "dict" in says and "list[str]" not in says.lower(),
        "completion_ids" in named, frozenset(named) if len(named) == len(parameters) else None,
    )  # fmt: skip
