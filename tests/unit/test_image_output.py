"""Files of known size, written past the page cache: what lies on the disk, and what a failing disk leaves."""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import disk
from orchestrator.backends import storage as storage_module
from orchestrator.backends.storage import Storage

PAGE = 4096


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Those that refused O_DIRECT: none, at the beginning of each test."""
    found: set[int] = set()
    monkeypatch.setattr(storage_module._LocalImage, "_buffered_devices", found)
    return found


@pytest.fixture
def calls() -> Iterator[list[tuple[str, str]]]:
    found: list[tuple[str, str]] = []
    disk.watch(lambda call, path: found.append((call, Path(path).name)))
    yield found
    disk.watch(None)


@pytest.fixture
def failing() -> Iterator[Callable[[int, int], list[str]]]:
    """Lets the n-th call to the disk fail with an error number; gives the list of the calls seen."""

    def fail(number: int, error: int, only: str = "") -> list[str]:
        seen: list[str] = []

        def watcher(call: str, path: str) -> None:
            if only in ("", call):
                seen.append(call)
                if len(seen) == number:
                    raise OSError(error, os.strerror(error), path)

        disk.watch(watcher)
        return seen

    yield fail
    disk.watch(None)


def has_o_direct(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        (directory / "probe").unlink(missing_ok=True)
    return True


def in_aligned_memory(data: bytes) -> memoryview:
    memory = mmap.mmap(-1, max(PAGE, len(data)))
    memory[: len(data)] = data
    return memoryview(memory)[: len(data)]


def write(storage: Storage, path: str, data: bytes | memoryview, *lengths: int) -> None:
    """In pieces of these lengths, then the rest at once."""
    view, at = memoryview(data), 0
    with storage.open_image(path, len(view)) as output:
        for length in lengths:
            output.write(view[at : at + length])
            at += length
        output.write(view[at:])


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, (4 << 20) - 1, 4 << 20, (9 << 20) + 5])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_what_is_written_is_there_byte_for_byte(tmp_path: Path, size: int, is_aligned: bool) -> None:
    data = random.Random(size).randbytes(size)
    write(Storage(str(tmp_path)), "a/image", in_aligned_memory(data) if is_aligned else memoryview(b"x" + data)[1:])
    assert (tmp_path / "a" / "image").read_bytes() == data
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["image"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_any_length_and_place_in_memory_make_the_same_file(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    data = choose.randbytes(choose.randrange(12 << 20))
    lengths = [choose.choice([0, 1, 100, PAGE, 3 * PAGE, PAGE + 7, 1 << 20]) for _ in range(40)]
    write(Storage(str(tmp_path)), "image", in_aligned_memory(data), *lengths)
    assert (tmp_path / "image").read_bytes() == data


def test_an_object_store_gets_the_same_bytes() -> None:
    storage = Storage("mock:///root")
    write(storage, "a/image", b"0123456789", 3, 0)
    assert storage.read_bytes("a/image") == b"0123456789"


@pytest.mark.parametrize("url", ["local", "mock:///root"])
@pytest.mark.parametrize("given", [PAGE - 1, PAGE + 1])
def test_an_image_of_another_size_is_an_error(tmp_path: Path, url: str, given: int) -> None:
    storage = Storage(str(tmp_path) if url == "local" else url)
    with pytest.raises(ValueError, match="4096"), storage.open_image("image", PAGE) as output:
        output.write(memoryview(bytes(given)))
    assert list(tmp_path.iterdir()) == []


def test_aligned_memory_goes_to_the_disk_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_o_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    flags, lengths, real_open, real_pwrite = [], [], os.open, os.pwrite

    def opened(path: str, flag: int, *rest: int) -> int:
        flags.append(flag & os.O_DIRECT)
        return real_open(path, flag, *rest)

    def written(fd: int, data: memoryview, offset: int) -> int:
        lengths.append(len(data))
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", written)
    write(Storage(str(tmp_path)), "image", in_aligned_memory(bytes((16 << 20) + 5)), PAGE, 8 << 20)
    assert flags[0]
    assert lengths == [PAGE, 8 << 20, (8 << 20) - PAGE, PAGE], "the tail alone is padded in our own memory"


def test_the_file_is_durable_before_it_has_its_name_and_the_name_afterwards(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    if not has_o_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    write(Storage(str(tmp_path)), "image", bytes(PAGE + 1))
    assert [call for call, _ in calls] == ["fallocate", "write", "truncate", "fsync", "replace", "fsync"]
    assert calls[-2][1] == "image"
    assert calls[-1][1] == tmp_path.name
    assert all(name.endswith(".partial") for _, name in calls[:4])


def test_disk_full_at_any_call_leaves_nothing(tmp_path: Path, failing: Callable[..., list[str]]) -> None:
    def write_one() -> None:
        write(Storage(str(tmp_path)), "image", bytes((9 << 20) + 5))

    seen = failing(0, 0)
    write_one()
    calls = len(seen)
    assert calls >= 6
    for number in range(1, calls + 1):
        (tmp_path / "image").unlink()
        failing(number, errno.ENOSPC)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            write_one()
        # The last call makes the name durable: there is a file then, which a crash may take back.
        assert [path.name for path in tmp_path.iterdir()] == (["image"] if number == calls else [])
        failing(0, 0)
        write_one()


def test_a_disk_without_o_direct_is_written_through_the_page_cache_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: set[int]
) -> None:
    tries, real = [], os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            tries.append(path)
            os.close(real(path, flags & ~os.O_DIRECT, *rest))  # as some file systems do: the file is made all the same
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    for name in ("one", "two"):
        write(Storage(str(tmp_path)), name, in_aligned_memory(bytes(range(256)) * 33), PAGE)
        assert (tmp_path / name).read_bytes() == bytes(range(256)) * 33
    assert len(tries) == 1
    assert devices == {os.stat(tmp_path).st_dev}


@pytest.mark.parametrize("is_aligned", [True, False])
def test_a_disk_that_refuses_the_first_direct_write_gets_it_through_the_page_cache(
    tmp_path: Path, failing: Callable[..., list[str]], is_aligned: bool
) -> None:
    if not has_o_direct(tmp_path):
        pytest.skip("this file system has no O_DIRECT")
    seen = failing(1, errno.EINVAL, "write")
    data = random.Random(1).randbytes((5 << 20) + 3)
    write(Storage(str(tmp_path)), "image", in_aligned_memory(data) if is_aligned else data, 10)
    assert (tmp_path / "image").read_bytes() == data
    assert len(seen) >= 2


def test_a_disk_that_cannot_allocate_is_written_all_the_same(tmp_path: Path, failing: Callable[..., list[str]]) -> None:
    failing(1, errno.EOPNOTSUPP, "fallocate")
    write(Storage(str(tmp_path)), "image", bytes(10))
    assert (tmp_path / "image").read_bytes() == bytes(10)


def test_a_disk_that_writes_only_a_part_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    # A block of 512 bytes more than a page: the next call must begin at a page again.
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: PAGE + 512], offset))
    data = random.Random(2).randbytes(20 * PAGE + 9)
    write(Storage(str(tmp_path)), "image", in_aligned_memory(data))
    assert (tmp_path / "image").read_bytes() == data


def test_two_that_write_one_image_at_once_do_not_mix(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with storage.open_image("image", 3) as one, storage.open_image("image", 3) as two:
        for letters in ((b"a", b"x"), (b"b", b"y"), (b"c", b"z")):
            one.write(memoryview(letters[0]))
            two.write(memoryview(letters[1]))
    assert (tmp_path / "image").read_bytes() in (b"abc", b"xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_images_get_the_rights_that_files_get(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("text", b"x")
    write(storage, "image", b"x")
    assert stat.S_IMODE((tmp_path / "image").stat().st_mode) == stat.S_IMODE((tmp_path / "text").stat().st_mode)
