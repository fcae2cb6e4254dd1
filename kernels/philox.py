"""Philox4x32-10 (Salmon et al. 2011), random bits as a pure function of a counter and a key, in plain torch.

The same bits as csrc/philox.hpp and as `tl.philox_impl`, which Triton's kernels call.
"""

from __future__ import annotations

from torch import Tensor


def philox(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words of 32 random bits from a counter of four words and a key of two.

    All words are int64 tensors that broadcast, holding values below 2**32: a product of two wraps around in 64 bits,
    and the masks take the right halves of it.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (odd >> 32 & 0xFFFFFFFF) ^ c1 ^ k0, odd & 0xFFFFFFFF
        c2, c3 = (even >> 32 & 0xFFFFFFFF) ^ c3 ^ k1, even & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high word of an int64 tensor."""
    return value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF
