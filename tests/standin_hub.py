"""A hub on loopback, for the clients `huggingface_hub` and `datasets`.

Serves repositories from memory: information, trees, files with redirects and
ranges, branches. `Hub.faults` makes requests fail; a client may set it, with
the other faults, by posting them to `/faults`.
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

FAULTS = ("faults", "cuts", "delays")
_DATE = "2026-01-01T00:00:00.000Z"


def _digest(content):
  return hashlib.sha1(content).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
  """The server.

  Attributes:
    repos: {("datasets", "owner/name"): {branch: {path: bytes}}}.
    requests: (method, path) of every request.
    faults: statuses to answer the next requests for a file or repository with,
      0 to drop the connection.
    cuts: numbers of bytes after which the next contents end, with the
      connection.
    delays: seconds before the next answers about a file or repository.
    gated: ids that need a token.
  """

  daemon_threads = True

  def __init__(self, repos):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.repos, self.requests, self.faults = repos, [], []
    self.cuts, self.delays, self.gated = [], [], set()

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}"

  def commits(self, repo):
    """Returns the hash of each branch's content."""
    return {
      branch: _digest(
        repr(sorted((p, _digest(c)) for p, c in tree.items())).encode()
      )
      for branch, tree in self.repos[repo].items()
    }


@contextlib.contextmanager
def serve(repos):
  """Runs a hub while the context lasts."""
  hub = Hub(repos)
  threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
  try:
    yield hub
  finally:
    hub.shutdown()
    hub.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *args):
    """Prints nothing."""

  def do_GET(self):
    self._answer()

  do_HEAD = do_GET

  def do_POST(self):
    self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
    self._answer()

  def _send(self, status, content=b"", **headers):
    headers.setdefault("Content_Length", len(content))
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)

  def _json(self, value, status=200, **headers):
    content = json.dumps(value).encode()
    self._send(status, content, Content_Type="application/json", **headers)

  def _missing(self, code, status=404):
    self._json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

  def _answer(self):
    hub = self.server
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    if path == "/faults":
      left = {name: list(getattr(hub, name)) for name in FAULTS}
      posted = json.loads(self._body)
      for name in FAULTS:
        getattr(hub, name)[:] = posted.get(name, [])
      return self._json(left)
    hub.requests.append((self.command, path))
    if hub.delays:
      time.sleep(hub.delays.pop(0))
    if hub.faults:
      status = hub.faults.pop(0)
      if not status:
        self.close_connection = True
        self.connection.close()
        return
      self._json({"error": "a fault"}, status)
      return
    match = re.fullmatch(
      r"/api/(?P<kind>datasets|models)/(?P<id>[^/]+/[^/]+)"
      r"(/(?P<verb>revision|tree|paths-info)/(?P<rest>.*))?",
      path,
    )
    match = match or re.fullmatch(
      r"(/(?P<kind>datasets))?/(?P<id>[^/]+/[^/]+)/(?P<verb>resolve|blobs)/"
      r"(?P<rest>.*)",
      path,
    )
    repo = match and (match["kind"] or "models", match["id"])
    if not match or repo not in hub.repos:
      return self._missing("RepoNotFound", 401 if match else 404)
    # Where files are redirected to, no token is sent.
    known = "Authorization" in self.headers or match["verb"] == "blobs"
    if match["id"] in hub.gated and not known:
      return self._missing("GatedRepo", 401)
    commits = hub.commits(repo)
    rest = match["rest"] or "main"
    names = [*commits, *commits.values()]
    found = [n for n in names if rest == n or rest.startswith(f"{n}/")]
    if not found:
      return self._missing("RevisionNotFound")
    branch = next(b for b, c in commits.items() if found[0] in (b, c))
    tree, below = hub.repos[repo][branch], rest[len(found[0]) + 1 :]
    verb = match["verb"] or "revision"
    getattr(self, "_" + verb.replace("-", "_"))(
      repo, commits[branch], tree, below
    )

  def _revision(self, repo, commit, tree, below):
    self._json(
      {
        "id": repo[1],
        "_id": "0" * 24,
        "sha": commit,
        "lastModified": _DATE,
        "createdAt": _DATE,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in tree],
      }
    )

  def _entries(self, tree):
    folders = {}
    for path, content in tree.items():
      parts = path.split("/")
      for end in range(1, len(parts)):
        folder = "/".join(parts[:end])
        folders[folder] = {
          "type": "directory",
          "oid": _digest(folder.encode()),
          "size": 0,
          "path": folder,
        }
      folders[path] = {
        "type": "file",
        "oid": _digest(content),
        "size": len(content),
        "path": path,
      }
    return folders

  def _tree(self, repo, commit, tree, below):
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
    deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
    start = f"{below}/" if below else ""
    inside = [
      entry
      for path, entry in self._entries(tree).items()
      if path.startswith(start) and (deep or "/" not in path[len(start) :])
    ]
    if not inside:
      return self._missing("EntryNotFound")
    self._json(inside)

  def _paths_info(self, repo, commit, tree, below):
    try:
      paths = json.loads(self._body)["paths"]
    except ValueError:
      paths = urllib.parse.parse_qs(self._body.decode())["paths"]
    paths = [paths] if isinstance(paths, str) else paths
    entries = self._entries(tree)
    self._json([entries[p] for p in paths if p in entries])

  def _resolve(self, repo, commit, tree, below):
    if below not in tree:
      return self._missing("EntryNotFound")
    content = tree[below]
    headers = {
      "ETag": f'"{_digest(content)}"',
      "X_Repo_Commit": commit,
      "X_Linked_Size": len(content),
      "X_Linked_Etag": f'"{_digest(content)}"',
      "Accept_Ranges": "bytes",
    }
    if below.endswith(".parquet"):  # as large files are: from another place
      root = "" if repo[0] == "models" else "/datasets"
      place = f"{root}/{repo[1]}/blobs/{commit}/{below}"
      elsewhere = self.server.url.replace("127.0.0.1", "localhost")
      return self._send(302, Location=f"{elsewhere}{place}", **headers)
    self._content(content, headers)

  def _blobs(self, repo, commit, tree, below):
    self._content(tree[below], {"ETag": f'"{_digest(tree[below])}"'})

  def _content(self, content, headers):
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    if self.server.cuts and self.command == "GET":
      self.send_response(200)
      self.send_header("Content-Length", str(len(content)))
      self.end_headers()
      self.wfile.write(content[: self.server.cuts.pop(0)])
      self.close_connection = True
      return None
    if not asked:
      return self._send(200, content, **headers)
    start, end = int(asked[1]), int(asked[2] or len(content) - 1)
    part = content[start : end + 1]
    span = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
    self._send(206, part, Content_Range=span, **headers)


