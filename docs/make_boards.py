"""Writes what stands around the published boards, from their files:

    leaderboards/<suite>/manifest.json   `links`, and with them the board's pages built anew
    leaderboards/README.md               the table between its two marks
    leaderboards/index.html              that README as the front page

    python docs/make_boards.py
    python docs/make_boards.py --site DIR --repository https://github.com/OWNER/NAME

The second is for a site, which holds no more of the repository than DIR: it writes DIR/index.html alone, where commits and files outside
of leaderboards/ are links into the repository.
"""

from __future__ import annotations

import argparse
import json
import re
from html import escape
from pathlib import Path
from typing import Any, Final

from markdown_it import MarkdownIt

from klbench.record import Pooled, checked_in, write_atomically

ROOT: Final = Path(__file__).resolve().parents[1] / "leaderboards"
START, END = "<!-- rows: start -->", "<!-- rows: end -->"
LICENCES: Final = "Licences of the data"
PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>klbench: boards</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="quick/pages/style.css">
<style>
main {{ max-width: 62rem; margin: 0 auto; padding: 3rem 1.25rem; }}
h2 {{ margin: 2.5rem 0 .5rem; }}
table {{ width: 100%; font-size: .92rem; }}
th, td {{ text-align: left; white-space: normal; padding: .4rem 1.5rem .4rem 0; }}
td:nth-child(2) {{ min-width: 11rem; }}
td a, td code {{ white-space: nowrap; }}
pre {{ overflow-x: auto; padding: .7rem .9rem; background: var(--raised); }}
</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def boards() -> dict[str, dict[str, Any]]:
    """Manifests of the boards, by folder."""
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("*/manifest.json"))}


def links(manifest: dict[str, Any]) -> dict[str, str]:
    """What every board leads to, from its own index.html."""
    return {
        "all boards": "../index.html",
        "claims": "../claims/index.html",
        "accuracy of the estimators": "../accuracy/index.html",
        "rewards": "../rewards/index.html",
        "suite file": f"../../klbench/suites/{manifest['suite']['name']}.yaml",
        "data licences": f"../index.html#{anchor(LICENCES)}",
    }


def build(name: str, manifest: dict[str, Any]) -> None:
    """The links into the manifest, and the board's pages anew."""
    from klbench import run as grid  # loads torch, which the front page needs nothing of

    folder = ROOT / name
    text = json.dumps({**manifest, "links": links(manifest)}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "manifest.json", text.encode())
    grid.publish(folder, grid.records_in(folder), grid.manifest_in(folder), None, Pooled.all_in(folder), checked_in(folder))


def table(every: dict[str, dict[str, Any]]) -> str:
    """Rows, how many of them are recomputed, and what made them, a line a board."""
    lines = ["| board | rows | recomputed | commit | made with |", "|---|---|---|---|---|"]
    for name, manifest in every.items():
        rows, good = len(list((ROOT / name / "records").glob("*.json"))), len(checked_in(ROOT / name))
        told = "all" if good == rows else f"{good}" if good else "none"
        lines.append(
            f"| {name} | {rows} | {told} | `{manifest['git'][:12]}{'+' * manifest['git'].endswith('+')}` | `{manifest['command']}` |"
        )
    return "\n".join(lines)


def anchor(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower()).strip("-")


def front(text: str, repository: str = "") -> str:
    """The README as a page. With a repository's address, commits and files that are not in leaderboards/ are links into it."""
    markdown = MarkdownIt().enable("table")
    tokens = markdown.parse(text)
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(tokens[at + 1].content))
        for part in token.children or ():
            if part.type == "link_open" and repository and str(part.attrs["href"]).startswith("../"):
                part.attrs["href"] = f"{repository}/blob/HEAD/{str(part.attrs['href']).removeprefix('../')}"
            elif part.type == "link_open" and str(part.attrs["href"]) == "README.md":
                part.attrs["href"] = "index.html"
    body = markdown.renderer.render(tokens, markdown.options, {})
    for tag, close in (("<table>", "</table>"), ("<pre>", "</pre>")):  # wider than a phone: to be scrolled, from the keyboard too
        body = body.replace(tag, f'<div class="scroll" tabindex="0" role="group">{tag}').replace(close, f"{close}</div>")
    if repository:
        body = re.sub(r"<code>([0-9a-f]{12})(\+?)</code>", rf'<a href="{escape(repository)}/commit/\1"><code>\1\2</code></a>', body)
    return PAGE.format(body=body)


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asked.add_argument("--site", type=Path, help="folder of a site: index.html alone is written, there")
    asked.add_argument("--repository", default="", help="address of the repository")
    given = asked.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if given.site is None:
        for name, manifest in boards().items():
            build(name, manifest)
        before, rest = text.split(START)
        text = f"{before}{START}\n{table(boards())}\n{END}{rest.split(END)[1]}"
        write_atomically(path, text.encode())
    write_atomically((given.site or ROOT) / "index.html", front(text, given.repository).encode())


if __name__ == "__main__":
    main()
