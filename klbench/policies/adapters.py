"""PEFT adapters: those of files, safetensors only, merged into a float32 copy of their base, never the base itself; new ones to train."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from klbench.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (folder / CONFIG).is_file()


def folder_of(spec: str) -> Path:
    """The folder of an adapter: a local one, or `owner/name` fetched from a hub. Raises UserError when there is no adapter."""
    path = Path(spec)
    if path.is_dir():
        if not is_adapter(path):
            raise UserError(f"no adapter in {path}: {CONFIG} is missing")
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", spec) or spec.startswith("."):
        raise UserError(f"no adapter directory at {spec}")
    from huggingface_hub import hf_hub_download

    try:
        return Path([hf_hub_download(spec, name) for name in (WEIGHTS, CONFIG)][1]).parent
    except Exception as error:  # of networks, hubs and caches
        raise UserError(f"no adapter could be fetched from {spec}: {' '.join(str(error).split())[:200]}") from None


def base_of(folder: Path) -> str:
    """What the adapter says that it was trained on; empty where it does not say."""
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read: {error}") from None
    return str((told.get("base_model_name_or_path") if isinstance(told, dict) else None) or "")


def merged(name: str, model: Any, folder: Path) -> Any:
    """A float32 copy of `model` with the adapter's weights added in; `name`: what the model is called in errors.

    Raises UserError that names the adapter when peft is missing, when its weights are no safetensors, or when they do not fit the model.
    """
    try:
        import peft
    except ImportError:
        raise UserError(f"{folder} is a PEFT adapter, and peft is not installed: pip install peft") from None
    if not (folder / WEIGHTS).is_file():
        other = next((p.name for p in folder.glob("adapter_model.*")), None)
        raise UserError(f"no {WEIGHTS} in {folder}" + (f"; {other} is a pickle, which klbench never loads" if other else ""))
    base = copy.deepcopy(model).float()
    tables = {
        f"base_model.model.{n}.weight" for n, m in base.named_modules() if m in (base.get_input_embeddings(), base.get_output_embeddings())
    }
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            held = set(file.keys())
            rows = max((file.get_slice(key).get_shape()[0] for key in held & tables), default=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of keys is looked at below, and refused
            if rows > base.get_input_embeddings().weight.shape[0]:  # trained with words added to the vocabulary
                base.resize_token_embeddings(rows, mean_resizing=False)
            wrapped = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=False)
            read = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
            if held - tables != read - tables:
                odd = sorted((held ^ read) - tables)
                raise UserError(f"the adapter in {folder} does not fit {name}: {len(odd)} of its weights have no place there, as {odd[0]}")
            if not hasattr(wrapped.base_model, "merge_and_unload"):
                raise UserError(
                    f"the adapter in {folder} is {wrapped.active_peft_config.peft_type.value}: it cannot be merged into weights"
                )
            return wrapped.merge_and_unload().float().requires_grad_(True).eval()
    except UserError:
        raise
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError, OSError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter in {folder} does not fit {name}: {type(error).__name__}: {why}") from None


def low_rank(name: str, model: Any, rank: int, seed: int) -> Any:
    """A LoRA tuner whose `.model` is `model` with W + B A in place of each linear W but the head's; B = 0, so it says what `model` says.

    Only A and B are trained. All else shares the memory of `model`, whose own flags stay as they are: nothing may write to it.
    Raises UserError where there is no linear layer to be found.
    """
    import peft

    shared = {id(p): torch.nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GPT-2 keeps its weights the other way round, which peft sees to
            torch.default_generator.manual_seed(seed)  # A is drawn from it
            return peft.LoraModel(copy.deepcopy(model, shared), config, "default")
    except ValueError as error:
        raise UserError(f"{name} takes no LoRA adapter: {' '.join(str(error).split())[:200]}") from None


def folded(tuner: Any) -> Any:
    """The model of a tuner of `low_rank` with W + B A written out as one matrix each, in memory of its own."""
    return copy.deepcopy(tuner).merge_and_unload().requires_grad_(True).eval()
