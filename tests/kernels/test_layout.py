"""The layout: where documents lie, stated a second time by plain loops."""

from dataclasses import replace

import pytest
import torch

from tokenmill.kernels.layout import GHOST, KeyLayout, Layout, bucket


@pytest.mark.parametrize("lengths", [[1], [3, 1, 17], [5] * 9, [130, 2]])
def test_rows_know_their_document_and_place(lengths):
    layout = Layout.from_lengths(lengths)
    rows = [(i, p) for i, length in enumerate(lengths) for p in range(length)]
    assert layout.segment_ids.tolist() == [i for i, _ in rows]
    assert layout.positions.tolist() == [p for _, p in rows]
    assert layout.cu_seqlens.diff().tolist() == layout.document_lengths.tolist() == lengths
    assert layout.max_seqlen >= max(lengths)
    assert layout.real_rows.all()
    assert {t.dtype for t in (layout.positions, layout.cu_seqlens, layout.document_lengths)} == {torch.int32}
    assert layout.document_ids.dtype == torch.int64


def test_empty_segments_own_no_row_and_ghosts_are_not_real():
    layout = Layout.from_lengths([2, 3], [7, GHOST])
    assert layout.real_rows.tolist() == [True, True, False, False, False]
    cu_seqlens = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    layout = Layout(layout.positions, cu_seqlens, 16, torch.arange(5), cu_seqlens.diff())
    assert layout.segment_ids.tolist() == [1, 1, 3, 3, 3]


def test_what_is_derived_is_made_once_and_moves_along_in_no_copy():
    layout = Layout.from_lengths([4, 4])
    made = [layout.derived("x", lambda: object()) for _ in range(2)]
    assert made[0] is made[1]
    keys = KeyLayout(torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), 16)
    moved = replace(layout, keys=keys, _derived={}).to("cpu")
    assert moved.derived("x", lambda: 1) == 1
    assert moved.keys is not None
    assert moved.keys.gather.tolist() == [0, 1, 2]


def test_buckets_are_few_and_never_too_small():
    sizes = {bucket(n) for n in range(1, 40_000)}
    assert len(sizes) < 14
    assert all(bucket(n) >= n for n in range(40_000))


def test_impossible_lengths_are_refused():
    with pytest.raises(ValueError, match="positive, got 0"):
        Layout.from_lengths([3, 0])
    with pytest.raises(ValueError, match="2 documents but 1 document_ids"):
        Layout.from_lengths([3, 4], [1])


def test_branching():
    """As the same texts one by one: positions and keys; a prefix of no tokens and one without branches among them."""
    layout = Layout.branching([2, 0, 1], [[2, 1], [3], []])
    assert layout.keys is not None
    assert layout.positions.tolist() == [0, 1, 2, 3, 2, 0, 1, 2, 0]
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 5, 5, 8, 9]
    assert layout.document_ids.tolist() == [0, 0, 0, 1, 1, 2]
    assert layout.document_lengths.tolist() == [2, 4, 3, 0, 3, 1]
    assert [rows.tolist() for rows in layout.keys.gather.split(layout.keys.cu_seqlens.diff().tolist())] == [
        [0, 1], [0, 1, 2, 3], [0, 1, 4], [], [5, 6, 7], [8],
    ]  # fmt: skip
    assert (layout.max_seqlen, layout.keys.max_seqlen) == (16, 16)
    assert layout.positions.dtype == layout.cu_seqlens.dtype == layout.keys.cu_seqlens.dtype == torch.int32
    empty = Layout.branching([], [])
    assert empty.cu_seqlens.tolist() == [0]
    assert empty.positions.numel() == 0
