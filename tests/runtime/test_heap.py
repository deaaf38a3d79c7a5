"""Memory that is freed and wanted again, in a process of its own: the setting is the process's."""

import subprocess
import sys

import pytest

PROGRAM = """
import pathlib, re, sys, torch
from sana.runtime.heap import keep_freed_memory

def heap():
    first, last = re.search(r"(\\w+)-(\\w+) .*\\[heap\\]", pathlib.Path("/proc/self/maps").read_text()).groups()
    return int(last, 16) - int(first, 16)

if sys.argv[1] == "kept":
    keep_freed_memory(torch.device("cpu"))
before = heap()
tensors = [torch.empty(2**22) for _ in range(12)]
del tensors
print(heap() - before)
"""
BYTES = 12 * 4 * 2**22


def growth(how):
    """Bytes by which the heap is larger when all tensors are gone."""
    words = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_tensors_stay_in_the_heap():
    assert growth("as it was") < BYTES // 10
    assert growth("kept") > 0.8 * BYTES
