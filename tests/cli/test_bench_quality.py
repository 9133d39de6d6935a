"""What the quality report's figures mean, on a tiny random model; on SmolLM2 where the model must know something."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import quality, quality_subjects
from bench.quality import Files, Part, joined, measure, write
from bench.quality_lab import Clock, Lab, compare
from bench.quality_plot import front
from bench.quality_report import Report, cells, render, summary
from bench.quality_rows import Row, Table
from bench.quality_subjects import FULL, TARGETS, LeftOut, Subject, all_subjects, fraction
from bench.quality_tables import Sizes, Tables
from bench.quality_tasks import Question, Recall, Text, Words, conversations, needles, texts
from cli.errors import BadInputError
from cli.main import app
from kernels.layout import CacheShape
from kvpilot.recipes import recipes
from tests.tiny import prompt, random_profile, tiny_loaded
from workers.cache.sequence_cache import Occasion
from workers.engine.attention import cache_shape
from workers.engine.runner import LoadedModel, load_model
from workers.stages.base import Codec, Evictor, LayerView, Pipeline, Placer, Stage, parameter
from workers.stages.budgets import PER_HEAD
from workers.stages.evict.window import Window
from workers.stages.registry import build, stages

SIZES = Sizes(
    contexts=(256, 384),
    texts=1,
    text_tokens=384,
    horizon=4,
    haystacks=1,
    needles=1,
    asked=1,
    conversations=1,
    turn_tokens=256,
    prompts=1,
    prompt_tokens=256,
    answer_tokens=68,
)
FIELDS = {
    "table", "name", "label", "kind", "target", "pipeline", "context", "query_aware", "loss_class", "bytes_fraction",
    "host_fraction", "shadow_fraction", "divergence", "divergence_last_quarter", "perplexity", "perplexity_full",
    "needle_accuracy", "agreement", "samples", "seconds", "left_out", "error",
}  # fmt: skip
SMOLLM2 = CacheShape(layers=30, kv_heads=3, query_heads=9, head_dim=64, dtype=torch.float32)
EVERY = sorted({*stages(), *recipes(), *quality_subjects.COMBINATIONS})


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded()


@pytest.fixture(scope="module")
def report(loaded: LoadedModel) -> Report:
    return measure(loaded, SIZES, (), "kvpilot bench quality", Console(quiet=True))


def subject(text: str, shape: CacheShape) -> Subject:
    """A pipeline as it is."""
    pipeline = build(text, shape)
    return Subject(text, "evict", None, lambda tokens: pipeline)


def tables_of(loaded: LoadedModel, *texts: str) -> Tables:
    """Measures these pipelines beside the full cache."""
    shape = cache_shape(loaded.model.config, torch.float32)
    subjects = [subject(text, shape) for text in (FULL, *texts)]
    return Tables(loaded, subjects, Clock(), lambda what: None)


def numbers(row: Row) -> list[float]:
    found = (row.bytes_fraction, row.divergence, row.perplexity, row.agreement)
    return [value for value in found if value is not None]


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("table", Table)
def test_every_stage_recipe_and_combination_has_rows_in_every_table(report: Report, table: Table) -> None:
    rows = report.of(table)
    assert sorted({row.name for row in rows}) == EVERY
    assert {row.error for row in rows} == {None}
    for row in rows:
        assert (row.left_out is None) == (row.samples > 0) == (len(numbers(row)) == 4), row
        assert all(math.isfinite(value) for value in numbers(row))
        assert row.query_aware in ((False, True) if table is Table.RETRIEVAL else (table is Table.GENERATION,))
    pairs = [(row.label, row.context, row.query_aware) for row in rows]
    assert len(pairs) == len(set(pairs))
    groups = {pair[1:] for pair in pairs}
    assert len(groups) == {Table.TEXT: 2, Table.RETRIEVAL: 4}.get(table, 1)
    assert len(pairs) == len(groups) * len({pair[0] for pair in pairs})


@pytest.mark.slow
def test_the_full_cache_loses_nothing_and_takes_everything(report: Report) -> None:
    rows = [row for row in report.rows if row.name == FULL]
    assert len(rows) == 2 + 4 + 1 + 1
    for row in rows:
        assert (row.bytes_fraction, row.host_fraction, row.shadow_fraction) == (1.0, 0.0, 0.0)
        assert row.divergence == pytest.approx(0.0, abs=1e-5)
        assert row.agreement == 1.0
        assert row.perplexity == pytest.approx(row.perplexity_full)
        assert row.loss_class == "exact"


@pytest.mark.slow
def test_bytes_are_those_asked_for_and_exact_pipelines_move_them(report: Report) -> None:
    for row in report.of(Table.TEXT):
        if row.target is not None and row.bytes_fraction is not None:
            assert quality_subjects.ENOUGH * row.target <= row.bytes_fraction <= row.target + 1e-6, row
        if row.name == "host" and row.bytes_fraction is not None:
            assert row.divergence == 0.0
            assert row.host_fraction is not None
            # all tables are on the device; the blocks are on one tier or the other
            assert row.bytes_fraction + row.host_fraction == pytest.approx(1.0, abs=1e-6)
    evicting = [row for row in report.of(Table.TEXT) if row.kind == "evict" and row.samples]
    assert {row.loss_class for row in evicting} == {"recoverable"}
    assert {row.shadow_fraction > 0.5 for row in evicting if row.shadow_fraction is not None} == {True}
    dropped = [row for row in evicting if row.bytes_fraction is not None and row.bytes_fraction < 1]
    assert min(row.divergence for row in dropped if row.divergence is not None) > 0


@pytest.mark.slow
def test_snapkv_holds_all_it_generates_and_windows_do_not(report: Report) -> None:
    rows = {row.label: row for row in report.of(Table.GENERATION)}
    window, snapkv = (rows[f"{name} at 0.5"].bytes_fraction for name in ("window", "snapkv"))
    assert window is not None
    assert snapkv is not None
    assert snapkv > window


@pytest.mark.slow
def test_the_document_is_json_and_every_table_is_shown(report: Report, tmp_path: Path) -> None:
    files = Files(tmp_path / "q.json", tmp_path / "q.html", tmp_path / "q.png")
    write(report, files)
    document = json.loads((tmp_path / "q.json").read_text())
    assert {"machine", "model", "date", "command", "seconds", "spent_s", "settings", "rows"} == set(document)
    assert all(set(row) == FIELDS for row in document["rows"])
    assert len(document["rows"]) == len(report.rows)
    assert sum(document["spent_s"].values()) == pytest.approx(document["seconds"], abs=1.0)
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "q.html").read_text()
    assert page.count("<h2>") == len(Table) + 1
    assert "data:image/png;base64," in page
    assert all(f"<td>{name}" in page for name in EVERY)
    console = Console(width=250, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    for table in Table:
        shown = cells(report, table)
        assert [line[0] for line in shown.lines] == list(dict.fromkeys(row.label for row in report.rows))
        assert {len(line) for line in shown.lines} == {len(shown.heads)}
        console.print(*render(report, table), sep="\n")
    said = console.export_text()
    left_out = [row for row in report.rows if row.left_out]
    assert left_out
    assert all(f"{row.label}: {row.left_out}" in " ".join(said.split()) for row in left_out)
    assert "slowest: " in summary(report)


# -- single figures ----------------------------------------------------------------------------------------------------


def test_divergence_and_perplexity_are_those_of_decode_steps(loaded: LoadedModel) -> None:
    """The same by decoding token by token, with log-probabilities in double precision."""
    ids, context, horizon = prompt(256, seed=3), 224, 8
    tables = tables_of(loaded, "window(sinks=4, recent=64)", "kivi(bits=2)")
    rows = tables.text([Text("random", tuple(ids))], (context,), horizon)
    lab = Lab(loaded, 300, 2, 1, Clock())
    following, behind = ids[context : context + horizon], {}
    for row in rows:
        assert row.pipeline is not None
        seq = lab.open()
        lab.compute(seq, ids[:context], context)
        pipeline = build(row.pipeline, lab.cache.shape)
        lab.cache.apply(seq, pipeline.without_shadow(), Occasion.PROMPT)
        steps: list[torch.Tensor] = []
        lab.decode([(seq, Pipeline())], following, lambda index, logprobs, to=steps: to.append(logprobs[0].double()))
        behind[row.name] = torch.stack(steps)
        lab.cache.close(seq)
    came = torch.tensor(ids[context + 1 : context + horizon + 1])
    for row in rows:
        exact, other = behind[FULL], behind[row.name]
        divergence = float((exact.exp() * (exact - other)).sum(-1).mean())
        assert row.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert row.perplexity == pytest.approx(float((-other.gather(1, came[:, None]).mean()).exp()), rel=1e-3)
        assert (row.divergence > 1e-3) == (row.name != FULL)


def test_a_hit_is_what_greedy_decoding_says(loaded: LoadedModel) -> None:
    """Answers are the full cache's own, so that it has them right; what lacks the context has not."""
    ids, asked = prompt(256, seed=4), prompt(5, seed=5)
    lab = Lab(loaded, 300, 1, 1, Clock())
    seq = lab.open()
    lab.compute(seq, ids, len(ids))
    answer: list[int] = []
    lab.decode([(seq, Pipeline())], asked, lambda index, logprobs: answer.append(int(logprobs.argmax())))
    answer = answer[-1:]
    for _ in range(3):
        lab.decode([(seq, Pipeline())], answer[-1:], lambda index, logprobs: answer.append(int(logprobs.argmax())))
    recall = Recall("own", tuple(ids), (Question(tuple(asked), tuple(answer)),))
    rows = tables_of(loaded, "window(sinks=0, recent=32)", "host(recent=32)").retrieval([recall], 4)
    accuracy = {(row.name.partition("(")[0], row.query_aware): row.needle_accuracy for row in rows}
    assert accuracy["full", False] == accuracy["host", False] == 1.0
    assert accuracy["window", False] == 0.0
    wrong = replace(recall, questions=(Question(tuple(asked), (*answer[:-1], (answer[-1] + 1) % 256)),))
    rows = tables_of(loaded).retrieval([wrong], 4)
    assert {row.needle_accuracy for row in rows} == {0.0}  # one wrong token is a wrong answer


