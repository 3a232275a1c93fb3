"""Priors and policies from what people write.

    BASE[+ADAPTER][@DECODING[,DECODING ...]]        DECODING[,DECODING ...] alone is prior@DECODING...

BASE: a shipped prior's name, a directory in Hugging Face format, `owner/name` on a hub, or `prior`, the prior that was given.
ADAPTER: a directory or hub name of a PEFT adapter; alone it stands on the base that it names, where that is a directory, else on the prior.
DECODING: `temperature:0.7`, `top_p:0.9`, or `system:FILE`, a system prompt read from a text file; they apply in the order written. A blend
(`realignment:0.5`) mixes the policy with the prior and comes first. `emulated:SMALL` comes before all: BASE is then a small model that was
tuned from SMALL, a base too, and the policy is the prior times BASE/SMALL; `emulated:SMALL,realignment:0.5` has that ratio's square root.
A path that exists as a whole is that path, whatever + and @ it holds; of `prior` and `mini` the directory is ./prior and ./mini. Beyond
text: transformers models in memory, klbench policies, samplers and decodings, and objects that only draw.

Of a policy and its prior the same token ids are compared. Words that a trainer added behind the prior's are left out of the policy's law,
and so are columns of either model beyond the other's, unless they are words of the prior; a policy that reads or writes ids otherwise
keeps its draws and has no density. Nothing that a user hands over is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from klbench import method
from klbench.errors import UserError, unknown
from klbench.method import AbstractBlend, AbstractDecoding, AbstractSampler, AbstractSteering
from klbench.policies import adapters, causal_lm
from klbench.policies.blended import Blended, emulated
from klbench.policies.causal_lm import CausalLM
from klbench.policies.passes import HALF
from klbench.priors import SHIPPED, prior_path
from klbench.target import Drawer, Policy, WithoutDensity

PRIOR: Final = "prior"
SYSTEM: Final = "system"
EMULATED: Final = "emulated"
HUB: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*")

Opened = Policy | AbstractSampler | AbstractSteering | WithoutDensity


@final
@dataclass(frozen=True)
class Spec:
    """A policy as text, taken apart. system: the prompt itself, not its file.  untuned: place of what the base was tuned from."""

    base: str
    adapter: str = ""
    decodings: tuple[AbstractDecoding | AbstractBlend, ...] = ()
    system: str | None = None
    untuned: str = ""

    @classmethod
    def parse(cls, text: str, include: tuple[Path, ...] = ()) -> Spec:
        """Raises UserError for an unknown decoding, with the nearest name."""
        if Path(text).exists():
            return cls(text)
        base, adapter = _parted(text, "+", lambda rest: Path(rest).exists())
        if base and adapter and Path(adapter).exists():
            return cls(base, adapter)
        if _names_decoding(text, include):
            text = f"{PRIOR}@{text}"
        head, tail = _parted(text, "@", lambda rest: _names_decoding(rest, include))
        base, adapter = _parted(head, "+", lambda rest: Path(rest).exists())
        if (tail is not None and not tail) or (adapter is not None and not adapter) or not base:
            raise UserError(f"{text!r}: BASE[+ADAPTER][@DECODING,...] expected, with nothing empty")
        decodings, system, untuned = _decodings(tail, include) if tail else ((), None, "")
        return cls(base, adapter or "", decodings, system, untuned)


def _parted(text: str, mark: str, fits: Callable[[str], bool]) -> tuple[str, str | None]:
    """What stands before and behind a mark, or the text and None. Of several marks the last with a thing that exists before it is taken,
    else the first; those with a rest that fits come before those without."""
    places = [i for i, c in enumerate(text) if c == mark]
    if Path(text).exists() or not places:
        return text, None
    places = [i for i in places if fits(text[i + 1 :])] or places
    at = next((i for i in reversed(places) if _exists(text[:i])), places[0])
    return text[:at], text[at + 1 :]


def _exists(base: str) -> bool:
    return base in (PRIOR, *SHIPPED) or (base != "" and Path(base).exists())


def _samplers(include: tuple[Path, ...]) -> list[str]:
    return [*method.names("samplers"), *(p.stem for folder in include for p in folder.glob("*.py"))]


def _names_decoding(text: str, include: tuple[Path, ...]) -> bool:
    """Whether text starts with the name of a decoding."""
    name = re.split("[:,]", text, maxsplit=1)[0].replace("-", "_")
    return name in (SYSTEM, EMULATED) or (
        name in _samplers(include) and isinstance(method.sampler(name, include), AbstractDecoding | AbstractBlend)
    )


def _decodings(text: str, include: tuple[Path, ...]) -> tuple[tuple[AbstractDecoding | AbstractBlend, ...], str | None, str]:
    """Decodings in order, the system prompt and what is untuned. A comma in the name of a file is one where no decoding's name follows."""
    parts: list[str] = []
    for part in text.split(","):
        if parts and parts[-1].startswith((f"{SYSTEM}:", f"{EMULATED}:")) and not _names_decoding(part, include):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    found: list[AbstractDecoding | AbstractBlend] = []
    system, untuned = None, ""
    for part in parts:
        name, _, argument = part.partition(":")
        if name == EMULATED:
            if found or untuned or not argument:
                raise UserError(f"{text!r}: emulated:SMALL expected, once and before other decodings")
            untuned = argument
            continue
        if name == SYSTEM:
            if system is not None:
                raise UserError(f"{text!r}: one system prompt expected")
            system = _system(argument)
            continue
        made = method.sampler(part, include)
        if not isinstance(made, AbstractDecoding | AbstractBlend):
            raise UserError(f"{part!r} draws from the prior by itself: it stands alone, not behind an @")
        found.append(made)
    return tuple(found), system, untuned


