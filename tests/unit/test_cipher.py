"""Encrypted pages: nothing of them in clear, every change of a byte noticed, another key a miss and never damage."""

from __future__ import annotations

import base64
import hmac
import logging
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from agentmem import Memory
from agentmem.activation.cipher import MAGIC, OVERHEAD, RULES, ContainerError, ForeignKey, PageCipher, key_name
from agentmem.activation.identity import chain, digest
from agentmem.activation.pages import Page
from agentmem.activation.store import PageStore
from agentmem.config import read
from agentmem.database import Database
from agentmem.errors import ConfigError, Corrupt, Incompatible, MissingDependency

KEY = bytes(range(32))
NAME = b"n" * 32
GRID = 16
IDENTITY = digest({"weights": "w"})
TOKENS = [70_000 + i for i in range(GRID * 3)]


@pytest.fixture(scope="module")
def cipher() -> PageCipher:
    return PageCipher(KEY)


def test_what_was_sealed_is_opened_and_no_two_containers_are_alike(cipher: PageCipher) -> None:
    page = os.urandom(5000)
    one, two = bytes(cipher.seal(page, NAME)), bytes(cipher.seal(page, NAME))
    assert bytes(cipher.open(one, NAME)) == bytes(cipher.open(two, NAME)) == page
    assert len(one) == len(page) + OVERHEAD
    assert one[48:] != two[48:]
    assert page[:16] not in one
    assert key_name(one) == cipher.key_name


def test_the_container_is_as_drawn(cipher: PageCipher) -> None:
    container = bytes(cipher.seal(b"page", NAME))
    magic, version, name, _, length = struct.unpack_from("<8sI16s12sQ", container)
    assert (magic, version, name, length) == (MAGIC, 1, cipher.key_name, 4)
    assert len(container) == 48 + 4 + 16


def test_a_container_made_by_hand_from_its_description_is_opened(cipher: PageCipher) -> None:
    """Pins the format: files of version 1 stay readable."""

    def derived(purpose: bytes) -> bytes:
        return hmac.digest(KEY, purpose, "sha256")

    header = b"AMKVSEAL" + struct.pack("<I", 1) + derived(b"agentmem page key name 1")[:16] + b"n" * 12
    header += struct.pack("<Q", 9)
    content = AESGCM(derived(b"agentmem page encryption 1")).encrypt(b"n" * 12, b"some page", header + NAME)
    assert bytes(cipher.open(header + content, NAME)) == b"some page"
    assert cipher.name(b"k" * 32) == hmac.digest(derived(b"agentmem page names 1"), b"k" * 32, "sha256")


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "short": lambda data: data[: OVERHEAD - 1],
    "magic": lambda data: b"AMKVPAGE" + data[8:],
    "version": lambda data: data[:8] + struct.pack("<I", 2) + data[12:],
    "length": lambda data: data[:40] + struct.pack("<Q", 1 << 40) + data[48:],
    "key": lambda data: data[:12] + bytes(16) + data[28:],
    "tag": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_error(cipher: PageCipher, rule: str) -> None:
    container = BROKEN[rule](bytes(cipher.seal(b"some page", NAME)))
    with pytest.raises(ContainerError) as raised:
        cipher.open(container, NAME)
    assert raised.value.args == (rule, RULES[rule])


@pytest.mark.parametrize("change", [lambda data: data + b"\0", lambda data: data[:-1], lambda data: b""])
def test_a_longer_or_shorter_container_is_refused(cipher: PageCipher, change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ContainerError):
        cipher.open(change(bytes(cipher.seal(b"some page", NAME))), NAME)


def test_a_container_is_of_one_name_and_one_key_only(cipher: PageCipher) -> None:
    container = bytes(cipher.seal(b"some page", NAME))
    with pytest.raises(ContainerError, match="authentication"):
        cipher.open(container, b"m" * 32)
    with pytest.raises(ContainerError, match="another page key"):
        PageCipher(bytes(32)).open(container, NAME)
    assert cipher.name(NAME) != PageCipher(bytes(32)).name(NAME) != NAME


@pytest.mark.parametrize(
    "text", [KEY.hex(), KEY.hex().upper(), base64.b64encode(KEY).decode(), base64.urlsafe_b64encode(KEY).decode()[:-1]]
)
def test_keys_are_read_as_hex_and_base64(cipher: PageCipher, text: str) -> None:
    assert PageCipher.parse(f" {text}\n").key_name == cipher.key_name


@pytest.mark.parametrize("text", ["", "secret-words", KEY.hex()[:-2], base64.b64encode(b"s" * 33).decode(), "zz" * 32])
def test_bad_keys_are_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match="32 random bytes") as raised:
        PageCipher.parse(text)
    assert not text or text not in str(raised.value)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingDependency, match=r"pip install 'agentmem\[encryption\]'"):
        PageCipher(KEY)


def test_the_key_is_in_no_repr_message_or_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "5e" * 32
    caplog.set_level(logging.DEBUG)
    settings = read(page_key=secret)
    with Memory(tmp_path / "m", embedder="none", page_key=secret) as memory:
        seen = f"{settings!r} {settings} {settings.model_dump()} {memory!r} {vars(memory)!r} {caplog.text}"
        assert memory.activation.entries() == []
    refused: list[dict[str, Any]] = [{"page_key": 7}, {"page_key": [secret]}, {"page_key": secret, "page_codec": "zip"}]
    for wrong in refused:
        with pytest.raises(ConfigError) as raised:
            read(**wrong)
        seen += str(raised.value)
    with pytest.raises(ConfigError) as raised:
        Memory(tmp_path / "n", embedder="none", page_key=secret[:-2])
    assert not (tmp_path / "n").exists()
    seen += str(raised.value)
    assert secret[:-2] not in seen
    assert repr(PageCipher.parse(secret)) == "PageCipher(...)"


# ---- through the store


def states(count: int = 3) -> list[tuple[Any, Any]]:
    values = np.random.default_rng(5).integers(0, 1 << 16, (2, 2, GRID * count, 12)).astype(np.uint16)
    return [(layer[..., :8].copy(), layer[..., 8:].copy()) for layer in values]


class Safe:
    """A folder of encrypted pages."""

    def __init__(self, folder: Path, key: bytes | None = KEY, salt: bytes = b"salt") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder / "pages"
        self.cipher = None if key is None else PageCipher(key)
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, self.folder, grid=GRID, cipher=self.cipher)
        self.view = self.store.view(salt)

    def seal(self) -> int:
        return self.view.seal(IDENTITY, TOKENS, 0, states(), [("r",)] * 3)

    def found(self) -> int:
        """Pages whose states come out as they went in; a wrong one fails the test."""
        room = [(np.zeros((2, GRID, 8), np.uint16), np.zeros((2, GRID, 4), np.uint16)) for _ in range(2)]
        count = 0
        for page in self.view.longest(IDENTITY, TOKENS):
            try:
                page.read_layers([k for k, _ in room], [v for _, v in room], 0)
            except Corrupt:
                break
            for copies, sources in zip(room, states(), strict=True):
                for copy, source in zip(copies, sources, strict=True):
                    assert (copy == source[:, count * GRID : (count + 1) * GRID]).all()
            count += 1
        return count

    def files(self) -> list[Path]:
        """In the order of the prompt."""
        return [self.folder / f"{entry.key}.page" for entry in self.store.entries()]


@pytest.fixture
def safe(tmp_path: Path) -> Safe:
    safe = Safe(tmp_path / "safe")
    assert safe.seal() == 3
    return safe


def test_encrypted_pages_are_found_again(safe: Safe, tmp_path: Path) -> None:
    assert safe.found() == 3
    assert Safe(tmp_path / "safe").found() == 3
    assert safe.store.verify() == []
    assert safe.store.bytes() == sum(file.stat().st_size for file in safe.files())


def test_nothing_of_a_page_is_in_clear(safe: Safe) -> None:
    keys = chain(IDENTITY, b"salt", TOKENS, GRID)
    key, value = states()[1]
    clear = [b"AMKVPAGE", np.array(TOKENS[:4], np.int32).tobytes(), key[0, 0].tobytes(), value[0, 0].tobytes(), *keys]
    safe.database.query("PRAGMA wal_checkpoint(TRUNCATE)")
    everything = [*safe.files(), *safe.folder.parent.glob("memory.db*")]
    for file in everything:
        content = file.read_bytes()
        assert not [part for part in clear if part in content], file.name
        assert not any(key.hex() in file.name for key in keys)


def test_no_plain_byte_reaches_the_disk_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem import _pure

    kernels, targets = _pure.kernels(), []
    original = kernels.page_write

    def spy(descriptor: int, *rest: Any) -> Any:
        targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return original(descriptor, *rest)

    monkeypatch.setattr(kernels, "page_write", spy)
    assert Safe(tmp_path / "safe").seal() == 3
    assert len(targets) == 3
    assert all(target.startswith("/memfd:") for target in targets)


def test_pages_under_another_key_or_none_are_a_miss_and_stay(safe: Safe, tmp_path: Path) -> None:
    for key in (bytes(32), None):
        other = Safe(tmp_path / "safe", key)
        assert other.found() == 0
        assert other.store.verify() == []
        assert other.store.swap_in().pages == 0
        assert other.seal() == 3
        assert other.found() == 3
    assert safe.found() == 3
    assert len(safe.files()) == 9
    assert not (safe.folder / "quarantine").exists()


