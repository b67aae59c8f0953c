"""Windows in a file: what they are as a batch, what is fitted to them, and what of them is in memory."""

import contextlib
import errno
import resource
import signal
import tempfile
import tracemalloc

import pytest
import torch

import neumuter
from neumuter.texts import Windows, encode, store_windows
from neumuter.texts.encoding import count_tokens
from neumuter.training import references
from neumuter.training.batches import PairedBatches
from tests.models import tokenizer
from tests.neumuter.small_fits import FORGET, KEEP, RECIPES
from tests.neumuter.test_recipes import memorised, same

TEXTS = ["Ada Brisk, ada@post.example", ("Who? ", "Jonas Vance"), "The kettle is on the shelf, " * 3, "Tea"]


@pytest.fixture(scope="module")
def llama():
    return memorised("llama")


def stored(batch):
    windows = Windows()
    windows.add_rows(batch)
    return windows


@pytest.mark.parametrize("max_length", [8, 16, 256])
def test_windows_are_the_rows_of_a_batch(max_length):
    words = tokenizer()
    batch, windows = encode(TEXTS, words, max_length), store_windows(iter(TEXTS), words, max_length)
    assert len(windows) == len(batch["labels"])
    assert windows.tokens == batch["attention_mask"].sum()
    assert windows.width == batch["labels"].shape[1]
    for again in (windows, stored(batch)):
        rows = again.rows(range(len(windows)))
        assert rows.keys() == batch.keys()
        assert all(torch.equal(rows[key], batch[key]) for key in batch)
    ids, first = windows[1]
    assert ids.dtype == torch.int64
    assert windows.size(1) == len(ids)
    assert windows.count(1) == len(ids) - first
    with pytest.raises(IndexError, match=f"window {len(windows)} of"):
        windows[len(windows)]


def test_what_is_no_text_is_named_as_ever():
    words = tokenizer()
    with pytest.raises(ValueError, match="text 2 has no token to predict"):
        store_windows(["Tea at four", ""], words, 8)
    with pytest.raises(ValueError, match="holds no text"):
        store_windows([], words, 8)
    with pytest.raises(TypeError, match="tokenizer must be"):
        store_windows(["Tea"], None, 8)


@pytest.fixture
def small_files():
    """No file may have more than a mebibyte and a half."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 19, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("windows", [20_000, 6_400])
def test_a_full_folder_is_named_with_what_was_written(small_files, windows, tmp_path, monkeypatch):
    """Whether windows are still added when no more can be written, or the last are written out."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Windows()

    def fill():
        for _ in range(windows):
            store.add([5] * 64, 1)
        store.digest()

    with pytest.raises(OSError, match=r"of which 1\.5 MiB could be written\. .* TMPDIR chooses") as raised:
        fill()
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(tmp_path)
    # What is left in the buffer has no place when the file is closed.
    with contextlib.suppress(OSError):
        store._file.close()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_fit_to_windows_is_that_to_a_batch(llama, recipe):
    results = []
    for forget, keep in ((FORGET, KEEP), (stored(FORGET), stored(KEEP))):
        with neumuter.attach(llama, start_layer=1) as masked:
            pair = PairedBatches(masked, forget, keep)
            results.append(RECIPES[recipe](pair))
            sizes = count_tokens(keep), pair.count_tokens(range(12)), pair.count_tokens([7, 2], True)
            results.append((sizes, pair.forget_rows(torch.tensor([2, 0]))))
    (batch, (sizes, rows)), (windows, (other_sizes, other_rows)) = results[:2], results[2:]
    assert same(batch, windows)
    assert sizes == other_sizes
    real = rows["attention_mask"] == 1
    assert torch.equal(rows["labels"], other_rows["labels"])
    assert torch.equal(rows["input_ids"][real], other_rows["input_ids"][real])


def test_no_windows_are_refused(llama):
    with neumuter.attach(llama) as masked, pytest.raises(ValueError, match="retain_batch holds no window"):
        PairedBatches(masked, FORGET, Windows())


def test_digests_tell_windows_apart():
    words = tokenizer()
    found = [store_windows(texts, words, 16).digest() for texts in (["ab"], ["ac"], ["a", "b"], ["ab", "ab"])]
    found.append(store_windows([("a", "b")], words, 16).digest())
    assert len(set(found)) == 5
    assert store_windows(["ab"], words, 16).digest() == found[0]


def test_little_of_a_window_is_in_memory(llama, monkeypatch):
    """Neither of its tokens nor of what a step has once had."""
    monkeypatch.setattr(references, "HOST_BYTES", 0)
    monkeypatch.setattr(references, "DEVICE_BYTES", 0)
    ids = list(range(3, 63))
    kept = []
    for count in (100, 4100):
        tracemalloc.start()
        windows = Windows()
        for _ in range(count):
            windows.add(ids, 1)
        with neumuter.attach(llama) as masked:
            pair = PairedBatches(masked, FORGET, windows)
            for start in range(0, count, 4):
                pair.take([0, *range(5 + start, 9 + start)])
            source = pair.hard_first(4, 0)
            assert len(next(source)) == 8
            kept.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    # 16 bytes of a window and 8 of its references' place, but not a number of Python, which would be 32.
    # torch has what is still to come of a round, 4 bytes. Its tokens are 240.
    assert (kept[1] - kept[0]) / 4000 < 30
    assert source.state()["left"][1].dtype == torch.int32
