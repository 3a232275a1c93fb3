"""klbench's tasks as YAML tasks of lm-eval, `klbench_<family>` or `klbench_<family>_<variant>`.

    DIR/klbench_*.yaml     a task each, for `lm_eval run --include_path DIR`; the folder may be moved
    DIR/klbench_*.jsonl    its documents
    DIR/klbench_rows.py    reads them from where it lies: lm-eval would look for them in the working directory

A task whose audit `accuracy` compares probabilities of given texts becomes a multiple choice, whose `acc` is klbench's audit.accuracy: the
texts have the ids that they have behind the prompt, no EOS, nothing normalised by length. It runs wherever lm-eval and datasets are. Of
any other task draws are taken, DRAWS a prompt at temperature 1, and `reward` is their mean reward; that needs klbench beside lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, final

import yaml

from klbench import task as tasks
from klbench.audit import Chosen, first_chosen
from klbench.record import digest, write_atomically
from klbench.task import AbstractTask

OURS: Final = "klbench_"  # what names of klbench's tasks begin with in lm-eval
DRAWS: Final = 16  # documents of each score prompt where lm-eval draws: it draws one of each document
ACCURACY: Final = "accuracy"  # the audit that a multiple choice is made of
EARNED: Final = "klbench.harness.earned.earned"
READER: Final = "klbench_rows.py"
SOURCE: Final = '''"""Documents of klbench's tasks, from the files beside this one. Written by `klbench tasks export`."""

from pathlib import Path

import datasets


def rows(file, **metadata):
    """{"test": the lines of a file as documents}."""
    import json

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return datasets.DatasetDict({"test": datasets.Dataset.from_list([json.loads(line) for line in lines])})
'''


@final
class _Function(str):
    """A function's dotted name: `!function NAME` in YAML."""


@final
class _Dumper(yaml.SafeDumper):
    """YAML with lm-eval's tag."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def harness_name(task: str) -> str:
    """`klbench_family_variant` of `family/variant`."""
    return OURS + task.replace("/", "_")


def by_harness_name() -> dict[str, str]:
    """Names of the installed tasks by their names in lm-eval."""
    return {harness_name(name): name for name in tasks.names()}


def documents(name: str) -> str:
    """Digest of what lm-eval is given of an installed task."""
    config, rows = _made(harness_name(name), tasks.load(name))
    return digest([{key: str(value) for key, value in config.items()}, rows])


def export(folder: Path, names: Sequence[str], include: Sequence[Path] = ()) -> list[Path]:
    """Writes these tasks into `folder` and returns the YAML files. Raises UserError for a name that no task has, before it writes."""
    loaded = {harness_name(name): tasks.load(name, include) for name in names}
    made = {name: _made(name, task) for name, task in loaded.items()}
    written = []
    for name, (config, found) in made.items():
        lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in found)
        write_atomically(folder / f"{name}.jsonl", lines.encode())
        text = yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        write_atomically(folder / f"{name}.yaml", f"# {loaded[name].summary}\n{text}".encode())
        written.append(folder / f"{name}.yaml")
    write_atomically(folder / READER, SOURCE.encode())
    return written


def _made(name: str, task: AbstractTask) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """lm-eval's configuration of a task, and its documents."""
    found = [a for a in task.audits() if isinstance(a, Chosen) and a.name == ACCURACY and a.combine is first_chosen]
    kind, documents = _choice(found[0]) if found else _drawn(task)
    config = {
        "task": name,
        "custom_dataset": _Function(f"{READER.removesuffix('.py')}.rows"),
        "dataset_kwargs": {"file": f"{name}.jsonl"},
        "test_split": "test",
        "doc_to_text": "prompt",
        "num_fewshot": 0,
        **kind,
        "metadata": {
            "version": task.version,
            "klbench_task": task.name,
            "summary": task.summary,
            "licence": _licence(task),
        },
    }
    return config, documents


def _choice(audit: Chosen) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A multiple choice whose first text is right. The space before every text is lm-eval's delimiter."""
    spaced = all(text.startswith(" ") and not text.startswith("  ") for row in audit.texts for text in row)
    kind = {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "target_delimiter": " " if spaced else "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    cut = int(spaced)
    return kind, [{"prompt": p, "choices": [text[cut:] for text in row]} for p, row in zip(audit.prompts, audit.texts, strict=True)]


def _drawn(task: AbstractTask) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draws at temperature 1, nothing truncated; klbench counts what they earn."""
    kind = {
        "output_type": "generate_until",
        "doc_to_target": "",
        "process_results": _Function(EARNED),
        "generation_kwargs": {
            "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "until": [], "max_gen_toks": task.max_new_tokens,
        },
        "metric_list": [{"metric": "reward", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    return kind, [{"prompt": p, "klbench_task": task.name} for p in task.prompts("score") for _ in range(DRAWS)]


def _licence(task: AbstractTask) -> str:
    """Which licences lie beside the task's data."""
    package = type(task).__module__.rpartition(".")[0]
    found = sorted(p.name for p in files(package).iterdir() if p.name.startswith("LICENSE")) if package else []
    return f"klbench: Apache-2.0; data: {', '.join(found)} in {package.replace('.', '/')}" if found else "klbench: Apache-2.0"
