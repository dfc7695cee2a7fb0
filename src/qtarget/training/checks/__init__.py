"""What can be found wrong before the first training step."""

from qtarget.training.checks.datasets import (
    ColumnSet,
    column_faults,
    column_sets,
    datasets_of,
    faults_of_columns,
    missing_columns,
    no_supervised_token,
    packed_batch,
    packed_without_boundaries,
    reference_column,
    token_columns_without_ids,
    unmet_masks,
    untrainable_rows,
)
from qtarget.training.checks.start import (
    adapter_on_head,
    before_loading,
    beside_adapter,
    missing_teacher,
    no_generation_markers,
    prepared,
    target_faults,
)

__all__ = [
    "ColumnSet",
    "adapter_on_head",
    "before_loading",
    "beside_adapter",
    "column_faults",
    "column_sets",
    "datasets_of",
    "faults_of_columns",
    "missing_columns",
    "missing_teacher",
    "no_generation_markers",
    "no_supervised_token",
    "packed_batch",
    "packed_without_boundaries",
    "prepared",
    "reference_column",
    "target_faults",
    "token_columns_without_ids",
    "unmet_masks",
    "untrainable_rows",
]
