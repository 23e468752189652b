"""Pieces joined are the decoding of everything at once, whatever the cuts and the bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text import backends
from text.tokenizer import Tokenizer

BYTES = backends.ours(backends.byte_level(), eos_token="<|end|>")
PIECES = backends.ours(backends.sentence_piece(), eos_token="</s>")
WORDS = backends.ours(backends.word_piece())
HELLO = "hello wörld 🎉🏳️‍🌈 日本語 <think>x</think> end\n"


def pieces_of(
    tokenizer: Tokenizer,
    ids: list[int],
    groups: list[int] | None = None,
    prompt: list[int] | None = None,
    skip: bool = True,
) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt or [], skip_special_tokens=skip)
    pieces, rest = [], list(ids)
    for size in [*(groups or []), *[1] * len(ids)]:
        if rest:
            pieces.append(detokenizer.push(rest[:size]))
            rest = rest[size:]
    return [*pieces, detokenizer.flush()]


def test_every_truncation_of_a_byte_level_text() -> None:
    ids = BYTES.encode(HELLO)
    for end in range(len(ids) + 1):
        assert "".join(pieces_of(BYTES, ids[:end])) == BYTES.decode(ids[:end])


def test_every_truncation_of_a_byte_fallback_text() -> None:
    """Whole characters stay; of a character cut short each byte becomes U+FFFD."""
    ids = PIECES.encode(HELLO)
    for end in range(len(ids) + 1):
        data = b"".join(PIECES.token_bytes(i) for i in ids[:end]).removeprefix(b" ")
        whole = data.decode("utf-8", "ignore")
        cut = len(data) - len(whole.encode())
        assert "".join(pieces_of(PIECES, ids[:end])) == whole + "\ufffd" * cut
    assert "".join(pieces_of(PIECES, ids)) == PIECES.decode(ids) == HELLO


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=12),
    st.lists(st.integers(1, 4), max_size=6),
    st.booleans(),
)
def test_any_tokens_of_a_byte_level_vocabulary(
    ids: list[int], groups: list[int], skip: bool
) -> None:
    got = "".join(pieces_of(BYTES, ids, groups, skip=skip))
    assert got == BYTES.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, PIECES.vocab_size - 1), max_size=12),
    st.lists(st.integers(1, 4), max_size=6),
)
def test_cuts_do_not_matter_to_a_byte_fallback_vocabulary(
    ids: list[int], groups: list[int]
) -> None:
    assert "".join(pieces_of(PIECES, ids, groups)) == "".join(pieces_of(PIECES, ids))


def test_characters_are_never_split() -> None:
    for tokenizer in (BYTES, PIECES):
        ids = tokenizer.encode("a🎉b")
        *pieces, tail = pieces_of(tokenizer, ids)
        assert "\ufffd" not in "".join(pieces)
        assert tail == ""


def test_a_character_cut_short_ends_as_a_replacement() -> None:
    ids = BYTES.encode("a🎉")
    *pieces, tail = pieces_of(BYTES, ids[:-1])
    assert ("".join(pieces), tail) == ("a", "\ufffd")


def test_invalid_bytes_do_not_hold_text_back() -> None:
    lone = BYTES.token_id("ÿ")  # byte 0xff, never part of UTF-8
    assert lone is not None
    pieces = pieces_of(BYTES, [lone, *BYTES.encode("ok")])
    assert pieces[0] == "\ufffd"
    assert "".join(pieces) == "\ufffdok"


def test_the_first_token_keeps_its_space() -> None:
    prompt = PIECES.encode("hello")
    space = PIECES.token_id("▁world")
    assert space is not None
    assert "".join(pieces_of(PIECES, [space], prompt=prompt)) == " world"


def test_output_may_complete_a_character_of_the_prompt() -> None:
    ids = [PIECES.token_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    assert None not in ids
    assert "".join(pieces_of(PIECES, [ids[1]], prompt=[ids[0]])) == "é"  # type: ignore[list-item]


def test_continuations_join_words() -> None:
    ids = [WORDS.token_id(word) for word in ("test", "##s", "hello", "##s")]
    assert "".join(pieces_of(WORDS, ids)) == WORDS.decode(ids) == "tests hellos"  # type: ignore[arg-type]


def test_ids_the_tokenizer_does_not_know_are_nothing() -> None:
    """Embeddings are padded, so a model can produce them."""
    ids = [*BYTES.encode("a"), BYTES.vocab_size + 5, *BYTES.encode("b")]
    assert "".join(pieces_of(BYTES, ids)) == "ab"
    assert "".join(pieces_of(BYTES, ids, groups=[3])) == "ab"


def test_special_tokens_are_shown_on_demand() -> None:
    ids = [*BYTES.encode("a"), BYTES.eos_id or 0]
    assert "".join(pieces_of(BYTES, ids)) == "a"
    assert "".join(pieces_of(BYTES, ids, skip=False)) == "a<|end|>"


def test_endless_invalid_bytes_are_shown_in_the_end() -> None:
    lone = PIECES.token_id("<0xFF>")
    detokenizer = PIECES.detokenizer([])
    shown = sum(len(detokenizer.push([lone])) for _ in range(600))  # type: ignore[list-item]
    assert shown > 200
