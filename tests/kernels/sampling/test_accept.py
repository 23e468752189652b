"""Sample-and-match verification against a loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling.accept import accepted_counts


def by_hand(sampled: list[int], drafts: list[int]) -> int:
    count = 0
    for mine, theirs in zip(sampled, drafts[:-1], strict=False):
        if mine != theirs:
            break
        count += 1
    return count


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(
        st.integers(0, 6).flatmap(
            lambda k: st.tuples(*(st.lists(st.integers(0, 2), min_size=k + 1, max_size=k + 1),) * 2)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_longest_match(sequences: list[tuple[list[int], list[int]]]):
    starts = [0]
    for sampled, _ in sequences:
        starts.append(starts[-1] + len(sampled))
    counts = accepted_counts(
        torch.tensor([t for sampled, _ in sequences for t in sampled]),
        torch.tensor([t for _, drafts in sequences for t in drafts], dtype=torch.int32),
        starts,
    )
    assert counts.tolist() == [by_hand(*sequence) for sequence in sequences]


def test_no_drafts_is_the_same_path():
    tokens = torch.tensor([3, 4, 5])
    assert accepted_counts(tokens, tokens, [0, 1, 2, 3]).tolist() == [0, 0, 0]


def test_the_last_row_judges_nothing():
    """What the token table holds at the last row's position may happen to equal its sample."""
    tokens = torch.tensor([1, 2, 3])
    assert accepted_counts(tokens, tokens, [0, 3]).tolist() == [2]
