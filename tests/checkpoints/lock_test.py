"""One writer: who holds a folder, and whom a second process meets there."""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent import futures

import pytest
from etils import epath

from zofo_jax import errors
from zofo_jax.checkpoints import lock
from zofo_jax.commands import arguments

HOLD = """
import os, signal, sys
from etils import epath
from zofo_jax.checkpoints import lock
from zofo_jax.commands import arguments
with lock.hold(epath.Path(sys.argv[1])):
  print("held", flush=True)
  sys.stdin.read()
"""


HOST = socket.gethostname()


@pytest.fixture
def folder(tmp_path):
  return epath.Path(tmp_path / "run")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
  """Another process, and the folder that it holds."""
  folder = epath.Path(tmp_path_factory.mktemp("other") / "run")
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(folder)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process, folder
  process.kill()
  process.communicate()


def left_by(folder, age=0.0, **changes):
  """Leaves a lock as another process would; returns its path."""
  with lock.hold(folder):
    owner = json.loads((folder / lock.NAME).read_text())
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / lock.NAME
  path.write_text(json.dumps(owner | {"token": "other"} | changes))
  then = time.time() - age
  os.utime(path, (then, then))
  return path


def test_a_second_process_is_told_who_holds_the_folder(other):
  process, folder = other
  for _ in range(2):  # the file is as it was
    with pytest.raises(errors.UserError) as caught, lock.hold(folder):
      pass
    text = str(caught.value)
    assert f"{folder} is in use by process {process.pid} on {HOST} " in text
    assert f"since {time.strftime('%Y-%m-%d')}" in text


def test_another_process_may_have_got_the_number(folder):
  left_by(folder, pid=os.getpid(), started="1")
  with lock.hold(folder):
    pass


@pytest.mark.parametrize("age, dead", [(0, False), (170, False), (190, True)])
def test_a_process_elsewhere_is_known_by_its_heartbeat(folder, age, dead):
  path = left_by(folder, age, host="far", system="far boot", pid=1)
  if dead:
    with lock.hold(folder):
      pass
    return
  with pytest.raises(errors.UserError) as caught, lock.hold(folder):
    pass
  for part in ("process 1 on far", f"{path} is removed", "180 s have passed"):
    assert part in str(caught.value)
  path.unlink()  # as the sentence says
  with lock.hold(folder):
    pass


def test_an_unreadable_lock_is_of_somebody(folder):
  path = left_by(folder)
  path.write_text("")
  with pytest.raises(errors.UserError, match="in use by another process"):
    with lock.hold(folder):
      pass
  assert sorted(p.name for p in folder.iterdir()) == [lock.NAME]


def test_a_heartbeat(folder):
  with lock.hold(folder):
    path = folder / lock.NAME
    held = lock._Lock(path, json.loads(path.read_text()))
    os.utime(path, (1, 1))
    older, newer = folder / "older", folder / "newer"
    older.touch()
    held.touch()
    newer.touch()
    times = [p.stat().mtime for p in (older, path, newer)]
    assert times == sorted(times)  # by the file system's clock
    path.unlink()  # by somebody who believed that it was dead
    held.touch()
    assert path.exists()
    path.write_text(json.dumps({**held._owner, "pid": 7, "token": "other"}))
    with pytest.raises(errors.UserError, match="now of process 7"):
      held.touch()
    held.release()
    assert path.exists()  # that of the other process


def test_nothing_is_left(folder):
  with lock.hold(folder):
    assert [p.name for p in folder.iterdir()] == [lock.NAME]
  assert not folder.exists()
  folder.mkdir()
  with pytest.raises(RuntimeError), lock.hold(folder):
    raise RuntimeError
  assert not list(folder.iterdir())


def acquire_at_once(folder, count):
  """Returns the locks of those of `count` threads that get one."""
  barrier = threading.Barrier(count)

  def acquire(_):
    barrier.wait()
    with contextlib.suppress(errors.UserError):
      return lock._acquire(folder)

  with futures.ThreadPoolExecutor(count) as pool:
    return [held for held in pool.map(acquire, range(count)) if held]


