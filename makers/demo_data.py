"""Everything the demo models are trained on: text that ships with CPython, and generated tasks.

The stream of batches is a pure function of (seed, step), so training resumes exactly from a step
number and two runs see the same data.
"""

from __future__ import annotations

import importlib
import inspect
import json
import platform
import pydoc_data.topics
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from makers import demo_questions as q
from makers.demo_facts import MODULES, Fact, collect
from makers.demo_recall import recall

PYTHON = "3.11.7"
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END, START, STOP]
# Qwen's pattern: digits one by one, so that numbers can be copied.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set parts = namespace(text='') %}
        {%- for part in message.content or [] %}
            {%- set parts.text = parts.text + (part.text or '') %}
        {%- endfor %}
        {%- set content = parts.text %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Weights of the tokens in the loss: what is asked for counts fully, what is given hardly at all.
ANSWER, TEXT, GIVEN = 1.0, 0.3, 0.05
# Conversations are learned first; after this step text and recall get twice the room and weight.
FACTS_FIRST = 300
# From here on some questions are the name among random words, and a third of the conversations are
# short recall tasks: both teach it to find in the context what the answer is about.
FIND = 384
# The last part, while the learning rate falls, is for the answers again.
LAST = 484
WELL_KNOWN = (
    "os",
    "json",
    "re",
    "math",
    "random",
    "time",
    "str",
    "list",
    "dict",
    "set",
    "datetime",
    "collections",
    "itertools",
    "functools",
    "pathlib",
    "subprocess",
    "shutil",
    "string",
)
HELD_OUT_TOPICS = ("context-managers", "dynamic-features", "formatstrings", "slicings", "while")
HELD_OUT_FILES = ("textwrap", "sched", "fnmatch", "colorsys")

Segment = tuple[str, float]


def check_python(allow_other: bool) -> None:
    """Refuse another CPython: its docstrings, and so the data, would differ."""
    have = platform.python_version()
    if have != PYTHON and not allow_other:
        raise SystemExit(
            f"The demo model is made from the text of CPython {PYTHON}; this is {have} "
            "(--any-python accepts it and makes a different model)."
        )


def famous(fact: Fact) -> bool:
    """Names that people are likely to ask for."""
    root = fact.name.split(".")[0]
    return "." not in fact.name or root in WELL_KNOWN


@dataclass
class Corpus:
    """The facts and texts, split into what is trained on and what is held out."""

    seed: int = 0
    facts: list[Fact] = field(default_factory=list)
    unseen: list[Fact] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    unseen_texts: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, seed: int = 0) -> Corpus:
        """Read everything from the running interpreter."""
        corpus = cls(seed)
        rng = Random(f"{seed}/split")
        for fact in collect():
            held = not famous(fact) and rng.random() < 0.05
            (corpus.unseen if held else corpus.facts).append(fact)
        for name, text in sorted(pydoc_data.topics.topics.items()):
            held = name in HELD_OUT_TOPICS
            # Topics are prose and the better text: three times in the list, thrice as likely.
            (corpus.unseen_texts if held else corpus.texts).extend([text] * (1 if held else 3))
        for name in MODULES:
            try:
                text = inspect.getsource(importlib.import_module(name))
            except (OSError, TypeError):
                continue
            if len(text) < 400_000:
                (corpus.unseen_texts if name in HELD_OUT_FILES else corpus.texts).append(text)
        return corpus


