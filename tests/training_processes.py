"""One of several processes that train: `python training_processes.py FOLDER CASES`, the environment saying which one it is.

CASES: {name: [objective, kind of model, train settings, the step before which process 1 dies, or 0]} in JSON; each is trained into its own
folder. What is said of a case that fails goes to standard output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from test_train import Letters, asked
from tiny import model, tokenizer

from klbench.errors import UserError
from klbench.policies.causal_lm import wrap
from klbench.processes import joined
from klbench.train import _Loop, train


def main(folder: Path, cases: dict[str, tuple[str, str, dict[str, object], int]]) -> None:
    torch.set_num_threads(1)
    processes, device = joined("cpu")
    step = _Loop.step
    for name, (objective, kind, settings, dies) in cases.items():

        def dying(self: _Loop, state: dict[str, torch.Tensor], number: int, at: int = dies) -> object:
            if at and number + 1 == at and processes.rank == 1:
                os._exit(1)
            return step(self, state, number)

        _Loop.step = dying  # type: ignore[assignment, method-assign]
        prior = wrap("tiny", model(kind, 4), tokenizer())
        before = prior.weights_hash()
        try:
            policy, _ = train(asked(objective, **settings), Letters(), prior, folder / name, processes=processes, device=device)
        except UserError as error:
            print(f"{name}: {error}", flush=True)
            os._exit(2)
        assert prior.weights_hash() == before
        (folder / f"{name}.{processes.rank}").write_text(policy.weights_hash())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
