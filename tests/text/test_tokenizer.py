"""Vocabulary facts and the bytes of tokens."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from tests.text import backends
from text.assets import load_text
from text.generation import load_generation
from text.pool import SHORT, PoolFullError, TextPool
from text.tokenizer import Tokenizer, TokenizerError

TEXT = "hello wörld 🎉 日本語"


@pytest.mark.parametrize("kind", [backends.byte_level, backends.sentence_piece])
def test_token_bytes_join_to_the_text(kind) -> None:
    tokenizer = backends.ours(kind())
    data = b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(TEXT))
    assert data.decode().lstrip(" ") == TEXT


def test_labels_tell_tokens_apart() -> None:
    tokenizer = backends.ours(backends.byte_level())
    labels = [tokenizer.token_label(i) for i in range(tokenizer.vocab_size)]
    assert len(set(labels)) == tokenizer.vocab_size
    assert tokenizer.token_label(tokenizer.token_id("ÿ") or 0) == "bytes:\\xff"


def test_facts() -> None:
    tokenizer = backends.ours(backends.byte_level(), eos_token="<|end|>")
    assert tokenizer.eos_id == tokenizer.token_id("<|end|>")
    assert tokenizer.special_ids == {tokenizer.eos_id}
    assert tokenizer.longest_token >= len("<|end|>")
    assert tokenizer.token_bytes(-1) == tokenizer.token_bytes(10**6) == b""


def write_checkpoint(folder: Path) -> None:
    backends.byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": "<|end|>", "lstrip": False},
                "bos_token": None,
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "{{ messages[0].content }}{{ eos_token }}"},
                ],
            }
        )
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 5], "temperature": 0.6, "top_k": 20, "top_p": None})
    )


def test_load_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    text = load_text(tmp_path)
    assert text.tokenizer.decode(text.tokenizer.encode(TEXT)) == TEXT
    assert text.template is not None
    assert text.template.render([{"role": "user", "content": "x"}]) == "x<|end|>"
    assert text.generation.temperature == 0.6
    assert text.generation.top_k == 20
    assert text.generation.top_p is None
    assert text.generation.end_ids == {3, 5, text.tokenizer.eos_id}


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    own = tmp_path / "own.jinja"
    own.write_text("own")
    template = load_text(tmp_path).template
    assert template is not None
    assert template.source == "file"
    template = load_text(tmp_path, own).template
    assert template is not None
    assert template.source == "own"


def test_missing_files_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_end_tokens_fall_back_to_the_model_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert load_generation(tmp_path, None).end_ids == {9}
    assert load_generation(tmp_path / "nowhere", 4).end_ids == {4}


async def test_the_pool_is_bounded_and_leaves_the_loop_free() -> None:
    pool = TextPool(threads=1, limit=2)
    gate = threading.Event()
    first = asyncio.create_task(pool.run(gate.wait))
    second = asyncio.create_task(pool.run(lambda: 7))
    await asyncio.sleep(0)
    with pytest.raises(PoolFullError):
        await pool.run(lambda: 8)
    with pytest.raises(PoolFullError):
        await pool.run(lambda: 8, SHORT + 1)
    assert await pool.run(threading.get_ident, SHORT) == threading.get_ident()
    gate.set()
    assert await first
    assert await second == 7
    assert await pool.run(lambda: 9) == 9
    pool.close()