def test_only_one_of_many_takes_a_dead_one_over(folder):
  switch_interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)
  try:
    for _ in range(20):
      path = left_by(folder, started="1")
      (held,) = acquire_at_once(folder, 8)
      assert [p.name for p in folder.iterdir()] == [lock.NAME]
      assert json.loads(path.read_text()) == held._owner
      held.release()
  finally:
    sys.setswitchinterval(switch_interval)


def test_one_that_comes_late_to_a_takeover(folder, monkeypatch):
  left_by(folder, started="1")
  create, locks = lock._create, []

  def be_late(path, owner):
    if path.name != lock.NAME and not locks:  # the first claim
      monkeypatch.setattr(lock, "_create", create)
      locks.append(lock._acquire(folder))
    return create(path, owner)

  monkeypatch.setattr(lock, "_create", be_late)
  with pytest.raises(errors.UserError, match="in use by process"):
    lock._acquire(folder)
  assert [p.name for p in folder.iterdir()] == [lock.NAME]
  locks[0].release()
  assert not list(folder.iterdir())


def test_one_that_was_killed_in_a_takeover(folder):
  path = left_by(folder, started="1")
  claim = path.with_name(lock._claim_name(path))
  claim.write_text(path.read_text())
  assert len(acquire_at_once(folder, 3)) == 1
  assert [p.name for p in folder.iterdir()] == [lock.NAME]


def test_an_unknown_start(folder):
  left_by(folder, started="", pid=2**22 + 1)  # beyond Linux' largest
  with lock.hold(folder):
    pass
  left_by(folder, started="")
  with pytest.raises(errors.UserError, match="in use by process"):
    with lock.hold(folder):
      pass


@pytest.mark.parametrize("kind", ["a folder", "a link to no file"])
def test_what_is_no_lock(folder, kind):
  folder.mkdir()
  path = folder / lock.NAME
  path.mkdir() if kind == "a folder" else os.symlink("nothing", path)
  with pytest.raises(errors.UserError, match=f"lock.json is {kind}; expected"):
    with lock.hold(folder):
      pass


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="a folder to write into"):
    with lock.hold(epath.Path(tmp_path / "file" / "run")):
      pass


@pytest.mark.parametrize("link", [True, False])
def test_file_systems_without_links(folder, monkeypatch, link):
  def refuse(*unused):
    raise PermissionError

  if not link:
    monkeypatch.setattr(os, "link", refuse)
  with lock.hold(folder):
    with pytest.raises(errors.UserError, match="in use"):
      with lock.hold(folder):
        pass


@pytest.mark.parametrize(
  "command", ["train", "icl", "metatrain", "adapt", "sweep"]
)
def test_every_command_that_writes(other, command_line, capsys, command):
  process, folder = other
  config = "--sweep=sweeps/theta" if command == "sweep" else "--config=llama"
  assert command_line(command, config, f"--workdir={folder}") == 2
  assert f"in use by process {process.pid}" in capsys.readouterr().err


def test_a_killed_process_is_recognized_at_once(other):
  process, folder = other
  process.kill()  # and not waited for: a zombie
  os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
  with lock.hold(folder):
    owner = json.loads((folder / lock.NAME).read_text())
    assert owner["pid"] == os.getpid()


def test_a_function_holds_its_folder_while_it_runs(tmp_path):
  @lock.locked
  def run(config, workdir):
    return config, (epath.Path(workdir) / lock.NAME).exists()

  folder = str(tmp_path / "run")
  assert run("a", folder) == ("a", True)
  assert run(config="b", workdir=folder) == ("b", True)
  assert not (tmp_path / "run" / lock.NAME).exists()


@pytest.mark.parametrize("function", arguments._RUNNERS.values())
def test_whatever_writes_to_a_folder_holds_it(function, tmp_path):
  module, _, name = function.partition(":")
  call = getattr(importlib.import_module(module), name)
  with (
    lock.hold(epath.Path(tmp_path)),
    pytest.raises(errors.UserError, match="in use"),
  ):
    call(None, str(tmp_path))