def test_another_tenant_finds_nothing(safe: Safe, tmp_path: Path) -> None:
    assert Safe(tmp_path / "safe", salt=b"tlas").found() == 0
    assert safe.found() == 3


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("where", [0, 8, 12, 30, 40, 60, -1])
def test_a_damaged_container_is_put_aside_and_kept_anew(safe: Safe, where: int) -> None:
    flip(safe.files()[1], where)
    assert safe.found() == 1
    assert len(list((safe.folder / "quarantine").iterdir())) == 1
    assert safe.seal() == 2
    assert safe.found() == 3


def test_files_that_changed_places_are_damage(safe: Safe) -> None:
    first, second, third = safe.files()
    content = second.read_bytes()
    second.write_bytes(third.read_bytes())
    third.write_bytes(content)
    assert safe.found() == 1
    assert first.exists()


def test_a_plain_page_in_place_of_an_encrypted_one_is_damage(safe: Safe, tmp_path: Path) -> None:
    plain = Safe(tmp_path / "plain", None)
    plain.seal()
    safe.files()[1].write_bytes(plain.files()[1].read_bytes())
    assert safe.found() == 1


@pytest.mark.parametrize("fault", ["short read", "input/output error"])
def test_a_file_that_can_not_be_read_whole_is_a_miss(safe: Safe, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        if fault == "short read":
            return 0
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    assert safe.found() == 0
    monkeypatch.undo()
    assert safe.seal() == 3
    assert safe.found() == 3


def test_opening_without_the_key_says_so(safe: Safe) -> None:
    for cipher in (None, PageCipher(bytes(32))):
        with pytest.raises(ForeignKey, match=r"page_key|another page key"):
            Page(safe.files()[0], cipher)
    assert issubclass(ForeignKey, Incompatible)


def test_forgetting_deletes_encrypted_pages_also_those_put_aside(safe: Safe) -> None:
    flip(safe.files()[2], -1)
    assert safe.found() == 2
    names = safe.store.made_from(["r"])
    assert len(names) == 3
    assert safe.store.delete(names) == names
    assert not list(safe.folder.rglob("*.page"))
    assert not list((safe.folder / "quarantine").iterdir())
    assert safe.store.bytes_in_ram() == 0


def saved(safe: Safe, tmp_path: Path) -> Path:
    assert safe.store.save(tmp_path / "saved") == 3
    return tmp_path / "saved"


def elsewhere(tmp_path: Path, key: bytes | None) -> Safe:
    other = Safe(tmp_path / "elsewhere", key)
    with other.database.write() as connection:
        columns = [row["name"] for row in connection.execute("PRAGMA table_info(records)") if row["notnull"]]
        names = [column for column in columns if column != "id"]
        connection.execute(f"INSERT INTO records (id, {', '.join(names)}) VALUES ('r'{', 0' * len(names)})")
    return other


@pytest.mark.parametrize("key", [KEY, None, bytes(32)])
def test_saved_pages_stay_encrypted_and_are_carried_without_their_key(
    safe: Safe, tmp_path: Path, key: bytes | None
) -> None:
    folder = saved(safe, tmp_path)
    for file in safe.files():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    other = elsewhere(tmp_path, key)
    assert other.store.restore(folder) == 3
    assert other.found() == (3 if key == KEY else 0)
    assert Safe(tmp_path / "elsewhere").found() == 3


def test_pages_are_saved_without_their_key(safe: Safe, tmp_path: Path) -> None:
    assert Safe(tmp_path / "safe", None).store.save(tmp_path / "saved") == 3
    other = elsewhere(tmp_path, KEY)
    assert other.store.restore(tmp_path / "saved") == 3
    assert other.found() == 3


def test_damage_on_the_way_is_passed_over_with_the_key_and_without_found_by_who_has_it(
    safe: Safe, tmp_path: Path
) -> None:
    folder = saved(safe, tmp_path)
    flip(folder / safe.files()[1].name, -20)
    assert elsewhere(tmp_path, None).store.restore(folder) == 3  # a whole container, as far as can be told
    assert Safe(tmp_path / "elsewhere").found() == 1
    (tmp_path / "again").mkdir()
    assert elsewhere(tmp_path / "again", KEY).store.restore(folder) == 1


@pytest.mark.parametrize("start", range(0, 2000, 500))
def test_every_flip_and_truncation_of_a_container_is_noticed(cipher: PageCipher, start: int) -> None:
    choose = random.Random(start)
    container = bytes(cipher.seal(os.urandom(3000), NAME))
    for _ in range(500):
        damaged = bytearray(container)
        if choose.random() < 0.25:
            damaged = damaged[: choose.randrange(len(container))]
        else:
            damaged[choose.randrange(len(container))] ^= 1 << choose.randrange(8)
        with pytest.raises(ContainerError):
            cipher.open(damaged, NAME)
