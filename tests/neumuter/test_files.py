"""Folders that are whole or not there, and what becomes of those that a kill left behind."""

import errno
import fcntl
import json
import math
import os

import pytest

from neumuter.files import new_folder, write_json


def abandon(folder):
    """What a killed process leaves of a new folder."""
    folder.mkdir()
    (folder / "half").write_text("of it")
    return folder


def test_only_abandoned_folders_of_the_same_name_are_removed(tmp_path):
    abandoned = [abandon(tmp_path / f".out.{name}.tmp") for name in ("abcd_123", "00000000")]
    others = [".out.v2.abcd_123.tmp", ".other.abcd_123.tmp", ".out.long_name_1.tmp", "out.abcd_123.tmp"]
    others = [abandon(tmp_path / name) for name in others]
    file, link = tmp_path / ".out.aaaaaaaa.tmp", tmp_path / ".out.bbbbbbbb.tmp"
    file.write_text("a file that is being written")
    link.symlink_to(others[0])
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "whole").write_text("all")
        assert not any(folder.exists() for folder in abandoned)
    assert set(tmp_path.iterdir()) == {tmp_path / "out", file, link, *others}
    assert all(any(folder.iterdir()) for folder in others)


def test_a_folder_that_is_being_filled_is_not_taken(tmp_path):
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "first").write_text("all")
        with pytest.raises(BlockingIOError, match="another process is writing"), new_folder(tmp_path / "out"):
            pass
        with new_folder(tmp_path / "other"):
            pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_the_later_of_two_does_not_replace_the_first(tmp_path, monkeypatch):
    """Where neither sees the other before the end: on a file system without locks."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    kept = abandon(tmp_path / ".out.abcd_123.tmp")
    first, later = new_folder(tmp_path / "out"), new_folder(tmp_path / "out")
    with pytest.raises(FileExistsError), later, first as temporary:
        (temporary / "first").write_text("all")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]
    assert set(tmp_path.iterdir()) == {tmp_path / "out", kept}


def test_the_system_does_not_replace_a_folder_that_is_filled_at_the_last_moment(tmp_path, monkeypatch):
    replace = os.replace

    def fill_and_replace(source, target):
        target.mkdir()
        (target / "theirs").write_text("whole")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fill_and_replace)
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "out") as temporary:
        (temporary / "ours").write_text("too late")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_reports_are_json_whatever_was_measured(tmp_path):
    """NaN and Infinity, which Python writes and other readers refuse, become null."""
    measured = {
        "priv_leak": math.inf,
        "states": [{"auc": math.nan, "loss": 1.5}, (-math.inf, True, "NaN", 2)],
    }
    write_json(tmp_path / "report.json", measured)
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found == {"priv_leak": None, "states": [{"auc": None, "loss": 1.5}, [None, True, "NaN", 2]]}
