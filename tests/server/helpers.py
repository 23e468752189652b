"""A tiny tokenizer, an app around a scripted engine, and a client that reads the raw bytes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from engine.config import Config, EngineConfig, ModelConfig, ServerConfig
from server.app import create_app
from tests.fakes_engine import ScriptedEngine, fixed
from text.assets import TextAssets
from text.chat_template import ChatTemplate
from text.generation import GenerationDefaults
from text.tokenizer import Tokenizer

END = "<|im_end|>"
START = "<|im_start|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>{% endif %}{% endif %}"
)
MODEL = "org/tiny"
REPLY = "Hello wörld 🎉, this is the reply. STOP and more"


def byte_level_backend(vocab_size: int = 400) -> Backend:
    """A byte-level BPE trained on a few sentences: every string can be encoded."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = ["hello world, this is the reply to a question", "stop and more"] * 10
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return backend


def byte_level_tokenizer() -> Tokenizer:
    backend = byte_level_backend()
    decoder = json.loads(backend.to_str())["decoder"]
    return Tokenizer(backend, decoder=decoder, special_tokens={"eos_token": END})


def text_assets(**generation: Any) -> TextAssets:
    tokenizer = byte_level_tokenizer()
    assert tokenizer.eos_id is not None
    return TextAssets(
        tokenizer=tokenizer,
        template=ChatTemplate(TEMPLATE, tokenizer.special_tokens),
        generation=GenerationDefaults(end_ids=frozenset({tokenizer.eos_id}), **generation),
    )


TEXT = text_assets()
TOKENIZER = TEXT.tokenizer
EOS = TOKENIZER.eos_id


def reply_engine(text: str = REPLY, *, eos: bool = True, **options: Any) -> ScriptedEngine:
    """An engine that says one text, then the end token."""
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    return ScriptedEngine(fixed([*ids, EOS] if eos else ids), **options)


def config(*, seed: int | None = 7, **server: Any) -> Config:
    made = Config(engine=EngineConfig(model=ModelConfig(served_model_name=(MODEL,), seed=seed)))
    return replace(made, server=ServerConfig(**server))


@asynccontextmanager
async def client_of(
    engine: ScriptedEngine, text: TextAssets = TEXT, cfg: Config | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client on the app itself, without a socket. Streams arrive as one body."""
    app = create_app(engine, text, cfg or config())
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client


def chat(content: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def completion(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


def events(body: bytes) -> list[Any]:
    """The `data:` payloads of a stream, `[DONE]` left as a string."""
    assert body.endswith(b"\n\n")
    found: list[Any] = []
    for block in body.decode().split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block
        payload = block.removeprefix("data: ")
        found.append(payload if payload == "[DONE]" else json.loads(payload))
    return found


def streamed_text(found: list[Any], index: int = 0) -> str:
    """The text of one choice, of either format."""
    text = ""
    for event in found:
        for choice in event["choices"] if isinstance(event, dict) else ():
            if choice["index"] == index:
                text += choice.get("text", choice.get("delta", {}).get("content", ""))
    return text
