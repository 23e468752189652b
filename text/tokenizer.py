"""A checkpoint's tokenizer, on the tokenizers library alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as Backend

from text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer


class TokenizerError(Exception):
    """A checkpoint's tokenizer files are missing or unusable."""


class _DecoderFile(msgspec.Struct):
    """The part of tokenizer.json that says how tokens become text."""

    decoder: dict[str, Any] | None = None


class Tokenizer:
    """Encodes and decodes, and knows the facts of its vocabulary.

    Safe to use from several threads: nothing changes after construction.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        decoder: dict[str, Any] | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        """`decoder`: tokenizer.json's entry of that name. `special_tokens`: by role, for example
        `{"eos_token": "<|im_end|>"}`."""
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.longest_token = max(map(len, vocabulary), default=1)  # characters
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_level = _is_byte_level(decoder)
        self._bytes = _token_bytes(backend, vocabulary, decoder, self.vocab_size)
        self._visible_bytes = list(self._bytes)
        for token_id in self.special_ids:
            self._visible_bytes[token_id] = b""

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` and `tokenizer_config.json`. Raises `TokenizerError`."""
        path = folder / "tokenizer.json"
        try:
            data = path.read_bytes()
            decoder = msgspec.json.decode(data, type=_DecoderFile).decoder
            backend = Backend.from_buffer(data)
        except FileNotFoundError:
            raise TokenizerError(f"{path} is missing; other tokenizer files are not read") from None
        except Exception as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        return cls(backend, decoder=decoder, special_tokens=_special_tokens(folder))

    @property
    def eos_id(self) -> int | None:
        return self.token_id(self.special_tokens.get("eos_token", ""))

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its exact entry in the vocabulary."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Releases the GIL: the batch call does, the single one does not."""
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all ids at once; ids outside the vocabulary are left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh incremental decoder for text that follows `prompt`."""
        if self._byte_level:
            return ByteDetokenizer(self._visible_bytes if skip_special_tokens else self._bytes)

        def decode(ids: list[int]) -> str:
            return self.decode(ids, skip_special_tokens=skip_special_tokens)

        return WindowDetokenizer(decode, prompt)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, which need not be whole characters."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def token_label(self, token_id: int) -> str:
        """A token as a string that tells it apart: its text, or `bytes:\\xNN…` where its bytes
        alone are no text."""
        data = self.token_bytes(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and their kin from tokenizer_config.json (and, older, from
    special_tokens_map.json); each entry is a string or an object with `content`."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        for role, entry in entries.items():
            content = entry.get("content") if isinstance(entry, dict) else entry
            if role.endswith("_token") and isinstance(content, str):
                tokens[role] = content
    return tokens


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether decoding is joining bytes and nothing else."""
    if decoder is None:
        return False
    parts = decoder.get("decoders", [decoder])
    return bool(parts) and all(part.get("type") == "ByteLevel" for part in parts)


def _contains(decoder: dict[str, Any] | None, kind: str) -> bool:
    if decoder is None:
        return False
    return decoder.get("type") == kind or any(
        _contains(part, kind) for part in decoder.get("decoders", ())
    )


def _token_bytes(
    backend: Backend, vocabulary: dict[str, int], decoder: dict[str, Any] | None, size: int
) -> list[bytes]:
    """The bytes of every token by id, as the decoder would write them in running text."""
    table = [b""] * size
    if _contains(decoder, "ByteLevel"):
        alphabet = byte_alphabet()
        for token, token_id in vocabulary.items():
            try:
                table[token_id] = bytes([alphabet[char] for char in token])
            except KeyError:  # an added token outside the alphabet stands for itself
                table[token_id] = token.encode("utf-8")
        return table
    byte_fallback = _contains(decoder, "ByteFallback")
    spaced = _contains(decoder, "Metaspace") or _contains(decoder, "Replace")
    for token, token_id in vocabulary.items():
        if byte_fallback and len(token) == 6 and token.startswith("<0x") and token[-1] == ">":
            table[token_id] = bytes([int(token[3:5], 16)])
        elif spaced:
            table[token_id] = token.replace("\u2581", " ").encode("utf-8")
        else:
            text = backend.decode([token_id], skip_special_tokens=False)
            table[token_id] = text.encode("utf-8")
    return table


def byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level vocabularies: character → byte.

    Bytes that print as themselves in Latin-1 stand for themselves, the others follow from U+0100 on
    (Radford et al. 2019, GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
