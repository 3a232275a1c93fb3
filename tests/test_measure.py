"""A measure's name is its address: printing and parsing undo each other, and nothing unknown vanishes."""

from __future__ import annotations

from dataclasses import fields

import pytest

from klbench.errors import UserError
from klbench.measure import COLUMNS, Measure


@pytest.mark.parametrize(
    "text, measure",
    [
        ("reverse_kl", Measure("reverse_kl")),
        ("kl_prior.rao_blackwell(draws=64)", Measure("kl_prior", "rao_blackwell", (("draws", 64),))),
        ("log_z(interval='betting', n=0.5)", Measure("log_z", "", (("interval", "betting"), ("n", 0.5)))),
        ("cost.machine.seconds", Measure("cost.machine.seconds")),
        ("lm_eval.lambada.acc(draws=-3)", Measure("lm_eval.lambada.acc", "", (("draws", -3),))),
        ("""js(interval="it's")""", Measure("js", "", (("interval", "it's"),))),
    ],
)
def test_parse_and_print_are_inverses(text: str, measure: Measure) -> None:
    assert Measure.parse(text) == measure
    assert str(measure) == text
    assert hash(Measure.parse(str(measure))) == hash(measure)


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_its_own_name(column: str) -> None:
    assert str(Measure.parse(column)) == column
    about = COLUMNS[column]
    assert about.title and about.formula and about.better in ("low", "high", "")


def test_two_spellings_are_one_measure() -> None:
    other = Measure.parse("  kl_prior.plain( n = 3,draws=2 ) ")
    assert other == Measure.parse("kl_prior.plain(draws=2, n=3)") and str(other) == "kl_prior.plain(draws=2, n=3)"
    assert Measure.parse("kl_prior()") == Measure("kl_prior")


@pytest.mark.parametrize(
    "text, printed",
    [
        ("reverse-kl", "reverse_kl"),
        ("kl-prior.k3", "kl_prior.k3"),
        ("kl_prior.rao-blackwell(draws=64)", "kl_prior.rao_blackwell(draws=64)"),
        (" distinct-2-target ", "distinct_2_target"),
        ("cost.train-draws", "cost.train_draws"),
        ("lm-eval.mmlu-pro.exact-match", "lm_eval.mmlu-pro.exact-match"),  # what follows is lm-eval's own name
        ("chi2", "chi2"),
    ],
)
def test_in_names_a_hyphen_is_an_underscore(text: str, printed: str) -> None:
    assert str(Measure.parse(text)) == printed and Measure.parse(printed) == Measure.parse(text)


def test_a_value_keeps_its_hyphens() -> None:
    assert Measure.parse("log-z(interval='a-b')").options == (("interval", "a-b"),)
    assert Measure("reverse-kl") == Measure("reverse_kl") and Measure("kl-prior", "rao-blackwell").estimator == "rao_blackwell"


@pytest.mark.parametrize(
    "text, says",
    [
        ("reverse-lk", "no column 'reverse_lk'; did you mean 'reverse_kl'?"),
        ("kl-prior(dra-ws=2)", "name=value pairs"),
        ("reverse_lk", "no column 'reverse_lk'; did you mean 'reverse_kl'?"),
        ("kl_prior(darws=2)", "no option of kl_prior 'darws'; did you mean 'draws'?"),
        ("kl_prior(64)", "name=value pairs"),
        ("kl_prior(draws=x)", "name=value pairs"),
        ("kl_prior(draws=)", "name=value pairs"),
        ("kl_prior(draws=[1])", "name=value pairs"),
        ("kl_prior(draws=1, draws=2)", "name=value pairs"),
        ("kl_prior(n=1, n='a')", "name=value pairs"),
        ("kl_prior(draws=1)(draws=2)", "name=value pairs"),
        ("kl_prior(**{'draws': 1})", "name=value pairs"),
        ("kl_prior.", "column.estimator"),
        ("(draws=1)", "column.estimator"),
        ("", "column.estimator"),
    ],
)
def test_refusals(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        Measure.parse(text)
    assert says in str(error.value)


def test_a_measure_has_no_hidden_field() -> None:
    assert [f.name for f in fields(Measure)] == ["column", "estimator", "options"]


def test_only_what_holds_the_posterior_is_guarded() -> None:
    free = {
        "reward",
        "gold",
        "kl_prior",
        "entropy",
        "forgetting",
        "moments",
        "unique",
        "unique_valid",
        "self_bleu",
        *(f"distinct_{n}" for n in (1, 2, 3, 4)),
    }
    assert {name for name, column in COLUMNS.items() if not column.posterior} == free
