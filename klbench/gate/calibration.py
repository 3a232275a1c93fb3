"""What was measured of a gate: how often it cries wolf, what it finds, and how much training seeds differ. A JSON file beside the gate's.

`gate.yaml` has `gate.calibration.json`. It holds for the settings that it was measured for (their hash is in it); the noise of the training
seeds depends on no margin and serves either way.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from scipy.special import betaincinv

from klbench.errors import UserError
from klbench.gate.compare import SeedNoise
from klbench.gate.settings import Gate
from klbench.record import write_atomically

SCHEMA: Final = 1


@final
@dataclass(frozen=True)
class Share:
    """count of `of`, with its exact 95 % interval (Clopper and Pearson 1934, Biometrika 26, 404-413)."""

    count: int
    of: int

    @property
    def value(self) -> float:
        return self.count / self.of if self.of else math.nan

    @property
    def low(self) -> float:
        return float(betaincinv(self.count, self.of - self.count + 1, 0.025)) if self.count else 0.0

    @property
    def high(self) -> float:
        return float(betaincinv(self.count + 1, self.of - self.count, 0.975)) if self.count < self.of else 1.0

    def __str__(self) -> str:
        return f"{self.count} of {self.of:,}: {100 * self.value:.2g} % [{100 * self.low:.2g}, {100 * self.high:.2g}]"


@final
@dataclass(frozen=True)
class Power:
    """A worsening of `times` the detectable one, put into one metric of one policy. found: beyond noise; blocked: by the verdict."""

    times: float
    found: Share
    blocked: Share


@final
@dataclass(frozen=True)
class Calibration:
    """alarms, by what was compared with what: `retrained` boards of other training seeds, `reseeded` scorings, `split` halves of draws.

    noise: by cell and metric (klbench.gate.compare.key) the standard deviation over training seeds and its degrees of freedom.
    detectable: by metric what the retrained comparisons could have detected whatever the margin, their median at the worst of the cells.
    """

    gate: str
    rate: float
    alarms: dict[str, Share]
    inconclusive: Share
    power: tuple[Power, ...]
    noise: dict[str, tuple[float, float]]
    detectable: dict[str, float]
    command: str = ""

    @property
    def whole(self) -> Share:
        """False alarms over all comparisons."""
        return Share(sum(s.count for s in self.alarms.values()), sum(s.of for s in self.alarms.values()))

    @property
    def held(self) -> bool:
        """Whether the stated rate may be true, of all comparisons and of each kind: not where a lower limit is above it."""
        return all(share.low <= self.rate for share in (self.whole, *self.alarms.values()))

    def to_json(self) -> str:
        data = asdict(self)
        data["alarms"] = {k: [s.count, s.of] for k, s in self.alarms.items()}
        data["inconclusive"] = [self.inconclusive.count, self.inconclusive.of]
        data["power"] = [
            {"times": p.times, "found": [p.found.count, p.found.of], "blocked": [p.blocked.count, p.blocked.of]} for p in self.power
        ]
        return json.dumps({"schema": SCHEMA, **data}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Atomically. Raises UserError where the place cannot be written."""
        try:
            write_atomically(path, self.to_json().encode())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None


def place_of(gate_file: Path) -> Path:
    """`gate.calibration.json` of `gate.yaml`."""
    return gate_file.with_name(f"{gate_file.stem}.calibration.json")


def read(gate_file: Path) -> Calibration | None:
    """What was measured of the gate in a file; None where nothing was. Raises UserError for a file that is no calibration."""
    path = place_of(gate_file)
    try:
        data: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    try:
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {str(data['schema'])[:20]}, this klbench reads {SCHEMA}")
        found = Calibration(
            str(data["gate"]),
            _finite(data["rate"]),
            {str(k): _share(s) for k, s in data["alarms"].items()},
            _share(data["inconclusive"]),
            tuple(Power(_finite(p["times"]), _share(p["found"]), _share(p["blocked"])) for p in data["power"]),
            {str(k): (_finite(sd), _finite(dof)) for k, (sd, dof) in data["noise"].items()},
            {str(k): _finite(x) for k, x in data["detectable"].items()},
            str(data["command"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: no calibration of a gate: {' '.join(str(error).split())[:200]}") from None
    if any(sd < 0 or dof <= 0 for sd, dof in found.noise.values()):
        raise UserError(f"{path}: noise: standard deviations of at least 0 with positive degrees of freedom expected")
    return found


def _finite(x: object) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        raise ValueError(f"a number expected, got {str(x)[:40]!r}")
    return float(x)


def _share(data: Any) -> Share:
    count, of = data
    if not (isinstance(count, int) and isinstance(of, int) and 0 <= count <= of):
        raise ValueError(f"a count and its total expected, got {str(data)[:40]}")
    return Share(count, of)


def noise_for(gate: Gate, gate_file: Path) -> tuple[SeedNoise, str]:
    """What a verdict takes from a gate's calibration: the noise of training seeds, and what to say of the rate.

    Raises UserError where the measured rate shows that the stated one is not held.
    """
    found = read(gate_file)
    if found is None:
        return {}, f"the false-alarm rate of {100 * gate.rate:g} % is stated, not measured: klbench check --calibrate measures it"
    if found.gate != gate.sha256:
        return (
            found.noise,
            f"{gate_file.name} was changed since its rate was measured; klbench check --calibrate does that",
        )
    if not found.held:
        worst = max((found.whole, *found.alarms.values()), key=lambda s: s.low)
        raise UserError(
            f"{gate_file}: it states a false-alarm rate of {100 * gate.rate:g} % and does not hold it: {worst} comparisons of equals "
            "were regressions; widen its margins or lower its rate, then klbench check --calibrate"
        )
    return found.noise, f"false alarms as measured: {found.whole}, stated {100 * gate.rate:g} %"
