"""Sample-and-match verification against a loop."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling.accept import Drafts, longest_matches


def by_hand(sampled: list[int], drafts: list[int]) -> int:
    count = 0
    for mine, theirs in zip(sampled, drafts[:-1], strict=False):
        if mine != theirs:
            break
        count += 1
    return count


def accepted_counts(sampled: list[int], drafts: list[int], lengths: list[int]) -> list[int]:
    """Of sequences with so many rows each."""
    ends = torch.tensor(lengths).cumsum(0)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    judged = Drafts(torch.tensor(drafts).int(), sequence, ends - torch.tensor(lengths), ends - 1)
    return longest_matches(torch.tensor(sampled), judged).tolist()


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
    counts = accepted_counts(
        [t for sampled, _ in sequences for t in sampled],
        [t for _, drafts in sequences for t in drafts],
        [len(sampled) for sampled, _ in sequences],
    )
    assert counts == [by_hand(*sequence) for sequence in sequences]


def test_no_drafts_is_the_same_path():
    assert accepted_counts([3, 4, 5], [3, 4, 5], [1, 1, 1]) == [0, 0, 0]


def test_the_last_row_judges_nothing():
    """What the token table holds at the last row's position may happen to equal its sample."""
    assert accepted_counts([1, 2, 3], [1, 2, 3], [3]) == [2]
