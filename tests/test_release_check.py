"""`make release-check` notices what it is for; the builds and installs themselves run there."""

from __future__ import annotations

import subprocess
import zipfile

import pytest

import release_check

FILES = ["qtarget/__init__.py", "qtarget/py.typed", "qtarget/lens/page_files/page.html"]
ABOUT = ["METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"]


@pytest.fixture
def release(tmp_path):
    """A release whose source tracks FILES and whose wheel is not built yet."""
    made = release_check.Release(tmp_path)
    for name in FILES:
        (made.source / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (made.source / "src" / name).touch()
    for words in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", *words], cwd=made.source, check=True)
    made.wheel = tmp_path / "qtarget-1.2.3-py3-none-any.whl"
    return made


def pack(release, names):
    with zipfile.ZipFile(release.wheel, "w") as wheel:
        for name in [*names, *(f"qtarget-1.2.3.dist-info/{one}" for one in ABOUT)]:
            wheel.writestr(name, "")


def test_a_whole_wheel_passes(release):
    pack(release, FILES)
    assert release.contents() == "3 files, 2 of them data"


@pytest.mark.parametrize("lost", FILES)
def test_a_lost_file_is_named(release, lost):
    pack(release, [name for name in FILES if name != lost])
    with pytest.raises(release_check.Failed, match=rf"missing \['{lost}'\], not expected \[\]"):
        release.contents()


def test_a_file_too_many_is_named(release):
    pack(release, [*FILES, "tests/test_x.py"])
    with pytest.raises(release_check.Failed, match=r"missing \[\], not expected \['tests/test_x\.py'\]"):
        release.contents()


def test_a_command_that_ends_otherwise_fails_with_its_words(tmp_path):
    with pytest.raises(release_check.Failed, match=r"ended with 3 instead of 0:\nwhy"):
        release_check.run(["sh", "-c", "echo why; exit 3"], tmp_path)


def test_the_check_that_fails_is_named_and_the_next_does_not_run(monkeypatch, capsys):
    def good():
        """The first"""
        return "fine"

    def bad():
        """The second"""
        raise release_check.Failed("a reason")

    def never():
        raise AssertionError

    monkeypatch.setattr(release_check.Release, "checks", lambda self: [good, bad, never])
    assert release_check.main() == 1
    printed = capsys.readouterr()
    assert "ok  The first: fine" in printed.out
    assert printed.err.splitlines() == ["FAILED  The second", "a reason", "release-check: failed at: The second"]
