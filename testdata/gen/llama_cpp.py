"""llama.cpp's own tokenization, through the library inside the PyPI package xllamacpp (2026.10.11549), for generators and tests/interop.

No model is needed: a GGUF file without tensors will do, if it has the sizes that every model has.
"""
import ctypes

import xllamacpp.xllamacpp

NUMBERS = ("gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")
TRUTHS = ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")


class Parameters(ctypes.Structure):
    """`llama_model_params` of include/llama.h; it is checked against the library's defaults below."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("devices", "overrides")),
        *((name, ctypes.c_int32) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in ("split", "progress", "progress_data", "kv_overrides")),
        *((name, ctypes.c_bool) for name in TRUTHS),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SILENT = LOG(lambda level, text, data: None)

library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
library.llama_model_default_params.restype = Parameters
library.llama_model_load_from_file.restype = ctypes.c_void_p
library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
library.llama_model_free.argtypes = [ctypes.c_void_p]
library.llama_model_get_vocab.restype = ctypes.c_void_p
library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
library.llama_tokenize.argtypes = [
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
]
library.llama_log_set(SILENT, None)
library.llama_backend_init()


def tokenize(gguf, texts):
    """The ids of each text: no token put before or behind it, special tokens read in it."""
    parameters = library.llama_model_default_params()
    defaults = {name: getattr(parameters, name) for name in TRUTHS}
    if defaults != {**dict.fromkeys(TRUTHS, False), "use_extra_bufts": True, "load_mtp": defaults["load_mtp"]}:
        raise SystemExit(f"this library's llama_model_params is laid out differently: {defaults}")
    parameters.vocab_only, parameters.gpu_layers = True, 0
    model = library.llama_model_load_from_file(str(gguf).encode(), parameters)
    if not model:
        raise SystemExit(f"{gguf}: llama.cpp does not load it")
    vocabulary, every = library.llama_model_get_vocab(model), []
    for text in texts:
        data = text.encode()
        room = 4 * len(data) + 16
        ids = (ctypes.c_int32 * room)()
        count = library.llama_tokenize(vocabulary, data, len(data), ids, room, False, True)
        assert 0 <= count <= room
        every.append(list(ids[:count]))
    library.llama_model_free(model)
    return every
