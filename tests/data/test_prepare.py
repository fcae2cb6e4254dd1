"""From files to a stream: every kind of input, and every way in which one can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyarrow
import pyarrow.parquet
import pytest

from tokenmill.data import documents
from tokenmill.data import prepare as preparing
from tokenmill.data.chat import LossOn, alpaca_messages, render
from tokenmill.data.documents import find_inputs, read_texts
from tokenmill.data.encode import encode
from tokenmill.data.errors import DataError
from tokenmill.data.merge import merge
from tokenmill.data.prepare import prepare
from tokenmill.data.report import inspect
from tokenmill.data.stream import TokenStream

prepare = partial(prepare, progress=False)
ALPACA = {"instruction": "Name it.", "input": "A bone.", "output": "Femur."}
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def write_rows(path, rows) -> None:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def plain(tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def test_every_kind_of_input(tmp_path, small):
    (tmp_path / "a.txt").write_text("A fever.\n\nOf 39 degrees.\n", encoding="utf-8")
    write_rows(tmp_path / "b.jsonl", [{"text": "One.", "id": 3}, ALPACA])
    write_rows(tmp_path / "c.jsonl.gz", [{"messages": MESSAGES}, {"text": "日本\u2028x"}])
    inputs = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]
    stream = prepare(inputs, small, tmp_path / "deep" / "out")
    stream.verify()
    documents = [stream.document(i).tolist() for i in range(len(stream))]
    masks = [stream.loss_mask(i).tolist() for i in range(len(stream))]
    alpaca, messages = render(alpaca_messages(ALPACA), small), render(MESSAGES, small)
    assert documents == [
        plain(small, "A fever.\n\nOf 39 degrees.\n"),
        plain(small, "One."),
        alpaca[0],
        messages[0],
        plain(small, "日本\u2028x"),
    ]
    assert masks[2:4] == [alpaca[1], messages[1]]
    assert all(set(mask) == {1.0} for mask in masks[:2] + masks[4:])
    assert stream.sources == ["a", "b", "c"]
    assert stream.source_ids.tolist() == [0, 1, 1, 2, 2]


def test_options(tmp_path, small):
    write_rows(tmp_path / "a.jsonl", [{"body": "One.", "text": "not this"}])
    stream = prepare([f"web={tmp_path}/a.jsonl"], small.path, tmp_path / "out", text_key="body")
    assert stream.document(0).tolist() == plain(small, "One.")
    assert stream.sources == ["web"]
    with pytest.raises(DataError, match="already exists"):
        prepare([tmp_path / "a.jsonl"], small, tmp_path / "out")
    again = prepare([tmp_path / "a.jsonl"], small, tmp_path / "out", overwrite=True)
    assert again.document(0).tolist() == plain(small, "not this")
    write_rows(tmp_path / "a.jsonl", [ALPACA])
    with pytest.raises(DataError, match=r"a\.jsonl:1: template 'mistral-v3' needs"):
        prepare([tmp_path / "a.jsonl"], small, tmp_path / "out2", template="mistral-v3")


def test_same_input_same_bytes(tmp_path, small):
    write_rows(tmp_path / "a.jsonl", [{"text": "One."}, ALPACA])
    for name in ("x", "y"):
        prepare([tmp_path / "a.jsonl"], small, tmp_path / name)
    for path in (tmp_path / "x").iterdir():
        assert path.read_bytes() == (tmp_path / "y" / path.name).read_bytes()


def test_rows_of_chats(tmp_path, small):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}] * 2
    history = {"instruction": "Hi", "output": "Hello.", "history": [["Hi", "Hello."]]}
    rows = [{"conversations": turns}, {"messages": MESSAGES * 2}, history]
    write_rows(tmp_path / "a.jsonl", rows)
    columns = [key for row in rows for key in row]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([dict.fromkeys(columns) | row for row in rows]), tmp_path / "b.parquet"
    )
    for loss_on in get_args(LossOn):
        stream = prepare([tmp_path / "a.jsonl", tmp_path / "b.parquet"], small, tmp_path / loss_on, loss_on=loss_on)
        ids, mask = render(MESSAGES * 2, small, "mistral-v1", loss_on)
        assert [stream.document(i).tolist() for i in range(6)] == [ids] * 6
        assert [stream.loss_mask(i).tolist() for i in range(6)] == [mask] * 6
        assert stream.manifest["chat"] == {"template": "mistral-v1", "loss_on": loss_on}
    assert "conversations template mistral-v1 and loss on the last answer" in inspect(tmp_path / "last")


def test_conversations_with_the_text_they_make(tmp_path, small):
    row = {**ALPACA, "text": "Below is an instruction: Name it. A bone. Femur."}
    write_rows(tmp_path / "a.jsonl", [row])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "b.parquet")
    files = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    stream = prepare(files, small, tmp_path / "chat")
    ids, mask = render(alpaca_messages(ALPACA), small)
    assert [stream.document(i).tolist() for i in range(2)] == [ids] * 2
    assert [stream.loss_mask(i).tolist() for i in range(2)] == [mask] * 2
    texts = prepare(files, small, tmp_path / "text", text_key="text")
    assert [texts.document(i).tolist() for i in range(2)] == [plain(small, row["text"])] * 2


def test_many_small_files_make_few_chunks(tmp_path, small_pieces):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text("x" * 100)
    files = find_inputs([tmp_path])
    chunks = list(preparing._chunks(files, preparing.Place(0, 0, 0), ["text"]))
    assert [(place, len(chunk)) for place, chunk in chunks] == [((10 * i - 1, 1, 1000 * i), 10) for i in range(1, 5)]


def test_conversations_rendered_otherwise_do_not_mix(tmp_path, small):
    write_rows(tmp_path / "chat.jsonl", [{"messages": MESSAGES}])
    write_rows(tmp_path / "text.jsonl", [{"text": "A fever."}])
    chat, text = [tmp_path / "chat.jsonl"], [tmp_path / "text.jsonl"]
    prepare(chat, small, tmp_path / "all")
    prepare(chat, small, tmp_path / "last", loss_on="last")
    before = files_of(tmp_path / "all")
    for other in (dict[str, Any](loss_on="last"), dict[str, Any](template="alpaca")):
        with pytest.raises(DataError, match=r"chat\.jsonl:1: conversations of .* do not go into one stream with those"):
            prepare(chat, small, tmp_path / "all", append=True, **other)
        assert files_of(tmp_path / "all") == before
    with pytest.raises(DataError, match=r"last: conversations of template mistral-v1 and loss on the last answer do"):
        merge([tmp_path / "all", tmp_path / "last"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    prepare(text, small, tmp_path / "text")
    assert "chat" not in TokenStream.open(tmp_path / "text").manifest
    for streams in (["text", "last"], ["last", "text"]):
        merged = merge([tmp_path / name for name in streams], tmp_path / "-".join(streams))
        assert merged.manifest["chat"]["loss_on"] == "last"
    prepare(text, small, tmp_path / "all", append=True, loss_on="last")  # no conversation in it
    again = prepare(chat, small, tmp_path / "all", append=True, template="mistral-v1")
    assert (len(again), again.manifest["chat"]["loss_on"]) == (3, "all")


def test_progress_goes_to_stderr(tmp_path, small, capfd):
    write_rows(tmp_path / "a.jsonl", [{"text": "One."}])
    prepare([tmp_path / "a.jsonl"], small, tmp_path / "out", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


def test_empty_documents_are_left_out_and_counted(tmp_path, small):
    """In a corpus of a hospital's notes some always are; a conversation with an empty turn is an error."""
    rows = [{"text": "A fever."}, {"text": ""}, {"text": " \n\u3000"}, {"text": "A cough."}]
    write_rows(tmp_path / "a.jsonl", rows * 4)
    stream = prepare([tmp_path / "a.jsonl"], small, tmp_path / "out")
    assert len(stream) == 8
    assert stream.manifest["report"]["empty"] == {"a": 8}
    text = inspect(stream.folder)
    assert ", 8 empty removed\n" in text
    assert f"empty removed         8, such as\n  {tmp_path}/a.jsonl:2\n  {tmp_path}/a.jsonl:3\n" in text
    both = merge([stream.folder, stream.folder], tmp_path / "both")
    assert both.manifest["report"]["empty"] == {"a": 16}
    assert len(both.manifest["report"]["empty_examples"]) == 5
    assert list(read_texts([tmp_path / "a.jsonl"])) == ["A fever.", "A cough."] * 4


