"""Runs in the environment of llama-cpp-python, which has neither torch nor neumuter: numbers for the tests.

python engine.py logits MODEL.gguf TOKENS.npy LOGITS.npy [LORA.gguf]
python engine.py quantise WEIGHTS.npy TYPE DATA.npy
"""

import ctypes
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def logits(model, tokens, out, lora=None):
    """Logits float32 [sequences, tokens, vocabulary] of sequences of tokens."""
    ids = np.load(tokens)
    options = dict(n_ctx=ids.shape[1], n_threads=1, logits_all=True, verbose=False, lora_path=lora)
    llama = llama_cpp.Llama(model, **options)
    found = []
    for row in ids:
        llama.reset()
        llama.eval(row.tolist())
        found.append(np.array(llama.scores[: len(row)], np.float32))
    np.save(out, np.stack(found))


def quantise(weights, kind, out):
    """The bytes that ggml makes of float32 [rows, inputs] in a type, by its number."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    ggml = ctypes.CDLL(next(folder.glob("libggml-base.so*")))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_row_size.restype = ctypes.c_size_t
    values = np.ascontiguousarray(np.load(weights))
    rows, inputs = values.shape
    size = ggml.ggml_row_size(ctypes.c_int(int(kind)), ctypes.c_int64(inputs))
    data = np.zeros(rows * size, np.uint8)
    importance = np.ones(inputs, np.float32)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, data, importance))
    source, target, matrix = pointers
    ggml.ggml_quantize_chunk(
        ctypes.c_int(int(kind)),
        source,
        target,
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(inputs),
        matrix,
    )
    np.save(out, data.reshape(rows, size))


if __name__ == "__main__":
    {"logits": logits, "quantise": quantise}[sys.argv[1]](*sys.argv[2:])
