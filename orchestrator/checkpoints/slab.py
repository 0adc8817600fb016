"""Memory that a trainer fills and a writer empties: one file on tmpfs per rank, with one or two slots.

A save copies tensors into a slot and ends with one store of 8 bytes, the seal. From then on the slot belongs to the
writers: whichever of them lives writes it, also when the trainer is gone. No process talks to another one for that.

    page 0        what the file is: sizes, boot, owner; the word `ready`
    each slot     4096 bytes head | layout as JSON | job as JSON | data: whole file images, 4096-aligned

A slot is FREE, FILLING (trainer), SEALED, WRITING, WRITTEN (writer), FREE again. Words that two sides look at are
stored at once, the value twice in one word: half a store cannot be seen. Who dies is told by locks: the trainer holds
byte 0 of the file, the writer of slot i byte 1 + i. The kernel drops those of a process that dies.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from orchestrator.checkpoints.image import rounded_up
from orchestrator.checkpoints.job import Layout, Outcome, SaveJob, SlotResult
from orchestrator.errors import CheckpointError

PAGE = 4096
HUGE = 2 << 20
SUFFIX = ".slab"
ASIDE = ".job"
"""Ending of a file with a job that had no room in its slot."""
PROTOCOL = 2

_MAGIC = b"ORCSLAB2"
_STEP = 64 << 20
"""Bytes that are made present at a time: meanwhile no other Python thread runs."""
_POPULATE_WRITE = 23
_CHUNK = 8 << 20
_JOB_ROOM = 64 << 10

# Page 0. What is covered by the checksum never changes while somebody has the slab; `ready` and
# `taken` do.
_FIXED = struct.Struct("<8sIIQQ")  # magic, protocol, slots, slot_bytes, first_slot
_READY = 32
_TAKEN = 40
_IDENTITY = struct.Struct("<16s32sI")  # boot id, slab id, bytes of the owner's JSON
_IDENTITY_AT = 48
_CHECK_AT = 100
_OWNER_AT = 2048

# Head of a slot.
_STATE = 0
_GENERATION = 16
_RESULT = 24
_ABANDON = 40
_ABOUT = struct.Struct("<16sQQQQd")  # save token, layout_bytes, meta_bytes, data_start, data_bytes, sealed_at
_ABOUT_AT = 64
_SEAL_CHECK_AT = 120
_OUTCOME_AT = 1024
_OUTCOME_LENGTH = struct.Struct("<II")  # bytes, crc32
_OUTCOME_BYTES = PAGE - _OUTCOME_AT - _OUTCOME_LENGTH.size
_FLOCK = struct.Struct("hhqqi4x")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

_LOW = 0xFFFFFFFF
_MAX_GENERATION = 1 << 24


class State(IntEnum):
    """Of a slot. A word that is none of these reads as `filling`: nothing was promised."""

    free = 0
    filling = 1
    sealed = 2
    writing = 3
    written = 4


class Ready(IntEnum):
    """Whether the pages of a slab exist."""

    waiting = 0
    ready = 1
    refused = 2


_CODES = {SlotResult.committed: 1, SlotResult.durable: 2, SlotResult.failed: 3, SlotResult.abandoned: 4}


class SlabDamaged(CheckpointError):
    """A slab file, or what lies in a slot of it, is not what was put there."""

    def __init__(self, path: str, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, why

    def __str__(self) -> str:
        return f"The staging memory {self.path} cannot be used: {self.why}. Earlier checkpoints are untouched."


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """Whose saves a slab is for."""

    run: str
    attempt: int
    rank: int
    pid: int
    host: str = ""


Watcher = Callable[[str], None]
_watcher: Watcher | None = None


def watch(watcher: Watcher | None) -> None:
    """For tests: called with the name of every store that another process may see, before it; it may never come
    back."""
    global _watcher
    _watcher = watcher


def _point(name: str) -> None:
    if _watcher is not None:
        _watcher(name)


# -- sizes -------------------------------------------------------------------------------------------------------------


def slot_bytes_for(layout: Layout) -> int:
    """What a slot must have for saves of this layout. What is no tensor is guessed: a job that turns out to be larger
    lies in a file of its own."""
    said = len(layout.encode())
    needed = PAGE + rounded_up(said) + rounded_up(_JOB_ROOM + 4 * said) + rounded_up(layout.size_bytes)
    return rounded_up(needed, HUGE if needed >= HUGE else PAGE)


def slab_bytes(slots: int, slot_bytes: int) -> int:
    return _first_slot(slot_bytes) + slots * slot_bytes


def _first_slot(slot_bytes: int) -> int:
    return HUGE if slot_bytes >= HUGE else PAGE


def boot_id() -> bytes:
    """16 bytes that change when the machine starts anew; zeros where that is unknown."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


