"""The ragged batch against a token-by-token restatement."""

import random

import torch

from scheduler.plan import Admit, Row
from scheduler.request import SamplingParams
from worker.batch import build_batch
from worker.slots import SlotTable
from worker.transfer import HostTransfer

PAGE = 4


def admit(slots: SlotTable, slot: int, cached: tuple[int, ...], pages: tuple[int, ...]) -> None:
    slots.admit(Admit(slot, slot, SamplingParams(max_tokens=1), 0, len(cached), pages, cached))


def test_random_steps_place_every_token_where_its_sequence_stands() -> None:
    rng = random.Random(0)
    for _ in range(50):
        slots = SlotTable(8, 64, PAGE, torch.device("cpu"))
        free = list(range(1, 200))
        rng.shuffle(free)
        text: dict[int, list[int]] = {}  # tokens with KV, by slot
        table: dict[int, list[int]] = {}
        for slot in range(1, 8):
            text[slot] = [rng.randrange(1000) for _ in range(PAGE * rng.randrange(4))]
            table[slot] = [free.pop() for _ in range(len(text[slot]) // PAGE)]
            admit(slots, slot, tuple(text[slot]), tuple(table[slot]))
        rows, fed = [], []
        for slot in rng.sample(range(1, 8), rng.randrange(1, 8)):
            chunk = tuple(rng.randrange(1000) for _ in range(rng.randrange(1, 9)))
            need = -(-(len(text[slot]) + len(chunk)) // PAGE) - len(table[slot])
            pages = tuple(free.pop() for _ in range(need))
            slots.add_pages(slot, pages)
            table[slot] += pages
            rows.append(Row(slot, slot, chunk, rng.random() < 0.7, new_pages=pages))
            fed.append(chunk)
        batch = build_batch(rows, slots, HostTransfer())

        ids, positions, kv_slots, token_rows, reads = [], [], [], [], []
        for i, row in enumerate(rows):
            start = len(text[row.slot])
            for j, token in enumerate(fed[i]):
                position = start + j
                ids.append(token)
                positions.append(position)
                kv_slots.append(table[row.slot][position // PAGE] * PAGE + position % PAGE)
                token_rows.append(i)
            if row.samples:
                reads.append((len(ids) - 1, row.slot, positions[-1] + 1))
        at = batch.attention
        assert batch.ids.tolist() == ids
        assert at.positions.tolist() == positions
        assert at.kv_slots.tolist() == kv_slots
        assert at.token_rows.tolist() == token_rows
        assert at.kv_lengths.tolist() == [
            len(text[r.slot]) + len(c) for r, c in zip(rows, fed, strict=True)
        ]
        assert at.query_starts.diff().tolist() == [len(c) for c in fed]
        assert at.max_query == max(len(c) for c in fed)
        assert at.max_kv == int(at.kv_lengths.max())
        for i, row in enumerate(rows):
            pages = -(-int(at.kv_lengths[i]) // PAGE)
            assert at.page_table[i, :pages].tolist() == table[row.slot]
        got = batch.samples.tokens.tolist() if batch.samples.tokens is not None else range(len(ids))
        assert list(got) == [token for token, _, _ in reads]
        assert batch.samples.host_slots == [slot for _, slot, _ in reads]
        assert batch.samples.positions.tolist() == [position for _, _, position in reads]


def test_live_rows_continue_from_the_devices_own_length() -> None:
    slots = SlotTable(4, 64, PAGE, torch.device("cpu"))
    admit(slots, 1, (), ())
    slots.add_pages(1, (7, 9))
    build_batch([Row(1, 1, (5, 6, 7), True)], slots, HostTransfer())
    slots.computed[1] += 3
    slots.tokens[1, 3] = 42  # what the first step sampled
    slots.tokens[1, 4:6] = torch.tensor([50, 51], dtype=torch.int32)  # drafts
    batch = build_batch([Row(1, 1, None, True, drafts=2)], slots, HostTransfer())
    assert batch.ids.tolist() == [42, 50, 51]
    assert batch.attention.positions.tolist() == [3, 4, 5]
    assert batch.samples.positions.tolist() == [4, 5, 6]
    assert batch.samples.starts == [0, 3]
    assert batch.attention.kv_slots.tolist() == [7 * 4 + 3, 9 * 4, 9 * 4 + 1]
