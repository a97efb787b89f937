"""Memory figures of a process."""

import subprocess
import sys

from zofo_jax.report import memory


def test_peak_memory_is_that_of_this_process_and_stays():
  code = """
import numpy as np
from zofo_jax.report import memory
before = memory.peak_rss_bytes()
block = np.ones(50_000_000)
full = memory.rss_bytes()
del block
print(before, full, memory.rss_bytes(), memory.peak_rss_bytes())
"""
  output = subprocess.check_output([sys.executable, "-c", code], text=True)
  before, full, after, peak = map(int, output.split())
  slack = 1_000_000  # the kernel counts in batches of pages
  assert full - before > 390_000_000
  assert after < full - 390_000_000
  assert peak > full - slack


def test_a_peak_is_no_lower_than_what_is_now(monkeypatch):
  read = {"VmRSS": 8192, "VmHWM": 4096}
  monkeypatch.setattr(memory, "_proc_status", read.get)
  usage = memory.usage()
  assert usage["rss_bytes"] == usage["peak_rss_bytes"] == 8192
