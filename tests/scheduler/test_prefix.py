"""The prefix cache: what is found, what must never be."""

from __future__ import annotations

import random

import pytest

from scheduler.prefix import HashChain, PrefixIndex, chain_root
from tests.scheduler.driving import assert_exact, gather, pair, request

PROMPT = tuple(range(10, 26))  # four pages of four


def cached_tokens(first, second, **config) -> int:
    """Runs one request to its end, then another; how much the second found."""
    both = pair(**config)
    both.add(first)
    both.finish()
    both.add(second)
    answers = both.finish()
    assert_exact(answers, [first, second], both.worker.script)
    finish = answers[second.id, 0].finish
    assert finish is not None
    return finish.cached_tokens


def test_a_prompt_seen_before_is_found_but_for_its_last_token() -> None:
    assert cached_tokens(request("a", PROMPT), request("b", PROMPT)) == 12
    assert cached_tokens(request("a", PROMPT), request("b", (*PROMPT, 1))) == 16
    assert cached_tokens(request("a", PROMPT), request("b", PROMPT[:15])) == 12
    assert cached_tokens(request("a", PROMPT), request("b", PROMPT[:4])) == 0


def test_where_windows_are_dense_a_hit_ends_with_a_block_of_theirs() -> None:
    """What comes after reads its own block dense, so all of that has to be computed."""
    for length, found in ((7, 0), (8, 0), (9, 8), (12, 8), (16, 8), (17, 16)):
        text = (*PROMPT, 1, 2, 3)[:length]
        assert cached_tokens(request("a", PROMPT), request("b", text), prefix_block=8) == found
    with pytest.raises(ValueError, match="prefix_block must be a multiple of page_size"):
        pair(prefix_block=6)


def test_generated_pages_are_found_by_the_next_turn() -> None:
    both = pair()
    first = request("a", PROMPT, max_tokens=9)
    both.add(first)
    text = both.finish()["a", 0].tokens
    second = request("b", [*PROMPT, *text, 3, 4, 5])
    both.add(second)
    finish = both.finish()["b", 0].finish
    assert finish is not None
    assert finish.cached_tokens == 24  # of 16 + 9 tokens all but the last have KV


@pytest.mark.parametrize("fields", [{"cache_salt": b"x"}, {"tenant": "x"}, {"adapter": "x"}])
def test_salt_tenant_and_adapter_keep_prefixes_apart(fields: dict) -> None:
    assert cached_tokens(request("a", PROMPT), request("b", PROMPT, **fields)) == 0
    assert cached_tokens(request("a", PROMPT, **fields), request("b", PROMPT, **fields)) == 12


def test_the_parts_of_a_root_do_not_run_together() -> None:
    assert chain_root(b"ab", b"c") != chain_root(b"a", b"bc")
    assert chain_root(b"", b"a") != chain_root(b"a", b"")


def test_prompt_logprobs_bypass_the_cache() -> None:
    second = request("b", PROMPT, prompt_logprobs=0)
    assert cached_tokens(request("a", PROMPT), second) == 0


def test_the_cache_can_be_off() -> None:
    off = {"enable_prefix_cache": False}
    assert cached_tokens(request("a", PROMPT), request("b", PROMPT), **off) == 0


def test_a_colliding_digest_is_not_believed() -> None:
    index = PrefixIndex()
    mine = HashChain(b"", 2, digest=lambda data: b"same")
    index.register(1, mine.link(0, [1, 2]))
    assert index.match(mine, [1, 2], 1) == [1]
    other = HashChain(b"", 2, digest=lambda data: b"same")
    assert index.match(other, [3, 4], 1) == []
    index.register(2, other.link(0, [3, 4]))  # the name is taken: it stays private
    assert 2 not in index
    root = HashChain(b"another root", 2, digest=lambda data: b"same")
    assert index.match(root, [1, 2], 1) == [], "the same tokens after something else"


def test_a_duplicate_page_stays_private() -> None:
    index = PrefixIndex()
    chain = HashChain(b"", 2)
    index.register(1, chain.link(0, [1, 2]))
    index.register(2, chain.link(0, [1, 2]))
    assert index.match(chain, [1, 2], 1) == [1]
    assert 2 not in index
    index.forget(1)
    assert index.match(chain, [1, 2], 1) == []


def test_links_are_computed_once_and_shared_by_forks() -> None:
    calls = []

    def digest(data: bytes) -> bytes:
        calls.append(data)
        return bytes([len(calls)])

    chain = HashChain(b"", 2, digest)
    tokens = list(range(8))
    for _ in range(3):
        chain.link(3, tokens)
    assert len(calls) == 4
    fork = chain.fork(2)
    assert fork.link(1, tokens) is chain.link(1, tokens)
    assert fork.link(2, [0, 1, 2, 3, 9, 9]) != chain.link(2, tokens)
    assert len(calls) == 5


def test_the_longest_prefix_against_brute_force() -> None:
    rng = random.Random(0)
    index = PrefixIndex()
    size, stored = 3, []
    for page in range(1, 60, 4):
        tokens = [rng.randrange(2) for _ in range(4 * size)]
        chain = HashChain(b"", size)
        for i in range(4):
            index.register(page + i, chain.link(i, tokens))
        stored.append(tokens)
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(4 * size)]
        longest = max(
            i for i in range(5) for other in stored if other[: i * size] == tokens[: i * size]
        )
        assert len(index.match(HashChain(b"", size), tokens, 4)) == longest


def test_hits_are_pinned_before_pages_are_taken() -> None:
    """The hits of an admission must not be evicted for another row of the same step."""
    both = pair(num_pages=10, page_size=4, depth=0)
    both.add(request("a", PROMPT, max_tokens=1))
    both.finish()  # four cached pages, five blank ones
    both.add(request("long", range(30, 48), max_tokens=3))  # five pages, all the blank ones
    both.add(request("b", PROMPT, max_tokens=1))
    answers = both.finish()
    assert answers["b", 0].finish is not None
    assert answers["b", 0].finish.cached_tokens == 12
    assert gather(both.outputs)["long", 0].finish is not None
