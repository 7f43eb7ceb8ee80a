"""KV pages encrypted at rest with AES-256-GCM: each page file in a small container of its own.

Knows the container and the page key; knows nothing of pages, stores or models. What it hides: token ids, headers and
states, and which prompt a page belongs to (names are keyed, so that a guessed prompt can't be confirmed). What it does
not hide: how many pages there are, their sizes, times and order in a prompt, their identity (which model made them) and
the ids of the records they were made from, all in ``memory.db``, where the records themselves stand in clear; and the
decrypted pages in this process's memory, which the system may write to its swap space.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import mmap
import os
import secrets
import struct
from typing import TYPE_CHECKING

from ..errors import ConfigError, Incompatible, MissingDependency

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MAGIC", "OVERHEAD", "RULES", "ContainerError", "ForeignKey", "PageCipher", "key_name"]

MAGIC = b"AMKVSEAL"
VERSION = 1
#: Magic, version, name of the page key, nonce, length of the page in bytes. Little-endian; behind it the ciphertext (as
#: long as the page) and the tag.
_FIELDS = struct.Struct("<8sI16s12sQ")
_TAG = 16
#: Bytes of a container beside the page.
OVERHEAD = _FIELDS.size + _TAG
#: What one call of the cryptography package takes; AES-GCM itself ends at 64 GiB (NIST SP 800-38D).
_LONGEST = (1 << 31) - 1
_KEY_BYTES = 32

#: Why a container is refused; the first rule that is broken, in this order.
RULES = {
    "short": "the file is shorter than an encrypted page's header",
    "magic": "the file is not an encrypted page",
    "version": "the encrypted page has another format version",
    "length": "the encrypted page is not as long as its header says",
    "key": "the page is encrypted under another page key",
    "tag": "the encrypted page fails its authentication",
}


class ContainerError(ValueError):
    """A container breaks the rule ``args[0]`` of `RULES`; ``args[1]`` says it in words."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule, RULES[rule])


class ForeignKey(Incompatible):
    """A page is encrypted and can't be read here: no page key, or another one."""


class PageCipher:
    """Encrypts and decrypts page files under one page key of 32 bytes.

    Raises `ConfigError` for a key of another length or a system without anonymous files (a page's plain bytes never
    touch a disk), `MissingDependency` without the cryptography package. Nonces are random, 96 bits: under one key no
    more than 2**32 pages may be written (NIST SP 800-38D, 8.3).
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ConfigError(f"page_key has {len(key)} bytes: give 32 random bytes, as 64 hex digits or base64")
        if not hasattr(os, "memfd_create"):
            raise ConfigError("page_key needs files in memory (memfd_create), which this system does not have")
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise MissingDependency(
                "page_key needs the package 'cryptography': pip install 'agentmem[encryption]'"
            ) from error
        # One key for each purpose, so that none says anything of another.
        self._names = _derived(key, b"agentmem page names 1")
        self._aead = AESGCM(_derived(key, b"agentmem page encryption 1"))
        self.key_name = _derived(key, b"agentmem page key name 1")[:16]

    @classmethod
    def parse(cls, text: str) -> PageCipher:
        """The cipher of a key written as 64 hex digits or base64. The text is in no message of any error."""
        text = text.strip()
        try:
            key = bytes.fromhex(text)
        except ValueError:
            try:
                padded = text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4)
                key = base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True)
            except (binascii.Error, ValueError):
                raise ConfigError("page_key is neither hex nor base64: give 32 random bytes in one of them") from None
        return cls(key)

    def name(self, key: bytes) -> bytes:
        """The name under which a page is known outside its file: 32 bytes that say nothing without the page key."""
        return hmac.digest(self._names, key, hashlib.sha256)

    def seal(self, page: bytes | memoryview, name: bytes) -> mmap.mmap:
        """A whole page file as a container for this name, in memory."""
        length = len(page)
        if not 0 < length <= _LONGEST:
            raise ContainerError("length")
        nonce = secrets.token_bytes(12)
        header = _FIELDS.pack(MAGIC, VERSION, self.key_name, nonce, length)
        out = mmap.mmap(-1, length + OVERHEAD)
        out[: _FIELDS.size] = header
        with memoryview(out) as view, view[_FIELDS.size :] as room:
            self._aead.encrypt_into(nonce, page, header + name, room)
        return out

    def open(self, container: Buffer, name: bytes) -> mmap.mmap:
        """The page file in a container that was sealed for this name, in anonymous memory of its own.

        Raises `ContainerError`. A container can't be given another name: header and name are associated data, and a
        name follows from the tenant's salt, the identity and every token up to the page's end.
        """
        from cryptography.exceptions import InvalidTag

        view = memoryview(container).cast("B")
        found, nonce, length = _header(view)
        if found != self.key_name:
            raise ContainerError("key")
        out = mmap.mmap(-1, length)
        try:
            with memoryview(out) as room:
                self._aead.decrypt_into(nonce, view[_FIELDS.size :], bytes(view[: _FIELDS.size]) + name, room)
        except InvalidTag:
            raise ContainerError("tag") from None
        return out

    def __repr__(self) -> str:
        return "PageCipher(...)"


def key_name(container: Buffer) -> bytes:
    """Under which key a container is encrypted (16 bytes), after every check that needs no key."""
    return _header(memoryview(container).cast("B"))[0]


def _header(view: memoryview) -> tuple[bytes, bytes, int]:
    """(key name, nonce, length of the page). No size is believed before it is compared with the file's."""
    if len(view) < OVERHEAD:
        raise ContainerError("short")
    magic, version, name, nonce, length = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise ContainerError("magic")
    if version != VERSION:
        raise ContainerError("version")
    if not 0 < length <= _LONGEST or length != len(view) - OVERHEAD:
        raise ContainerError("length")
    return name, nonce, length


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, purpose, hashlib.sha256)
