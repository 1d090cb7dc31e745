"""Freed maps are kept for the next ones, freed volumes go back: as the system counts pages."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

from meddanet import cases, heap

# prints the page faults of 50 allocations of 1 MiB, after a first one, and by how many MiB the
# process shrinks when an array of `size` MiB is freed
COUNTED = """
import json, resource, sys
import numpy as np
from meddanet import heap

getattr(heap, sys.argv[1])()
size = int(sys.argv[2])

def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize() >> 20

def fill(mib):
    return np.ones(mib << 20, np.uint8)

fill(size)  # as other arrays were freed before, which raises bounds that nobody has set
fill(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    fill(1)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
array = fill(size)
held = resident()
del array
print(json.dumps([faults, held - resident()]))
"""


def counted(name: str, size: int, **variables: str) -> list[int]:
    own = {name: value for name, value in os.environ.items() if name not in heap.VARIABLES}
    told = subprocess.check_output(
        [sys.executable, "-c", COUNTED, name, str(size)], env={**own, **variables}, text=True
    )
    return json.loads(told)


@pytest.fixture
def glibc() -> None:
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("malloc is not glibc's")


def test_maps_are_kept_and_volumes_go_back(glibc):
    faults, returned = counted("return_freed_volumes", 20)
    # 256 pages each
    assert faults < 100 and returned >= 19


def test_nearly_all_is_kept(glibc):
    faults, returned = counted("keep_freed_memory", 30)
    assert faults < 100 and returned <= 1


@pytest.mark.parametrize(("name", "value"), [
    ("MALLOC_MMAP_THRESHOLD_", "65536"), ("MALLOC_TRIM_THRESHOLD_", "65536"),
    ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536"),
])
def test_what_the_user_has_set_stays(glibc, name, value):
    """Every map is one that the system makes anew."""
    faults, returned = counted("keep_freed_memory", 30, **{name: value})
    assert faults > 50 * 200 and returned >= 29


def test_a_folder_run_sets_it(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(cases, "return_freed_volumes", lambda: called.append(1))
    cases.ReadAhead([], tmp_path)
    assert called


def test_another_malloc_is_left_alone(monkeypatch):
    for name in heap.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    heap.keep_freed_memory()
