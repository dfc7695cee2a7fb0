"""Trainers that train nothing: they prepare rows, for teacher caches and dry runs."""

from __future__ import annotations

from qtarget.training.trainer import QTargetTrainer


class DryTrainer(QTargetTrainer):
    """Prepares rows and checks them as training would. Its student may be without weights; nothing else is loaded."""

    def _roles(self, requires: frozenset[str]) -> frozenset[str]:
        return frozenset()


class RowsTrainer(QTargetTrainer):
    """Prepares rows and asks the teacher. Its student may be without weights."""

    opens_teacher = True
