"""From files to a stream: every kind of input, and every way in which one can be wrong."""

from __future__ import annotations

import gzip
import json
from functools import partial

import pytest

from tokenmill.data.chat import alpaca_messages, render
from tokenmill.data.errors import DataError
from tokenmill.data.prepare import inspect, prepare, read_texts
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
    stream = prepare([tmp_path / "a.jsonl"], small.path, tmp_path / "out", text_key="body", source="web")
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


def test_progress_goes_to_stderr(tmp_path, small, capfd):
    write_rows(tmp_path / "a.jsonl", [{"text": "One."}])
    prepare([tmp_path / "a.jsonl"], small, tmp_path / "out", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


BAD_ROWS = [
    (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not JSON"),
    (b'{"text": "a"}\n\n[1]\n', r"a\.jsonl:3: a list, expected an object"),
    (b'{"body": "a", "id": 1}\n', r"a\.jsonl:1: no key 'text', 'messages'.*\(found 'body', 'id'\): .*--text-key"),
    (b"{}\n", r"a\.jsonl:1: no key 'text'.*\(found none\)"),
    (b'{"text": 3}\n', r"a\.jsonl:1: 'text' is a int, expected a string"),
    (b'{"text": "a"}\n{"text": " \\n"}\n', r"a\.jsonl:2: 'text' is empty"),
    (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: .* half of a surrogate pair"),
    (b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    (b'{"messages": []}\n', r"a\.jsonl:1: the conversation has no user's message"),
    (b'{"instruction": "a", "output": ""}\n', r"a\.jsonl:1: 'output' is empty"),
    (b"", r"out: no documents to write: the corpus is empty"),
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
            gzip.compress(b'{"text": "a long enough line"}\n' * 9)[:-12],
            r"a\.jsonl\.gz:\d+: not whole as gzip",
        ),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz:1: not whole as gzip"),
        ("a.txt", b"", r"a\.txt: 'text' is empty"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.csv", b"x", r"a\.csv: expected a file that ends in \.txt, \.jsonl, \.jsonl\.gz"),
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
    with pytest.raises(DataError, match="is a folder: pass its files"):
        prepare([tmp_path], small, tmp_path / "out")


def test_texts_to_train_a_tokenizer_on(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n")
    messages = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    write_rows(tmp_path / "b.jsonl.gz", [{"text": "Two."}, {**ALPACA, "input": ""}, {"messages": messages}])
    texts = list(read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl.gz"]))
    assert texts == ["One.\n", "Two.", "Name it.", "Femur.", "Be kind.", "Hi", "Hello."]
    write_rows(tmp_path / "c.jsonl", [{"text": "One."}, {"messages": 3}])
    with pytest.raises(DataError, match=r"c\.jsonl:2: 'messages' is a int"):
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
