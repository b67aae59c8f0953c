"""docs/performance.md and docs/results.md, made from the results.

Their prose is in bench/templates, where a person edits it. A placeholder {{PART FILE REST}} there stands for
what the function PART makes of the rows of the results file FILE and of REST.
"""

import hashlib
import json
import re

from bench import RESULTS, ROOT, picture, tables
from bench.rows import read, replace
from bench.unlearning import page

TEMPLATES = ROOT / "bench/templates"
DOCS = ROOT / "docs"
# Of each page: the folder of its results, its parts, and of its picture the name, what it shows and how.
PAGES = {
    "performance": (
        RESULTS,
        tables.PARTS,
        "performance.png",
        picture.machines_shown,
        picture.draw_activations,
    ),
    "results": (
        RESULTS / "unlearning",
        page.PARTS,
        "results-budgets.png",
        picture.budgets_shown,
        picture.draw_budgets,
    ),
}
PLACEHOLDER = re.compile(r"\{\{(\w+) ([\w-]+)(?: ([^}]+))?\}\}")


def render(name):
    """The text of a page. Raises KeyError where its template names a part that there is not."""
    folder, parts, *_ = PAGES[name]

    def fill(match):
        part, file, rest = match.groups()
        rows = read(folder / f"{file}.jsonl")
        found = parts[part](rows, rest) if rows else None
        nobody = "No GPU has measured this yet." if file.startswith("nvidia") else "Not measured yet."
        return f"*{nobody}*" if found is None else found

    source = f"bench/templates/{name}.md"
    first = f"<!-- made by `python -m bench report` from {source} and bench/results; do not edit -->\n\n"
    return first + PLACEHOLDER.sub(fill, (TEMPLATES / f"{name}.md").read_text())


def main(check=False):
    """Writes the pages and pictures, or tells whether they are current; returns the exit status."""
    stale = [what for name in PAGES for what in _renewed(name, check)]
    if check:
        print(f"out of date: {', '.join(stale)}; run python -m bench report" if stale else "All is current.")
        return int(bool(stale))
    print(f"renewed: {', '.join(stale) or 'nothing, all was current'}")
    return 0


def _renewed(name, check):
    """Yields what was out of date; with ``check`` it still is."""
    folder, _, picture_name, select, draw = PAGES[name]
    results = {path.stem: read(path) for path in sorted(folder.glob("*.jsonl"))}
    shown_files = {file for _, file, _ in PLACEHOLDER.findall((TEMPLATES / f"{name}.md").read_text())}
    for file in sorted(results.keys() - shown_files):
        yield f"bench/templates/{name}.md, which does not show {file}"
    path, text = DOCS / f"{name}.md", render(name)
    if not path.exists() or path.read_text() != text:
        yield path.name
        if not check:
            replace(path, text)
    shown = select(results)
    digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()
    if shown and picture.digest_of(DOCS / picture_name) != digest:
        yield picture_name
        if not check:
            draw(shown, DOCS / picture_name, digest)
