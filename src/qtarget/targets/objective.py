"""What a run trains: one target, or one per data source, each fixed or on a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qtarget.errors import ConfigError
from qtarget.targets import Target
from qtarget.targets.schedule import ScheduledTarget


@dataclass(frozen=True)
class Objective:
    """Targets by data source; a single target stands under ``None``.

    Attributes:
        targets: source → target.
        column: the dataset column that names the source of a row, where there are sources.
    """

    targets: dict[str | None, ScheduledTarget]
    column: str | None = None

    @classmethod
    def single(cls, config: object) -> Objective:
        return cls({None: ScheduledTarget.read(config)})

    @classmethod
    def by_source(cls, configs: object, column: str) -> Objective:
        """From ``{source: target}``. Raises ConfigError with the faults of every source."""
        if not isinstance(configs, Mapping) or not configs:
            raise ConfigError(f"targets is {configs!r}; write a target for each source, as in {{math: dft, chat: sft}}")
        targets: dict[str | None, ScheduledTarget] = {}
        faults = []
        for source, config in configs.items():
            try:
                targets[str(source)] = ScheduledTarget.read(config)
            except ConfigError as error:
                faults += [f"targets.{source}: {fault}" for fault in error.faults]
        if faults:
            raise ConfigError(faults)
        return cls(targets, column)

    @property
    def sources(self) -> list[str]:
        """Names of the data sources, in order; empty for a single target."""
        return [source for source in self.targets if source is not None]

    @property
    def requires(self) -> frozenset[str]:
        """What some target needs at some step."""
        return frozenset().union(*(target.requires for target in self.targets.values()))

    def requires_from(self, step: int, total_steps: int) -> frozenset[str]:
        """What some target needs at this step or later."""
        return frozenset().union(*(target.requires_from(step, total_steps) for target in self.targets.values()))

    def at(self, step: int, total_steps: int) -> list[Target]:
        """The targets for the optimiser step that follows ``step`` finished ones, in the order of ``targets``."""
        return [target.at(step, total_steps) for target in self.targets.values()]

    def values(self, step: int, total_steps: int) -> dict[str, float]:
        """The scheduled numbers as they are at that step, under the names they are logged by."""
        return {
            f"target/{name}" if source is None else f"{source}/target/{name}": value
            for source, target in self.targets.items()
            for name, value in target.values(step, total_steps).items()
        }

    def finals(self) -> Iterator[Target]:
        """Every target as it is once its schedules have ended."""
        return (target.final for target in self.targets.values())

    def to_config(self) -> object:
        """The YAML form: of ``target``, or of ``targets``."""
        if None in self.targets:
            return self.targets[None].to_config()
        return {source: target.to_config() for source, target in self.targets.items()}

    def __str__(self) -> str:
        return "; ".join(str(t) if s is None else f"{s}: {t}" for s, t in self.targets.items())

    def describe(self) -> str:
        """The targets with their formulas."""
        return "; ".join(
            f"target {'' if source is None else f'of {source} '}{target}: {target.final.formula}"
            for source, target in self.targets.items()
        )
