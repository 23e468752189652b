"""The sampler as the worker uses it, against a slow oracle in plain Python."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.sampling import reference
from kernels.sampling.accept import Drafts
from scheduler.request import SamplingParams, TokenLogprob
from tests.kernels.sampling import oracle
from tests.kernels.sampling.cases import chi_square
from worker.sampler import Form, Sampled, Sampler
from worker.sampling_state import SlotSampling

VOCAB, LENGTH = 24, 40
CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=64, temperature=0)


class Bench:
    """Slots admitted with given parameters over a random token table."""

    def __init__(
        self,
        owners: Sequence[tuple[SamplingParams, int]],
        prompt_len: int = 6,
        vocab: int = VOCAB,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = len(owners) + 1
        self.vocab, self.prompt_len, self.owners = vocab, prompt_len, owners
        self.table = torch.randint(0, vocab, (count, LENGTH), generator=generator).int()
        self.slots = SlotSampling(count, vocab, CPU)
        self.sampler = Sampler(self.slots, self.table)
        for slot, (params, choice) in enumerate(owners, start=1):
            self.slots.admit(slot, params, choice, prompt_len)

    def sample(self, logits: torch.Tensor, rows: Sequence[tuple[int, int]]) -> Sampled:
        """rows: (slot, position)."""
        before = logits.clone(), self.table.clone()
        result = self.sampler.sample(
            logits, [slot for slot, _ in rows], torch.tensor([position for _, position in rows])
        )
        assert torch.equal(logits.nan_to_num(), before[0].nan_to_num())
        assert torch.equal(self.table, before[1])
        return result

    def expected(self, logits: torch.Tensor, slot: int, position: int) -> int | None:
        params, choice = self.owners[slot - 1]
        history = self.table[slot, :position].tolist()
        return oracle.sample(logits.tolist(), params, choice, history, self.prompt_len)


tokens = st.integers(0, VOCAB - 1)
some_params = st.builds(
    SamplingParams,
    max_tokens=st.just(64),
    min_tokens=st.sampled_from([0, 0, 5, 20]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.5]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.4]),
    top_k=st.sampled_from([0, 0, 1, 5, 23, 24, 99]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7, -1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, -0.4]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.0, 2.5]), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=6).map(tuple),
    allowed_token_ids=st.none() | st.sets(tokens, min_size=1, max_size=8).map(tuple),
    stop_token_ids=st.frozensets(tokens, max_size=3),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    owners=st.lists(st.tuples(some_params, st.integers(0, 3)), min_size=1, max_size=4),
    prompt_len=st.integers(1, 10),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_every_row_is_what_the_oracle_says(owners, prompt_len, seed, data):
    bench = Bench(owners, prompt_len, seed=seed)
    slots = st.integers(1, len(owners))
    rows = data.draw(
        st.lists(st.tuples(slots, st.integers(prompt_len, LENGTH)), min_size=1, max_size=6)
    )
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 2
    logits[::3] = (logits[::3] * 2).round()  # ties
    sampled = bench.sample(logits, rows)
    for i, (slot, position) in enumerate(rows):
        expected = bench.expected(logits[i], slot, position)
        assert bool(sampled.finite[i]) == (expected is not None)
        assert int(sampled.tokens[i]) == (expected or 0)


def mixed_owners() -> list[tuple[SamplingParams, int]]:
    base = SamplingParams(max_tokens=64, seed=7)
    return [
        (GREEDY, 0),
        (base, 0),
        (replace(base, temperature=0.6, top_p=0.9), 1),
        (replace(base, top_k=5, repetition_penalty=1.2, logprobs=2), 0),
        (replace(base, presence_penalty=0.6, frequency_penalty=0.2, logprobs=5), 2),
        (replace(GREEDY, bad_words=((3, 4), (5,)), logit_bias=((1, 4.0),)), 0),
        (replace(base, min_tokens=9, stop_token_ids=frozenset({0, 2}), min_p=0.02), 0),
        (replace(GREEDY, allowed_token_ids=(9, 11), repetition_penalty=1.4), 0),
    ]


@pytest.mark.parametrize("vocab", [VOCAB, 4096])
def test_a_row_does_not_depend_on_its_batch(vocab: int):
    """Tokens and logprobs, bit for bit, in any company."""
    bench = Bench(mixed_owners(), vocab=vocab)
    rows = [(slot, position) for slot in range(1, 9) for position in (6, 7, 21, 40)]
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(1)) * 3
    together = bench.sample(logits, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2)).tolist()
    for part in (order, order[:7], *([i] for i in range(len(rows)))):
        alone = bench.sample(logits[part], [rows[i] for i in part])
        for at, i in enumerate(part):
            assert int(alone.tokens[at]) == int(together.tokens[i])
            mine, theirs = slice(at, at + 1), slice(i, i + 1)
            assert alone.logprobs_of(mine) == together.logprobs_of(theirs)


def table_model(history: Sequence[int], vocab: int) -> torch.Tensor:
    """Logits that depend on the last tokens, as a model's would."""
    key = hash(tuple(history[-3:])) % 2**31
    return torch.randn(vocab, generator=torch.Generator().manual_seed(key)) * 1.5


