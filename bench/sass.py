"""What a kernel's machine code (SASS, as nvdisasm prints it) says of how well it was compiled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import Any

_LINE = re.compile(r"^\s*(?:(?P<label>\.L\w*):|/\*\w+\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>.*))")
_TARGET = re.compile(r"`\((\.L\w*)\)")
_WIDTH = re.compile(r"\.(?:[US]?(8|16)|(64|128|256))(?=\.|$)")


def examine(code: str) -> dict[str, Any]:
    """What is in the code, whether or not it is executed:

    tensor_core_instructions   HMMA, HGMMA, UTCHMMA, ...
    async_copies               from global to shared memory: LDGSTS, UTMALDG, UBLKCP
    main_loop_is_synchronous   of the innermost loops around tensor-core instructions, one has no asynchronous copies
    global_load_bytes          the width of a thread's load with which most bytes are loaded: None where there is none,
                               or where tensor memory accesses carry the data
    global_store_bytes         the same of stores
    uses_local_memory          as spilled registers and local arrays do
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    for line in code.splitlines():
        if not (found := _LINE.match(line)):
            continue
        if found["label"]:
            labels[found["label"]] = len(opcodes)
            continue
        opcodes.append(found["opcode"])
        target = _TARGET.search(found["operands"])
        # A branch back closes a loop; but .ANY repeats one instruction, for threads whose operands differ.
        if found["opcode"].startswith("BRA") and ".ANY" not in found["opcode"] and target and target[1] in labels:
            loops.append(range(labels[target[1]], len(opcodes)))

    def places(*names: str) -> list[int]:
        return [i for i, opcode in enumerate(opcodes) if opcode.startswith(names)]

    products = [i for i, opcode in enumerate(opcodes) if opcode.partition(".")[0].endswith("MMA")]
    copies = places("LDGSTS", "UTMALDG", "UBLKCP")
    around = [min((loop for loop in loops if i in loop), key=len, default=None) for i in products]
    main_loops = {loop for loop in around if loop}
    return {
        "tensor_core_instructions": len(products),
        "async_copies": len(copies),
        "main_loop_is_synchronous": any(not any(i in loop for i in copies) for loop in main_loops),
        "global_load_bytes": None if places("UTMALDG", "UBLKCP") else _width([opcodes[i] for i in places("LDG")]),
        "global_store_bytes": None if places("UTMASTG") else _width([opcodes[i] for i in places("STG")]),
        "uses_local_memory": bool(places("STL", "LDL")),
    }


def _width(opcodes: Collection[str]) -> int | None:
    """The width in bytes with which most bytes are moved; of two, the smaller one."""
    widths = Counter(int(m[1] or m[2]) // 8 if (m := _WIDTH.search(opcode)) else 4 for opcode in opcodes)
    return min(widths, key=lambda width: (-width * widths[width], width), default=None)
