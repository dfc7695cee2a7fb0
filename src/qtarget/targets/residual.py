"""Residuals: the distribution that gets the mass that the label does not get.

Each is a log-linear pool, the softmax of a linear combination of the models' logits:

    R = softmax(c·z_student + c_T·z_teacher + c_R·z_reference)        [n, V]

so a residual is a small frozen object with the coefficients. To write your own, make a class like these: a frozen
dataclass with ``coefficients``. Student-only pools cover the head's full width, as p does; the others cover the real
vocabulary and are 0 beyond it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from qtarget.errors import ConfigError, check_range, unknown
from qtarget.targets.divergence import FORWARD_KL, Divergence
from qtarget.targets.parts import KINDS, Kind, Part, named

MODELS = ("student", "teacher", "reference")


class Residual(Part, ABC):
    """Base of the residuals."""

    known: ClassVar[dict[str, type[Residual]]] = {}

    @property
    @abstractmethod
    def coefficients(self) -> Mapping[str, float]:
        """Of each model's logits in the pool: ``{"student": 0.5, "teacher": 0.5}``; a missing model counts as 0."""

    @property
    def offset_slope(self) -> float | None:
        """Adds log σ(slope · (z_v − z_y)) to the pooled logits, or None."""
        return None

    @property
    def nonzero(self) -> dict[str, float]:
        """The coefficients that are not 0: a zero is dropped, never multiplied, as 0 · (−inf) would be NaN."""
        given = self.coefficients
        return {model: given[model] for model in MODELS if given.get(model, 0) != 0}

    def coefficient(self, model: str) -> float:
        return self.nonzero.get(model, 0.0)

    @property
    def is_student(self) -> bool:
        """Whether it is the student itself: p − R = 0, so the term has no gradient and costs nothing."""
        return self.nonzero == {"student": 1.0} and self.offset_slope is None

    @property
    def is_student_only(self) -> bool:
        return set(self.nonzero) == {"student"}

    @property
    def keeps_student_shape(self) -> bool:
        """R ∝ p wherever the other models are ∝ p: what lets a top-k teacher be used without a dense row."""
        total = sum(self.nonzero.values())
        return abs(total - 1) < 1e-12 and self.offset_slope is None and len(self.nonzero) <= 2

    @property
    def requires(self) -> frozenset[str]:
        """The models it needs besides the student; a coefficient of 0 needs none."""
        return frozenset(self.nonzero) - {"student"}


class Term(NamedTuple):
    """One residual of a target, b D(R, p) with b = factor × the weight that the trust rule leaves."""

    factor: float
    pool: Residual
    divergence: Divergence = FORWARD_KL


@named("student")
@dataclass(frozen=True)
class Student(Residual):
    """The student's own distribution, R = p: nothing but the label is taught (DFT, arXiv:2508.05629).

    >>> Student().is_student
    True
    """

    @property
    def coefficients(self) -> dict[str, float]:
        return {"student": 1.0}


@named("uniform")
@dataclass(frozen=True)
class Uniform(Residual):
    """The same for every token of the real vocabulary, R_v = 1/V (label smoothing, arXiv:1512.00567).

    >>> Uniform().coefficients
    {}
    """

    @property
    def coefficients(self) -> dict[str, float]:
        return {}


@named("reference")
@dataclass(frozen=True)
class Reference(Residual):
    """The frozen reference model, R = softmax(z_ref) (ASFT, arXiv:2509.23753).

    >>> sorted(Reference().requires)
    ['reference']
    """

    @property
    def coefficients(self) -> dict[str, float]:
        return {"reference": 1.0}


@named("teacher")
@dataclass(frozen=True)
class Teacher(Residual):
    """The teacher, R = softmax(z_T / temperature) (distillation, arXiv:1503.02531).

    >>> Teacher(temperature=2.0).coefficients
    {'teacher': 0.5}
    """

    temperature: float = 1.0

    def __post_init__(self):
        check_range("temperature", self.temperature, 0, open_low=True)

    @property
    def coefficients(self) -> dict[str, float]:
        return {"teacher": 1.0 / self.temperature}


