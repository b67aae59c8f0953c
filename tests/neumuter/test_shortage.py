"""Where processes share a model, and one of them lacks memory, the next run takes fewer samples at a time."""

import pytest
import torch

import neumuter
from neumuter.models import pieces
from neumuter.models.pieces import SplitOutOfMemoryError
from neumuter.recipes.fisher import rank_by_fisher
from neumuter.training.batches import PairedBatches
from neumuter.training.journal import UNFINISHED, Journal
from neumuter.training.shortage import SHORTAGE, remember_shortage
from tests.models import build
from tests.neumuter import jobs
from tests.neumuter.launching import end


@pytest.mark.parametrize("layout", ["fsdp", "tp"])
def test_a_run_that_ended_for_lack_of_memory_goes_on_with_less(layout, tmp_path):
    model = jobs.trained("llama")
    model.save_pretrained(tmp_path / "model")
    said = []
    for _ in range(4):
        (first, _), (second, printed) = end(jobs.short_of_memory, 2, tmp_path, tmp_path, layout, 2)
        if not second:
            break
        said.append(printed)
        # The first process fails, too, because the second is gone.
        assert first
        assert (tmp_path / "out" / SHORTAGE).exists()
    assert (first, second) == (0, 0), printed
    assert said
    for text in said:
        assert "CUDA out of memory: " in text
        assert "samples at a time do not fit into the memory of this process." in text
        assert "Go on by --resume (in Python, resume=True), with half of the samples at a time." in text
    assert f"Memory ran out before: 1/{2 ** len(said)} of the samples at a time" in printed
    assert not (tmp_path / "out" / SHORTAGE).exists()
    assert not (tmp_path / "out" / UNFINISHED).exists()
    found = neumuter.MuteSet.load(tmp_path / "out" / "mutes.safetensors")
    jobs.check_same_but_for_rounding(found, jobs.unlearn(model, "modulate", jobs.MORE_KEPT).mutes)


def test_a_shortage_is_remembered_until_a_run_ends_or_begins_anew(tmp_path, caplog):
    """Of several machines each has a file of its own."""
    with pytest.raises(torch.OutOfMemoryError), remember_shortage(tmp_path, resume=False):
        raise SplitOutOfMemoryError("CUDA out of memory.")
    with pytest.raises(KeyboardInterrupt), remember_shortage(tmp_path, resume=True):
        raise KeyboardInterrupt
    assert caplog.text.count("1/2 of the samples at a time") == 1
    with remember_shortage(tmp_path, resume=True):
        pass
    assert not [*tmp_path.iterdir()]
    (tmp_path / SHORTAGE).write_text('{"halvings": 3}')
    with pytest.raises(KeyboardInterrupt), remember_shortage(tmp_path, resume=False):
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


def test_what_the_layout_asks_for_and_a_shortage_add_up(tmp_path, caplog):
    (tmp_path / SHORTAGE).write_text('{"halvings": 1}')
    sizes = []
    with pieces.sparing(1):
        sizes.append(pieces.Pieces(None, 8).limit(8))
        with remember_shortage(tmp_path, resume=True):
            sizes.append(pieces.Pieces(None, 8).limit(8))
        sizes.append(pieces.Pieces(None, 8).limit(8))
    assert [*sizes, pieces.Pieces(None, 8).limit(8)] == [4, 2, 4, 8]
    assert "Memory ran out before: 1/4 of the samples at a time" in caplog.text


def test_what_fits_does_not_change_the_parts_that_a_journal_counts(monkeypatch):
    """Under tensor parallelism alone one process's journal is that of all."""
    counted, add_up = [], Journal.sum
    monkeypatch.setattr(Journal, "sum", lambda *given: counted.append(list(given[2])) or add_up(*given))
    with neumuter.attach(build("llama"), start_layer=0) as masked:
        for halvings in (0, 2):
            pair = PairedBatches(masked, jobs.texts("forget"), jobs.texts("retain"))
            pair.pieces.halvings = halvings
            rank_by_fisher(pair)
    assert len(counted) == 4
    assert counted[:2] == counted[2:]
