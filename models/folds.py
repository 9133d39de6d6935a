"""Cross-validation that never divides a document."""

from __future__ import annotations

from collections.abc import Iterator

from sklearn.model_selection import GroupKFold

from models.examples import Examples, Index
from models.fitting import TrainingError

FOLDS = 5


def folds_of(examples: Examples, folds: int = FOLDS) -> Iterator[tuple[Index, Index]]:
    """Pairs of row numbers, to fit on and to test on; the same ones every time.

    Raises:
        TrainingError: fewer documents than folds, or fewer than 2 folds.
    """
    if folds < 2:
        raise TrainingError(f"folds {folds}: expected 2 or more")
    if examples.documents < folds:
        raise TrainingError(
            f"{examples.documents} documents with lossy pipelines in the training split; "
            f"cross-validation with {folds} folds takes at least {folds}"
        )
    folding = GroupKFold(n_splits=folds, shuffle=True, random_state=0)
    return iter(folding.split(examples.rows, groups=examples.source))