@pytest.mark.parametrize("params", [owner[0] for owner in mixed_owners()])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_drafts_change_nothing(params: SamplingParams, k: int):
    """Whatever is drafted, right or wrong, the text is the one without drafts."""
    prompt, length = [1, 2, 3, 4, 5, 6], 34

    def generate(drafts_for: dict[int, list[int]] | None) -> list[int]:
        bench = Bench([(params, 0)])
        text = list(prompt)
        while len(text) < length:
            drafts = [] if drafts_for is None else drafts_for[len(text)]
            drafted = text + drafts
            bench.table[1, : len(drafted)] = torch.tensor(drafted).int()
            positions = range(len(text), len(drafted) + 1)
            logits = torch.stack([table_model(drafted[:p], VOCAB) for p in positions])
            sampled = bench.sample(logits, [(1, p) for p in positions]).tokens.tolist()
            accepted = 0
            while accepted < len(drafts) and drafts[accepted] == sampled[accepted]:
                accepted += 1
            text += sampled[: accepted + 1]
        return text[:length]

    plain = generate(None)
    generator = torch.Generator().manual_seed(k)
    noisy = torch.where(
        torch.rand(LENGTH + 8, generator=generator) < 0.7,
        torch.tensor(plain + [0] * (LENGTH + 8 - length)),
        torch.randint(0, VOCAB, (LENGTH + 8,), generator=generator),
    ).tolist()
    room = LENGTH - 1
    speculated = generate({p: noisy[p : min(p + k, room)] for p in range(length)})
    assert speculated == plain


def test_penalties_count_the_drafts_before_a_row():
    """The classic: with a presence penalty, a draft must weigh on the rows after it."""
    bench = Bench([(replace(GREEDY, presence_penalty=2.0), 0)])
    bench.table[1, 6:8] = torch.tensor([3, 4])
    logits = torch.zeros(3, VOCAB)
    logits[:, 3], logits[:, 4], logits[:, 5] = 1.0, 0.9, 0.8
    assert bench.sample(logits, [(1, 6), (1, 7), (1, 8)]).tokens.tolist() == [3, 4, 5]


def test_penalised_marginals():
    """Over seeds, tokens follow the softmax of the penalised, biased and scaled logits."""
    params = SamplingParams(
        max_tokens=64,
        temperature=0.8,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        logit_bias=((3, 1.5),),
    )
    n, position = 3000, 20
    bench = Bench([(replace(params, seed=seed), 0) for seed in range(n)])
    bench.table[:] = bench.table[1].clone()
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(6)) * 1.5
    sampled = bench.sample(row.repeat(n, 1), [(slot, position) for slot in range(1, n + 1)])
    history = bench.table[1, :position].tolist()
    z = torch.tensor([float(x) for x in oracle.process(row.tolist(), params, history, 6)])
    expected = n * (z.double() / 0.8).softmax(-1)
    assert abs(chi_square(torch.bincount(sampled.tokens, minlength=VOCAB), expected)) < 4


def test_min_tokens_is_counted_from_the_prompt():
    params = replace(GREEDY, min_tokens=2, stop_token_ids=frozenset({3}))
    bench = Bench([(params, 0)])
    logits = torch.zeros(3, VOCAB)
    logits[:, 3], logits[:, 9] = 2.0, 1.0
    assert bench.sample(logits, [(1, 6), (1, 7), (1, 8)]).tokens.tolist() == [9, 9, 3]


