"""Tiny tokenizers of the three kinds that checkpoints have."""

from __future__ import annotations

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from text.tokenizer import Tokenizer as Ours

CORPUS = ["hello world, this is a test", "grüße 🎉 and 日本語 text", "the end of the world"] * 20


def ours(backend: Tokenizer, **special: str) -> Ours:
    return Ours(backend, decoder=json.loads(backend.to_str())["decoder"], special_tokens=special)


def byte_level(vocab_size: int = 350) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: every token is bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("日本", special=False)])
    return backend


def sentence_piece() -> Tokenizer:
    """As Llama 2 and Gemma: pieces with a space mark, single bytes as a fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁hello", "▁world", "h", "e", "l", "o", "w", "r", "d", "▁a", "b", ",", "!", "�"]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return backend


def word_piece() -> Tokenizer:
    """As BERT: continuations are marked."""
    words = ["[UNK]", "[SEP]", "hello", "world", "##s", "##ing", "test", ",", "go"]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken("[SEP]", special=True)])
    return backend
