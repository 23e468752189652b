"""The prefix cache's index: chained page hashes, every hit verified by the tokens themselves.

A full page of tokens is named by `sha256(digest of the page before ‖ its tokens)`; the chain's
root stands for everything else that changes KV: model, format, adapter, salt, tenant. So one
digest names a whole prefix, two tenants never share a name, and looking a prefix up is one
dictionary probe a page.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from typing import NamedTuple

Digest = Callable[[bytes], bytes]


def sha256_digest(data: bytes) -> bytes:
    return sha256(data).digest()


def chain_root(*parts: bytes) -> bytes:
    """The digest a chain starts from. Lengths are hashed too, so parts can't run together."""
    return sha256_digest(b"".join(len(part).to_bytes(8, "little") + part for part in parts))


class Link(NamedTuple):
    """One full page of a token list."""

    digest: bytes
    parent: bytes  # the digest of the page before, or the root
    content: bytes  # the page's tokens, int32


class HashChain:
    """The links of one append-only token list, each computed once, when first asked for."""

    __slots__ = ("_digest", "_links", "_page_size", "_root")

    def __init__(self, root: bytes, page_size: int, digest: Digest = sha256_digest) -> None:
        self._root = root
        self._page_size = page_size
        self._digest = digest
        self._links: list[Link] = []

    def link(self, page: int, tokens: Sequence[int]) -> Link:
        """The link of the `page`-th page; `tokens` must hold that page in full."""
        links, size = self._links, self._page_size
        while len(links) <= page:
            start = len(links) * size
            parent = links[-1].digest if links else self._root
            content = array("i", tokens[start : start + size]).tobytes()
            links.append(Link(self._digest(parent + content), parent, content))
        return links[page]

    def fork(self, pages: int) -> HashChain:
        """A chain for another token list that begins with the same `pages` full pages."""
        chain = HashChain(self._root, self._page_size, self._digest)
        chain._links = self._links[:pages]
        return chain


class PrefixIndex:
    """Which page holds the KV of which link. A link has at most one page, a page one link."""

    __slots__ = ("_link_of", "_page_of")

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._link_of: dict[int, Link] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._link_of

    def __len__(self) -> int:
        return len(self._link_of)

    def links(self) -> Iterable[Link]:
        return self._link_of.values()

    def find(self, link: Link) -> int | None:
        """The page of one link. Its digest alone is not believed."""
        page = self._page_of.get(link.digest)
        return None if page is None or self._link_of[page] != link else page

    def match(self, chain: HashChain, tokens: Sequence[int], pages: int) -> list[int]:
        """Pages of the longest indexed prefix, at most `pages` of them.

        A digest alone is not believed: tokens and parent must be equal as well.
        """
        found: list[int] = []
        for i in range(pages):
            link = chain.link(i, tokens)
            page = self._page_of.get(link.digest)
            if page is None or self._link_of[page] != link:
                break
            found.append(page)
        return found

    def register(self, page: int, link: Link) -> None:
        """Publishes a page whose KV is complete and will not change while it stays indexed.

        Where another page holds the same link, that one stays: page tables are append-only, so a
        duplicate is kept by its owner and simply not published.
        """
        if link.digest not in self._page_of:
            self._page_of[link.digest] = page
            self._link_of[page] = link

    def forget(self, page: int) -> Link:
        """Withdraws a page that is about to be overwritten; returns what it held."""
        link = self._link_of.pop(page)
        del self._page_of[link.digest]
        return link
