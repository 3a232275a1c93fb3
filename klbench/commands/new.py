"""`klbench new task|objective NAME`: a folder or a file that is sound and runs as it stands, to be edited."""

from __future__ import annotations

import json
import keyword
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from klbench.errors import UserError

WHO: Final = ("teacher", "nurse", "plumber", "surgeon", "painter", "scientist", "secretary", "firefighter")
WORDINGS: Final = {
    "train": ("The {} was late for work because", "The {} was happy because"),
    "dev": ("The {} went home early because",),
    "score": ("The {} was tired because",),
}

app = typer.Typer(help="Start a task or an objective of your own.", rich_markup_mode=None, no_args_is_help=False)
Folder = Annotated[Path, typer.Option("--dir", help="where it is put, and what --include then names")]


@app.command("task")
def new_task(name: Annotated[str, typer.Argument(help="family, or family/variant")], where: Folder = Path(".")) -> None:
    """Write DIR/FAMILY: task.py, prompts in three splits, README.md and LICENSE-data. Edit the prompts, the reward and the README."""
    from klbench import task

    name = name.replace("-", "_")
    if not task.NAME.fullmatch(name) or any(keyword.iskeyword(part) for part in name.split("/")):
        raise UserError(f"task {name!r}: `family` or `family/variant` expected, in small letters, digits and underscores")
    if name in task.names():
        raise UserError(f"there is a task {name!r} already: klbench ls tasks")
    family = name.partition("/")[0]
    folder = where / family
    _refuse(folder)
    context = {"name": name, "title": _title(name), "rates": _rendered("rates.md.j2", {"name": name}).strip()}
    texts = {
        "task.py": _rendered("task.py.j2", context),
        "README.md": _rendered("readme.md.j2", context),
        "LICENSE-data": _rendered("license.j2", context),
    }
    for split, wordings in WORDINGS.items():
        texts[f"{split}.jsonl"] = "".join(json.dumps({"prompt": w.format(who)}) + "\n" for who in WHO for w in wordings)
    _write(folder, texts)
    print(folder)
    print(f"next: klbench validate {folder.as_posix()}")
    print(f"      klbench run quick --task {name} --include {where.as_posix()}")


@app.command("objective")
def new_objective(
    name: Annotated[str, typer.Argument(help="a Python name: the file's and the objective's")], where: Folder = Path(".")
) -> None:
    """Write DIR/NAME.py, an objective that keeps every law. Edit its loss, what it states, and its docstring."""
    from klbench import method

    name = name.replace("-", "_")
    if not name.isidentifier() or not name.islower() or keyword.iskeyword(name):
        raise UserError(f"objective {name!r}: a Python name in small letters expected, as it is called by its file's")
    for kind in ("objectives", "samplers"):
        if name in method.names(kind):
            raise UserError(f"there is one called {name!r} already: klbench ls {kind}")
    path = where / f"{name}.py"
    _refuse(path)
    _write(path, _rendered("objective.py.j2", {"title": _title(name)}))
    print(path)
    print(f"next: klbench validate {path.as_posix()}")
    print(f"      klbench run quick --objective {name} --include {where.as_posix()}")


def _title(name: str) -> str:
    """`my_family/variant` as a class name: MyFamilyVariant."""
    return "".join(part.capitalize() for part in name.replace("/", "_").split("_"))


def _rendered(template: str, context: dict[str, Any]) -> str:
    import jinja2

    text = files("klbench.templates").joinpath(template).read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text).render(context)


def _refuse(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists: another name, or another --dir")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{path} cannot be written: {above} is {'no directory' if not above.is_dir() else 'not writable'}")


def _write(path: Path, content: dict[str, str] | str) -> None:
    """The file, or the folder of files, whole under its name or not at all. Raises UserError when the disk says no."""
    made = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            os.chmod(part, 0o755)
            for name, text in {path.name: content}.items() if isinstance(content, str) else content.items():
                (part / name).write_text(text, encoding="utf-8")
            os.rename(part / path.name if isinstance(content, str) else part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
