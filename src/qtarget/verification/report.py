"""Runs every check on a subject; prints lines, a table or JSON."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qtarget.errors import ConfigError
from qtarget.verification import auxiliary, cuts, gradient, masks, neighbours, resources
from qtarget.verification.check import FAIL, NOT_APPLICABLE, PASS, Check, Finding, not_applicable
from qtarget.verification.expected import Expected
from qtarget.verification.subject import Subject, supervised

logger = logging.getLogger(__name__)

FAMILIES = (gradient, cuts, masks, auxiliary, neighbours, resources)
CHECKS: list[Check] = [check for family in FAMILIES for check in family.CHECKS]


@dataclass(frozen=True)
class Report:
    """What the checks found, in their order.

    Attributes:
        about: what was verified: target, model, rows, tokens, device, dtype, processes.
    """

    found: list[tuple[Check, Finding]]
    about: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [check.name for check, finding in self.found if finding.status == FAIL]

    @property
    def verdict(self) -> str:
        counts = Counter(finding.status for _, finding in self.found)
        return ", ".join(f"{counts[status]} {status}" for status in (PASS, FAIL, NOT_APPLICABLE))

    def to_dict(self) -> dict[str, Any]:
        checks = [
            {
                "name": check.name,
                "promise": check.promise,
                **asdict(finding),
                "hint": (finding.hint or check.hint) if finding.status == FAIL else None,
            }
            for check, finding in self.found
        ]
        return {"passed": not self.failed, "about": self.about, "checks": checks}


def verify(
    subject: Subject, checks: Sequence[Check] | None = None, progress: Callable[[str], None] = lambda name: None
) -> Report:
    """Run the checks, each whatever became of the others. ``progress`` gets the name of each before it runs.

    Raises:
        ConfigError: no row has a supervised token.
    """
    if not any(map(supervised, subject.rows)):
        raise ConfigError(
            "rows: none of those used has a supervised token; use more rows, or check completion_only_loss, "
            "assistant_only_loss and max_length"
        )
    findings = []
    is_nothing = functools.cache(Expected(subject).is_nothing)
    for check in CHECKS if checks is None else checks:
        progress(check.name)
        findings.append((check, _run(check, subject, is_nothing)))
    return Report(findings, _about(subject))


def _run(check: Check, subject: Subject, is_nothing: Callable[[], bool]) -> Finding:
    try:
        if check.of_gradient and is_nothing():
            return not_applicable(
                "the target has no gradient on these rows, for example because the teacher is the student: there is "
                "nothing to compare with"
            )
        return check.run(subject)
    except ConfigError as error:
        return Finding(FAIL, " ".join(error.faults), hint="the trainer itself refuses: it says why")
    except Exception as error:  # whatever breaks here would break the run: it is what was looked for
        logger.exception("check %s could not run", check.name)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Finding(FAIL, f"stopped by {text}", {"stopped_by": text}, "the traceback is in the log above")


def _about(subject: Subject) -> dict[str, Any]:
    sampled = {sample.number for sample in subject.samples}
    return {
        "target": "; ".join(map(str, subject.targets)),
        "model": str(getattr(subject.base.config, "_name_or_path", "")) or type(subject.base).__name__,
        "rows": len(subject.rows),
        "tokens": sum(len(row["input_ids"]) for row in subject.rows),
        "not_among_the_rows": [str(target) for number, target in enumerate(subject.targets) if number not in sampled],
        "supervised_tokens": sum(len(supervised(row)) for row in subject.rows),
        "device": str(subject.device),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "processes": subject.processes,
    }
