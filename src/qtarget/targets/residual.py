"""Residuals: the distribution that gets the trust the label does not.

Each is a log-linear pool, the softmax of a linear combination of the logits at hand:

    R = softmax(c·z_student + c_T·z_teacher + c_R·z_reference)

so one small value describes them all. A coefficient of zero is dropped, never multiplied: 0 · (−inf) would be NaN.
Student-only pools run over the head's full width, as p does; the others cover the real vocabulary and are 0 beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qtarget.errors import ConfigError, check_range, unknown

POOLS: dict[str, Callable[..., Pool]] = {}


def _named(function):
    POOLS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Pool:
    """A log-linear pool over the vocabulary.

    Attributes:
        student, teacher, reference: coefficients of the logits.
        offset_slope: adds log σ(slope · (z_v − z_y)) to the pooled logits, or None.
        written: (name, parameters) it was made from, for the YAML form.
    """

    student: float = 0.0
    teacher: float = 0.0
    reference: float = 0.0
    offset_slope: float | None = None
    written: tuple[str, dict] = field(default=("pool", {}), compare=False)

    def __post_init__(self):
        if self.written == ("pool", {}):  # made directly
            object.__setattr__(self, "written", ("pool", dict(self.terms)))

    @property
    def is_student(self) -> bool:
        """The student itself: p − R = 0, so the term has no gradient and costs nothing."""
        return self.terms == {"student": 1.0} and self.offset_slope is None

    @property
    def is_student_only(self) -> bool:
        return set(self.terms) == {"student"}

    @property
    def keeps_student_shape(self) -> bool:
        """R ∝ p wherever the other models are ∝ p: what lets a top-k teacher be used without a dense row."""
        total = self.student + self.teacher + self.reference
        return abs(total - 1) < 1e-12 and self.offset_slope is None and len(self.terms) <= 2

    @property
    def terms(self) -> dict[str, float]:
        """The coefficients that are not zero, by name."""
        named = {"student": self.student, "teacher": self.teacher, "reference": self.reference}
        return {name: c for name, c in named.items() if c != 0}

    @property
    def requires(self) -> frozenset[str]:
        return frozenset(self.terms) - {"student"}


@_named
def student() -> Pool:
    """The student's own distribution: nothing but the label is taught. Needs nothing."""
    return Pool(student=1.0, written=("student", {}))


@_named
def uniform() -> Pool:
    """Every token of the real vocabulary alike (label smoothing). Needs nothing."""
    return Pool(written=("uniform", {}))


@_named
def reference() -> Pool:
    """The frozen reference model. Needs: "reference"."""
    return Pool(reference=1.0, written=("reference", {}))


@_named
def teacher(temperature: float = 1.0) -> Pool:
    """The teacher, softmax(z_T / temperature). Needs: "teacher"."""
    check_range("temperature", temperature, 0, open_low=True)
    return Pool(teacher=1.0 / temperature, written=("teacher", {"temperature": temperature}))


@_named
def guided(eta: float = 0.5, temperature: float = 1.0) -> Pool:
    """Student and teacher, mixed in log space (Target-SFT, arXiv:2606.11189).

    R = softmax((1 − η) z_student + η z_teacher / temperature). η = 0 is the student alone, which makes Target-SFT equal
    to DFT; η = 1 is the teacher alone. Needs: "teacher" (not at η = 0).

    >>> guided(eta=0.0).terms
    {'student': 1.0}
    """
    check_range("eta", eta, 0, 1)
    check_range("temperature", temperature, 0, open_low=True)
    written = ("guided", {"eta": eta, "temperature": temperature})
    return Pool(student=1.0 - eta, teacher=eta / temperature, written=written)


@_named
def tempered(temperature: float = 1.0) -> Pool:
    """The student at another temperature: softmax(z / temperature). Needs nothing."""
    check_range("temperature", temperature, 0, open_low=True)
    return Pool(student=1.0 / temperature, written=("tempered", {"temperature": temperature}))


@_named
def sharpened(beta: float = 0.7, h: str = "linear") -> Pool:
    """The student sharpened by beta < 1 (GEM, arXiv:2408.16673); h "logsigmoid" adds log σ(0.01 (z_v − z_y))."""
    check_range("beta", beta, 0, open_low=True)
    if h not in ("linear", "logsigmoid"):
        raise unknown("h", h, ("linear", "logsigmoid"))
    slope = 0.01 if h == "logsigmoid" else None
    return Pool(student=1.0 / beta, offset_slope=slope, written=("sharpened", {"beta": beta, "h": h}))


@_named
def pool(student: float = 0.0, teacher: float = 0.0, reference: float = 0.0) -> Pool:
    """Any log-linear pool of your own, by its coefficients."""
    parameters = {"student": student, "teacher": teacher, "reference": reference}
    for name, value in parameters.items():
        check_range(name, value)
    return Pool(student, teacher, reference, written=("pool", parameters))


def as_pool(value: object) -> Pool:
    """A pool from what a user may write: a pool, or a function that makes one."""
    if callable(value) and not isinstance(value, Pool):
        value = value()
    if isinstance(value, Pool):
        return value
    raise ConfigError(f"residual is {value!r}; use one of {', '.join(sorted(POOLS))}")
