"""The files of a checkpoint beside its weights: configurations, tokenizers, texts and the model card."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import huggingface_hub
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from neumuter.models.adapted import Source
from neumuter.mutes.mute_set import MuteSet

CARD = "README.md"
# No other files are copied: weights in other formats still know what is to be forgotten.
COPIED_SUFFIXES = (".json", ".jsonl", ".txt", ".md", ".model", ".jinja", ".tiktoken", ".py", ".yaml")
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


def find_companions(source: Source) -> Path:
    """Find the folder with the files of a model; those of one on the Hub are downloaded, or in its cache."""
    if Path(source.base).is_dir():
        return Path(source.base)
    patterns = [*(f"*{suffix}" for suffix in COPIED_SUFFIXES), *(f"{name}*" for name in COPIED_NAMES)]
    found = huggingface_hub.snapshot_download(
        source.base, revision=source.revision, allow_patterns=patterns, local_files_only=source.cached
    )
    return Path(found)


def list_companions(folder: Path, index: Path | None = None) -> list[Path]:
    """List all files but weights that are to be copied; of indices of weights ``index`` alone.

    Raises:
        ValueError: one is a link to elsewhere, where it may be anything.
    """
    # In the Hub's cache, files are links to blobs.
    homes = folder.resolve(), folder.resolve().parent.parent / "blobs"
    found = []
    for file in [*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*")]:
        known = file.suffix in COPIED_SUFFIXES or file.name.split(".")[0] in COPIED_NAMES
        if file.name.endswith(".index.json") and file != index:
            known = False
        if known and file.is_file():
            if not any(file.resolve().is_relative_to(home) for home in homes):
                raise ValueError(
                    f"{file} would be copied, but is a link out of its folder: put the file itself there, or "
                    "copy the folder with cp -rL"
                )
            found.append(file)
    return found


def copy_companions(files: Iterable[Path], folder: Path, target: Path) -> None:
    """Copy ``files`` of a folder, as they are, to the same places in ``target``."""
    for file in files:
        copy = target / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def write_card(mutes: MuteSet, target: Path) -> None:
    """Append what was done to the model card in the folder ``target``, which may have none."""
    card = (target / CARD).read_bytes() + b"\n\n" if (target / CARD).exists() else b""
    (target / CARD).write_bytes(card + model_card(mutes).encode())


def model_card(mutes: MuteSet) -> str:
    """Write what was done to a checkpoint that ``mutes`` is folded into, a section in Markdown."""
    counts = {path: len(layer.indices) for path, layer in mutes.layers.items()}
    layers = [
        (f"`{path}`", counts.get(path, 0), width, f"{counts.get(path, 0) / width:.2%}")
        for path, width in mutes.widths.items()
    ]
    before, after = (mutes.metrics.get(when) or {} for when in ("before", "after"))
    metrics = [(_code(key), _code(before.get(key)), _code(after.get(key))) for key in {**before, **after}]
    low, high = mutes.gain_range
    return "\n".join(
        [
            "# Made to forget with NeuMuter",
            "",
            "FFN neurons of this model are multiplied by gains, folded into its down projections, so that it",
            "no longer says given texts. This suppresses the texts; it does not prove that they are deleted",
            "from the weights.",
            "",
            f"- Mode: {mutes.mode}, gains from {low:g} to {high:g}",
            f"- Neurons: {mutes.count} of {sum(mutes.widths.values())} ({mutes.share:.2%})",
            f"- Seed: {mutes.seed}",
            "",
            *_table(("FFN", "neurons", "of", "share"), layers),
            *(_table(("metric", "before", "after"), metrics) if metrics else []),
            "Method:",
            "",
            "```json",
            json.dumps(mutes.method, indent=2),
            "```",
            "",
        ]
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    rows = (names, ["---"] * len(names), *rows)
    return [*(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def _code(value: object) -> str:
    """Write JSON that stays one cell of a table and means nothing else in Markdown, whoever wrote it."""
    return "`" + json.dumps(value).replace("`", "'").replace("|", "\\|") + "`"