def test_query_aware_puts_the_question_into_the_prompt(loaded: LoadedModel) -> None:
    """A window that holds the question alone has it among the prompt's last tokens, and its first token is exact."""
    ids = tuple(prompt(256, seed=6))
    recall = Recall("random", ids, (Question(tuple(prompt(40, seed=7)), (1, 2)),))
    rows = tables_of(loaded, "window(sinks=0, recent=32)").retrieval([recall], 4)
    agnostic, aware = (
        next(row for row in rows if row.query_aware is known and row.name != FULL) for known in (False, True)
    )
    assert (agnostic.samples, aware.samples) == (1, 1)
    assert agnostic.divergence != aware.divergence
    lab = Lab(loaded, 400, 1, 1, Clock())
    whole = lab.open()
    lab.compute(whole, [*ids, *recall.questions[0].ids], 296)
    with lab.fork(whole) as fork:
        lab.apply(fork, build("window(sinks=0, recent=32)", lab.cache.shape))
        behind = compare(lab.score(whole, [1]), lab.score(fork, [1]), [2])
    assert aware.divergence == pytest.approx(float(behind.divergence[0]) / 2, rel=1e-3)  # of two tokens, one exact


def test_votes_and_masses_are_those_of_a_prompt_computed_alone(loaded: LoadedModel) -> None:
    ids = prompt(300, seed=8)
    lab = Lab(loaded, 320, 2, 1, Clock())
    base, alone = lab.open(), lab.open()
    lab.compute(base, ids, 236)
    lab.compute(alone, ids, 300)
    with lab.prompt(base, ids) as (ready, logprobs):
        for name in ("votes", "mass"):
            mine, other = (getattr(lab.cache.tables, name)[seq.slot, :, :, :300] for seq in (ready, alone))
            assert mine == pytest.approx(other, rel=2e-2, abs=2e-3)
            assert mine.sum() > 1
        assert logprobs.exp().sum() == pytest.approx(1.0, abs=1e-5)