@named("guided")
@dataclass(frozen=True)
class Guided(Residual):
    """Student and teacher, mixed in log space: R = softmax((1 − η) z + η z_T / temperature) (arXiv:2606.11189).

    η = 0 is the student alone, which makes Target-SFT equal to DFT and needs no teacher; η = 1 is the teacher alone.

    >>> Guided(eta=0.25).coefficients
    {'student': 0.75, 'teacher': 0.25}
    >>> Guided(eta=0.0).requires
    frozenset()
    """

    eta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        check_range("eta", self.eta, 0, 1)
        check_range("temperature", self.temperature, 0, open_low=True)

    @property
    def coefficients(self) -> dict[str, float]:
        return {"student": 1.0 - self.eta, "teacher": self.eta / self.temperature}


@named("tempered")
@dataclass(frozen=True)
class Tempered(Residual):
    """The student at another temperature, R = softmax(z / temperature) (arXiv:1503.02531).

    >>> Tempered(temperature=2.0).coefficients
    {'student': 0.5}
    """

    temperature: float = 1.0

    def __post_init__(self):
        check_range("temperature", self.temperature, 0, open_low=True)

    @property
    def coefficients(self) -> dict[str, float]:
        return {"student": 1.0 / self.temperature}


@named("sharpened")
@dataclass(frozen=True)
class Sharpened(Residual):
    """The student sharpened by beta < 1, R = softmax(z / beta) (GEM, arXiv:2408.16673).

    h "logsigmoid" adds log σ(0.01 (z_v − z_y)) to z / beta: the slope of the authors' code.

    >>> Sharpened(beta=0.5).coefficients
    {'student': 2.0}
    """

    beta: float = 0.7
    h: str = "linear"

    def __post_init__(self):
        check_range("beta", self.beta, 0, open_low=True)
        if self.h not in ("linear", "logsigmoid"):
            raise unknown("h", self.h, ("linear", "logsigmoid"))

    @property
    def coefficients(self) -> dict[str, float]:
        return {"student": 1.0 / self.beta}

    @property
    def offset_slope(self) -> float | None:
        return 0.01 if self.h == "logsigmoid" else None


@named("pool")
@dataclass(frozen=True)
class Pool(Residual):
    """Any log-linear pool, by its coefficients: R = softmax(student·z + teacher·z_T + reference·z_ref).

    >>> Pool(teacher=0.5, reference=0.5).coefficients
    {'student': 0.0, 'teacher': 0.5, 'reference': 0.5}
    """

    student: float = 0.0
    teacher: float = 0.0
    reference: float = 0.0

    def __post_init__(self):
        for model, value in self.coefficients.items():
            check_range(model, value)

    @property
    def coefficients(self) -> dict[str, float]:
        return {"student": self.student, "teacher": self.teacher, "reference": self.reference}


def as_pool(value: object) -> Residual:
    """A residual from what a user may write: a residual, its class, or a function that returns one.

    Raises:
        ConfigError: it is none, or its coefficients are no finite numbers, or of a model there is not.
    """
    made: Any = value() if callable(value) and not isinstance(value, Part) else value
    if not isinstance(made, Residual):
        raise ConfigError(f"residual is {made!r}; use one of {', '.join(sorted(Residual.known))}")
    for model, coefficient in made.coefficients.items():
        if model not in MODELS:
            raise unknown(f"coefficient of residual {made.label}", model, MODELS)
        check_range(f"coefficient of {model} in residual {made.label}", coefficient)
    return made


KINDS[Residual] = Kind(as_pool)

student = Student
uniform = Uniform
reference = Reference
teacher = Teacher
guided = Guided
tempered = Tempered
sharpened = Sharpened
pool = Pool
