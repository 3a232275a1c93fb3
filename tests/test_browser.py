"""The pages in a real Chromium, from a disk: sorting, filters, a shared address, comparison, reading without scripts, access, harm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, missing
from test_board import certified, record

from klbench.board import Board
from klbench.page import site
from klbench.record import Record, Sample

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
RTL = "שלום עולם"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


def table(task: str, beta: float, rng: np.random.Generator, names: list[str], kind: str = "objective", first: int = 0) -> list[Record]:
    hard = rng.normal(0, 2, 12)
    found = []
    for k, name in enumerate(names, first):
        free, status = list(hard + 0.3 * (k + 1) + rng.normal(0, 0.05, 12)), "uncertified" if name == "dpo" else "certified"
        columns = {"reward": certified(0.9 - 0.1 * k), "kl_prior": certified(0.2 + 0.15 * k), "wasted_nats": certified(0.1 * k)}
        prompts = {"reward_max": [1.0] * 12, "kl_prior": [0.1 * k] * 12, "reward": [0.5] * 12}
        said = [Sample(prompt=f"p{i}", completion=f" {name} says {i}", reward=0.1 * i, log_p0=-3.0, log_q=-2.0) for i in range(4)]
        found.append(
            record(name, free, 0.3 * (k + 1), status, task=task, beta=beta, kind=kind, columns=columns, prompts=prompts, samples=said)
        )
    return found


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two tasks of one family, one of them at two β; four objectives, the prior, the posterior and best-of-n each."""
    rng = np.random.default_rng(0)
    records = []
    for task, beta in (("toy/a", 0.5), ("toy/a", 1.0), ("zoo", 0.5)):
        records += table(task, beta, rng, ["rloo", "grpo", "dpo", "a_long_name_of_a_method"])
        records += table(task, beta, rng, ["ancestral", "best_of_n:4"], "sampler", 4)
        records.append(record("rejection", [0.0] * 12, 0.0, "exact", kind="sampler", task=task, beta=beta, curve=[]))
    folder = tmp_path_factory.mktemp("site")
    board = Board.of(records, {"command": "klbench run quick --out runs/x", "versions": {"torch": "2"}})
    board.write(folder)
    site.write(board, folder)
    return folder.as_uri()


def labels(chromium: Browser) -> list[str]:
    return chromium.texts("table.board tbody th.name a")


