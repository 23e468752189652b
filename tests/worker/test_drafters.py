"""Drafters that need no model: against naive searches, and what they must keep apart."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from worker.drafters.base import LATER, Ask, Drafter, Guess
from worker.drafters.lookup import SIZES, LookupDrafter
from worker.drafters.memory import Groups, Shares
from worker.drafters.recycling import RecyclingDrafter
from worker.drafters.registry import MODEL_FREE
from worker.drafters.suffix import DEPTH, TOKEN_BITS, Memory, SuffixDrafter

A, B = b"group a", b"group b"


def ask(drafter: Drafter, tokens: list[int], most: int = 4, slot: int = 1) -> Guess:
    (guess,) = drafter.propose([Ask(slot, tokens, most)], 0.0)
    return guess


def text(seed: int, length: int, alphabet: int = 4) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(alphabet) for _ in range(length)]


def filled(tokens: list[int], pieces: int = 1, **size: int) -> Memory:
    memory = Memory(**size)
    into = memory.begin()
    cut = -(-len(tokens) // pieces)
    for start in range(0, len(tokens), cut):
        into.extend(tokens[start : start + cut])
    return memory


@pytest.mark.parametrize("seed", range(5))
def test_a_trie_counts_every_run(seed: int) -> None:
    tokens = text(seed, 200)
    trie = filled(tokens).young
    runs = Counter(
        tuple(tokens[start:end])
        for start in range(len(tokens))
        for end in range(start + 1, min(start + DEPTH, len(tokens)) + 1)
    )

    def node_of(run: tuple[int, ...]) -> int:
        node = 0
        for token in run:
            node = trie._child[node << TOKEN_BITS | token]
        return node

    assert len(trie) == len(runs) + 1
    for run, count in runs.items():
        node = node_of(run)
        assert trie._count[node] == count
        following = {token: runs[*run, token] for token in range(4) if runs[*run, token]}
        if following and len(run) < DEPTH:
            assert following[trie._best[node]] == max(following.values()) == trie._most_often[node]


def test_a_text_in_pieces_is_the_text() -> None:
    tokens = text(1, 300)
    whole, pieces = filled(tokens).young, filled(tokens, pieces=37).young
    assert whole._child == pieces._child
    assert whole._count == pieces._count
    assert whole._best == pieces._best


def test_a_full_memory_keeps_the_newest() -> None:
    tokens = text(2, 6000, alphabet=1000)
    memory = filled(tokens, pieces=300, nodes=5000)
    assert memory.turns > 2
    assert len(memory) <= 5000 + 2 * 20 * (DEPTH + 1)
    for end in (5990, 5850):  # in the young trie, and in the old one
        _, guess = memory.guess([*tokens, *tokens[end - 5 : end]], 4, 0.0)
        assert guess.tokens == tokens[end : end + 4]
    _, guess = memory.guess([*tokens, *tokens[95:100]], 4, 0.0)
    assert guess.tokens != tokens[100:104]


def test_texts_go_on_when_others_have_filled_the_memory() -> None:
    memory = Memory(nodes=2000)
    one, other = memory.begin(), memory.begin()
    for i in range(300):
        one.extend(text(i, 10, alphabet=500))
        other.extend(text(1000 + i, 3, alphabet=500))
        assert len(memory) <= 2000 + 4 * 10 * (DEPTH + 1)
    assert memory.turns > 2
    newest = text(100, 20, alphabet=10**6)
    one.extend(newest)
    assert memory.guess(newest[:8], 4, 0.0)[1].tokens == newest[8:12]


def test_what_the_old_trie_knows_counts_as_guessed() -> None:
    memory, phrase = Memory(nodes=3000), text(0, 16, alphabet=10**6)
    memory.begin().extend(phrase)
    memory.turn()
    into = memory.begin()
    assert into.extend(phrase[:8]) == [False] + [True] * 7
    memory.turn()  # the phrase as a whole is forgotten, its first half is not
    assert into.extend(phrase[8:]) == [False] * 8
    memory.begin().extend(phrase)
    memory.turn()
    again = memory.begin()
    assert again.extend(phrase[:8]) == [False] + [True] * 7
    assert again.extend(phrase[8:]) == [True] * 8


def test_a_text_that_two_turns_passed_by_goes_on_as_a_new_one() -> None:
    memory, phrase = Memory(nodes=3000), text(0, 16, alphabet=10**6)
    into = memory.begin()
    into.extend(phrase[:8])
    memory.turn()
    memory.turn()
    memory.begin().extend(text(1, 50, alphabet=10**6))
    assert into.extend(phrase[8:]) == [False] * 8
    assert memory.guess(phrase[8:12], 4, 0.0)[1].tokens == phrase[12:16]


def test_text_that_repeats_itself_ages_too() -> None:
    memory, phrase = Memory(nodes=4000), text(0, 100, alphabet=10**6)
    for _ in range(200):
        memory.begin().extend(phrase)
        assert memory.young.tokens + memory.old.tokens <= 1200
    assert memory.turns > 10
    assert memory.guess(phrase[:8], 4, 0.0)[1].tokens == phrase[8:12]


def test_what_followed_once_is_not_certain_when_the_own_text_was_forgotten() -> None:
    drafter = SuffixDrafter()
    phrase = list(range(30, 50))
    for slot, tokens in ((1, phrase[:8]), (2, phrase)):
        drafter.admit(slot, A)
        ask(drafter, tokens, slot=slot)
    drafter._groups.of(A).turn()
    guess = ask(drafter, phrase[:8])
    assert guess.tokens == phrase[8:12]
    assert all(0 < c < 1 for c in guess.confidence)


def test_a_text_says_what_would_have_been_guessed() -> None:
    drafter = SuffixDrafter()
    phrase = list(range(30, 50))
    drafter.admit(1, A)
    assert drafter.ended(1, phrase, 5) == [False] * 15
    drafter.admit(1, A)
    assert drafter.ended(1, [7, *phrase], 3) == [True] * 18
    drafter.admit(1, B)
    assert drafter.ended(1, [7, *phrase], 3) == [False] * 18
    # Of somebody who was asked already, only what is new.
    drafter.admit(1, A)
    ask(drafter, phrase[:10])
    assert drafter.ended(1, phrase, 5) is None
    drafter.admit(2, A)
    assert ask(drafter, phrase[:12], slot=2).tokens == phrase[12:16]


def test_suffixes_of_the_own_text_are_continued() -> None:
    drafter = SuffixDrafter()
    drafter.admit(1, A)
    phrase = list(range(100, 112))
    guess = ask(drafter, [*phrase, 7, 8, *phrase[:6]], most=5)
    assert guess.tokens == phrase[6:11]
    assert all(0.5 < c <= 1 for c in guess.confidence)
    assert ask(drafter, [*phrase, 7, 8, *phrase[:6], 999]).tokens == []
    # Of several continuations the usual one, and as doubtful as it is.
    drafter.admit(1, A)
    guess = ask(drafter, [1, 2, 5, 1, 2, 5, 1, 2, 6, 1, 2], most=1)
    assert guess.tokens == [5]
    assert 0.4 < guess.confidence[0] < 0.75


@pytest.mark.parametrize("name", ["suffix", "recycling"])
def test_a_group_shares_what_it_has_seen_and_nothing_else(name: str) -> None:
    drafter = MODEL_FREE[name]()
    phrase = list(range(50, 70))
    drafter.admit(1, A)
    ask(drafter, phrase)
    drafter.admit(2, A)
    assert ask(drafter, phrase[:8], slot=2).tokens == phrase[8:12]
    drafter.admit(3, B)
    assert ask(drafter, phrase[:8], slot=3).tokens == []
    drafter.admit(1, B)  # another owner of the slot, in another group
    assert ask(drafter, phrase[:8], slot=1).tokens == []


@pytest.mark.parametrize("seed", range(5))
def test_lookup_finds_what_a_search_finds(seed: int) -> None:
    drafter = LookupDrafter()
    drafter.admit(1, A)
    tokens = text(seed, 12, alphabet=3)
    for token in text(seed + 100, 150, alphabet=3):
        tokens.append(token)
        expected: list[int] = []
        for size in SIZES:
            run = tokens[-size:]
            ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == run]
            if ends:
                expected = tokens[ends[-1] : ends[-1] + 4]
                break
        assert ask(drafter, tokens).tokens == expected


def test_lookup_forgets_the_former_owner() -> None:
    drafter = LookupDrafter()
    drafter.admit(1, A)
    ask(drafter, [1, 2, 3, 4, 1, 2])
    drafter.admit(1, A)
    assert ask(drafter, [1, 2]).tokens == []


def test_recycling_learns_from_wrong_drafts_too() -> None:
    drafter = RecyclingDrafter()
    drafter.admit(1, A)
    tokens = [1, 2]
    ask(drafter, tokens)
    drafter.verified(1, [2, 30, 31], [40, 50, 60])  # drafts 30 and 31 were wrong
    tokens += [40]
    assert ask(drafter, [*tokens, 30], most=1).tokens == [50]
    assert ask(drafter, [9, 31], most=1).tokens == [60]


@pytest.mark.parametrize("name", MODEL_FREE)
def test_any_drafter_keeps_to_its_contract(name: str) -> None:
    """Random texts in several slots, random outcomes; the same again gives the same."""

    def drive() -> list[Guess]:
        rng = random.Random(3)
        drafter = MODEL_FREE[name]()
        tokens: dict[int, list[int]] = {}
        guesses = []
        for _ in range(400):
            slot = rng.randrange(1, 5)
            if slot not in tokens or rng.random() < 0.02:
                tokens[slot] = [rng.randrange(6) for _ in range(rng.randrange(1, 40))]
                drafter.admit(slot, rng.choice((A, B)))
            asks = [
                Ask(slot, tokens[slot], rng.randrange(1, 9))
                for slot in tokens
                if rng.random() < 0.7
            ]
            least = rng.choice((0.0, 0.3, 0.9))
            for one, guess in zip(asks, drafter.propose(asks, least), strict=True):
                assert len(guess.tokens) == len(guess.confidence) <= one.most
                assert all(0 < c <= 1 for c in guess.confidence)
                product = 1.0
                for c in guess.confidence[:-1]:
                    product *= c
                assert product >= least or len(guess.tokens) <= 1
                fed = [one.tokens[-1], *guess.tokens]
                chosen = [rng.randrange(6) for _ in fed]
                right = 0
                while right < len(guess.tokens) and guess.tokens[right] == chosen[right]:
                    right += 1
                if guess.tokens:
                    drafter.verified(one.slot, fed, chosen)
                one.tokens.extend(chosen[: right + 1])
                guesses.append(guess)
        return guesses

    first = drive()
    assert sum(len(guess.tokens) for guess in first) > 200
    assert drive() == first


@pytest.mark.parametrize("name", MODEL_FREE)
def test_a_long_text_is_read_in_pieces(name: str) -> None:
    drafter = MODEL_FREE[name]()
    drafter.admit(1, A)
    tokens = [i % 50 for i in range(20_000)]
    steps = 0
    while ask(drafter, tokens) is LATER:
        steps += 1
        assert steps < 100
    assert steps >= 2
    assert ask(drafter, tokens).tokens == [0, 1, 2, 3]


def test_groups_forget_the_longest_unused() -> None:
    groups: Groups[list[int]] = Groups(list, most=2)
    groups.of(A).append(1)
    groups.of(B).append(2)
    assert groups.of(A) == [1]
    groups.of(b"c").append(3)
    assert len(groups) == 2
    assert groups.of(A) == [1]
    assert groups.of(B) == []


@pytest.mark.parametrize("name", ["suffix", "recycling"])
def test_a_group_that_is_asked_is_not_forgotten(name: str) -> None:
    drafter = MODEL_FREE[name]()
    phrase = list(range(50, 70))
    drafter.admit(1, A)
    ask(drafter, phrase)
    for i in range(100):
        drafter.admit(2, bytes([i]))
        ask(drafter, [1, 2, i], slot=2)
        ask(drafter, phrase)
    drafter.admit(3, A)
    assert ask(drafter, phrase[:8], slot=3).tokens == phrase[8:12]


def test_shares_follow_what_they_are_told() -> None:
    shares = Shares(2, 0.5)
    assert shares[0] == 0.5
    for i in range(2000):
        shares.learn(0, i % 10 != 0)
    assert shares[0] == pytest.approx(0.9, abs=0.03)
    assert shares[1] == 0.5
    for _ in range(3000):
        shares.learn(0, False)
    assert shares[0] == 0.01