def test_bad_words_see_the_prompt_and_their_own_length():
    params = replace(GREEDY, bad_words=((1, 2, 3), (7,), (5, 3), (2, 2, 3)))
    bench = Bench([(params, 0)])
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 3], logits[0, 9] = 3.0, 2.0, 1.0
    for history, token in (
        ([0, 0, 0, 0, 1, 2], 9),
        ([0, 0, 0, 0, 2, 1], 3),
        ([0, 0, 0, 0, 1, 5], 9),
    ):
        bench.table[1, :6] = torch.tensor(history).int()
        assert bench.sample(logits, [(1, 6)]).tokens.tolist() == [token]
    bench.slots.admit(1, params, 0, prompt_len=1)
    bench.table[1, 0] = 2  # what is no token yet must not match as if it were the first
    assert bench.sample(logits, [(1, 1)]).tokens.tolist() == [3]


def test_overlapping_bans_do_not_undo_each_other():
    """Two words ending in the same token, only one of them complete."""
    for words in (((1, 3), (2, 3)), ((2, 3), (1, 3))):
        bench = Bench([(replace(GREEDY, bad_words=words), 0)])
        bench.table[1, 5] = 1
        logits = torch.zeros(1, VOCAB)
        logits[0, 3] = 1.0
        assert bench.sample(logits, [(1, 6)]).tokens.tolist() == [0]


def test_a_slot_forgets_its_former_owner():
    params = SamplingParams(
        max_tokens=9, min_tokens=8, temperature=1.3, top_p=0.1, top_k=2, min_p=0.9, seed=2**64 - 1,
        presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=1.5,
        logit_bias=((3, 9.0),), bad_words=((4,),), allowed_token_ids=(3, 4),
        stop_token_ids=frozenset({3}), logprobs=4,
    )  # fmt: skip
    used, fresh = Bench([(params, 3)]), Bench([(GREEDY, 0)])
    for later in (GREEDY, SamplingParams(max_tokens=9, seed=5)):
        used.slots.admit(1, later, 0, 6)
        fresh.slots.admit(1, later, 0, 6)
        logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1))
        rows = [(1, p) for p in range(6, 14)]
        ours, theirs = used.sample(logits, rows), fresh.sample(logits, rows)
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.logprobs_of(slice(0, 8)) == ()


def test_seed_choice_and_position_each_make_another_draw():
    base = SamplingParams(max_tokens=9, seed=5)
    owners = [(base, 0), (base, 1), (replace(base, seed=6), 0), (replace(base, seed=5 + 2**40), 0)]
    bench = Bench(owners, vocab=4096)
    logits = torch.zeros(1, 4096)
    seen = {
        int(bench.sample(logits, [(slot, position)]).tokens)
        for slot in range(1, 5)
        for position in range(6, 16)
    }
    assert len(seen) > 35  # of 40 draws among 4096 equal tokens
    again = Bench(owners, vocab=4096, seed=99)  # another history, same draw
    rows = [(1, 6), (2, 7)]
    two = logits.expand(2, -1).contiguous()
    assert again.sample(two, rows).tokens.tolist() == bench.sample(two, rows).tokens.tolist()


def test_bad_rows_are_flagged_alone():
    bench = Bench([*mixed_owners()])
    rows = [(slot, 12) for slot in range(1, 9)] * 4
    clean = torch.randn(32, VOCAB, generator=torch.Generator().manual_seed(3))
    expected = bench.sample(clean, rows)
    assert expected.finite.all()
    logits = clean.clone()
    for i in range(8):  # each kind of row, each kind of damage
        logits[i, (i * 5) % VOCAB] = math.nan
        logits[8 + i, (i * 7) % VOCAB] = math.inf
        logits[16 + i] = -math.inf
    sampled = bench.sample(logits, rows)
    assert sampled.finite.tolist() == [False] * 24 + [True] * 8
    assert sampled.tokens[:24].tolist() == [0] * 24
    assert sampled.tokens[24:].tolist() == expected.tokens[24:].tolist()


def test_masked_logits_are_never_chosen():
    bench = Bench(mixed_owners())
    rows = [(slot, 12) for slot in range(1, 8)] * 30
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(3))
    logits[:, 4:20] = -math.inf
    sampled = bench.sample(logits, rows)
    assert sampled.finite.all()
    assert not ((sampled.tokens >= 4) & (sampled.tokens < 20)).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_choose_from(temperature: float):
    params = replace(
        GREEDY,
        temperature=temperature,
        min_tokens=5,
        allowed_token_ids=(3,),
        stop_token_ids=frozenset({3}),
    )
    bench = Bench([(params, 0)])
    sampled = bench.sample(torch.zeros(2, VOCAB), [(1, 6), (1, 11)])
    assert sampled.finite.tolist() == [False, True]
    assert sampled.tokens.tolist() == [0, 3]


