"""Text files to a token stream.

The inputs are cut into chunks of whole documents, in order (data/documents.py); other processes encode chunks
(data/encode.py); this one takes them in order, leaves out what repeats an earlier document, and writes. So the stream
is the same for any number of processes. Where the work was stopped, it goes on after the last shard that was finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tokenmill.data.chat import LossOn
from tokenmill.data.decontaminate import Evaluations
from tokenmill.data.dedupe import Dedupe, SeenKeys
from tokenmill.data.documents import PIECE, TEXT_KEY, Input, Piece, find_inputs, pieces
from tokenmill.data.encode import MIXED, Encoded, Encoder, encode
from tokenmill.data.errors import DataError
from tokenmill.data.merge import differ
from tokenmill.data.report import EXAMPLES, Report
from tokenmill.data.stream import TokenStream
from tokenmill.data.tokenizer import Tokenizer
from tokenmill.data.writer import StreamWriter

VERSION = 5  # of how documents are made and compared: work of another version is begun anew
# That a row may have beside its text.
COLUMNS = ("messages", "conversations", "instruction", "input", "output", "system", "history")
COLUMNS += ("prompt", "question", "chosen", "rejected")
EXCERPT = 40  # tokens of a duplicate that is shown


class Place(NamedTuple):
    """Where in the inputs a chunk ends."""

    input: int
    pieces: int  # of that input that are done
    bytes: int  # of all inputs that are done


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer | str | Path,
    output: str | Path,
    *,
    text_key: str | None = None,
    source_key: str | None = None,
    template: str = "auto",
    loss_on: LossOn = "all",
    dedupe: Dedupe | None = None,
    decontaminate: Sequence[str | Path] = (),
    overwrite: bool = False,
    append: bool = False,
    workers: int = 1,
    shard_tokens: int = 1 << 26,
    progress: bool = True,
) -> TokenStream:
    """Tokenise files, folders or patterns (see `find_inputs`) into the stream `output`, a folder that appears whole or
    not at all; with `append`, into new shards of the stream that is there.

    A plain document is BOS, its text, EOS; a conversation is rendered with `template`, with loss on all its answers or
    on the last (data/chat.py); a preference pair, beside which a stream holds nothing else, is rendered with it too
    (data/preference.py). A stream says how, and takes in none that are rendered otherwise. Documents keep the order of
    the inputs. `text_key` is the field of a row that is its text, whatever else it holds (None: see data/documents.py).
    `source_key` is the field that names its source; None takes the name of the input. `dedupe` leaves out what repeats
    an earlier document of these inputs (data/dedupe.py), `decontaminate` what shares text with evaluation files
    (data/decontaminate.py); the stream's report (data/report.py) counts both.

    Called again after it was killed, with the same arguments and inputs, it goes on after the last finished shard.

    Raises DataError naming file, line and key where an input cannot be used; nothing else is skipped.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.open(tokenizer)
    files, evaluation_files = find_inputs(inputs), find_inputs(decontaminate) if decontaminate else []
    if append and dedupe:
        print(f"dedupe: within these inputs; not against the documents that {output} holds", file=sys.stderr)
    evaluations = None
    if evaluation_files:
        evaluations = Evaluations(evaluation_files)
        print(
            f"decontaminate: {evaluations.texts:,} texts are looked for; {evaluations.too_short:,} have too few words",
            file=sys.stderr,
        )
    encoder = Encoder(tokenizer, text_key, source_key, template, loss_on, dedupe, evaluations)
    arguments = [VERSION, tokenizer.name, tokenizer.sha256, text_key, source_key, template, loss_on, dedupe]
    seen = SeenKeys()
    report = Report()
    place = Place(0, 0, 0)

    new_keys: list[bytes] = []  # of documents written since the last checkpoint

    def checkpoint() -> dict[str, Any]:
        with (writer.partial / "keys").open("ab") as file:
            file.writelines(new_keys)
            file.flush()
            os.fsync(file.fileno())
            new_keys.clear()
            kinds = {"pairs": writer.pairs, "chat": writer.chat}
            return {"place": place, "keys": file.tell(), "report": report.asdict(), **kinds}

    writer = StreamWriter(
        output,
        tokenizer,
        overwrite=overwrite,
        append=append,
        shard_tokens=shard_tokens,
        job=_job([*arguments, shard_tokens], [*files, *evaluation_files]),
        checkpoint=checkpoint,
    )
    total = sum(file.size for file in files)
    with (
        writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="prepare", disable=not progress) as bar,
    ):
        if writer.state is not None:
            place, report = Place(*writer.state["place"]), Report.load(writer.state["report"])
            writer.pairs, writer.chat = writer.state["pairs"], writer.state["chat"]
            os.truncate(writer.partial / "keys", writer.state["keys"])
            seen.add(np.fromfile(writer.partial / "keys", np.uint64))
            bar.update(place.bytes)
            print(f"{output}: going on after {place.bytes:,} of {total:,} bytes", file=sys.stderr)
        columns = [*COLUMNS, text_key or TEXT_KEY, *([source_key] if source_key else [])]
        chunks = iter(()) if writer.done else _chunks(files, place, columns)
        for place, encoded in encode(chunks, encoder, min(workers, total // PIECE + 1)):
            for source, *example in encoded.contaminated:
                report.contaminated[source] += 1
                report.contaminated_examples += [example][: EXAMPLES - len(report.contaminated_examples)]
            for source, *example in encoded.empty:
                report.empty[source] += 1
                report.empty_examples += [example][: EXAMPLES - len(report.empty_examples)]
            new = np.ones(len(encoded.sizes), np.bool_)
            if encoded.keys is not None:
                new = seen.first(encoded.keys)
                new_keys.append(encoded.keys[new].tobytes())
                _count_duplicates(report, encoded, ~new, tokenizer)
            if encoded.pairs is not None:
                if writer.pairs not in (None, encoded.pairs):
                    held = "pairs" if writer.pairs else "other documents"
                    raise DataError(f"{encoded.places[0]}: {MIXED} ({output} has {held})")
                writer.pairs = encoded.pairs
            if encoded.chat is not None:
                if writer.chat not in (None, encoded.chat):
                    raise DataError(f"{encoded.places[0]}: {differ(encoded.chat, writer.chat)}")
                writer.chat = encoded.chat
            documents = encoded.documents.kept(new)
            sizes = np.bincount(documents.source_ids, encoded.sizes[new], len(documents.sources))
            report.bytes.update(dict(zip(documents.sources, map(int, sizes), strict=True)))
            writer.add_documents(documents)
            bar.update(place.bytes - bar.n)
        writer.report = report.asdict()
    return TokenStream.open(output)


def _job(arguments: Sequence[Any], files: Sequence[Input]) -> str:
    """Names a piece of work: another text where an argument or a file is another."""
    stats = [(str(file.path), file.source, file.size, file.path.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([arguments, stats]).encode()).hexdigest()


def _chunks(files: Sequence[Input], start: Place, columns: Sequence[str]) -> Iterator[tuple[Place, list[Piece]]]:
    """The pieces of the files after `start`, gathered until they are worth sending, and where each chunk ends."""
    chunk: list[Piece] = []
    size = 0  # bytes of the chunk
    before = sum(file.size for file in files[: start.input])
    place = start
    for i in range(start.input, len(files)):
        skip = start.pieces if i == start.input else 0
        for done, piece in enumerate(pieces(files[i], columns), 1):
            if done <= skip:
                continue
            chunk.append(piece)
            size += piece.size
            place = Place(i, done, before + piece.end)
            if size >= PIECE:
                yield place, chunk
                chunk, size = [], 0
        before += files[i].size
    if chunk:
        yield place, chunk


def _count_duplicates(report: Report, encoded: Encoded, repeated: NDArray[np.bool_], tokenizer: Tokenizer) -> None:
    documents = encoded.documents
    ends = np.cumsum(documents.lengths)
    for i in np.flatnonzero(repeated):
        begin = int(ends[i] - documents.lengths[i])
        report.duplicates[documents.sources[documents.source_ids[i]]] += 1
        if len(report.duplicate_examples) < EXAMPLES:
            excerpt = tokenizer.decode(documents.tokens[begin : min(begin + EXCERPT, ends[i])])
            report.duplicate_examples.append([encoded.places[i], " ".join(excerpt.split())])
