"""The lock of a run's folder: one process at a time writes to it.

`WORKDIR/lock.json` says who holds the folder. A killed process leaves it there.
On the same host the next process sees that there is no such process any more;
elsewhere, that the file has not been touched for `STALE_SECONDS`. Locks of the
file system are not used, since network file systems may lack them.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from etils import epath

from zofo_jax import errors, report
from zofo_jax.checkpoints import folders
from zofo_jax.sharding import multihost

P = ParamSpec("P")
T = TypeVar("T")
NAME = "lock.json"
# The holder touches the file this often.
BEAT_SECONDS = 20.0
# Longer than a client of NFS may believe in old times of a file (60 s).
STALE_SECONDS = 180.0
_FIELDS = {"host", "pid", "since", "system", "started", "token"}
_log = logging.getLogger("zofo_jax")


@contextlib.contextmanager
def hold(folder: epath.Path) -> Iterator[None]:
  """Holds a folder, which is made if need be, in a `with` statement.

  Of several processes of a run the first one holds it.

  Args:
    folder: local or "gs://...", where two that start within a second may both
      be let in.

  Raises:
    UserError: another process holds it, it cannot be written to, or checkpoints
      cannot be in a folder of this name; on all processes.
  """
  folders.absolute(folder)
  lock: _Lock | None = None
  made = [path for path in (folder, *folder.parents) if not path.exists()]
  with multihost.raise_on_all_processes():
    if multihost.is_primary():
      lock = _acquire(folder)
  try:
    yield
  finally:
    if lock is not None:
      lock.release()
      for path in made:  # nothing may have been written
        with contextlib.suppress(OSError, ValueError):
          path.rmdir()


def locked(function: Callable[P, T]) -> Callable[P, T]:
  """Returns the function, which holds the folder `workdir` while it runs."""
  signature = inspect.signature(function)

  @functools.wraps(function)
  def call(*args: P.args, **kwargs: P.kwargs) -> T:
    workdir = signature.bind(*args, **kwargs).arguments["workdir"]
    with hold(epath.Path(workdir)):
      return function(*args, **kwargs)

  return call


class _Lock:
  """A lock that this process holds."""

  def __init__(self, path: epath.Path, owner: dict[str, Any]):
    """Starts to touch the file."""
    self._path, self._owner = path, owner
    self._released = threading.Event()
    threading.Thread(target=self._beat, name="lock", daemon=True).start()

  def _beat(self) -> None:
    while not self._released.wait(BEAT_SECONDS):
      try:
        self.touch()
      except OSError:  # a network file system, for a while
        continue
      except errors.UserError as error:
        # The other process has resumed from the last checkpoint; whatever this
        # one wrote would corrupt its files.
        print(f"zofo_jax: {error}", file=sys.stderr, flush=True)
        os._exit(2)

  def touch(self) -> None:
    """Shows that this process is alive; makes the file again if it is gone.

    Raises:
      UserError: another process holds the folder.
    """
    owner = _read(self._path)
    if owner is None and not self._path.exists():
      _create(self._path, self._owner)
    elif owner is not None and owner["token"] != self._owner["token"]:
      raise errors.UserError(
        f"{self._path} is now of {_describe(owner)}, so this process ends; it "
        "had shown no sign of life."
      )
    elif _is_local(self._path):
      os.utime(self._path)
    else:
      self._path.write_text(json.dumps(self._owner))

  def release(self) -> None:
    """Removes the file."""
    self._released.set()
    with contextlib.suppress(OSError):
      if (_read(self._path) or {}).get("token") == self._owner["token"]:
        self._path.unlink()


def _acquire(folder: epath.Path) -> _Lock:
  """Makes the file, or takes that of a dead process over."""
  path = folder / NAME
  owner = {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    "system": _system(),
    "started": _started(os.getpid()),
    "token": uuid.uuid4().hex,
  }
  report.make_folder(folder)
  if path.is_dir() or (os.path.islink(path) and not path.exists()):
    kind = "a folder" if path.is_dir() else "a link to no file"
    raise errors.UserError(
      f"--workdir: {path} is {kind}; expected a file that zofo_jax made, or "
      "nothing."
    )
  for _ in range(3):
    if _create(path, owner) or _take_over(path, owner):
      if (_read(path) or {}).get("token") == owner["token"]:
        return _Lock(path, owner)
  raise errors.UserError(
    f"--workdir: {folder} is in use by processes that start at this moment; "
    "expected another folder."
  )


def _create(path: epath.Path, owner: dict[str, Any]) -> bool:
  """Makes the file unless it exists; returns whether it did."""
  text = json.dumps(owner)
  if not _is_local(path):
    if path.exists():
      return False
    path.write_text(text)
    time.sleep(1.0)  # of two that write, the last one stays
    return (_read(path) or {}).get("token") == owner["token"]
  # The file appears with its content. Links, too, are made by one process only
  # on any file system, but some have none.
  unique = pathlib.Path(path.with_name(f"{NAME}.{owner['token']}"))
  try:
    unique.write_text(text)
    try:
      os.link(unique, path)
    except FileExistsError:
      return False
    except OSError:
      try:
        with open(path, "x") as file:
          file.write(text)
      except FileExistsError:
        return False
    return True
  finally:
    unique.unlink(missing_ok=True)


def _take_over(path: epath.Path, owner: dict[str, Any]) -> bool:
  """Replaces the file of a dead process; returns whether it did.

  Only the process that makes a second file, the claim, may replace the first,
  which therefore exists all the time. The claim's name depends on the content
  of the first. If its process, too, is dead, there is a claim on the claim.

  Raises:
    UserError: the process, or the one with the claim, is or may be alive.
  """
  first = name = _name_if_dead(path)
  who = _describe(_read(path))
  claims = []
  while name is not None:
    claims.append(path.with_name(name))
    if _create(claims[-1], owner):
      break
    name = _name_if_dead(claims[-1])
  else:
    return False
  # Another process may have replaced the file before this one made its claim.
  replaces = _claim_name(path) == first
  if replaces:
    new = path.with_name(f"{NAME}.{owner['token']}")
    new.write_text(json.dumps(owner))
    new.replace(path)
    _log.info("%s was left by %s, which has ended.", path, who)
  for claim in claims if replaces else claims[-1:]:
    claim.unlink(missing_ok=True)
  return replaces


def _name_if_dead(path: epath.Path) -> str | None:
  """Returns the name of a claim on a dead process's file; None without a file.

  Raises:
    UserError: the process is, or may be, alive.
  """
  name = _claim_name(path)
  owner = _read(path)
  age = _age(path)
  if age is None:  # has been removed just now
    return None
  if owner is not None and owner["system"] == _system():
    started = _started(owner["pid"])
    alive = started != "" and owner["started"] in ("", started)
    advice = "expected another --workdir, or that it has ended"
  else:
    alive = age < STALE_SECONDS
    advice = (
      f"its last sign of life was {max(age, 0):.0f} s ago; expected another "
      f"--workdir, or, if it was killed, that {STALE_SECONDS:.0f} s have "
      f"passed or {path} is removed"
    )
  if alive:
    raise errors.UserError(
      f"--workdir: {path.parent} is in use by {_describe(owner)}; {advice}."
    )
  return name


def _claim_name(path: epath.Path) -> str | None:
  """Returns the name of the file that claims another one, if that exists."""
  try:
    content = path.read_bytes()
  except OSError:
    if not path.exists():
      return None
    content = b""
  return f"{NAME}.{hashlib.sha256(path.name.encode() + content).hexdigest()}"


def _read(path: epath.Path) -> dict[str, Any] | None:
  """Returns the owner; None if there is none, or it cannot be read."""
  try:
    owner = json.loads(path.read_text())
    return owner if _FIELDS <= owner.keys() else None
  except (OSError, ValueError, AttributeError):
    return None


def _age(path: epath.Path) -> float | None:
  """Returns the age of a file in seconds, by the clock of the file system."""
  probe = path.with_name(f"{NAME}.{uuid.uuid4().hex}")
  probe.write_text("")
  try:
    now = probe.stat().mtime or time.time()
    return now - (path.stat().mtime or now)
  except FileNotFoundError:
    return None
  finally:
    probe.unlink()


def _describe(owner: dict[str, Any] | None) -> str:
  if owner is None:
    return "another process"
  return f"process {owner['pid']} on {owner['host']} since {owner['since']}"


def _is_local(path: epath.Path) -> bool:
  return "://" not in str(path)


def _system() -> str:
  """Returns what two processes share that can see each other by their ids."""
  parts = [socket.gethostname()]
  for name in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
    with contextlib.suppress(OSError):
      link = os.path.islink(name)
      text = os.readlink(name) if link else pathlib.Path(name).read_text()
      parts.append(text.strip())
  return " ".join(parts)


def _started(pid: int) -> str:
  """Returns when a process began, "" if there is none of this id.

  Another process may have got the id since.
  """
  try:
    # After the name in parentheses: the state, which is Z once it has ended,
    # and 19 fields later the ticks since the boot.
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    state, *others = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else others[18]
  except (OSError, IndexError):
    pass
  if os.path.isdir("/proc/self"):
    return ""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return ""
  except OSError:
    pass
  return "alive"