def test_needles_lie_in_every_part_of_exactly_so_many_tokens(loaded: LoadedModel) -> None:
    words = Words(loaded)
    for tokens in (700, 1000):
        (stack,) = needles(words, 1, 3, tokens)
        assert len(stack.ids) == tokens
        text = loaded.tokenizer.decode(stack.ids)
        places = []
        for question in stack.questions:
            asked, answer = (loaded.tokenizer.decode(ids) for ids in (question.ids, question.answer))
            key = asked.split(" of ")[1].split()[0]
            needle = f"The password of {key} is{answer}."
            assert text.count(needle) == 1
            places.append(text.index(needle))
        assert places == sorted(places)
        assert places[0] < len(text) / 2 < places[2]


def test_conversations_ask_for_what_the_first_turn_says(loaded: LoadedModel) -> None:
    (chat,) = conversations(Words(loaded), 1, 500)
    first, between = (loaded.tokenizer.decode(ids) for ids in (chat.ids, chat.between))
    assert between.count("[user]") == 2
    assert len(chat.questions) == 3
    for question in chat.questions:
        answer = loaded.tokenizer.decode(question.answer)
        assert answer.strip(" .") in first
        assert answer.strip(" .") not in between + loaded.tokenizer.decode(question.ids)


def test_texts_are_real_and_differ(loaded: LoadedModel) -> None:
    found = texts(Words(loaded), 3, 900)
    assert len({text.name for text in found}) == 3
    assert {len(text.ids) for text in found} == {900}