def _system(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"system prompt {file!r} cannot be read: {error}") from None
    if not text:
        raise UserError(f"system prompt {file!r} is empty")
    return text


def open_prior(
    spec: Any, device: str | None = "cpu", *, chat: bool = False, tokenizer: Any = None, trust_remote_code: bool = False
) -> Policy:
    """A prior from text, a model in memory or a Policy, which is returned as it is.

    device: None leaves a model in memory where it is.  chat: prompts are turns of the tokenizer's chat template.  tokenizer: one in
    memory, or where to load it, in place of the one beside the model. Raises UserError, of one line, for whatever cannot be a prior.
    """
    if isinstance(spec, Policy):
        return spec
    hands = _Hands(str(spec) if isinstance(spec, str | Path) else PRIOR, None, device, chat, tokenizer, trust_remote_code)
    if isinstance(spec, str | Path):
        return hands.text(Spec.parse(str(spec)))
    if _in_memory(spec):
        return hands.model(spec)
    raise UserError(f"prior: a name, a path, a hub name, a transformers model or a klbench Policy expected, got {type(spec).__name__}")


def open_policy(
    name: str, spec: Any, prior: Policy, device: str | None = "cpu", *, chat: bool = False, tokenizer: Any = None,
    trust_remote_code: bool = False, include: tuple[Path, ...] = (),
) -> Opened:  # fmt: skip
    """A policy to be compared with `prior`: what `open_prior` takes, and samplers, decodings, adapters and objects without `log_prob`.

    The prior itself comes back for `prior` and `ancestral`. A WithoutDensity comes back where no probability can be computed. include:
    directories with samplers of the user's own. Raises UserError, of one line that names `name` or the thing, for whatever is no policy.
    """
    if isinstance(spec, AbstractSampler | AbstractSteering | WithoutDensity):
        return spec
    hands = _Hands(name, prior, device, chat, tokenizer, trust_remote_code)
    if isinstance(spec, AbstractDecoding):
        return hands.text(Spec(PRIOR, decodings=(spec,)))
    if isinstance(spec, Policy):
        return _beside(prior, spec)
    if isinstance(spec, str | Path):
        text = str(spec)
        alone = text.partition(":")[0].replace("-", "_") in _samplers(include) and not Path(text).exists()
        if alone and not _names_decoding(text, include):
            made = method.sampler(text, include)
            assert isinstance(made, AbstractSampler | AbstractSteering)
            return prior if text == "ancestral" else made
        parsed = Spec.parse(text, include)
        return prior if parsed == Spec(PRIOR) else _beside(prior, hands.text(parsed))
    if _in_memory(spec):
        return _beside(prior, hands.model(spec))
    if isinstance(spec, Drawer):
        return WithoutDensity(spec, f"{type(spec).__name__} has no log_prob: it draws, and nobody knows with what probability")
    raise UserError(f"{name}: a path, a hub name, a transformers model, a klbench Policy or a sampler expected, got {type(spec).__name__}")


def _in_memory(spec: Any) -> bool:
    return hasattr(spec, "forward") and hasattr(spec, "config")


