"""Pipeline text: what parses, what does not, and that spelling and reading are inverse."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.pipeline import (
    MAX_PIPELINE_CHARACTERS,
    PipelineError,
    StageSpec,
    format_pipeline,
    format_value,
    parse_pipeline,
    parse_value,
)


def test_the_example_of_the_design() -> None:
    assert parse_pipeline("snapkv(keep=0.5) | kivi(bits=4) | host(recent=256)") == (
        StageSpec("snapkv", (("keep", 0.5),)),
        StageSpec("kivi", (("bits", 4),)),
        StageSpec("host", (("recent", 256),)),
    )


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("full", (StageSpec("full"),)),
        ("full()", (StageSpec("full"),)),
        ("  streaming-llm ( sinks = 4 )  ", (StageSpec("streaming-llm", (("sinks", 4),)),)),
        ("a|b", (StageSpec("a"), StageSpec("b"))),
        ("a(x=true, y=false)", (StageSpec("a", (("x", True), ("y", False))),)),
        ("a(x=-1, y=+2, z=1e-3, w=.5)", (StageSpec("a", (("x", -1), ("y", 2), ("z", 1e-3), ("w", 0.5))),)),
        ("a(x='b c', y=\"d | e\")", (StageSpec("a", (("x", "b c"), ("y", "d | e"))),)),
        ("a(x=ada, y=a-b, z='true')|b", (StageSpec("a", (("x", "ada"), ("y", "a-b"), ("z", "true"))), StageSpec("b"))),
    ],
)
def test_texts_that_parse(text: str, stages: tuple[StageSpec, ...]) -> None:
    assert parse_pipeline(text) == stages


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a stage name at the end"),
        ("   ", "a stage name at the end"),
        ("|", "a stage name, not '|'"),
        ("a |", "a stage name at the end"),
        ("a b", "before the next stage"),
        ("a(", "a parameter name of stage 'a'"),
        ("a(x", "`=` after parameter 'x'"),
        ("a(x=", "a value for parameter 'x'"),
        ("a(x=1", "`,` or `)`"),
        ("a(x=1 y=2)", "`,` or `)`"),
        ("a(x=1, x=2)", "given twice"),
        ("a(x=not sure)", "`,` or `)`"),
        ("a(x=|)", "a value for parameter 'x'"),
        ("a(1=2)", "a parameter name"),
        ("a(x='open)", "unexpected"),
        ("a; b", "unexpected ';' at character 1"),
        ("1a", "a stage name"),
        ("a" * (MAX_PIPELINE_CHARACTERS + 1), "at most 1024"),
    ],
)
def test_texts_that_do_not_parse_say_why(text: str, words: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text)
    assert words in str(caught.value)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,12}", fullmatch=True)
values = st.one_of(
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_characters='"\\', exclude_categories=("Cs",)), max_size=12),
)
stages = st.builds(
    StageSpec,
    names,
    st.lists(st.tuples(names, values), max_size=3, unique_by=lambda pair: pair[0]).map(tuple),
)


@given(st.lists(stages, min_size=1, max_size=4).map(tuple))
def test_reading_is_the_inverse_of_spelling(pipeline: tuple[StageSpec, ...]) -> None:
    read = parse_pipeline(format_pipeline(pipeline))
    assert read == pipeline
    assert [type(value) for stage in read for _, value in stage.parameters] == [
        type(value) for stage in pipeline for _, value in stage.parameters
    ]


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        parsed = parse_pipeline(text)
    except PipelineError:
        return
    assert parse_pipeline(format_pipeline(parsed)) == parsed


def test_a_bare_word_is_written_with_quotes() -> None:
    assert format_pipeline(parse_pipeline("a(x=ada)")) == 'a(x="ada")'
    assert parse_value("ada") == parse_value('"ada"') == "ada"
    with pytest.raises(PipelineError, match="expected one number, true, false or string"):
        parse_value("ada pyramid")


@given(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,12}", fullmatch=True).filter(lambda word: word not in ("true", "false"))
)
def test_quotes_are_of_no_consequence_for_one_word(word: str) -> None:
    assert parse_pipeline(f"a(x={word})") == parse_pipeline(f"a(x='{word}')")


def test_values_keep_their_types() -> None:
    assert format_value(True) == "true"
    assert format_value(1) == "1"
    assert format_value(1.0) == "1.0"
    assert not math.isnan(float(format_value(0.1)))
