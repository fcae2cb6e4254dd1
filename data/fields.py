"""Records in the free text that a model writes: JSON, or a label and a colon before each field, however decorated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

MARKS = re.compile(r"[#*\-_=~`]*|[#*]*\d+[.)]\**")


def read_records(text: str, names: Sequence[str], heading: str) -> list[dict[str, str]]:
    """The records in a text, each with those of the named fields that it has, in order; a record may lack any.

    As JSON: an object, a list of them or one a line, also within prose or a fence. Else by labels: `Name: value` or
    `**Name:** value` at the beginning of a line, the value up to the next label. Fields come in the order of `names`:
    where a line of a value looks like the label of an earlier field it belongs to the value, but for the field that
    begins the first record, which begins another. A line such as `### Heading 2`, with the word `heading`, also begins
    one.
    """
    found = [_texts(value, names) for value in _json(text)]
    return [record for record in found if record] or _labelled(text, names, heading)


def _json(text: str) -> list[dict[str, Any]]:
    """The objects in a text that is JSON from its first bracket to its last, as a whole or by line."""
    begin = re.search(r"[\[{]", text)
    body = text[begin.start() : max(text.rfind("]"), text.rfind("}")) + 1] if begin else ""
    for parts in ([body], body.splitlines()):
        try:
            return list(_objects([json.loads(part) for part in parts if part.strip()]))
        except (ValueError, RecursionError):
            continue
    return []


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """The innermost objects: those that hold no other."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [each for item in inner for each in _objects(item)]
    yield from found or ([value] if isinstance(value, dict) else [])


def _texts(values: dict[str, Any], names: Sequence[str]) -> dict[str, str]:
    lower = {key.strip().lower(): value for key, value in values.items()}
    return {name: str(lower[name]).strip() for name in names if isinstance(lower.get(name), str | int | float)}


def _labelled(text: str, names: Sequence[str], heading: str) -> list[dict[str, str]]:
    before = r"^[ \t#>*_\-\u2013\u2022.()\[\]\d]*"  # marks of a heading, emphasis or list
    label = re.compile(rf"{before}({'|'.join(names)})[ \t*_]*[:\uff1a](?:\*\*|__)?[ \t]*", re.I | re.M)
    records: list[dict[str, str]] = []
    opener = ""
    for block in re.split(rf"(?im){before}{heading}(?:[ \t]*[#\d]+)?[ \t*_:.)\]]*$", text):
        record: dict[str, str] = {}
        name, begin = "", 0
        for match in label.finditer(block):
            following = match[1].lower()
            opener = opener or following
            new = following == opener and bool(record or name)
            if name and not new and names.index(following) <= names.index(name):
                continue
            if name:
                record[name] = _value(block[begin : match.start()])
            if new:
                records.append(record)
                record = {}
            name, begin = following, match.end()
        if name:
            records.append({**record, name: _value(block[begin:])})
    return records


def _value(text: str) -> str:
    """A value, without lines at its end that hold no more than marks or a number: they lead on to what follows."""
    lines = text.strip().split("\n")
    while lines and MARKS.fullmatch(lines[-1].strip()):
        lines.pop()
    return "\n".join(lines).strip()