@final
@dataclass(frozen=True)
class _Hands:
    """What is known when a model is opened; `prior` None when it is the prior."""

    name: str
    prior: Policy | None
    device: str | None
    chat: bool
    tokenizer: Any
    trust: bool

    def model(self, model: Any) -> CausalLM:
        """Of a model in memory: its tokenizer is the one given, else the one beside the directory it came from, else the prior's."""
        source = str(getattr(model.config, "_name_or_path", "") or "")
        words, notes = self._given(), []
        if words is None and source and Path(source).is_dir() and causal_lm.has_tokenizer(Path(source)):
            words = causal_lm.tokenizer_of(source, self.trust)
        elif words is None and isinstance(self.prior, CausalLM):
            words = self.prior.tokenizer
        elif words is None and HUB.fullmatch(source):
            words = causal_lm.tokenizer_of(source, self.trust)
        elif words is None:
            raise UserError(f"{self.name}: a transformers model in memory needs tokenizer=...")
        if model.dtype in HALF:
            notes.append(f"weights in {str(model.dtype).removeprefix('torch.')} are scored as a float32 copy")
        return causal_lm.wrap(self.name, model, words, self.device, chat=self.chat, notes=notes)

    def text(self, spec: Spec) -> CausalLM:
        """Of text, taken apart."""
        if spec.base == PRIOR and not spec.adapter:
            if spec.untuned:
                raise UserError(f"{self.name}: name the tuned model before it, as in TUNED@emulated:{spec.untuned}")
            if any(isinstance(x, AbstractBlend) for x in spec.decodings):
                raise UserError(f"{self.name}: a blend mixes a policy with the prior: name the policy, as in POLICY@realignment:0.5")
            return self._prior().prompted(self.name, spec.system, [x for x in spec.decodings if isinstance(x, AbstractDecoding)])
        base, adapter = spec.base, spec.adapter
        if not adapter and adapters.is_adapter(Path(base)):
            if any(Path(base).glob("model*.safetensors")):
                raise UserError(f"{base} holds both a model and an adapter: keep the one that is meant, or name the adapter as BASE+{base}")
            base, adapter = self._base_of(Path(base)), base
        folder = adapters.folder_of(adapter) if adapter else None
        if base == PRIOR:
            prior = self._prior()
            where, model, beside = prior.device, prior.model, prior.tokenizer
            spec = replace(spec, system=spec.system or prior.system, decodings=(*prior.decodings, *spec.decodings))
        else:
            place = self._place(base)
            where, beside = causal_lm.device_of(self.device or "cpu"), None
            model = causal_lm.model_of(place, self.name, trust_remote_code=self.trust)
            spec = replace(spec, system=spec.system or causal_lm.system_of(place))
            if not Path(place).is_dir() or causal_lm.has_tokenizer(Path(place)):
                beside = place
        if folder is not None:
            model = adapters.merged(base, model, folder)
            beside = folder if causal_lm.has_tokenizer(folder) else beside
        words, notes = self._words(beside, base)
        model = model.to(where).eval()
        if spec.untuned:
            untuned = self._untuned(spec.untuned, words)
            model = Blended(emulated, EMULATED, model, untuned.to(where), self._prior().model).eval()
        for blend in (x for x in spec.decodings if isinstance(x, AbstractBlend)):
            if isinstance(spec.decodings[0], AbstractDecoding):
                raise UserError(f"{self.name}: a blend mixes two models as they are: it comes before other decodings")
            if causal_lm.extra_words(words, self._prior().tokenizer) is None:
                raise UserError(f"{self.name}: a blend needs two models of one tokenizer, and the prior's is another")
            model = Blended(blend.law, repr(blend), model, self._prior().model).eval()
        decodings = tuple(x for x in spec.decodings if isinstance(x, AbstractDecoding))
        return causal_lm.settled(self.name, model, words, chat=self.chat, system=spec.system, decodings=decodings, notes=notes)

    def _prior(self) -> CausalLM:
        if self.prior is None:
            raise UserError(f"{self.name}: {PRIOR!r} is the prior itself; a prior is a name, a directory or a hub name")
        if not isinstance(self.prior, CausalLM):
            raise UserError(f"{self.name}: a decoding or adapter of the prior needs a causal language model, and the prior is none")
        return self.prior

    def _untuned(self, base: str, words: Any) -> Any:
        """The model that a small one was tuned from. Raises UserError unless it, the tuned one and the prior read the same ids."""
        place = self._place(base)
        theirs = {"the prior": self._prior().tokenizer}
        if not Path(place).is_dir() or causal_lm.has_tokenizer(Path(place)):
            theirs[base] = causal_lm.tokenizer_of(place, self.trust)
        for whose, other in theirs.items():
            if causal_lm.extra_words(words, other) is None:
                raise UserError(f"{self.name}: {EMULATED} needs three models of one tokenizer, and that of {whose} is another")
        return causal_lm.model_of(place, self.name, trust_remote_code=self.trust)

    def _base_of(self, folder: Path) -> str:
        """Where the base of an adapter is that was named without one."""
        told = adapters.base_of(folder)
        if told and Path(told).is_dir():
            return told
        if self.prior is None:
            which = f"its base {told!r} is no directory here" if told else "it names no base"
            raise UserError(f"{folder} is a PEFT adapter and {which}: write BASE+{folder}")
        return PRIOR

    def _place(self, base: str) -> str:
        """The directory or hub name of a base. Raises UserError with the nearest name."""
        if base in SHIPPED:
            return str(prior_path(base))
        if "/" not in base and not Path(base).exists():
            if self.prior is None:
                raise unknown("prior (nor a directory)", base, SHIPPED)
            known = [*method.names("samplers"), *SHIPPED, SYSTEM]
            raise unknown("model directory, hub name or sampler", base, known)
        return base

    def _given(self) -> Any:
        return causal_lm.tokenizer_of(self.tokenizer, self.trust) if isinstance(self.tokenizer, str | Path) else self.tokenizer

    def _words(self, beside: Any, base: str) -> tuple[Any, list[str]]:
        """The tokenizer given, the one found beside the weights (itself, or its place), or the prior's; and what to say of that."""
        given = self._given()
        if given is not None:
            return given, []
        if beside is not None:
            return (causal_lm.tokenizer_of(beside, self.trust) if isinstance(beside, str | Path) else beside), []
        if isinstance(self.prior, CausalLM):
            return self.prior.tokenizer, ["no tokenizer lies beside its weights: the prior's is used"]
        return causal_lm.tokenizer_of(base, self.trust), []


