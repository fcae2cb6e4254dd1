"""Preference rows to a stream."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from tokenmill.data.chat import prompt
from tokenmill.data.convert import export_megatron
from tokenmill.data.errors import DataError
from tokenmill.data.loader import sequential_batches
from tokenmill.data.merge import merge
from tokenmill.data.preference import parse_pair, render_pair
from tokenmill.data.prepare import prepare
from tokenmill.data.report import inspect
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.unfold import unfold
from tokenmill.data.writer import StreamWriter

USER = {"role": "user", "content": "Is it a fever?"}
SYSTEM = {"role": "system", "content": "Be brief."}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No, 36 degrees."}
FORMS = {
    "texts": {"prompt": "Is it a fever?", "chosen": "Yes.", "rejected": "No, 36 degrees.", "grades": [4, 1]},
    "question": {"question": "Is it a fever?", "system": "", "chosen": "Yes.", "rejected": "No, 36 degrees."},
    "prompt of messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "no prompt": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "prompt repeated": {"prompt": "Is it a fever?", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER]},
}


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_all_forms_are_one(row):
    pair = parse_pair(row)
    assert [dict(m) for m in pair.prompt] == [USER]
    assert (pair.chosen, pair.rejected) == ("Yes.", "No, 36 degrees.")


def test_longer_prompts():
    assert parse_pair({"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}).prompt == [SYSTEM, USER]
    row = {"question": "Is it a fever?", "system": "Be brief.", "chosen": "Yes.", "rejected": "No."}
    assert parse_pair(row).prompt == [SYSTEM, USER]
    turns = [USER, YES, USER]
    assert parse_pair({"prompt": turns, "chosen": [YES], "rejected": "No."}).prompt == turns
    assert parse_pair({"chosen": [*turns, YES], "rejected": [*turns, NO]}).texts()[-2:] == ["Yes.", "No, 36 degrees."]


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_a_system_prompt_beside_any_form(row):
    assert parse_pair({**row, "system": "Be brief."}).prompt == [SYSTEM, USER]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "'rejected' is a NoneType"),
        ({"prompt": "p", "chosen": "a", "rejected": [USER]}, "'rejected' must end with a message of the assistant's"),
        ({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, "'chosen' must end"),
        ({"prompt": "p", "chosen": ["a", YES], "rejected": ["a", NO]}, "not a message"),
        ({"prompt": [USER, YES], "chosen": "a", "rejected": "b"}, "ends with an answer"),
        ({"chosen": [USER, YES], "rejected": [SYSTEM, USER, NO]}, "different prompts"),
        ({"prompt": "p", "chosen": [USER, YES], "rejected": [USER, NO]}, "'prompt' is none of the messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is a int"),
        (
            {"prompt": [SYSTEM, USER], "chosen": "a", "rejected": "b", "system": "other"},
            "'system' is not the system mess",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "system": 3}, "'system' is a int"),
        ({"prompt": [SYSTEM], "chosen": "a", "rejected": "b"}, "no user's message"),
    ],
)
def test_what_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        parse_pair(row)


@pytest.mark.parametrize("template", ["mistral-v1", "mistral-v2", "mistral-v3"])
def test_both_answers_follow_the_same_ids(template):
    pytest.importorskip("mistral_common")
    tokenizer = Tokenizer.open(template)
    pair = parse_pair({"prompt": [SYSTEM, USER, YES, USER], "chosen": [YES], "rejected": [NO]})
    ids, mask = render_pair(pair, tokenizer, template)
    shared = prompt(pair.prompt, tokenizer, template)
    chosen, rejected = ([*tokenizer.encode(text), tokenizer.eos_id] for text in (pair.chosen, pair.rejected))
    assert ids == [*shared, *chosen, shared[-1], *rejected]
    assert mask == [0] * len(shared) + [1] * len(chosen) + [0] + [1] * len(rejected)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_stream_of_pairs(tmp_path, small):
    file = write(tmp_path / "pairs.jsonl", *FORMS.values())
    for workers in (1, 2):
        stream = prepare([file], small, tmp_path / str(workers), workers=workers, progress=False)
        assert stream.pairs
    assert "every document is a pair" in inspect(stream.folder)
    ids, mask = render_pair(parse_pair(FORMS["texts"]), small)
    length = len(prompt([USER], small))
    answers = [[*small.encode(text), small.eos_id] for text in ("Yes.", "No, 36 degrees.")]
    for i in range(len(FORMS)):
        assert stream.document(i).tolist() == ids
        assert stream.loss_mask(i).tolist() == mask
    (batch,) = sequential_batches(stream, sequence_length=500, tokens_per_batch=500)
    batch = unfold(batch)
    assert batch.source_ids.numel() == 3 * len(FORMS)
    assert batch.tokens.numel() == len(FORMS) * (length - 1 + sum(map(len, answers)))
    again = prepare([file], small, tmp_path / "1", append=True, progress=False)
    assert again.pairs
    assert len(again) == 2 * len(FORMS)
    assert merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged").pairs
    with pytest.raises(DataError, match="merged: holds preference pairs, which Megatron's files have no form for"):
        export_megatron(tmp_path / "merged", tmp_path / "m")
    repeated = prepare([file], small, tmp_path / "once", dedupe="exact", progress=False)
    assert (len(repeated), repeated.pairs) == (1, True)


def test_pairs_and_others_do_not_mix(tmp_path, small):
    pairs = write(tmp_path / "pairs.jsonl", FORMS["texts"])
    texts = write(tmp_path / "texts.jsonl", {"text": "a fever"})
    both = write(tmp_path / "both.jsonl", {"messages": [USER, YES]}, FORMS["texts"])
    with pytest.raises(ValueError, match=r"both.jsonl:2: preference pairs and other documents"):
        prepare([both], small, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"texts.jsonl:1: preference pairs and other documents"):
        prepare([pairs, texts], small, tmp_path / "out", progress=False)
    prepare([pairs], small, tmp_path / "out", progress=False)
    prepare([texts], small, tmp_path / "plain", progress=False)
    with pytest.raises(ValueError, match="out: preference pairs and other documents"):
        merge([tmp_path / "plain", tmp_path / "out"], tmp_path / "merged")
    for output, file, held in (("out", texts, "pairs"), ("plain", pairs, "other documents")):
        message = rf"{file.name}:1: preference pairs and other documents .* \(.*{output} has {held}\)"
        with pytest.raises(ValueError, match=message):
            prepare([file], small, tmp_path / output, append=True, progress=False)
        assert not (tmp_path / f".{output}.partial").exists()


def test_what_is_not_pairs_is_not_opened_as_pairs(tmp_path, small):
    pair = [0, 0, 1, 1, 0, 1]
    for i, spans in enumerate(
        ([1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 0], pair)
    ):
        for masks in ([pair, spans], [spans, pair]):
            output = tmp_path / f"{i}"
            writer = StreamWriter(output, small, overwrite=True)
            with pytest.raises(DataError, match=r"00000\.silent: spans") if spans != pair else nullcontext(), writer:
                writer.pairs = True
                for mask in masks:
                    writer.add([1, 5, 6, 2, 5, 2], mask, source="a")
            assert output.exists() == (spans == pair)
    pairs = tmp_path / "5"
    with pytest.raises(DataError, match=r"spans are not"), StreamWriter(pairs, small, append=True) as writer:
        writer.add([1, 5, 2], source="a")
    assert len(TokenStream.open(pairs)) == 2


def test_real_preferences(tmp_path, small):
    file = Path(__file__).parents[3] / "shared" / "data" / "liveqa_preferences.jsonl.gz"
    if not file.exists():
        pytest.skip("the shared data is not here")
    stream = prepare([file], small, tmp_path / "stream", progress=False)
    assert (len(stream), stream.pairs) == (564, True)
    longest = int(stream.lengths.max())
    batches = [unfold(b) for b in sequential_batches(stream, sequence_length=longest, tokens_per_batch=1 << 16)]
    assert sum(b.tokens.numel() for b in batches) == stream.tokens - 2 * len(stream)