# -- making one --------------------------------------------------------------------------------------------------------


def create(path: Path, *, slots: int, slot_bytes: int, owner: Owner) -> None:
    """The file with its first page; the rest has no memory yet. It appears complete, or not at all. Raises OSError."""
    if slots not in (1, 2) or slot_bytes % PAGE or slot_bytes <= PAGE:
        raise ValueError(f"{slots} slots of {slot_bytes} bytes are no slab")
    partial = path.with_suffix(".new")
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, slab_bytes(slots, slot_bytes))
        _point("create")
        os.pwrite(fd, _first_page(path.stem, slots, slot_bytes, owner), 0)
        _point("name")
        os.rename(partial, path)
    finally:
        os.close(fd)


def _first_page(slab: str, slots: int, slot_bytes: int, owner: Owner) -> bytes:
    page = bytearray(PAGE)
    said = json.dumps(asdict(owner)).encode()
    if len(said) > PAGE - _OWNER_AT:
        raise ValueError("the owner's name is too long")
    _FIXED.pack_into(page, 0, _MAGIC, PROTOCOL, slots, slot_bytes, _first_slot(slot_bytes))
    _U64.pack_into(page, _READY, _word(Ready.waiting))
    _IDENTITY.pack_into(page, _IDENTITY_AT, boot_id(), slab.encode()[:32], len(said))
    page[_OWNER_AT : _OWNER_AT + len(said)] = said
    _U32.pack_into(page, _CHECK_AT, _first_page_check(page))
    return bytes(page)


def _first_page_check(page: bytes | bytearray | memoryview) -> int:
    check = zlib.crc32(page[0:_READY])
    check = zlib.crc32(page[_IDENTITY_AT:_CHECK_AT], check)
    return zlib.crc32(page[_CHECK_AT + 4 : PAGE], check)


def populate(slab: SlabFile) -> None:
    """All its pages exist afterwards. Raises OSError (ENOSPC when there is no memory for it); never SIGBUS.

    Of an open slab: to open the file once more would cost this process its locks.
    """
    if not touch(slab.mapping):
        slab.allocate()


def remove(path: Path) -> None:
    """The file, and jobs beside it. Who has it open keeps the memory until it closes it."""
    path.unlink(missing_ok=True)
    for index in (0, 1):
        path.with_suffix(f".{index}{ASIDE}").unlink(missing_ok=True)


def remove_unused(path: Path) -> bool:
    """Removes a file that cannot be opened as a slab, unless somebody has a lock on it."""
    with _lock:
        if os.path.realpath(path) in _opened:
            return False
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            is_used = _is_locked(fd, 0, 0)
        finally:
            os.close(fd)
        if not is_used:
            remove(path)
        return not is_used