# -- what is measured --------------------------------------------------------------------------------------------------


def test_stages_are_set_to_the_shares_at_a_thousand_tokens() -> None:
    """Evictors whose heads keep alike; others, and placers that keep more than blocks, or they say what they take."""
    profile = random_profile(SMOLLM2)
    for one in all_subjects(SMOLLM2, (), profile):
        try:
            pipeline = one.make(1024)
        except LeftOut as why:
            kind = stages()[one.name]
            assert issubclass(kind, (Placer, Codec)) or says_itself(kind), one.label
            takes = re.match(r"takes (0\.\d+) of the bytes at least", str(why))
            assert takes is not None
            assert float(takes[1]) > (one.target or 1)
            continue
        if one.target is None:
            continue
        found = fraction(pipeline, SMOLLM2, 1024, profile)
        assert 0.75 * one.target <= found <= one.target + 1e-6, (one.label, pipeline.text)
    labels = [one.label for one in all_subjects(SMOLLM2, (), profile)]
    assert labels[0] == FULL
    assert {"kivi(bits=2)", "kivi(bits=4)", "kivi(bits=8)", "fp8", "int8", "streaming-llm"} <= set(labels)
    for name, kind in stages().items():
        if name == "host" or (issubclass(kind, Evictor) and not says_itself(kind)):
            assert {f"{name} at {target:.3g}" for target in TARGETS} <= set(labels)


def says_itself(kind: type[Stage]) -> bool:
    """Whether its heads' budgets are the stage's own."""
    return issubclass(kind, Evictor) and kind().rule == PER_HEAD


def test_stages_that_need_a_profile_are_set_by_it_or_left_out_without() -> None:
    profile = random_profile(SMOLLM2)
    found = {one.label: one for one in all_subjects(SMOLLM2, (), profile)}
    for label in ("duo at 0.5", "expected_attention at 0.25"):
        share = float(label.split()[-1])
        assert 0.75 * share <= fraction(found[label].make(1024), SMOLLM2, 1024, profile) <= share + 1e-6
    with pytest.raises(LeftOut, match=r"takes 0\.3\d+ of the bytes at least, at 1024 tokens with share=0"):
        found["duo at 0.125"].make(1024)
    for one in all_subjects(SMOLLM2, ["duo", "razor", "expected_attention"]):
        if one.name != FULL:
            with pytest.raises(LeftOut, match=r"cannot serve this model: it needs the model's .*kvpilot model profile"):
                one.make(1024)


