"""The comparison of memories runs, and its losses are the same in both."""

import json
import sys

import pytest
import streamed


@pytest.mark.slow
def test_it_compares_both_memories(tmp_path, monkeypatch, capsys):
  path = tmp_path / "results.json"
  arguments = "--size=tiny --rows=2 --tokens=16 --repeats=1"
  monkeypatch.setattr(
    sys, "argv", ["streamed.py", *arguments.split(), f"--json={path}"]
  )
  streamed.main()
  results = json.loads(path.read_text())
  for name in ("zo", "lora"):
    host, device = results["host"][name], results["device"][name]
    assert host["loss"] == device["loss"]
    assert host["to_device"] > 0 == device["to_device"]
  assert results["host"]["lora"]["to_host"] == 0
  assert "GB on the device" in capsys.readouterr().out
