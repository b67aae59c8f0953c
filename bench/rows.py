"""Results on disk: JSON Lines, a row of results in each, with the machine and the code it was measured on.

A benchmark is a series of cases: what a row is about, and a function that measures the rest of it. A case
that has a row in the file already is not measured again, so that a run that was cut goes on.
"""

import json
import os
import traceback

# A row that differs in one of these is of another machine or of other code.
SAME = ("gpu", "cpu", "threads", "driver", "torch", "triton", "code")


def read(path):
    """The rows of a file, or none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path, rows):
    """Writes a file in one step, so that a process that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace(path, text):
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def differences(machine, other):
    """The names in SAME whose values differ between two machine records."""
    return [name for name in SAME if _fact(machine, name) != _fact(other, name)]


def _fact(machine, name):
    return machine.get("versions", {}).get(name, machine.get(name))


def put(path, about, found, machine):
    """Writes the row of a case, in the place of its old row if there is one, and returns it."""
    rows = read(path)
    row = about | found | {"machine": machine}
    place = next((i for i, known in enumerate(rows) if is_about(known, about)), len(rows))
    rows[place : place + 1] = [row]
    write(path, rows)
    return row


def is_about(row, about):
    return about.items() <= row.items()


def is_wrong(row):
    """Whether an op, or ours among the contenders, disagreed with the reference."""
    contenders = row.get("contenders") or [{}]
    return bool(row.get("error")) or "failed" in contenders[0]


def measure(cases, path, machine, fresh=False):
    """Measures the cases that have no row of this machine and code yet, or a wrong one.

    cases: yields (about, find) pairs of the dict that identifies a row and a function that returns the rest.
    fresh: measure all of them anew. Yields each row once it is in the file, and None for a case that raised.
    """
    known = [
        row
        for row in ([] if fresh else read(path))
        if not differences(row["machine"], machine) and not is_wrong(row)
    ]
    for about, find in cases:
        if any(is_about(row, about) for row in known):
            continue
        try:
            found = find()
        except Exception:  # the rows after this one may still be measured
            print(f"{about} failed:\n{traceback.format_exc()}", flush=True)
            yield None
            continue
        yield put(path, about, found, machine)