def test_a_stage_that_cannot_reach_a_share_or_serve_the_model_says_why() -> None:
    small = replace(SMOLLM2, head_dim=8, layers=2)
    found = {one.label: one for one in all_subjects(small)}
    with pytest.raises(LeftOut, match="cannot serve this model: head_dim 8 is below 16"):
        found["kivi"].make(1024)
    with pytest.raises(LeftOut, match=r"takes 0\.25 of the bytes at least, at 256 tokens with size=64"):
        found["tova at 0.125"].make(256)
    assert {one.name for one in all_subjects(small)} == set(EVERY)


def test_only_names_and_the_full_cache() -> None:
    assert [one.label for one in all_subjects(SMOLLM2, ["kivi-2bit", "fp8"])] == [FULL, "fp8", "kivi-2bit"]
    with pytest.raises(KeyError, match="'snap' given; accepted: 'full', 'window'"):
        all_subjects(SMOLLM2, ["snap"])


def test_stages_of_strangers_are_found_and_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    from kvpilot.bounds import Bounds

    @dataclass(frozen=True)
    class Shed(Window):
        """Drops a share: more is less."""

        name: ClassVar[str] = "shed"
        sinks: int = parameter(0, Bounds(least=0, most=0), minor=True)
        recent: int = parameter(32, Bounds(least=32, most=32), minor=True)
        drop: float = parameter(0.5, Bounds(least=0, most=1))

        def budget(self, seen: int) -> int:
            return max(64, round((1 - self.drop) * seen))

    monkeypatch.setattr(quality_subjects, "stages", lambda: {"full": stages()["full"], "shed": Shed})
    found = {one.label: one for one in all_subjects(SMOLLM2)}
    for target in TARGETS:
        stage = found[f"shed at {target:.3g}"].make(1024).stages[0]
        assert isinstance(stage, Shed)
        assert stage.budget(1024) == target * 1024


def test_the_front_is_what_nothing_beats() -> None:
    generator = random.Random(1)
    points = [(generator.randrange(20) / 20, generator.random()) for _ in range(60)]
    best = front(points)
    for at, point in enumerate(points):
        beaten = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        assert (at in best) != beaten


# -- errors ------------------------------------------------------------------------------------------------------------


class Breaks(Window):
    """Works a given number of times."""

    calls: ClassVar[int] = 0
    works: ClassVar[int] = 0

    def score(self, layer: LayerView) -> torch.Tensor:
        """Raises after ``works`` calls."""
        type(self).calls += 1
        if type(self).calls > type(self).works:
            raise RuntimeError("nothing goes any more")
        return super().score(layer)


@pytest.fixture(params=[0, 2], ids=["at once", "while decoding"])
def breaking(request: pytest.FixtureRequest) -> Subject:
    """Two calls, of a model of two layers, are one choice."""
    Breaks.calls, Breaks.works = 0, request.param
    pipeline = Pipeline((Breaks(recent=64),))
    return Subject("breaks", "evict", None, lambda tokens: pipeline)


def test_a_stage_that_raises_has_its_error_in_its_row_and_others_have_figures(
    loaded: LoadedModel, breaking: Subject
) -> None:
    shape = cache_shape(loaded.model.config, torch.float32)
    subjects = [subject(FULL, shape), breaking, subject("int8", shape), subject("window(recent=64)", shape)]
    tables = Tables(loaded, subjects, Clock(), lambda what: None)
    rows = tables.generation([Text("random", tuple(prompt(128, seed=9)))], 40)
    assert [row.error for row in rows] == [None, "RuntimeError: nothing goes any more", None, None]
    assert [row.divergence is None for row in rows] == [False, True, False, False]
    alone = tables_of(loaded, "int8", "window(recent=64)").generation([Text("random", tuple(prompt(128, seed=9)))], 40)
    for row, other in zip([rows[0], *rows[2:]], alone, strict=True):  # batches of another size round otherwise
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-2, abs=1e-5)
    rows = tables.text([Text("random", tuple(prompt(256, seed=9)))], (192,), 4)
    assert [bool(row.error) for row in rows] == [False, True, False, False]