def choose(chromium: Browser, name: str, value: str) -> None:
    chromium.js(
        "const e = document.querySelector(`#filters [name=${arguments[0]}]`); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


def test_the_script_shows_what_the_html_said(chromium: Browser, home: str) -> None:
    cells = (
        "return [...document.querySelectorAll('table.board tbody tr:not(.group)')].map((r) => [...r.cells].map((c) => c.innerText.trim()))"
    )
    marks = "return [...document.querySelectorAll('table.board .dot, table.board .line')].map((m) => m.getAttribute('style'))"
    chromium.view(scripts=False)
    chromium.open(f"{home}/index.html")
    before, drawn = chromium.js(cells), chromium.js(marks)
    chromium.view()
    chromium.open(f"{home}/index.html", "figures")
    assert chromium.js(cells) == before and len(before) == 21
    assert [re.findall(r"[\d.]+", m) for m in chromium.js(marks)] == [re.findall(r"[\d.]+", m) for m in drawn]
    assert chromium.errors() == []


def test_sorting_keeps_tables_apart_and_says_so(chromium: Browser, home: str) -> None:
    chromium.open(f"{home}/index.html", "figures")
    assert labels(chromium)[:3] == ["rejection", "rloo", "grpo"]
    chromium.js("document.querySelector('th[data-column=label] .sort').click()")
    names = labels(chromium)
    assert names[:7] == sorted(names[:7]) and names[7:14] == names[:7] and len(names) == 21
    assert chromium.js("return document.querySelector('th[data-column=label]').ariaSort") == "ascending"
    chromium.js("document.querySelector('th[data-column=label] .sort').click()")
    assert labels(chromium)[:7] == names[6::-1] and chromium.js("return location.hash") == "#sort=-label"
    chromium.js("document.querySelector('th[data-column=reward] .sort').click()")  # better high: downwards first
    values = [
        float(text.replace("−", "-").split("[")[0]) for text in chromium.texts("table.board tbody tr:not(.group) td:nth-child(7)")[:7]
    ]
    assert values == sorted(values, reverse=True) and len(set(values)) > 3
    chromium.js(
        "document.querySelector('th[data-column=reward] .sort').click(); document.querySelector('th[data-column=reward] .sort').click()"
    )
    assert labels(chromium)[:3] == ["rejection", "rloo", "grpo"] and chromium.js("return location.hash") == ""


def test_filters_and_the_rows_that_always_stay(chromium: Browser, home: str) -> None:
    chromium.open(f"{home}/index.html", "figures")
    choose(chromium, "task", "toy/a")
    assert len(labels(chromium)) == 14
    choose(chromium, "beta", "1")
    assert len(labels(chromium)) == 7 and chromium.texts(".group b") == ["toy/a"]
    choose(chromium, "method", "dpo")
    assert sorted(labels(chromium)) == ["ancestral", "best_of_n:4", "dpo", "rejection"]
    assert chromium.texts("tr:not(.stays) th.name a") == ["dpo"] and "1 of 21 rows, and 3" in chromium.texts("#count")[0]
    choose(chromium, "status", "exact")  # no dpo is exact
    assert labels(chromium) == [] and "Nothing fits" in chromium.texts("table.board")[0]
    chromium.js("document.querySelector('#filters [type=reset]').click()")
    assert len(labels(chromium)) == 21
    choose(chromium, "q", "ZOO")
    assert chromium.texts(".group b") == ["zoo"] and len(labels(chromium)) == 7
    choose(chromium, "family", "toy")
    assert labels(chromium) == []


def test_a_view_is_shared_by_its_address(chromium: Browser, home: str) -> None:
    chromium.open(f"{home}/index.html", "figures")
    choose(chromium, "status", "uncertified")
    choose(chromium, "task", "zoo")
    chromium.js("document.querySelector('th[data-column=kl_prior] .sort').click()")
    address, seen = chromium.js("return location.href"), labels(chromium)
    assert seen and seen != labels_of_nothing(chromium, home)
    chromium.open(address, "figures")
    assert labels(chromium) == seen
    assert chromium.js("return document.querySelector('#filters [name=task]').value") == "zoo"
    chromium.open(f"{home}/index.html#task=nonsense&sort=nonsense&page=-3&status=certified", "figures")
    assert labels(chromium) == [] and chromium.errors() == []


def labels_of_nothing(chromium: Browser, home: str) -> list[str]:
    chromium.open(f"{home}/index.html", "figures")
    return labels(chromium)


def test_figures_follow_the_filters(chromium: Browser, home: str) -> None:
    chromium.open(f"{home}/index.html", "figures")
    svg = "#live .chart svg"
    assert "toy/a · β 0.5" in chromium.js("return document.querySelector(arguments[0]).ariaLabel", svg)
    assert (
        chromium.js("return document.querySelectorAll(arguments[0] + ' a').length", svg) == 7
    )  # a point a policy, each a link to its page
    chromium.until(
        lambda: chromium.js("return document.querySelectorAll('#live .charts svg').length") >= 4, "learning and diversity are drawn"
    )
    choose(chromium, "task", "zoo")
    assert "zoo · β 0.5" in chromium.js("return document.querySelector(arguments[0]).ariaLabel", svg)


def test_two_policies_are_compared(chromium: Browser, home: str) -> None:
    chromium.open(f"{home}/index.html", "figures")
    chromium.js("document.querySelectorAll('.pick')[1].click(); document.querySelectorAll('.pick')[3].click()")
    link = chromium.js("return document.querySelector('.tray a').href")
    assert "compare.html#a=toy_a-rloo" in link
    chromium.js("document.querySelectorAll('.pick')[16].click()")  # of another task: the comparison starts anew
    assert "pick another of zoo" in chromium.texts(".tray")[0]
    chromium.open(link, "compared")
    lead = chromium.texts("#compared .lead")[0]
    assert lead.startswith("rloo is nearer to the posterior than dpo: rloo − dpo is −0.") and chromium.errors() == []
    mean, low, high = (float(x) for x in re.findall(r"-?\d+\.\d+", lead.replace("−", "-"))[:3])
    cells = [float(t.replace("−", "-")) for t in chromium.texts(".prompts td.main")]
    assert len(cells) == 12 and mean == pytest.approx(np.mean(cells), abs=1e-3)
    half = 2.2010 * np.std(cells, ddof=1) / 12**0.5  # Student's t, 11 degrees of freedom
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=2e-3)
    same = link.partition("&b=")[0] + "&b=" + link.partition("#a=")[2].partition("&")[0]
    chromium.open(same, "compared")
    assert chromium.texts("#compared .lead")[0].startswith("These prompts do not tell which is nearer: rloo − rloo is 0.000")
    assert not chromium.js("return document.querySelector('#compared details').open")
    other = chromium.js(
        "const s = document.querySelector('[name=b]'); s.value = [...s.options].at(-1).value;"
        "s.dispatchEvent(new Event('change', {bubbles: true})); return s.value"
    )
    chromium.until(lambda: other in chromium.js("return decodeURIComponent(location.hash)"), "the address names the other policy")


