"""``kvpilot inspect`` against the cache's own tables and accounting, and against a worker's engine, on a tiny model."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import inspect_run, inspect_view
from cli.document import fields
from cli.inspect import document, read_order
from cli.inspect_picture import HOST_BRIGHTNESS, colour, draw, image
from cli.inspect_run import Inspection, inspect_request
from cli.main import app
from kernels.layout import MEMORY_TIERS, Format, Tier
from tests.tiny import Drive, tiny_engine, tiny_loaded, tiny_model, tiny_tokenizer
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import SequenceCache
from workers.engine.runner import LoadedModel
from workers.stages.registry import build

PIPELINES = [
    "full",
    "window(sinks=4, recent=64)",
    "snapkv(keep=0.5) | kivi(bits=4)",
    "host(recent=64)",
    "disk(recent=64)",
    "layerkv(recent=64)",
    "kvpr(recent=64, recompute=0.6)",
    "arkvale(recent=64, share=0.5)",
    "kivi(bits=2)",
    'snapkv(keep=0.4, budgets="ada")',
    "h2o(keep=0.3) | int8 | host(recent=64)",
    "snapkv(keep=0.4, shadow=false) | kivi(bits=4, shadow=false)",
]
CONTEXT = 512
TEXT = "".join(f"Line {number} of a text that goes on. " for number in range(9))
TOKENS = 45
"""To generate: the cache is settled in the midst of them, and again."""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny_loaded()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as any model lies on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(attention="sdpa", max_position_embeddings=CONTEXT).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(loaded: LoadedModel, pipeline: str, text: str, tokens: int) -> Inspection:
    config = loaded.model.config
    return inspect_request(
        loaded, *read_order(config, loaded.tokenizer, frozenset(), pipeline, text, tokens, "text"), tokens
    )


def inspected(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *words], env={"COLUMNS": "100", "NO_COLOR": "1"})
    return result.exit_code, result.output


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_document_says_what_the_tables_and_the_accounting_say(
    pipeline: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[tuple[KVCache, SequenceCache]] = []
    monkeypatch.setattr(
        inspect_run,
        "read_heads",
        lambda cache, seq, scores, read=inspect_run.read_heads: caches.append((cache, seq)) or read(cache, seq, scores),
    )
    found = json.loads(json.dumps(document(run(loaded, pipeline, TEXT, TOKENS))))
    ((cache, seq),) = caches
    tables, slot, shape = cache.tables, seq.slot, cache.shape
    assert found["seen_tokens"] == seq.seen == len(TEXT) + TOKENS
    assert [(head["layer"], head["head"]) for head in found["heads"]] == list(np.ndindex(shape.layers, shape.kv_heads))
    for head in found["heads"]:
        place = (slot, head["layer"], head["head"])
        length = int(tables.length[place])
        assert head["kept"] == tables.position[place][:length].tolist()
        assert [position for block in head["blocks"] for position in block["positions"]] == head["kept"]
        for index, block in enumerate(head["blocks"]):
            assert block["format"] == Format(tables.format[place][index]).name.lower()
            assert block["tier"] == Tier(tables.tier[place][index]).name.lower()
            assert block["positions"] == tables.position[place][:length][32 * index : 32 * (index + 1)].tolist()
    use = cache.use(seq)
    assert found["cache"] == fields(use.to_proto())
    fetching = ("arkvale", "layerkv", "kvpr")
    asked = {"disk"} if pipeline.startswith("disk") else {"host"} if pipeline.startswith(fetching) else set()
    assert {tier["name"] for tier in found["recalls"]["tiers"]} == asked
    to_disk = sum(pair["bytes"] for pair in found["recalls"]["moved"] if pair["to_tier"] == "disk")
    assert to_disk == use.disk_bytes
    beside = Counter({f"{area.tier.name.lower()}_bytes": area.nbytes[0] for area in seq.areas.values()})  # no head's
    beside["device_bytes"] += seq.selective.nbytes()[0] if seq.selective else 0  # digests, and copies of host blocks
    beside["host_bytes"] += seq.inputs.nbytes if seq.inputs else 0
    for name in ("device_bytes", "host_bytes", "disk_bytes", "shadow_bytes"):
        assert sum(head[name] for head in found["heads"]) + beside[name] == getattr(use, name)
    assert found["loss_class"] == cache.loss_class(seq, build(pipeline, shape)).name.lower()
    assert found["pipeline"] == build(pipeline, shape).text
    blocks = Counter((block["format"], block["tier"]) for head in found["heads"] for block in head["blocks"])
    assert {(kind["format"], kind["tier"]): kind["blocks"] for kind in found["totals"]["kinds"]} == blocks
    assert sum(kind["tokens"] for kind in found["totals"]["kinds"]) == found["totals"]["kept_tokens"]
    assert "".join(found["tokens"][: found["prompt_tokens"]]) == TEXT


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_worker_ends_with_the_same_tokens_and_bytes(pipeline: str, loaded: LoadedModel, tmp_path: Path) -> None:
    prompt = loaded.tokenizer(TEXT)["input_ids"]
    drive = Drive(tiny_engine(loaded, disk_folder=tmp_path, disk_budget_bytes=8 << 20))
    drive.submit("job", prompt, max_tokens=TOKENS + 1, pipeline=pipeline)  # the last one is chosen, but not stored
    outcome = drive.finish()["job"]
    found = inspect_request(loaded, build(pipeline, drive.engine.shape), prompt, TOKENS)
    assert list(found.token_ids[len(prompt) :]) == outcome.token_ids[:TOKENS]
    assert found.use.to_proto() == outcome.finished.cache


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_scores_decide_what_is_kept(pipeline: str, loaded: LoadedModel) -> None:
    found = run(loaded, pipeline, TEXT, 0)
    told = document(found)
    if found.choice is None:
        assert told["choice"] is None
        assert all(head["scored"] is None and head["scores"] is None for head in told["heads"])
        return
    seen, first, recent = found.choice.seen, found.choice.first, found.choice.recent
    assert seen == len(TEXT)
    for layer in range(found.shape.layers):
        heads = [head for head in found.heads if head.layer == layer]
        assert all(head.scores is not None and head.scores.position.tolist() == list(range(seen)) for head in heads)
        score = np.stack([head.scores.score for head in heads if head.scores])
        kept = np.stack([np.isin(np.arange(seen), head.kept) for head in heads])
        free = np.arange(first, seen - recent)
        assert kept[:, :first].all()
        assert kept[:, seen - recent :].all()
        assert kept.sum() == len(heads) * found.choice.budget
        if "ada" in pipeline:  # beyond each head's floor, the best of a layer's heads together
            continue
        for one, stays in zip(score[:, free], kept[:, free], strict=True):
            assert not stays.any() or one[stays].min() >= one[~stays].max()
    written = json.loads(json.dumps(told))["heads"][0]["scores"]
    assert found.heads[0].scores is not None
    assert np.array_equal(np.array(written, np.float32), found.heads[0].scores.score)


def test_scores_are_those_of_the_last_choice(loaded: LoadedModel) -> None:
    pipeline = "h2o(keep=0.3)"
    begin, later = (run(loaded, pipeline, TEXT, tokens) for tokens in (0, TOKENS))
    assert begin.choice is not None
    assert later.choice is not None
    assert begin.choice.seen == len(TEXT)
    assert later.choice.seen == (len(TEXT) + TOKENS) // 32 * 32
    scores = later.heads[0].scores
    assert scores is not None
    assert len(scores.position) < later.choice.seen  # it chose among those that the choice before had left
    assert set(later.heads[0].kept[: later.choice.budget].tolist()) <= set(scores.position.tolist())


def printed(found: Inspection, width: int = 100) -> str:
    out = io.StringIO()
    inspect_view.show(found, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_map_shows_where_each_layer_keeps(loaded: LoadedModel) -> None:
    found = run(loaded, "window(sinks=4, recent=64)", TEXT, 0)
    rows = inspect_view.layer_map(found, 100)[: found.shape.layers]
    assert [row[:8] for row in rows] == ["layer  0", "layer  1"]
    cells = rows[0][9:-5]
    assert len(cells) == 100 - 14
    assert all(len(row) == 100 for row in rows)
    columns = [found.kept[0, start:end].mean() for start, end in _edges(found.seen, len(cells))]
    assert all(
        (cell == " ", cell == "█") == (share == 0, share == 1) for cell, share in zip(cells, columns, strict=True)
    )
    assert cells.strip(" ░▒▓█") == ""
    assert rows[0].endswith(f"{68 / found.seen:.0%}")
    assert max(len(row) for row in inspect_view.layer_map(found, 1000)) < 1000  # a token a column, no more


def _edges(seen: int, columns: int) -> list[tuple[int, int]]:
    places = [column * seen // columns for column in range(columns + 1)]
    return list(itertools.pairwise(places))


@pytest.mark.parametrize(
    ("share", "shade"), [(0, " "), (0.01, "░"), (0.34, "▒"), (0.67, "▓"), (0.999, "▓"), (1.0, "█")]
)
def test_shades(share: float, shade: str) -> None:
    assert inspect_view.shade(share) == shade


def test_terminal_shows_totals_and_pieces(loaded: LoadedModel) -> None:
    found = run(loaded, "snapkv(keep=0.4) | kivi(bits=4)", TEXT, 3)
    said = printed(found)
    assert "snapkv(keep=0.4) | kivi(bits=4) (recoverable), tiny, " in said
    assert f"{len(TEXT)} + 3 tokens" in said
    assert {("raw", "device"), ("int4", "device")} == {
        tuple(line.split()[:2]) for line in said.splitlines() if line.split()[:1] in (["raw"], ["int4"])
    }
    for name in ("device", "host", "shadow", "peak on the device", "full cache"):
        assert f"\n {name}" in said or f"\n{name}" in said
    assert max(len(line) for line in said.splitlines()[2:]) <= 120
    count = found.kept.sum(axis=0) / len(found.heads)
    assert found.choice is not None
    pieces = inspect_view.cut(count[: found.choice.seen - found.choice.recent], 0)
    best, worst = pieces[0], pieces[-1]
    assert best.share == pytest.approx(count[best.start : best.end].mean())
    shown = said[said.index("most kept:") :].splitlines()
    assert f"{best.start}-{best.end - 1}" in shown[1]
    assert TEXT[best.start : best.end] in shown[1]
    after = shown[shown.index("least kept:") + 1]
    assert TEXT[worst.start : worst.end] in after


def test_terminal_shows_what_lower_tiers_took(loaded: LoadedModel) -> None:
    assert "asked of disk there in time; moved device → disk " in printed(run(loaded, "disk(recent=64)", TEXT, 3), 200)
    assert "moved" not in printed(run(loaded, "full", TEXT, 3))


def test_pieces_cover_a_stretch_once_and_the_last_takes_the_rest_in() -> None:
    share = np.array([0.0] * 8 + [1.0] * 8 + [0.5] * 11)
    pieces = inspect_view.cut(share, 100)
    assert [(piece.start, piece.end, piece.share) for piece in pieces] == [
        (108, 116, 1.0),
        (116, 127, 0.5),
        (100, 108, 0.0),
    ]
    assert [(piece.start, piece.end) for piece in inspect_view.cut(share[:3], 0)] == [(0, 3)]


def test_where_there_is_nothing_to_compare_it_is_said(loaded: LoadedModel) -> None:
    assert "no stage evicts: every head keeps every token" in printed(run(loaded, "kivi(bits=2)", TEXT, 0))
    windowed = printed(run(loaded, "window(sinks=4, recent=64)", TEXT, 0))
    assert "every piece is kept by the same share of the 4 heads: 0%" in windowed
    assert "nothing to choose from" in printed(run(loaded, "snapkv", "short", 0))


def test_picture_has_a_colour_for_each_token_of_each_head(loaded: LoadedModel) -> None:
    found = run(loaded, "h2o(keep=0.3) | int8 | host(recent=64)", TEXT, TOKENS)
    pixels = image(found)
    assert pixels.shape == (4, found.seen, 3)
    assert ((pixels == 1).all(axis=2) == ~found.kept).all()
    kinds = {(kind.format, kind.tier): kind.tokens for kind in found.kinds}
    assert len(kinds) > 2
    for (fmt, tier), tokens in kinds.items():
        assert int((pixels == colour(fmt, tier)).all(axis=2).sum()) == tokens
    device, host = (np.array(colour(Format.INT8, tier)) for tier in MEMORY_TIERS)
    assert host == pytest.approx(HOST_BRIGHTNESS * device)
    assert draw(found).startswith(b"\x89PNG")


def test_command_writes_what_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    prompt, told, picture = tmp_path / "prompt.txt", tmp_path / "told.json", tmp_path / "kept.png"
    prompt.write_text(TEXT, encoding="utf-8")
    words = ["--prompt-file", str(prompt), "--model", str(folder), "--tokens", "2"]
    code, said = inspected("snapkv(keep=0.5) | kivi(bits=4)", *words, "--json", str(told), "--picture", str(picture))
    assert code == 0, said
    assert "layer  1" in said
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    assert (found["model"], found["prompt_tokens"], found["generated_tokens"]) == ("tiny", len(TEXT), 2)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("pipeline", "data", "options", "named"),
    [
        ("snapkw", b"text", (), ("pipeline: unknown stage 'snapkw'; known are ", "window")),
        ("kivi(bits=3)", b"text", (), ("pipeline: parameter 'bits' of stage 'kivi': 3 given; accepted:",)),
        ("full", b"", (), ("--prompt-file:", "prompt.txt' is empty; accepted: text of at least one token")),
        ("full", b"bad \xff", (), ("--prompt-file:", "has byte 0xff at offset 4; accepted: UTF-8 text")),
        ("full", b"x" * (CONTEXT + 1), (), ("--prompt-file:", "has 513 tokens; accepted: at most 512")),
        ("full", b"x" * 500, ("--tokens", "13"), ("--tokens: 13; accepted: at most 12",)),
        ("full", b"text", ("--json", "nowhere/told.json"), ("--json: 'nowhere/told.json'; accepted:",)),
        ("full", b"text", ("--model", "no-such-model"), ("no-such-model", "kvpilot model list")),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(
    pipeline: str, data: bytes, options: tuple[str, ...], named: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """And before the weights are loaded: these cannot be."""
    prompt, weightless = tmp_path / "prompt.txt", tmp_path / "model"
    prompt.write_bytes(data)
    shutil.copytree(folder, weightless)
    (weightless / "model.safetensors").write_bytes(b"")
    model = () if "--model" in options else ("--model", str(weightless))
    code, said = inspected(pipeline, "--prompt-file", str(prompt), *model, *options)
    assert code == 2
    for part in named:
        assert part in said


def test_a_prompt_that_fills_the_context_fits(folder: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("x" * 500)
    words = ("--prompt-file", str(prompt), "--model", str(folder), "--tokens", "12")
    assert inspected("h2o | kivi(bits=4) | host(recent=64)", *words)[0] == 0