def parquet(rows):
  """Returns rows as the bytes of a Parquet file."""
  import io

  import pyarrow
  import pyarrow.parquet

  sink = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
  return sink.getvalue()


def data_set(configs):
  """Returns the main branch of a set that holds data.

  Args:
    configs: {name of a configuration, None for the only one: {split: rows}}.
  """
  lines, tree = ["---", "configs:"], {}
  for config, splits in configs.items():
    folder = config or "data"
    lines += [f"- config_name: {config or 'default'}", "  data_files:"]
    for name, rows in splits.items():
      tree[f"{folder}/{name}-00000-of-00001.parquet"] = parquet(rows)
      lines += [f"  - split: {name}", f"    path: {folder}/{name}-*"]
  return {"main": {"README.md": "\n".join([*lines, "---"]).encode(), **tree}}


def script(name, configs):
  """Returns the branches of a set whose main branch is a loading script.

  Args:
    name: of the set, without its owner.
    configs: as for `data_set`.
  """
  return {
    "main": {f"{name}.py": b"raise SystemExit\n", "README.md": b"a script\n"},
    "refs/convert/parquet": {
      f"{config or 'default'}/{split}/0000.parquet": parquet(rows)
      for config, splits in configs.items()
      for split, rows in splits.items()
    },
  }