def test_the_page_of_a_policy(chromium: Browser, home: str) -> None:
    chromium.open(f"{home}/index.html", "figures")
    chromium.open(chromium.js("return document.querySelectorAll('th.name a')[1].href"))
    assert chromium.texts("h1") == ["rloo"] and len(chromium.texts("#curve svg")) >= 2
    assert "klbench run quick --task toy/a --objective rloo --set 'seeds=[0]' --out runs/again" in chromium.texts(".command")
    assert not chromium.js("return document.querySelector('.samples').open")  # behind a click
    chromium.js("document.querySelector('.samples > summary').click()")
    chromium.js("const f = document.getElementById('find'); f.value = 'SAYS 3'; f.dispatchEvent(new Event('input'))")
    assert chromium.js("return [...document.querySelectorAll('.sample')].map((s) => s.hidden)") == [True, True, True, False]
    assert chromium.texts("#found") == ["1 of 4"] and chromium.errors() == []


def test_everything_reads_without_scripts(chromium: Browser, home: str) -> None:
    chromium.view(scripts=False)
    try:
        chromium.open(f"{home}/index.html")
        assert len(labels(chromium)) == 21 and chromium.js("return document.querySelectorAll('#drawn svg').length") == 3
        hidden = "return ['filters', 'count', 'paging'].every((id) => getComputedStyle(document.getElementById(id)).display === 'none')"
        assert chromium.js(hidden)
        chromium.js("document.querySelector('.help').click()")
        assert chromium.js("return document.querySelector('.tip:popover-open').innerText").startswith("rank")
        chromium.open(chromium.js("return document.querySelector('th.name a').href"))
        assert chromium.texts("h1") == ["rejection"] and len(chromium.texts("table.columns tbody tr")) >= 8
        chromium.js("document.querySelector('.samples > summary').click()")
        assert chromium.js("return document.querySelector('.sample').innerText").startswith("Once")
        chromium.open(f"{home}/pages/compare.html")
        assert chromium.js("return getComputedStyle(document.querySelector('noscript')).display") != "none"
    finally:
        chromium.view()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_access_quiet_and_no_request_that_leaves(chromium: Browser, home: str, width: int, dark: bool) -> None:
    chromium.view(width, 844, dark)
    try:
        chromium.open(f"{home}/index.html", "figures")
        policy = chromium.js("return document.querySelectorAll('th.name a')[1].href")
        for url, ready in (
            (f"{home}/index.html#sort=reward&task=zoo", "figures"),
            (policy, ""),
            (f"{home}/pages/compare.html", "compared"),
        ):
            chromium.open(url, ready)
            assert chromium.js("return document.documentElement.scrollWidth - innerWidth") <= 0, f"{url} is wider than the window"
            chromium.js("document.querySelectorAll('details').forEach((d) => { d.open = true })")
            assert chromium.faults() == []
            assert chromium.errors() == []
            asked = chromium.asked()
            assert asked and all(a.startswith(("file://", "data:", "about:")) for a in asked), asked
    finally:
        chromium.view()