def test_ids_outside_the_vocabulary_are_ignored():
    params = replace(
        GREEDY,
        min_tokens=5,
        logit_bias=((VOCAB + 3, 50.0),),
        bad_words=((2, VOCAB), (VOCAB + 1, 3)),
        allowed_token_ids=(3, VOCAB + 7),
        stop_token_ids=frozenset({VOCAB}),
    )
    bench = Bench([(params, 0)])
    sampled = bench.sample(torch.zeros(1, VOCAB), [(1, 6)])
    assert sampled.tokens.tolist() == [3]


def test_logprobs_are_of_the_raw_distribution():
    shaped = SamplingParams(
        max_tokens=9, temperature=0.5, top_k=2, logit_bias=((3, 100.0),), logprobs=2
    )
    bench = Bench([(shaped, 0), (GREEDY, 0), (replace(GREEDY, logprobs=0), 0)])
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5))
    logits[1, 20] = -math.inf
    sampled = bench.sample(logits, [(2, 9), (1, 7), (1, 8), (3, 7)])
    exact = logits.double().log_softmax(-1)
    assert sampled.logprobs_of(slice(0, 1)) == ()
    entries = sampled.logprobs_of(slice(1, 3))
    assert [entry.token for entry in entries] == [3, 3]
    for row, entry in zip((1, 2), entries, strict=True):
        best = exact[row].topk(2)
        assert entry.logprob == pytest.approx(float(exact[row, 3]), abs=1e-5)
        assert entry.rank == 1 + int((exact[row] > exact[row, 3]).sum())
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    (own,) = sampled.logprobs_of(slice(3, 4))
    assert (own.rank, own.top) == (1, ())
    assert sampled.logprobs_of(slice(1, 1)) == ()


def test_prompt_logprobs():
    bench = Bench([(GREEDY, 0)])
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf], [0.0, 0.0, 0.0]])
    first, second = bench.sampler.prompt_logprobs(logits, (2, 1), 1)
    assert first == TokenLogprob(2, -math.inf, 3, ((1, pytest.approx(math.log(0.75))),))
    assert second.logprob == pytest.approx(-math.log(3))
    assert (second.rank, second.top[0][0]) == (1, 0)  # nothing is more likely; the lower id first


def triton_form() -> Form:
    pytest.importorskip("triton")
    from kernels.interpreter import interpreted, mend
    from kernels.sampling import choose_triton

    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 from the start")
    mend()
    return choose_triton


@pytest.mark.parametrize("form", [lambda: reference, triton_form], ids=["torch", "triton"])
def test_the_device_forms_give_the_same_tokens(form: Callable[[], Form]):
    """What a GPU runs with kernels and without, here on the CPU."""
    bench = Bench(mixed_owners(), vocab=512)
    rows = [(slot, position) for slot in range(1, 9) for position in (6, 21, 40)]
    logits = torch.randn(len(rows), 512, generator=torch.Generator().manual_seed(4)) * 3
    logits[5, 9] = math.nan
    logits[22, 3] = math.nan  # of a token that its slot may not choose
    expected = bench.sample(logits, rows)
    bench.sampler.use(form())
    sampled = bench.sample(logits, rows)
    assert sampled.tokens.tolist() == expected.tokens.tolist()
    assert sampled.finite.tolist() == expected.finite.tolist()
    assert sampled.finite.tolist().count(False) == 2


def test_nothing_waits_for_the_device():
    """On the meta device whatever reads a value back to the host raises."""
    device = torch.device("meta")
    slots = SlotSampling(9, VOCAB, device)
    for slot, (params, choice) in enumerate(mixed_owners(), start=1):
        slots.admit(slot, params, choice, 6)
    sampler = Sampler(slots, torch.zeros(9, LENGTH, dtype=torch.int32, device=device))
    positions = torch.ones(16, dtype=torch.int64, device=device)
    drafts = Drafts(positions, positions, positions[:2], positions[:2])
    logits = torch.zeros(16, VOCAB, device=device)
    sampled = sampler.sample(logits, [*range(1, 9)] * 2, positions, drafts=drafts)
    assert sampled.asked is not None
    assert sampled.accepted is not None
    assert sampled.accepted.shape == (2,)
