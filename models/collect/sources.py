"""All that a run is to measure, in an order of which any beginning is a fair mix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from models.collect.builtin import docstrings_of, find_builtin
from models.collect.corpus import (
    CorpusError,
    Found,
    Skipped,
    find_files,
    interleave,
    is_prompts_file,
    read_files,
    read_prompts,
)
from models.collect.document import CODE, PROSE, Document
from models.collect.plan import Options, Plan, make_plans
from models.collect.tasks import make_tasks
from models.collect.vocabulary import StoredVocabulary

_LEAST_CHARACTERS = 4_000
"""Of a text to make tasks of: a page."""
_MOST_READ_FOR_TASKS = 1_000


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        source: folder of text, or file of prompts; None for neither.
        builtin: also the text that lies on this machine.
        outcomes: past requests.
        tasks: generated tasks.
        limit: most documents, tasks not counted; None for all.
    """

    source: Path | None = None
    builtin: bool = False
    outcomes: tuple[Document, ...] = ()
    tasks: int = 0
    limit: int | None = None


def plan_all(
    wanted: Wanted, vocabulary: StoredVocabulary, others: Sequence[str], options: Options, skipped: Skipped
) -> list[Plan]:
    """The plans of a run.

    Raises:
        CorpusError: the source cannot be read, or there is nothing to measure.
    """
    files, prompts = _find(wanted)
    texts = _alternate([iter([*prompts, *wanted.outcomes]), _texts(files, options.seed, skipped)])
    plans = list(islice(make_plans(texts, vocabulary, others, options, skipped), wanted.limit))
    if wanted.tasks:
        sources = _task_sources(files, wanted.tasks, options.seed)
        tasks = make_tasks(wanted.tasks, sources, options.length, vocabulary.count, options.seed)
        plans = mix(plans, list(make_plans(tasks, vocabulary, others, options, skipped)))
    if not plans:
        raise CorpusError(f"nothing to measure; skipped: {skipped}")
    return plans


def _find(wanted: Wanted) -> tuple[list[Found], list[Document]]:
    files: list[Found] = []
    prompts: list[Document] = []
    if wanted.source is not None and is_prompts_file(wanted.source):
        prompts = read_prompts(wanted.source)
    elif wanted.source is not None:
        files += find_files(wanted.source)
    if wanted.builtin:
        files += find_builtin()
    return files, prompts


def _texts(files: Sequence[Found], seed: int, skipped: Skipped) -> Iterator[Document]:
    """Files, and for every third Python module its documentation in its place."""
    modules = 0
    for document in read_files(interleave(files, seed), skipped):
        said = docstrings_of(document)
        modules += said is not None
        yield said if said is not None and modules % 3 == 0 else document


def _task_sources(files: Sequence[Found], number: int, seed: int) -> list[Document]:
    """As many prose documents and Python modules as there are tasks, where there are."""
    taken: list[Document] = []
    left = {PROSE: number, CODE: number}
    for document in read_files(islice(interleave(files, seed), _MOST_READ_FOR_TASKS), Skipped()):
        if len(document.text) < _LEAST_CHARACTERS or (document.kind == CODE and not document.name.endswith(".py")):
            continue
        if left.get(document.kind, 0) > 0:
            left[document.kind] -= 1
            taken.append(document)
        if not any(left.values()):
            break
    return taken


def _alternate(iterators: Sequence[Iterator[Document]]) -> Iterator[Document]:
    """One of each in turn, as long as they last."""
    live = list(iterators)
    while live:
        for iterator in list(live):
            try:
                yield next(iterator)
            except StopIteration:
                live.remove(iterator)


def mix(one: Sequence[Plan], other: Sequence[Plan]) -> list[Plan]:
    """Both, each spread evenly over the whole."""
    placed = [
        ((2 * place + 1) / len(plans), which, plan)
        for which, plans in enumerate((one, other))
        for place, plan in enumerate(plans)
    ]
    return [plan for _, _, plan in sorted(placed, key=lambda entry: entry[:2])]
