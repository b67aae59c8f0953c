"""The changelog has the version that is being built, in the form that it names; CITATION.cff has it, too."""

import datetime
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
TEXT = (ROOT / "CHANGELOG.md").read_text()
ENTRIES = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", TEXT, re.MULTILINE)
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def test_the_version_has_an_entry_and_it_is_the_newest():
    assert ENTRIES[0][0] == VERSION
    assert re.findall(r"^## (.*)$", TEXT, re.MULTILINE) == [
        f"[{number}] - {date}" for number, date in ENTRIES
    ]


def test_versions_descend_and_all_but_the_newest_have_a_date():
    numbers = [tuple(map(int, number.split("."))) for number, _ in ENTRIES]
    assert numbers == sorted(set(numbers), reverse=True)
    for place, (_, date) in enumerate(ENTRIES):
        assert (place == 0 and date == "unreleased") or datetime.date.fromisoformat(date)
    assert KINDS.issuperset(re.findall(r"^### (.*)$", TEXT, re.MULTILINE))


def test_the_citation_is_of_that_version():
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