def _beside(prior: Policy, policy: Policy) -> Policy | WithoutDensity:
    """The policy over the prior's words, or without a density where its ids are others."""
    if policy is prior or not isinstance(policy, CausalLM) or not isinstance(prior, CausalLM):
        return policy
    extra = causal_lm.extra_words(policy.tokenizer, prior.tokenizer)
    if extra is None:
        ours, theirs = (f"the tokenizer of {m.name} ({len(m.tokenizer.get_vocab())} words)" for m in (policy, prior))
        return WithoutDensity(policy, f"{ours} is another than {theirs}: their probabilities are of different sequences")
    words, notes = _words_of(prior), list(policy.notes)
    ends = [word for word, i in extra.items() if i in policy.stops and i < policy.columns]
    if ends:
        return WithoutDensity(policy, f"{policy.name} ends a sequence with {ends[0]!r}, which the tokenizer of {prior.name} has not")
    written = sorted(word for word, i in extra.items() if i < policy.columns)
    columns = min(policy.columns, prior.columns)
    if written:
        columns = min(columns, words)
        notes.append(f"{len(written)} words that the prior lacks ({_some(written)}) are left out of its law, renormalised over the prior's")
    elif columns < policy.columns:
        notes.append(f"{policy.columns - columns} columns beyond the prior's are left out of its law, renormalised")
    if policy.columns < words:
        notes.append(f"its embeddings end before the prior's last {words - policy.columns} words, which it never writes")
    policy = policy.with_words(columns)
    return policy if tuple(notes) == policy.notes else replace(policy, notes=tuple(notes))


def _some(words: list[str]) -> str:
    return ", ".join(map(repr, words[:3])) + (", ..." if len(words) > 3 else "")


def _words_of(prior: CausalLM) -> int:
    """Ids of the prior that are words of its tokenizer; those beyond pad its embeddings to a round number."""
    return min(prior.columns, max(prior.tokenizer.get_vocab().values()) + 1)


def union_of_stops(prior: Policy, policies: Iterable[Any]) -> tuple[int, ...]:
    """The ids at which the prior or any policy ends a sequence, the prior's first; empty where the prior has no such ids."""
    causal: Iterator[CausalLM] = (m for m in (prior, *policies) if isinstance(m, CausalLM))
    return tuple(dict.fromkeys(i for m in causal for i in m.stops)) if isinstance(prior, CausalLM) else ()


def with_common_stops(prior: Policy, policies: Mapping[str, Opened]) -> tuple[Policy, dict[str, Opened]]:
    """The prior and its policies over the same sequences: ended by the same stops, written in the same columns.

    To be called before anything is drawn. Columns that pad one model's embeddings and that another lacks are left out of all; words of the
    prior's tokenizer never are. What is the prior stays the prior, and policies that need no change are the same objects.
    """
    if not isinstance(prior, CausalLM):
        return prior, dict(policies)
    stops = union_of_stops(prior, policies.values())
    least = min([prior.columns, *(m.columns for m in policies.values() if isinstance(m, CausalLM))])
    columns = max(least, _words_of(prior))
    common = prior.with_stops(stops).with_words(columns)
    return common, {
        name: common if m is prior else m.with_stops(stops).with_words(columns) if isinstance(m, CausalLM) else m
        for name, m in policies.items()
    }
