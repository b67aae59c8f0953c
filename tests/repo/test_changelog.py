"""The changelog has the version that is being built, in the form that it names."""

import datetime
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
TEXT = (ROOT / "CHANGELOG.md").read_text()
ENTRIES = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", TEXT, re.MULTILINE)


def test_the_version_has_an_entry_and_it_is_the_newest():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert ENTRIES[0][0] == version
    assert re.findall(r"^## (.*)$", TEXT, re.MULTILINE) == [
        f"[{number}] - {date}" for number, date in ENTRIES
    ]


def test_versions_descend_and_all_but_the_newest_have_a_date():
    numbers = [tuple(map(int, number.split("."))) for number, _ in ENTRIES]
    assert numbers == sorted(set(numbers), reverse=True)
    for place, (_, date) in enumerate(ENTRIES):
        assert (place == 0 and date == "unreleased") or datetime.date.fromisoformat(date)
    assert KINDS.issuperset(re.findall(r"^### (.*)$", TEXT, re.MULTILINE))
