"""Counts what is read of safetensors files."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace


class CountedReads:
    """Does what safetensors.safe_open does, and counts the elements read of each tensor."""

    def __init__(self, safe_open):
        self.safe_open, self.elements = safe_open, Counter()

    @contextmanager
    def __call__(self, *arguments):
        with self.safe_open(*arguments) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=lambda name: _Slice(file.get_slice(name), name, self))


class _Slice:
    def __init__(self, stored, name, reads):
        self.stored, self.name, self.reads = stored, name, reads
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, index):
        part = self.stored[index]
        self.reads.elements[self.name] += part.size
        return part
