"""Generated conversations whose answers stand in their own context, at any length.

Needles in a haystack, key-value look-up, copying, and JSON after a schema: what makes a small model
use its whole context, so that long-context and KV-format measurements on it mean something.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

from makers.word_lists import words

Turn = tuple[str, str]

ADJECTIVES = words(
    """
    red blue green white black golden silver old young small large quiet loud warm cold bright
    dark quick slow soft hard round flat deep high sweet bitter clean dusty empty full heavy
    light long narrow open plain rough sharp smooth tall thin wide wild
    """
)
NOUNS = words(
    """
    maple oak river stone cloud garden window table lamp bridge tower valley forest island
    mountain harbor engine wheel mirror candle basket bottle button carpet castle chair clock
    corner desert door drum feather field finger flower fountain glass hammer horse house kettle
    ladder leaf lemon letter market meadow needle ocean orange paper pencil piano pocket road
    rocket saddle sailor shadow shelf spoon star station storm street summer table temple thread
    ticket train tree tunnel village violin wagon wall water whistle winter wolf yard
    """
)
FIELDS = {
    "name": "string",
    "size": "integer",
    "color": "string",
    "price": "integer",
    "count": "integer",
    "city": "string",
    "weight": "integer",
    "owner": "string",
    "active": "boolean",
    "year": "integer",
    "label": "string",
    "score": "integer",
    "open": "boolean",
    "level": "integer",
    "shape": "string",
}


def key(rng: Random) -> str:
    """Two words, such as "quiet harbor"."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def value(rng: Random) -> str:
    """Mostly a number of five digits, sometimes a word."""
    return str(rng.randrange(10_000, 100_000)) if rng.random() < 0.8 else key(rng)


def needles(rng: Random, filler: Callable[[int], list[str]], tokens: int) -> list[Turn]:
    """Facts hidden in about `tokens` tokens of text, asked for one by one."""
    count = max(1, min(8, tokens // 300 + rng.randrange(2)))
    hidden = {key(rng): value(rng) for _ in range(count)}
    lines = filler(tokens)
    for k, v in hidden.items():
        lines.insert(rng.randrange(len(lines) + 1), f"The secret of the {k} is {v}.")
    asked = list(hidden.items())
    rng.shuffle(asked)
    turns = [
        (f"What is the secret of the {k}?", f"The secret of the {k} is {v}.") for k, v in asked
    ]
    opening = rng.choice(["Read this text.", "Here is a text.", "Remember what follows."])
    turns[0] = (f"{opening}\n\n" + "\n".join(lines) + f"\n\n{turns[0][0]}", turns[0][1])
    return turns


def lookup(rng: Random, filler: Callable[[int], list[str]], tokens: int) -> list[Turn]:
    """A table of keys and values; several of its lines are asked for."""
    table: dict[str, str] = {}
    for _ in range(max(2, tokens // 11)):
        table[key(rng)] = value(rng)
    shape = rng.choice(["{k}: {v}", "{k} = {v}", "- {k} -> {v}", '"{k}": "{v}",'])
    lines = "\n".join(shape.format(k=k, v=v) for k, v in table.items())
    asked = rng.sample(list(table.items()), min(len(table), 3 + tokens // 200, 16))
    ask = rng.choice(["What is the value of {k}?", "Which value has {k}?", "Look up {k}.", "{k}?"])
    turns = [(ask.format(k=k), v) for k, v in asked]
    turns[0] = (f"Here is a table:\n{lines}\n\n{turns[0][0]}", turns[0][1])
    return turns


def copying(rng: Random, filler: Callable[[int], list[str]], tokens: int) -> list[Turn]:
    """A text to repeat; about half the tokens are the answer."""
    if rng.random() < 0.5:
        text = "\n".join(filler(tokens // 2)).strip()
    else:
        text = ", ".join(value(rng) for _ in range(max(2, tokens // 14)))
    ask = rng.choice(["Repeat this text:", "Copy the following exactly:", "Say this again:"])
    return [(f"{ask}\n{text}", text)]


def structured(rng: Random, filler: Callable[[int], list[str]], tokens: int) -> list[Turn]:
    """A JSON schema and a record in words; the answer is the record as JSON."""
    fields = rng.sample(list(FIELDS), rng.randrange(2, 6))
    record: dict[str, object] = {}
    for name in fields:
        kind = FIELDS[name]
        if kind == "boolean":
            record[name] = rng.random() < 0.5
        else:
            record[name] = rng.randrange(1, 10_000) if kind == "integer" else key(rng)
    schema = {
        "type": "object",
        "properties": {name: {"type": FIELDS[name]} for name in fields},
        "required": fields,
    }
    said = list(record.items())
    rng.shuffle(said)
    words = ", ".join(f"{n} is {json.dumps(v).strip(chr(34))}" for n, v in said)
    text = f"Schema: {json.dumps(schema)}\nRecord: {words}.\nAnswer in JSON."
    if tokens > 400:
        text = "\n".join(filler(tokens - 200)) + "\n\n" + text
    return [(text, json.dumps(record))]


TASKS = (needles, lookup, copying, structured)


def recall(rng: Random, filler: Callable[[int], list[str]], tokens: int) -> list[Turn]:
    """One conversation of about `tokens` tokens."""
    task = rng.choices(TASKS, weights=(3, 3, 2, 1.5))[0]
    return task(rng, filler, tokens)