def _is_locked(fd: int, byte: int, count: int = 1) -> bool:
    """Whether another process holds a lock there. Asks only: taking it for a moment would turn its taker away."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, count, 0)
    return _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK


def touch(mapped: mmap.mmap) -> bool:
    """Gives this process the pages of a mapping, so that no store into it has to ask for one. False where the kernel
    cannot (before Linux 5.14). Raises OSError(ENOSPC) when there is no memory."""
    with contextlib.suppress(OSError, AttributeError):
        mapped.madvise(mmap.MADV_HUGEPAGE)  # each map by itself, where shared memory may have large pages at all
    for start in range(0, len(mapped), _STEP):
        try:
            mapped.madvise(_POPULATE_WRITE, start, min(_STEP, len(mapped) - start))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise OSError(errno.ENOSPC, "no memory is left for staging checkpoints") from error
    return True


# -- words -------------------------------------------------------------------------------------------------------------


def _word(value: int) -> int:
    """A value below 2^32, twice, in one store. A page that was never written reads as 0."""
    return value | value << 32


def _value(word: int) -> int | None:
    value = word & _LOW
    return value if word >> 32 == value else None


# -- a slab that is open -----------------------------------------------------------------------------------------------


class _Open:
    """One mapping of a file in this process. A second one must not be: closing any descriptor of a file drops all locks
    that the process has on it, and the map holds a descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            about = os.fstat(self.fd)
            self.inode, self.device = about.st_ino, about.st_dev
            if about.st_size < PAGE:
                raise SlabDamaged(str(path), f"it has {about.st_size} bytes")
            self.map = mmap.mmap(self.fd, about.st_size)
        except BaseException:
            os.close(self.fd)
            raise
        self.begin()

    def begin(self) -> None:
        self.view = memoryview(self.map)
        self.words = self.view[: len(self.view) & ~7].cast("Q")
        self.pid = os.getpid()
        self.users = 1
        self.is_filler = False
        self.claims: set[int] = set()

    def close(self) -> bool:
        """Gives the locks back. False if somebody still looks into the memory: then it stays open."""
        fcntl.lockf(self.fd, fcntl.LOCK_UN)
        try:
            self.words.release()
            self.view.release()
            self.map.close()
        except BufferError:
            return False
        os.close(self.fd)
        self.fd = -1
        return True


_opened: dict[str, _Open] = {}
_lingering: dict[str, _Open] = {}
"""Closed, but looked into. Whenever such a map went by itself, it would take the locks of a later opening with it."""
_lock = threading.Lock()


def _after_fork_in_child() -> None:
    """A child shares the memory but none of the locks: to it all these slabs are somebody else's."""
    global _lock
    _lock = threading.Lock()
    _opened.clear()
    _lingering.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _close_lingering(except_for: str) -> None:
    for key in [key for key, held in _lingering.items() if key != except_for and held.close()]:
        del _lingering[key]


