"""The text stream: whole characters, no part of a stop string, and in the end exactly the text of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tiny import EOS, tiny_tokenizer
from workers.engine.text import TextStream

TOKENIZER = tiny_tokenizer()
CHARACTERS = [
    chr(n) for n in (*range(0x800), *range(0x800, 0xD800, 0x1000), 0xF000, *range(0x10000, 0x110000, 0x40000))
]
ID_OF = {  # the token of each byte that UTF-8 uses
    byte: token_id
    for character in CHARACTERS
    for byte, token_id in zip(character.encode(), TOKENIZER.encode(character), strict=True)
}
fixed = settings(derandomize=True, max_examples=150, deadline=None, database=None)


def ids_of(text: str) -> list[int]:
    return [ID_OF[byte] for byte in text.encode()]


class Pieces:
    """A tokenizer whose tokens are any bytes."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return b"".join(self._pieces[token_id] for token_id in token_ids).decode(errors="replace")


def released(stream: TextStream, token_ids: Sequence[int]) -> list[str]:
    """What each token released; tokens after a stop are not added, as the engine does."""
    texts = []
    for token_id in token_ids:
        if stream.stopped:
            break
        texts.append(stream.add(token_id))
    return texts


def whole_text(tokenizer, token_ids: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
    """The definition: decode everything after each token; cut before the first stop string of the first text that has
    one. While the last character may be incomplete, the text is not looked at."""
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[:count]), skip_special_tokens=True)
        if text.endswith("\ufffd") and count < len(token_ids):
            continue
        if places := [text.find(word) for word in stop if word in text]:
            return text[: min(places)], True
    return tokenizer.decode(list(token_ids), skip_special_tokens=True), False


def test_a_character_comes_when_its_last_byte_has() -> None:
    stream = TextStream(TOKENIZER)
    assert released(stream, ids_of("aé€😀b")) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    stream = TextStream(TOKENIZER)
    assert released(stream, ids_of("ok€")[:-1]) == ["o", "k", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_bytes_that_are_no_character_come_with_the_next_one() -> None:
    stream = TextStream(Pieces(b"\xff", b"a"))
    assert released(stream, [0, 1, 0, 0, 1]) == ["", "\ufffda", "", "", "\ufffd\ufffda"]


def test_special_tokens_have_no_text() -> None:
    stream = TextStream(TOKENIZER)
    assert released(stream, [*ids_of("a"), EOS, *ids_of("b")]) == ["a", "", "b"]


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot() -> None:
    stream = TextStream(TOKENIZER, ["</s>"])
    assert released(stream, ids_of("x</a</s")) == ["x", "", "", "</a", "", "", ""]
    assert not stream.stopped
    assert stream.finish() == "</s"


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    stream = TextStream(TOKENIZER, ["END"])
    assert released(stream, ids_of("one ENEND two")) == ["o", "n", "e", " ", "", "", "EN", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_a_stop_string_within_a_token_ends_the_text_before_it() -> None:
    stream = TextStream(Pieces(b"say ", b"hi STOP more"), ["STOP"])
    assert released(stream, [0, 1]) == ["say ", "hi "]
    assert stream.stopped


@pytest.mark.parametrize(
    ("stop", "text", "want"),
    [
        (["abab", "bb"], "ababab", ""),
        (["abab", "bb"], "xabbab", "xa"),
        (["b", "abc"], "abc", "a"),  # the shorter one is complete first: generation ends there
        (["abc", "cd"], "abcd", ""),
        (["aa"], "xaaa", "x"),
        (["aab"], "aaab", "a"),  # held back: "aa", then a third a
        (["x", "x"], "ax", "a"),
        (["é"], "caé", "ca"),
        (["\n\n"], "a\n\nb", "a"),
    ],
)
def test_overlapping_stop_strings(stop: list[str], text: str, want: str) -> None:
    stream = TextStream(TOKENIZER, stop)
    assert "".join(released(stream, ids_of(text))) + stream.finish() == want
    assert stream.stopped


def test_several_stops_in_one_token_the_earliest_counts() -> None:
    stream = TextStream(Pieces(b"one, two; three"), [";", ","])
    assert released(stream, [0]) == ["one"]


def test_a_stop_string_before_half_a_character_is_found_at_the_end() -> None:
    stream = TextStream(Pieces(b"so\n\xf0\x9f"), ["\n"])
    assert released(stream, [0]) == [""]
    assert stream.finish() == "so"
    assert stream.stopped


alphabet = st.sampled_from(
    [b"a", b"b", b" ", b"\n", "é".encode(), "€".encode(), "😀".encode(), b"\xe2", b"\x80", b"\xff"]
)
byte_strings = st.lists(alphabet | st.binary(max_size=3), max_size=14).map(b"".join)
stops = st.lists(st.text("ab \né€", min_size=1, max_size=3), max_size=3)


@fixed
@given(content=byte_strings, stop=stops)
@example(content=b"\xe2\x82a", stop=["a"])
@example(content=b"aab", stop=["ab"])
def test_the_pieces_make_the_whole_text_cut_before_the_stop(content: bytes, stop: list[str]) -> None:
    token_ids = [ID_OF[byte] for byte in content if byte in ID_OF]
    stream = TextStream(TOKENIZER, stop)
    pieces = released(stream, token_ids)
    text = "".join(pieces) + stream.finish()
    assert (text, stream.stopped) == whole_text(TOKENIZER, token_ids, stop)
    assert text.startswith("".join(pieces))


@fixed
@given(cuts=st.lists(byte_strings.filter(bool), min_size=1, max_size=5), stop=stops, data=st.data())
def test_the_same_holds_for_tokens_of_several_bytes(cuts: list[bytes], stop: list[str], data) -> None:
    tokenizer = Pieces(*cuts)
    token_ids = data.draw(st.lists(st.integers(0, len(cuts) - 1), max_size=8))
    stream = TextStream(tokenizer, stop)
    text = "".join(released(stream, token_ids)) + stream.finish()
    assert (text, stream.stopped) == whole_text(tokenizer, token_ids, stop)


@fixed
@given(content=byte_strings, stop=stops, place=st.integers(0, 40))
def test_replaying_the_tokens_reaches_the_same_state(content: bytes, stop: list[str], place: int) -> None:
    token_ids = [ID_OF[byte] for byte in content if byte in ID_OF]
    first = TextStream(TOKENIZER, stop)
    before = released(first, token_ids[:place])
    second = TextStream(TOKENIZER, stop)
    assert released(second, token_ids[:place]) == before
    assert released(first, token_ids[place:]) == released(second, token_ids[place:])
    assert (first.finish(), first.stopped) == (second.finish(), second.stopped)
