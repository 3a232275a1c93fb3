"""klbench's diversity and divergence measures as metric modules of the library `evaluate`.

    evaluate.load(str(klbench.metric_path("distinct_n")))           also without a network
    evaluate.combine([str(klbench.metric_path(name)) for name in ("distinct_n", "self_bleu", "unique")])

Each folder here is one module; its name is its figure's. They compute nothing themselves: the functions of klbench/estimators do. A figure
`f` comes as `f`, the ends of its 95 % interval `f_low` and `f_high` (None where none can be trusted), `f_status` and `f_reason`. A
module passes over inputs of others, as `combine` hands all of them to each.
"""

from __future__ import annotations

from pathlib import Path

from klbench.errors import unknown


def metric_path(name: str) -> Path:
    """The folder of a metric, for `evaluate.load`. Raises UserError with the nearest name."""
    here = Path(__file__).parent
    known = sorted(p.parent.name for p in here.glob("*/*.py") if p.stem == p.parent.name)
    if name not in known:
        raise unknown("metric", name, known)
    return here / name
