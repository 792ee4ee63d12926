from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from system import safe_files


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (make_fifo, "it is a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (Path.mkdir, "Is a directory"),
        (lambda path: None, "No such file"),
    ],
    ids=["fifo", "link to a device", "folder", "nothing"],
)
def test_open_to_read_refuses_all_but_regular_files_at_once(make, cause: str, tmp_path: Path) -> None:
    make(tmp_path / "given")
    with pytest.raises(OSError, match=cause) as refused:
        safe_files.open_to_read(tmp_path / "given")
    assert refused.value.strerror and "\n" not in refused.value.strerror


def test_open_to_read_follows_a_link_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with safe_files.open_to_read(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_read_bytes_refuses_what_is_larger_than_it_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert safe_files.read_bytes(tmp_path / "file", most=5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes"):
        safe_files.read_bytes(tmp_path / "file", most=4)


def test_read_bytes_refuses_a_sparse_terabyte_before_it_reads(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="has 1,099,511,627,776 bytes"):
        safe_files.read_bytes(tmp_path / "file", most=1000)


def test_replacing_puts_a_file_in_the_place_of_a_link_and_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link.txt").symlink_to("precious")
    safe_files.write_text(tmp_path / "link.txt", "theirs")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "link.txt").read_text() == "theirs" and not (tmp_path / "link.txt").is_symlink()


def test_replacing_leaves_the_old_file_and_nothing_else_where_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "kept.png").write_text("old")

    def fail() -> None:
        with safe_files.replacing(tmp_path / "kept.png") as temporary:
            assert temporary.suffix == ".png"
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept.png": "old"}


def test_replacing_gives_the_mode_that_the_umask_lets_files_have(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    safe_files.write_text(tmp_path / "new", "")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_create_removes_a_link_and_leaves_its_target(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    with safe_files.create(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "link").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "hard link", "fifo"])
def test_open_in_place_refuses_what_is_no_file_of_this_folder_alone(kind: str, tmp_path: Path) -> None:
    precious, given = tmp_path / "precious", tmp_path / "given"
    if kind == "fifo":
        os.mkfifo(given)
    elif kind == "hard link":
        precious.write_text("mine")
        os.link(precious, given)
    else:
        given.symlink_to(precious)
        if kind == "symbolic link":
            precious.write_text("mine")
    with pytest.raises(OSError, match="FIFO" if kind == "fifo" else "given is .*link.*; remove it"):
        safe_files.open_in_place(given)
    assert precious.exists() == (kind in ("symbolic link", "hard link"))


def test_open_in_place_appends_to_what_is_there(tmp_path: Path) -> None:
    for word in (b"one", b"two"):
        with safe_files.open_in_place(tmp_path / "log") as file:
            file.write(word)
    assert (tmp_path / "log").read_bytes() == b"onetwo"


def test_make_folder_refuses_a_link_to_another(tmp_path: Path) -> None:
    safe_files.make_folder(tmp_path / "new" / "folder")
    safe_files.make_folder(tmp_path / "new" / "folder")
    (tmp_path / "link").symlink_to("new")
    with pytest.raises(OSError, match="link is a link"):
        safe_files.make_folder(tmp_path / "link")