BAD_ROWS = [
    (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not JSON"),
    (b'{"text": "a"}\n\n[1]\n', r"a\.jsonl:3: a list, expected an object"),
    (b'{"body": "a", "id": 1}\n', r"a\.jsonl:1: no key 'text', 'messages'.*\(found 'body', 'id'\): .*--text-key"),
    (b"{}\n", r"a\.jsonl:1: no key 'text'.*\(found none\)"),
    (b'{"text": 3}\n', r"a\.jsonl:1: 'text' is a int, expected a string"),
    (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: .* half of a surrogate pair"),
    (b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    (b'{"messages": []}\n', r"a\.jsonl:1: the conversation has no user's message"),
    (b'{"conversations": [{"from": "human", "value": "a"}]}\n', r"a\.jsonl:1: the conversation ends with a user's"),
    (b'{"conversations": [{"from": "tool", "value": "a"}]}\n', r"a\.jsonl:1: message 0 is from 'tool', expected"),
    (b'{"instruction": "a", "output": ""}\n', r"a\.jsonl:1: 'output' is empty"),
    (b"", r"a\.jsonl: is empty"),
    (b"\n", r"out: no documents to write: the corpus is empty"),
    (b'{"text": " "}\n', r"out: no documents to write: the corpus is empty"),
]


@pytest.mark.parametrize(("content", "message"), BAD_ROWS)
def test_bad_rows_name_file_and_line(tmp_path, small, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / "a.jsonl"], small, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a long enough line"}\n' * 9, mtime=0)[:-12],
            r"a\.jsonl\.gz:\d+: not whole as gzip",
        ),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz:1: not whole as gzip"),
        ("a.txt", b" ", "the corpus is empty"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.csv", b"x", r"a\.csv: expected a file that ends in \.txt, .*\.jsonl\.zst, \.parquet"),
    ],
)
def test_bad_files(tmp_path, small, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / name], small, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_bad_arguments(tmp_path, small):
    with pytest.raises(DataError, match="no input files"):
        prepare([], small, tmp_path / "out")
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        prepare([tmp_path / "nowhere.txt"], small, tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no file that ends in \.txt"):
        prepare([tmp_path], small, tmp_path / "out")


def test_texts_to_train_a_tokenizer_on(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n")
    messages = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    write_rows(tmp_path / "b.jsonl.gz", [{"text": "Two."}, {**ALPACA, "input": ""}, {"messages": messages}])
    texts = list(read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl.gz"]))
    assert texts == ["One.\n", "Two.", "Name it.", "Femur.", "Be kind.", "Hi", "Hello."]
    for row, message in (({"messages": 3}, "'messages' is a int"), ({"text": "\ud800"}, ".* half of a surrogate pair")):
        write_rows(tmp_path / "c.jsonl", [{"text": "One."}, row])
        with pytest.raises(DataError, match=rf"c\.jsonl:2: {message}"):
            list(read_texts([tmp_path / "c.jsonl"]))


def test_inspect(tmp_path, small):
    write_rows(tmp_path / "web.jsonl", [{"text": "The first document."}, {"text": "The patient has a fever. " * 9}])
    write_rows(tmp_path / "chat.jsonl", [ALPACA])
    stream = prepare([tmp_path / "web.jsonl", tmp_path / "chat.jsonl"], small, tmp_path / "out")
    report = inspect(tmp_path / "out")
    silent = render(alpaca_messages(ALPACA), small)[1].count(0)
    for line in (
        f"fingerprint   {stream.fingerprint}",
        "documents     3",
        f"tokens        {stream.tokens:,} ({1 - silent / stream.tokens:.1%} with loss)",
        "vocabulary    300 (uint16)",
        "tokenizer     tokenizer.model (BOS 1, EOS 2",
        f"  web: 2 documents, {stream.lengths[:2].sum()} tokens",
        f"  chat: 1 documents, {stream.lengths[2]} tokens",
        "The first document.",
    ):
        assert line in report
    bars = [line.split() for line in report.splitlines() if line.startswith("  up to")]
    assert sum(int(bar[3]) for bar in bars) == 3
    assert TokenStream.open(tmp_path / "out").fingerprint == stream.fingerprint


def corpus(folder: Path) -> list[str]:
    """Files of several kinds, with documents that repeat others or hold text of an evaluation; and that evaluation."""
    question = "which of the following drugs is the best choice for a child who has a fever and a rash"
    words = [" ".join(f"w{i * j % 97}" for j in range(40)) for i in range(60)]
    notes = [{"text": f"Note {i}. {words[i]}", "from": "ab"[i % 2]} for i in range(60)]
    notes[20] = {"text": notes[3]["text"].replace(",", "").upper(), "from": "c"}
    notes[30] = {"text": f"An exam asks {question}, and why?", "from": "a"}
    chats = [{"messages": [MESSAGES[0], {**MESSAGES[1], "content": "x" * i}], "from": "chat"} for i in range(1, 30)]
    folder.mkdir()
    write_rows(folder / "notes.jsonl", notes)
    write_rows(folder / "chats.jsonl.gz", [*chats, notes[5]])
    write_rows(folder.parent / "exam.jsonl", [{"question": question}, {"question": "Too short?"}])
    return [str(folder / "notes.jsonl"), f"chats={folder}/*.gz"]


def options(folder: Path) -> dict[str, Any]:
    return dict(dedupe="minhash", decontaminate=[folder / "exam.jsonl"], source_key="from")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 1000)
    monkeypatch.setattr(preparing, "PIECE", 1000)


def test_any_number_of_workers(tmp_path, small, small_pieces, capfd):
    inputs = corpus(tmp_path / "in")
    one = prepare(inputs, small, tmp_path / "one", shard_tokens=2000, **options(tmp_path))
    two = prepare(inputs, small, tmp_path / "two", shard_tokens=2000, workers=2, **options(tmp_path))
    assert files_of(one.folder) == files_of(two.folder)
    assert len(one.shards) > 3
    one.verify()
    assert len(one) == 60 + 30 - 2 - 1
    assert one.sources == ["a", "b", "chat"]
    report = one.manifest["report"]
    assert report["duplicates"] == {"b": 1, "c": 1}
    assert report["contaminated"] == {"a": 1}
    text = inspect(one.folder)
    assert "  c: 0 documents, 0 tokens, 1 duplicates removed" in text
    assert f"{tmp_path}/in/notes.jsonl:21: NOTE 3" in text
    assert f"{tmp_path}/in/notes.jsonl:31: shares 'which of the following drugs" in text
    assert "1 texts are looked for; 1 have too few words" in capfd.readouterr().err
    write_rows(tmp_path / "in" / "notes.jsonl", [{"text": "a", "from": "a"}] * 99 + [{"text": "b"}])
    with pytest.raises(DataError, match=r"notes\.jsonl:100: 'from' is None, expected the name of a source"):
        prepare(inputs, small, tmp_path / "out", workers=2, source_key="from")


class Dies:
    """An encoder whose process is ended from outside."""

    def __call__(self, pieces):
        os._exit(9)


def test_a_worker_that_is_ended(tmp_path):
    with pytest.raises(ChildProcessError, match="a worker process was ended from outside"):
        list(encode([(0, []), (1, [])], Dies(), 2))  # pyright: ignore[reportArgumentType]


def test_append(tmp_path, small, capfd):
    write_rows(tmp_path / "a.jsonl", [{"text": "One."}, ALPACA])
    write_rows(tmp_path / "b.jsonl", [{"text": "Two."}, {"text": "Two."}])
    both = prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], small, tmp_path / "both", dedupe="exact")
    prepare([tmp_path / "a.jsonl"], small, tmp_path / "out", dedupe="exact")
    assert "dedupe" not in capfd.readouterr().err
    stream = prepare([tmp_path / "b.jsonl"], small, tmp_path / "out", append=True, dedupe="exact")
    stream.verify()
    assert [stream.document(i).tolist() for i in range(3)] == [both.document(i).tolist() for i in range(3)]
    assert (len(stream), stream.sources, stream.manifest["report"]) == (3, ["a", "b"], both.manifest["report"])
    assert "not against the documents that" in capfd.readouterr().err


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from typing import Any
from tokenmill.data import documents, prepare as preparing
from tokenmill.data.stream import TokenStream
from tokenmill.data.words import hash_words
from test_prepare import corpus, files_of, options

folder, model, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
documents.PIECE = preparing.PIECE = 1000
inputs, out = corpus(folder / "in"), folder / "out"
arguments = dict(shard_tokens=2000, progress=False, **options(folder))
hash_words("makes its tables, before the process is copied many times")
preparing.prepare([folder / "exam.jsonl"], model, folder / "old", text_key="question", progress=False)

def attempt(output, die_at=None, mode=mode):
    "Whether it came to its end; else it was killed when it was about to wait for the disk for the so many-th time."
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    sync, calls = os.fsync, 0
    def fsync(file):
        nonlocal calls
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)
    os.fsync = fsync
    preparing.prepare(inputs, model, output, overwrite=mode == "overwrite", append=mode == "append", **arguments)
    os._exit(0)

