"""Flat rows with shared beginnings: every sequence is there, and what is shared is there once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ft.nn.layout import BLOCK, Layout
from lora_ft.nn.rows import WORTHWHILE, Segment, Tree, flat_row

# sequences that often begin alike: pieces of one or two tokens' repetitions, glued together
PIECE = st.sampled_from([[1] * 9, [2] * 20, [3], [1, 2], [4] * 40])
SEQUENCES = st.lists(st.lists(PIECE, min_size=1, max_size=4).map(lambda parts: sum(parts, [])), min_size=1, max_size=9)


@given(SEQUENCES)
@settings(deadline=None)
def test_every_sequence_is_there_with_its_positions(sequences):
    row = flat_row(sequences, share=True)
    assert row.input_ids.numel() == sum(s.length for s in row.segments) <= sum(map(len, sequences))
    for sequence, places in zip(sequences, row.places, strict=True):
        assert row.input_ids[0, places].tolist() == sequence
        assert row.position_ids[0, places].tolist() == list(range(len(sequence)))
    layout = Layout(row.segments)
    assert torch.equal(layout.positions, row.position_ids[0])


@given(SEQUENCES)
@settings(deadline=None)
def test_a_token_attends_to_the_tokens_before_it_in_its_sequence_and_to_no_other(sequences):
    row = flat_row(sequences, share=True)
    layout, tokens = Layout(row.segments), row.input_ids.numel()
    wanted = torch.zeros(tokens, tokens, dtype=torch.bool)
    for places in row.places:
        for n, place in enumerate(places):
            wanted[place, places[: n + 1]] = True
    starts = torch.tensor([0, *layout.lengths]).cumsum(0).tolist()
    found = torch.zeros_like(wanted)
    for block, reads in enumerate(layout.reads):
        keys = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in reads])
        mask = layout.mask(block, None, torch.device("cpu"))
        if mask is None:
            mask = torch.ones(len(keys), len(keys), dtype=torch.bool).tril()
        found[starts[block] : starts[block + 1]][:, keys] = mask
    assert torch.equal(found, wanted)


def test_short_beginnings_are_not_shared_and_the_order_stays():
    few = [[1, 2, 3, i] for i in (9, 5, 7)]
    assert WORTHWHILE > 2 * 3
    assert flat_row(few, share=True).segments == [Segment(4)] * 3
    assert flat_row(few, share=True).input_ids.tolist() == [sum(few, [])]


def test_equal_sequences_and_beginnings_of_others():
    start, end = list(range(20)), list(range(30, 50))
    tree = Tree.of([start + end, start, start + end, [7]])
    assert [end - start for _, start, end in tree.spans] == [20, 20, 1]
    assert tree.groups() == [[1, 0, 2], [3]] and tree.path(0) == tree.path(2) == [0, 1]


def test_many_short_ends_read_their_beginning_in_few_blocks():
    layout = Layout([Segment(900), *[Segment(1, 0)] * 100, Segment(BLOCK + 1, 0)])
    assert layout.lengths == [900, 100, BLOCK + 1] and layout.reads == [[0], [0, 1], [0, 2]]