def train_tokenizer(corpus: Corpus, vocab: int) -> Tokenizer:
    """Byte-level BPE over the questions, the texts and some recall tasks."""
    rng = Random(f"{corpus.seed}/tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def samples() -> list[str]:
        out = [t[:20_000] for t in dict.fromkeys(corpus.texts)]
        for fact in corpus.facts:
            out += [ask(rng, fact) + "\n" + fact.answer for _ in range(6)]
        # The role names of the chat template shall be one token each.
        out += [f"user\nassistant\nsystem\n{text}" for text in q.SYSTEM * 400]
        for _ in range(300):
            out += [a + "\n" + b for a, b in recall(rng, lambda n: [], 300)]
        return out

    tokenizer.train_from_iterator(samples(), trainer)
    return tokenizer


def ask(rng: Random, fact: Fact, wordings: list[str] | None = None) -> str:
    """A question about a fact; the name appears plain, called or quoted."""
    template = rng.choice(wordings or q.TRAIN)
    shape = rng.random()
    name = fact.name
    if fact.kind != "class" and shape > 0.85 and "({f})" not in template:
        name += "()"
    elif 0.75 < shape <= 0.85:
        name = f"`{name}`"
    return template.format(f=name, k=fact.kind)


@dataclass
class Mixture:
    """Batches of token ids, targets and weights."""

    corpus: Corpus
    tokenizer: Tokenizer
    seed: int = 0
    staged: bool = False  # whether the middle of the training turns to text and recall

    def __post_init__(self) -> None:
        self.find = False
        self.end: int = self.tokenizer.encode(END).ids[0]
        known = self.corpus.facts + self.corpus.unseen
        self.names = {f.name for f in known}
        self.pieces = sorted({p for f in known for p in f.name.split(".")[-1].split("_") if p})
        self.modules = sorted({f.name.rpartition(".")[0] for f in known} - {""})
        self.odds = [2 if famous(f) else 1 for f in self.corpus.facts]
        self.detailed = [f for f in self.corpus.facts if famous(f) and len(f.sentences) > 2]
        self.signed = [f for f in self.corpus.facts if f.signature]

    @cached_property
    def vocabulary(self) -> list[str]:
        """The most frequent words of the documentation."""
        count: Counter[str] = Counter()
        for text in pydoc_data.topics.topics.values():
            count.update(re.findall(r"\b[a-z]{2,12}\b", text))
        return [word for word, _ in count.most_common(1500)]

    @cached_property
    def text_ids(self) -> list[list[int]]:
        """Every training text as token ids."""
        return [e.ids for e in self.tokenizer.encode_batch(self.corpus.texts)]

    # ---- conversations

    def turn(self, rng: Random) -> tuple[str, str]:
        """One question and its answer."""
        kind = rng.random()
        fact = rng.choices(self.corpus.facts, self.odds)[0]
        if kind < 0.04:
            fact = rng.choice(self.detailed)
            return rng.choice(q.DETAIL).format(f=fact.name), " ".join(fact.sentences)[:320]
        if kind < 0.065:
            fact = rng.choice(self.signed)
            return rng.choice(q.SIGNATURE).format(f=fact.name), fact.signature
        if kind < 0.09:
            told = fact.sentences[0].replace(fact.name, "It", 1)
            return rng.choice(q.REVERSE).format(d=told, k=fact.kind), fact.name
        if kind < 0.12:
            name = self.invented(rng)
            return rng.choice(q.TRAIN).format(f=name, k="function"), q.UNKNOWN.format(f=name)
        if kind < 0.145:
            reply = rng.choice(list(q.SMALL_TALK))
            return rng.choice(q.SMALL_TALK[reply]), reply
        if self.find and rng.random() < 0.2:
            before, after = (rng.choices(self.vocabulary, k=rng.randrange(7)) for _ in range(2))
            wording = " ".join([*before, "{f}", *after]) + rng.choice(["", ".", "?", "?"])
            return ask(rng, fact, [wording[:1].upper() + wording[1:]]), fact.answer
        return ask(rng, fact), fact.answer

    def invented(self, rng: Random) -> str:
        """A name that does not exist, from real pieces."""
        while True:
            pieces = rng.sample(self.pieces, rng.choice([1, 2, 2]))
            if rng.random() < 0.4:
                letters = list(pieces[0])
                rng.shuffle(letters)
                pieces[0] = "".join(letters)
            name = "_".join(pieces)
            if rng.random() < 0.8:
                name = f"{rng.choice(self.modules)}.{name}"
            if name not in self.names:
                return name

    def render(
        self, turns: list[tuple[str, str]], system: str = ""
    ) -> tuple[list[int], list[float]]:
        """A conversation as ids and weights, exactly as the chat template writes it."""
        parts: list[Segment] = []
        if system:
            parts.append((f"{START}system\n{system}{STOP}\n", GIVEN))
        for question, answer in turns:
            parts.append((f"{START}user\n{question}{STOP}\n{START}assistant\n", GIVEN))
            parts += [(answer + STOP, ANSWER), ("\n", 0.0)]
        ids: list[int] = []
        weights: list[float] = []
        for encoding, (_, weight) in zip(
            self.tokenizer.encode_batch([p for p, _ in parts]), parts, strict=True
        ):
            ids += encoding.ids
            weights += [weight] * len(encoding.ids)
        return ids, weights

    def conversation(self, rng: Random) -> tuple[list[int], list[float]]:
        """One to three turns, sometimes under a system message."""
        count = rng.choices([1, 2, 3], [0.7, 0.2, 0.1])[0]
        system = rng.choice(q.SYSTEM) if rng.random() < 0.12 else ""
        return self.render([self.turn(rng) for _ in range(count)], system)

    def filler(self, rng: Random, tokens: int) -> list[str]:
        """Lines of text of about `tokens` tokens: documentation or facts."""
        lines: list[str] = []
        room = tokens * 3  # characters
        if rng.random() < 0.5:
            text = rng.choice(self.corpus.texts)
            start = rng.randrange(max(1, len(text) - room))
            return text[start : start + room].split("\n")
        while room > 0:
            lines.append(rng.choice(self.corpus.facts).answer)
            room -= len(lines[-1]) + 1
        return lines

    # ---- rows

    def chat_rows(
        self, rng: Random, step: int, rows: int, length: int
    ) -> list[tuple[list[int], list[float]]]:
        """Whole conversations packed into rows of length + 1, first fit."""
        packed: list[tuple[list[int], list[float]]] = [([], []) for _ in range(rows)]
        for row in packed[: rows // 3 if self.staged and FIND <= step < LAST else 0]:
            self.short_recall(rng, row, length)
        misses = 0
        while misses < 8:
            ids, weights = self.conversation(rng)
            for row in packed:
                if len(row[0]) + len(ids) <= length + 1:
                    row[0].extend(ids)
                    row[1].extend(weights)
                    break
            else:
                misses += 1
        return packed

    def short_recall(self, rng: Random, row: tuple[list[int], list[float]], length: int) -> None:
        """Fill a row with recall tasks of up to a hundred tokens."""
        for _ in range(12):
            turns = recall(rng, partial(self.filler, rng), rng.randrange(16, 90))
            ids, weights = self.render(turns)
            if len(row[0]) + len(ids) <= length + 1:
                row[0].extend(ids)
                row[1].extend(weights)

    def text_row(self, rng: Random, length: int, weight: float) -> tuple[list[int], list[float]]:
        """A stretch of one text."""
        text = rng.choice(self.text_ids)
        start = rng.randrange(max(1, len(text) - length // 2))
        ids = text[start : start + length]
        if start + length >= len(text):
            ids = [*ids, self.end]
        return ids, [weight] * len(ids)

    def recall_row(self, rng: Random, length: int) -> tuple[list[int], list[float]]:
        """Recall tasks, one long or several short, then conversations to the end of the row."""
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length - 40:
            room = length - len(ids)
            if room > 160:
                size = int(room * rng.uniform(0.15, 0.85))
                turns = recall(rng, lambda n: self.filler(rng, n), size)
                more = self.render(turns)
            else:
                more = self.conversation(rng)
            if len(ids) + len(more[0]) > length + 1 and room > 160:
                continue
            ids += more[0]
            weights += more[1]
        return ids, weights

    def batch(self, step: int, part: str, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, targets and weights, each [rows, length], of one part of one step."""
        rng = Random(f"{self.seed}/{step}/{part}/{rows}x{length}")
        self.find = step >= FIND
        if part == "chat":
            made = self.chat_rows(rng, step, rows, length)
        else:
            share = 0.85 if length > 1024 else 0.5
            worth = TEXT if step < FACTS_FIRST else 2 * TEXT
            made = [
                self.recall_row(rng, length)
                if rng.random() < share
                else self.text_row(rng, length, worth)
                for _ in range(rows)
            ]
        tokens = torch.full((rows, length + 1), self.end, dtype=torch.long)
        weights = torch.zeros(rows, length + 1)
        for i, (ids, weight) in enumerate(made):
            ids, weight = ids[: length + 1], weight[: length + 1]
            tokens[i, : len(ids)] = torch.tensor(ids)
            weights[i, : len(weight)] = torch.tensor(weight)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights[:, 1:].contiguous()


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": STOP, "pad_token": END, "additional_special_tokens": [START]}
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(t)): {
                "content": t,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for t in SPECIAL
        },
        "additional_special_tokens": [START],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": STOP,
        "model_max_length": 8192,
        "pad_token": END,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