def begin():
    shutil.rmtree(out, ignore_errors=True)
    if mode != "new":
        shutil.copytree(folder / "old", out)

begin()
assert attempt(out)
expected = files_of(out)
kills = 0
while True:
    begin()
    old = files_of(out) if out.exists() else None
    kills += 1
    if attempt(out, kills):
        break
    now = files_of(out) if out.exists() else None
    if now is not None and now != expected:  # the old one, where an append may have left files that it does not name
        assert now.items() >= old.items(), kills
        TokenStream.open(out).verify()
    if now != expected or mode != "new":
        assert attempt(out), kills
    assert files_of(out) == expected, kills
    left = {path.name for path in folder.iterdir()} - {"in", "exam.jsonl", "old", "out"}
    assert left <= ({".out.partial"} if now == expected and mode == "new" else set()), (kills, left)
    shutil.rmtree(folder / ".out.partial", ignore_errors=True)
print(kills)
"""


@pytest.mark.parametrize("mode", ["new", "overwrite", "append"])
def test_killed_at_any_moment(tmp_path, small, mode):
    """Killed at every place where it waits for the disk, and started again."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, small.path, mode],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 30
    assert done.stderr.count("going on after") > 20


@pytest.mark.parametrize("changed", ["an input", "an argument"])
def test_changed_work_is_begun_anew(tmp_path, small, small_pieces, monkeypatch, capfd, changed):
    inputs = corpus(tmp_path / "in")
    monkeypatch.setattr(preparing, "encode", lambda *arguments: interrupted(encode(*arguments)))

    def interrupted(results):
        for i, result in enumerate(results):
            yield result
            if i == 8:
                raise KeyboardInterrupt

    arguments = dict[str, Any](shard_tokens=1000, **options(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        prepare(inputs, small, tmp_path / "out", **arguments)
    assert (tmp_path / ".out.partial").is_dir()
    monkeypatch.undo()
    if changed == "an input":
        write_rows(tmp_path / "in" / "notes.jsonl", [{"text": "Other.", "from": "a"}])
    else:
        arguments["loss_on"] = "last"
    again = prepare(inputs, small, tmp_path / "out", **arguments)
    assert "not those of the work begun" in capfd.readouterr().err
    if changed == "an input":
        assert again.document(0).tolist() == plain(small, "Other.")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exam.jsonl", "in", "out"]


def test_a_full_disk(tmp_path, small):
    write_rows(tmp_path / "a.jsonl", [{"text": f"A fever of {i} degrees." * 9} for i in range(500)])
    script = "import sys; from tokenmill.trainer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "prepare", tmp_path / "a.jsonl", "--tokenizer", small.path, "--workers=1"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 64; "$@"', "-", *command, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("tokenmill: error: ")
    assert "00000.tokens" in line
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