class SlabFile:
    """A slab, open for the trainer or for a writer; both may be in one process, which then shares one mapping.

    Raises SlabDamaged when the file is no slab of this version and of this boot, FileNotFoundError when it is gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        key = os.path.realpath(path)
        with _lock:
            found = _opened.get(key)
            if found is not None:
                found.users += 1
                self._open = found
            else:
                _close_lingering(except_for=key)
                again = _lingering.pop(key, None)
                if again is not None:
                    again.begin()
                self._open = _opened[key] = again or _Open(Path(key))
        self._key = key
        self._is_closed = False
        try:
            self._check()
        except BaseException:
            self.close()
            raise
        view = self._open.view
        _, _, self.slot_count, self.slot_bytes, first = _FIXED.unpack_from(view, 0)
        self.slots = tuple(
            Slot(self, index, first + index * self.slot_bytes, self.slot_bytes) for index in range(self.slot_count)
        )

    @classmethod
    def open(cls, path: Path) -> SlabFile:
        return cls(path)

    def _check(self) -> None:
        view = self._open.view
        magic, protocol, slots, slot_bytes, first = _FIXED.unpack_from(view, 0)
        if magic != _MAGIC or protocol != PROTOCOL:
            raise SlabDamaged(str(self.path), "it is no slab of this version")
        if _U32.unpack_from(view, _CHECK_AT)[0] != _first_page_check(view[:PAGE]):
            raise SlabDamaged(str(self.path), "its first page is damaged")
        if len(view) != slab_bytes(slots, slot_bytes) or first != _first_slot(slot_bytes) or slots not in (1, 2):
            raise SlabDamaged(str(self.path), f"it has {len(view)} bytes")
        boot, slab, _ = _IDENTITY.unpack_from(view, _IDENTITY_AT)
        if boot != boot_id():
            raise SlabDamaged(str(self.path), "it is from before the machine was started")
        if slab.rstrip(b"\0") != self.path.stem.encode()[:32]:
            raise SlabDamaged(str(self.path), "it has another slab's name")

    @property
    def owner(self) -> Owner:
        """Raises SlabDamaged."""
        view = self._open.view
        _, _, length = _IDENTITY.unpack_from(view, _IDENTITY_AT)
        try:
            return Owner(**json.loads(bytes(view[_OWNER_AT : _OWNER_AT + min(length, PAGE - _OWNER_AT)])))
        except (ValueError, TypeError) as error:
            raise SlabDamaged(str(self.path), "its owner cannot be read") from error

    @property
    def mapping(self) -> mmap.mmap:
        return self._open.map

    @property
    def size_bytes(self) -> int:
        return len(self._open.view)

    def is_ready(self) -> bool:
        return _value(self._open.words[_READY // 8]) == Ready.ready

    def is_refused(self) -> bool:
        """There is no memory for it."""
        return _value(self._open.words[_READY // 8]) == Ready.refused

    def tell(self, ready: Ready) -> None:
        _point(f"ready {ready.name}")
        self._open.words[_READY // 8] = _word(ready)

    def allocate(self) -> None:
        os.posix_fallocate(self._open.fd, 0, self.size_bytes)

    def is_gone(self) -> bool:
        """Its file was removed: what is put into it nobody sees."""
        return os.fstat(self._open.fd).st_nlink == 0

    def hand_over(self, owner: Owner) -> None:
        """Makes it another trainer's; only of a slab without filler whose slots are all free. Dying in here leaves a
        damaged page, and the slab is removed."""
        view = self._open.view
        page = bytearray(_first_page(self.path.stem, self.slot_count, self.slot_bytes, owner))
        page[_READY : _READY + 8] = view[_READY : _READY + 8]
        _point("owner")
        view[:PAGE] = bytes(page)

    # -- locks

    def fill(self) -> bool:
        """Takes the trainer's lock. False if somebody has it, or the file was removed meanwhile."""
        with _lock:
            if self._open.is_filler or self._open.pid != os.getpid():
                return False
            if not self._lock(0):
                return False
            self._open.is_filler = True
        self._open.words[_TAKEN // 8] = _word(1)
        return not self.is_gone()

    def was_taken(self) -> bool:
        """Whether the trainer it was given to has come for it; it may be gone again."""
        return self._open.words[_TAKEN // 8] == _word(1)

    def stop_filling(self) -> None:
        with _lock:
            if self._open.is_filler:
                self._unlock(0)
                self._open.is_filler = False

    def is_mine(self) -> bool:
        """Whether this process may fill it; a forked child of the one that does may not."""
        return self._open.is_filler and self._open.pid == os.getpid()

    def has_filler(self) -> bool:
        """Whether the trainer lives."""
        with _lock:
            if self._open.is_filler:
                return True  # ours: the kernel says nothing of our own locks
            return _is_locked(self._open.fd, 0)

    def try_claim(self, index: int) -> bool:
        """Takes a slot for writing. False if somebody has it, another thread of this process included."""
        with _lock:
            if index in self._open.claims or not self._lock(1 + index):
                return False
            self._open.claims.add(index)
            return True

    def release(self, index: int) -> None:
        with _lock:
            if index in self._open.claims:
                self._unlock(1 + index)
                self._open.claims.discard(index)

    def _lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._open.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._open.fd, fcntl.LOCK_UN, 1, byte)

    def close(self) -> None:
        """The locks go when the last user in this process closes it."""
        if self._is_closed:
            return
        self._is_closed = True
        for slot in getattr(self, "slots", ()):
            slot.let_go()
        with _lock:
            self._open.users -= 1
            if self._open.users:
                return
            if _opened.get(self._key) is self._open:
                del _opened[self._key]
            if not self._open.close():
                _lingering[self._key] = self._open


class Slot:
    """One place for one save. `filling` calls are the trainer's, `writing` ones those of the writer who claimed it."""

    def __init__(self, slab: SlabFile, index: int, start: int, size: int) -> None:
        self.slab, self.index = slab, index
        self._view = slab._open.view[start : start + size]
        self._words = slab._open.words[start // 8 : (start + PAGE) // 8]
        self._layout_crc: tuple[bytes, int] | None = None
        """The layout's JSON that lies in the slot, put there by us, and its checksum."""
        self._data_bytes = 0

    def let_go(self) -> None:
        with contextlib.suppress(BufferError):
            self._words.release()
            self._view.release()

    @property
    def name(self) -> str:
        return f"{self.slab.path.stem[:8]}/{self.index}"

    @property
    def state(self) -> State:
        value = _value(self._words[_STATE // 8])
        return State(value) if value is not None and value <= State.written else State.filling

    @property
    def generation(self) -> int:
        """Which filling this is, from 1."""
        return self._words[_GENERATION // 8]

    @property
    def save(self) -> str:
        """The token of what was sealed here last."""
        return bytes(self._view[_ABOUT_AT : _ABOUT_AT + 16]).hex()

    @property
    def sealed_at(self) -> float:
        return _ABOUT.unpack_from(self._view, _ABOUT_AT)[5]

    def _become(self, state: State) -> None:
        _point(state.name)
        self._words[_STATE // 8] = _word(state)

    # -- filling

    def begin(self) -> int:
        """FREE -> FILLING; gives the generation."""
        if self.state is not State.free:
            raise ValueError(f"slot {self.name} is {self.state.name}")
        generation = self.generation + 1
        if generation >= _MAX_GENERATION:
            generation = 1
        self._become(State.filling)
        self._words[_GENERATION // 8] = generation
        self._words[_ABANDON // 8] = 0
        return generation

    def cancel(self) -> None:
        """FILLING -> FREE."""
        self._become(State.free)

    def abandon(self) -> None:
        """Says that nobody wants what was sealed here; the writer stops when it sees it."""
        _point("abandon")
        self._words[_ABANDON // 8] = self.generation

    def write_layout(self, layout: Layout, heads: Sequence[bytes]) -> None:
        """Where what lies, and the heads of the images; needed again only when the layout changes. Raises ValueError
        when it does not fit."""
        said = layout.encode()
        if PAGE + rounded_up(len(said)) + layout.size_bytes > len(self._view):
            raise ValueError(f"{layout.size_bytes} bytes do not fit into a slot of {len(self._view)}")
        self._layout_crc = None
        self._view[PAGE : PAGE + len(said)] = said
        space = self.space(layout)
        for head, at in zip(heads, layout.starts, strict=True):
            space[at : at + len(head)] = head
        self._layout_crc = said, zlib.crc32(said)
        self._data_bytes = layout.size_bytes

    def space(self, layout: Layout) -> memoryview:
        """Where the data of that layout lies: the slot's end, so that it stays in place whatever is before it."""
        start = len(self._view) - rounded_up(layout.size_bytes)
        return self._view[start : start + layout.size_bytes]

    def seal(self, job: SaveJob) -> None:
        """FILLING -> SEALED: from here on it is saved, whatever happens to this process. Raises OSError when there is
        no memory for a job that is larger than its room."""
        if self._layout_crc is None:
            raise ValueError("no layout was written")
        layout, layout_check = self._layout_crc
        meta = job.encode()
        meta_at = PAGE + rounded_up(len(layout))
        data_start = len(self._view) - rounded_up(self._data_bytes)
        if meta_at + len(meta) <= data_start:
            self._view[meta_at : meta_at + len(meta)] = meta
        else:
            self._write_aside(meta)
        _ABOUT.pack_into(
            self._view, _ABOUT_AT,
            bytes.fromhex(job.save), len(layout), len(meta), data_start, self._data_bytes, job.sealed_at,
        )  # fmt: skip
        _U32.pack_into(self._view, _SEAL_CHECK_AT, self._check(layout_check, meta))
        self._become(State.sealed)

    @property
    def _aside(self) -> Path:
        return self.slab.path.with_suffix(f".{self.index}{ASIDE}")

    def _write_aside(self, meta: bytes) -> None:
        fd = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(meta)

    def _check(self, layout_check: int, meta: bytes | memoryview) -> int:
        """Layout first: its share is known from the save before."""
        check = zlib.crc32(self._view[_GENERATION : _GENERATION + 8], layout_check)
        check = zlib.crc32(self._view[_ABOUT_AT:_SEAL_CHECK_AT], check)
        return zlib.crc32(meta, check)

    def result(self, generation: int) -> Outcome | None:
        """What became of that filling; None as long as it is not known."""
        value = _value(self._words[_RESULT // 8])
        if value is None or value >> 8 != generation:
            return None
        length, check = _OUTCOME_LENGTH.unpack_from(self._view, _OUTCOME_AT)
        start = _OUTCOME_AT + _OUTCOME_LENGTH.size
        said = bytes(self._view[start : start + min(length, PAGE - start)])
        if zlib.crc32(said) != check:
            return None
        return Outcome.decode(said)

    # -- writing

    def is_abandoned(self) -> bool:
        return self._words[_ABANDON // 8] == self.generation

    def job(self) -> tuple[Layout, SaveJob]:
        """What was sealed. Raises SlabDamaged."""
        view = self._view
        _, layout_bytes, meta_bytes, data_start, data_bytes, _ = _ABOUT.unpack_from(view, _ABOUT_AT)
        meta_at = PAGE + rounded_up(layout_bytes)
        if meta_at > data_start or data_start + rounded_up(data_bytes) != len(view):
            raise SlabDamaged(str(self.slab.path), f"slot {self.index} says sizes that it cannot have")
        layout, meta = bytes(view[PAGE : PAGE + layout_bytes]), bytes(view[meta_at : meta_at + meta_bytes])
        if meta_at + meta_bytes > data_start:
            try:
                meta = self._aside.read_bytes()
            except OSError as error:
                raise SlabDamaged(str(self.slab.path), f"the job of slot {self.index} is gone ({error})") from error
        if self._check(zlib.crc32(layout), meta) != _U32.unpack_from(view, _SEAL_CHECK_AT)[0]:
            raise SlabDamaged(str(self.slab.path), f"what was sealed in slot {self.index} has another checksum")
        try:
            decoded = Layout.decode(layout), SaveJob.decode(meta)
        except ValueError as error:
            why = f"slot {self.index} holds another version's job ({error})"
            raise SlabDamaged(str(self.slab.path), why) from error
        if decoded[0].size_bytes != data_bytes:
            raise SlabDamaged(str(self.slab.path), f"slot {self.index} has {data_bytes} bytes of data")
        return decoded

    @property
    def sealed_bytes(self) -> int:
        """Of tensors, in what was sealed."""
        return _ABOUT.unpack_from(self._view, _ABOUT_AT)[4]

    def images(self, layout: Layout) -> list[SlotImage]:
        space = self.space(layout)
        return [
            SlotImage(space[start : start + image.room_bytes], image.size_bytes)
            for image, start in zip(layout.images, layout.starts, strict=True)
        ]

    def begin_writing(self) -> None:
        self._become(State.writing)

    def is_written(self) -> None:
        """WRITING -> WRITTEN: the files are durable, and the commit is waited for."""
        self._become(State.written)

    def free(self, outcome: Outcome) -> None:
        """Any state -> FREE, with the word for the trainer what became of it."""
        said = outcome.encode(_OUTCOME_BYTES)
        start = _OUTCOME_AT + _OUTCOME_LENGTH.size
        _OUTCOME_LENGTH.pack_into(self._view, _OUTCOME_AT, len(said), zlib.crc32(said))
        self._view[start : start + len(said)] = said
        with contextlib.suppress(OSError):
            self._aside.unlink(missing_ok=True)
        _point("result")
        self._words[_RESULT // 8] = _word((self.generation % _MAX_GENERATION) << 8 | _CODES[outcome.result])
        self._become(State.free)


class SlotImage:
    """One file of a slot, as `writer.write_job` takes it: its bytes in order, in aligned pieces of the memory."""

    def __init__(self, room: memoryview, size_bytes: int) -> None:
        self._room, self._size_bytes = room, size_bytes

    def chunks(self) -> Iterator[memoryview]:
        for start in range(0, self._size_bytes, _CHUNK):
            yield self._room[start : min(start + _CHUNK, self._size_bytes)]
