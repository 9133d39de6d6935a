"""Documents from folders, prompts files, this machine and past jobs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvpilot.request import make_request
from models.collect.builtin import docstrings_of, find_builtin
from models.collect.corpus import (
    CorpusError,
    Found,
    Skipped,
    find_files,
    interleave,
    kind_of,
    read_files,
    read_prompts,
)
from models.collect.document import Document
from models.collect.outcomes import document_of
from models.dataset import source_of

PROSE = "It was a bright cold day, and the clocks were about to strike. " * 20


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_a_folder_is_read_with_all_below_it(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(
        folder,
        a_dot_txt=PROSE,
        sub__copy_dot_md=PROSE.upper().replace(" ", "\n"),
        sub__b_dot_py="def f():\n    return 1\n",
        latin_dot_txt="Grüße".encode("latin-1"),
        binary_dot_dat=b"a\0b",
        empty_dot_txt=" \n",
        _dot_hidden__c_dot_txt="hidden",
        d_dot_gz=gzip.compress(b"packed words"),
        broken_dot_gz=b"no gzip",
    )
    skipped = Skipped()
    documents = list(read_files(find_files(folder), skipped))
    assert [(document.name, document.kind) for document in documents] == [
        ("texts/a.txt", "prose"),
        ("texts/d.gz", "prose"),
        ("texts/sub/b.py", "code"),
    ]
    assert documents[1].text == "packed words"
    assert skipped.reasons == {
        "same text as another": 1,
        "not UTF-8": 1,
        "not text": 1,
        "empty": 1,
        "unreadable (BadGzipFile)": 1,
    }
    with pytest.raises(CorpusError, match="no folder"):
        find_files(tmp_path / "nowhere")


def test_text_longer_than_what_is_read_is_cut_between_characters(tmp_path: Path) -> None:
    write(tmp_path, long_dot_txt="ä" * 1_000_001)
    (document,) = read_files(find_files(tmp_path), Skipped())
    assert set(document.text) == {"ä"}


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("x.rs", "fn main() {}", "code"),
        ("x.md", "import me\n" * 9, "prose"),
        ("script", "#!/bin/sh\necho", "code"),
        ("Thing", "int main() {\n  return 0;\n}\n", "code"),
        ("NEWS.gz", PROSE, "prose"),
        ("x.c.gz", "words", "code"),
    ],
)
def test_kinds(name: str, text: str, kind: str) -> None:
    assert kind_of(Path(name), text) == kind


def test_any_beginning_of_the_order_is_a_mix_of_the_groups() -> None:
    found = [
        Found(f"{group}{n}", Path(), group) for group, size in (("a", 50), ("b", 50), ("c", 3)) for n in range(size)
    ]
    order = interleave(found, 7)
    assert sorted(order, key=str) == sorted(found, key=str)
    assert {file.group for file in order[:3]} == {"a", "b", "c"}
    assert [file.group for file in order[9:49]] == ["a", "b"] * 20
    assert order == interleave(found, 7) != interleave(found, 8)


def lines(path: Path, *entries: object) -> Path:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return path


def test_prompts_are_read(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    more = [*talk, {"role": "user", "content": "And now?"}]
    file = lines(
        tmp_path / "p.jsonl",
        {"prompt": PROSE + "Question one?", "completion": "Yes.", "kind": "exam", "id": "a#b"},
        "",
        {"prompt": PROSE + "Question two?"},
        {"prompt": PROSE + "Question three?"},
        {"prompt": PROSE + "Question three?"},
        {"messages": talk},
        {"messages": more},
    )
    exam, two, three, answered, open_ended = read_prompts(file)
    assert (exam.name, exam.kind, exam.continuation) == ("p/a%23b", "exam", "Yes.")
    assert two.name != three.name
    assert source_of(two.name) == source_of(three.name) != source_of(exam.name)
    assert (answered.kind, answered.turns, answered.continuation) == ("chat", (("user", "Hi"),), "Hello!")
    assert len(open_ended.turns) == 3
    assert source_of(answered.name) == source_of(open_ended.name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON: .* at column 2"),
        ("[1]", "line 2: list given; expected an object"),
        ({"prompt": "a", "promt": 1}, "line 2: unknown field 'promt'; known: prompt, completion"),
        ({"completion": "a"}, "line 2: exactly one of prompt and messages"),
        ({"prompt": 3}, "line 2: prompt: 3 given; expected text"),
        ({"messages": []}, "line 2: messages: expected a list"),
        ({"messages": [{"role": "user"}]}, r"line 2: messages\[0\]: expected an object with role and content"),
        ({"messages": [{"role": "bot", "content": ""}]}, r"messages\[0\].role: 'bot' given; accepted: system, user"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "an assistant's turn alone"),
        ({"prompt": "x", "id": "first"}, "id: that of line 1 again"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        read_prompts(lines(tmp_path / "p.jsonl", {"prompt": "good", "id": "first"}, line))


def test_all_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"2 lines not accepted:\n  line 1: .*\n  line 3: "):
        read_prompts(lines(tmp_path / "p.jsonl", "x", {"prompt": "good"}, "y"))
    with pytest.raises(CorpusError, match="no prompt in it"):
        read_prompts(lines(tmp_path / "p.jsonl", ""))


def test_what_lies_on_this_machine(tmp_path: Path) -> None:
    share, library = tmp_path / "share", tmp_path / "lib"
    big = PROSE * 3
    write(share / "common-licenses", **{"GPL-2": big, "LGPL-3": big})
    (share / "common-licenses" / "GPL").symlink_to("GPL-2")
    write(share, perl__5__pod__perlfunc_dot_pod=big, doc__tool__README_dot_gz=gzip.compress(big.encode(), 0))
    write(share, doc__tool__copyright=big, doc__tool__changelog=big)
    write(library, **{"json/__init__.py".replace("__", "_dunder_"): big})
    (library / "test").mkdir()
    (library / "test" / "test_x.py").write_text(big)
    (library / "small.py").write_text("x")
    (library / "big.py").write_text(big)
    found = {file.name: file.group for file in find_builtin(share, library)}
    assert found["licences/GNU#GPL-2"] == found["licences/GNU#LGPL-3"] == "licences"
    assert found["perl/perlfunc.pod"] == "manual"
    assert found["doc/tool/README.gz"] == "documentation"
    assert found["doc/tool/changelog"] == "changes"
    assert found["python/big.py"] == "modules"
    assert len(found) == 7
    assert find_builtin(tmp_path / "nothing", tmp_path / "nothing") == []


def test_a_modules_documentation_belongs_to_the_module() -> None:
    said = "This function does what its name says, and more. " * 10
    text = f'"""{said}"""\n' + "".join(f'def f{n}():\n    """{said}"""\n' for n in range(5))
    document = docstrings_of(Document("python/x.py", "code", text))
    assert document is not None
    assert document.kind == "prose"
    assert source_of(document.name) == "python/x.py"
    assert str(document.text).startswith(said.strip())
    assert "f4\n" + said.strip() in str(document.text)
    assert docstrings_of(Document("python/x.py", "code", "x = 1")) is None
    assert docstrings_of(Document("python/x.py", "code", "def (")) is None
    assert docstrings_of(Document("a.txt", "prose", text)) is None


def test_past_jobs_about_one_text_have_one_source() -> None:
    generated = tuple(range(20))
    one = document_of("j1", make_request(PROSE + "first?"), generated)
    other = document_of("j2", make_request(PROSE + "second?"), generated)
    assert one.name != other.name
    assert source_of(one.name) == source_of(other.name)
    assert one.continuation == generated
    turn = document_of("j3", make_request(messages=[("system", "s"), ("user", "hi")]), generated)
    assert (turn.kind, turn.turns) == ("chat", (("system", "s"), ("user", "hi")))
    session = document_of("j4", make_request("x", session_id="s1"), generated)
    assert source_of(session.name) == "job/session-s1"
    assert document_of("j5", make_request(token_ids=[1, 2]), generated).text == (1, 2)