def test_the_command_writes_everything_and_fails_if_a_row_did(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bad(Codec):
        """A codec without a format."""

        name: ClassVar[str] = "bad"
        summary: ClassVar[str] = "bad"

    monkeypatch.setattr(quality, "QUICK_SIZES", replace(SIZES, contexts=(256,), prompt_tokens=256, turn_tokens=256))
    profile = random_profile(cache_shape(loaded.model.config, torch.float32))
    monkeypatch.setattr(quality, "load_model", lambda *of: replace(loaded, profile=profile))
    monkeypatch.setattr(quality.store, "resolve", lambda name: Path("tiny"))
    monkeypatch.setattr(quality_subjects, "stages", lambda: {"full": stages()["full"], "window": Breaks})
    Breaks.calls = Breaks.works = 0
    words = ["bench", "quality", "--quick", "--processes", "1", "--only", "window"]
    words += ["--json", str(tmp_path / "q.json")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "rows are errors: window at 0.5 (text)" in result.output
    assert "ERROR RuntimeError: nothing goes any more" in result.output
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    assert {row["error"] for row in rows if row["name"] == "full"} == {None}
    assert "RuntimeError: nothing goes any more" in {row["error"] for row in rows if row["name"] == "window"}


def test_parts_of_several_processes_make_the_rows_of_one(loaded: LoadedModel) -> None:
    only, said = ("window", "snapkv", "host", "kivi", "streaming-llm"), Console(quiet=True)
    whole = measure(loaded, SIZES, only, "", said)
    together = joined([measure(loaded, SIZES, only, "", said, Part(index, 3)) for index in range(3)])
    assert len(whole.rows) > 4 * len(only)
    told = ("table", "context", "query_aware", "label", "pipeline", "bytes_fraction", "samples", "left_out", "error")
    for row, same in zip(together.rows, whole.rows, strict=True):
        assert [getattr(row, name) for name in told] == [getattr(same, name) for name in told]
        if same.divergence is not None:  # batches of other sizes are rounded otherwise
            assert row.divergence == pytest.approx(same.divergence, rel=1e-3, abs=1e-6)
    assert together.settings == whole.settings | {"processes": 3}
    assert set(together.spent) == set(whole.spent)


def test_bad_input_is_named(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = Console(quiet=True)
    with pytest.raises(BadInputError, match="--only: 'snap' given; accepted: 'full'"):
        measure(loaded, SIZES, ("snap",), "", said)
    with pytest.raises(BadInputError, match="'tiny' has a context of 400 tokens; accepted: at least 512"):
        measure(replace(loaded, context_tokens=400), SIZES, (), "", said)
    with pytest.raises(BadInputError, match="has no tokenizer"):
        measure(replace(loaded, tokenizer=None), SIZES, (), "", said)
    with pytest.raises(BadInputError, match=r"--json: .* given; accepted: a file in a folder that exists"):
        quality.bench(True, None, (), Files(json=tmp_path / "nowhere" / "q.json"))


# -- a model that knows something --------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_finds_needles_unless_they_are_dropped(smollm2: Path) -> None:
    loaded = load_model(smollm2, "smollm2", torch.device("cpu"), torch.float32)
    stacks = needles(Words(loaded), 1, 4, 900)
    rows = tables_of(loaded, "window(recent=64)", "int8").retrieval(stacks, 4)
    found = {(row.name.partition("(")[0], row.query_aware): row.needle_accuracy for row in rows}
    assert found["full", False] is not None
    assert found["full", False] >= 1 / 2
    assert found["full", False] == found["full", True] == found["int8", False]
    assert found["window", False] == found["window", True] == 0.0