def test_a_fault_would_be_found(chromium: Browser, home: str) -> None:
    chromium.open(f"{home}/index.html", "figures")
    chromium.js(
        "document.querySelector('#filters label').replaceWith(document.querySelector('#filters select'));"
        "fetch('https://example.invalid/').catch(() => {})"
    )
    assert any("select-name" in fault for fault in chromium.faults())
    assert any("example.invalid" in message for message in chromium.errors())  # the page's own policy forbids it


def test_keys_alone_reach_and_work_the_board(chromium: Browser, home: str) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    chromium.open(f"{home}/index.html", "figures")
    seen = []
    for _ in range(40):
        ActionChains(chromium.driver).send_keys(Keys.TAB).perform()
        seen.append(
            chromium.js("const e = document.activeElement; return e.getAttribute('aria-label') || e.textContent.trim().slice(0, 30)")
        )
        if seen[-1] == "reverse KL":
            break
    assert "to the board" in seen and seen[-1] == "reverse KL"
    ActionChains(chromium.driver).send_keys(Keys.ENTER).perform()
    assert chromium.js("return location.hash") == "#sort=reverse_kl"


def test_harmful_text_does_no_harm(chromium: Browser, tmp_path: Path) -> None:
    name, script = '"><img src=x onerror="harm=1">', "</script><script>harm=2</script><!--"
    texts = [(script, script), (RTL + "\u202e", "x" * 1_000_000), ("\u2028\u2029\x1b[2J", "<img src=y onerror='harm=3'>")]
    samples = [Sample(prompt=p, completion=c, reward=0.0, log_p0=-1.0, log_q=-2.0) for p, c in texts]
    rows = [
        record(m, [0.1 + k, 0.2 + k], task=name, samples=samples, notes=[script], prior=script) for k, m in enumerate((name, "rloo", RTL))
    ]
    rows = [r.model_copy(update={"prompt_ids": [script, RTL]}) for r in rows]
    board = Board.of(rows, {"command": f"klbench run {script}", "note": script})
    site.write(board, tmp_path)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.html")) < 400_000  # of a million characters a page shows thousands
    for page in sorted(tmp_path.rglob("*.html")):
        chromium.open(
            page.as_uri() + "#method=%3Cimg%20src%3Dx%3E", {"index.html": "figures", "compare.html": "compared"}.get(page.name, "")
        )
        chromium.js("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        assert chromium.js("return typeof harm") == "undefined", page
        assert chromium.js("return document.querySelectorAll('img').length") == 0
        assert chromium.errors() == [] and "harm=2" in chromium.js("return document.body.innerText"), page
        assert chromium.js("return document.documentElement.scrollWidth - innerWidth") <= 0, page
    chromium.open((tmp_path / "index.html").as_uri(), "figures")
    assert sorted(labels(chromium)) == sorted([name, "rloo", RTL])


def test_many_rows_come_in_pages(chromium: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [record(f"m{k % 24}", list(rng.normal(k % 24, 1, 3)), 1.0 + k, task=f"t{k // 120}", seed=k // 24 % 5) for k in range(360)]
    site.write(Board.of(rows), tmp_path)
    chromium.open((tmp_path / "index.html").as_uri(), "figures")
    assert len(chromium.texts("table.board tbody tr:not(.group)")) == 100 and "page 1 of 2" in chromium.texts("#paging")[0]
    assert "144 of 432 rows" in chromium.texts("#count")[0]  # methods, and one checkpoint of each
    chromium.js("document.querySelectorAll('#paging button')[1].click()")
    assert "page=2" in chromium.js("return location.hash") and "page 2 of 2" in chromium.texts("#paging")[0]
    choose(chromium, "rows", "policies")
    choose(chromium, "task", "t2")
    assert "120 of 432 rows" in chromium.texts("#count")[0] and len(labels(chromium)) == 100
    chromium.js("location.hash = '#rows=policies&method=m7&task=t2'")
    chromium.until(lambda: len(labels(chromium)) == 5, "the five checkpoints of one method")
