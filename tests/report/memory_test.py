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


def test_limits_are_those_of_the_control_groups_of_either_version(tmp_path):
  (tmp_path / "proc/self").mkdir(parents=True)
  (tmp_path / "proc/self/cgroup").write_text(
    "4:memory:/jobs/7\n3:cpu:/jobs/7\n0::/a/b\n"
  )
  for name, text in {
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/jobs/7/memory.limit_in_bytes": "3000",
    "cpu/jobs/7/memory.limit_in_bytes": "1",
    "a/memory.max": "2000",
    "a/b/memory.max": "max",
  }.items():
    path = tmp_path / "sys/fs/cgroup" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
  assert sorted(memory._limits(tmp_path)) == [2000, 3000, 2**63 - 4096]
  assert memory._limits(tmp_path / "elsewhere") == []


def test_what_is_available_is_no_more_than_a_limit(monkeypatch):
  monkeypatch.setattr(memory, "_limits", lambda: [10**6])
  assert memory.available_host_bytes() == 10**6
