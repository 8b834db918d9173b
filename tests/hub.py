"""A stand-in for the Hub on this machine: real HTTP, one public data set made of local files, one gated one, one model.

It answers what huggingface_hub asks for them: repository info, file listings, file contents with byte ranges.
By script it fails as servers do (see `serve`).
"""

import hashlib
import json
import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def handler(repositories, requests, fault, closed):
    def describe(files, name):
        data = files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer leaves in one piece, without 40 ms between its head and its body
        disable_nagle_algorithm = True

        def reply(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            headers.setdefault("Content_Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def fail(self, kind, status=200, body=b"[]", headers=None):
            """Answer in the way of this fault instead of with `body`."""
            requests[-1] += f" {kind}"
            self.close_connection = True
            if kind.isdigit():
                return self.reply(int(kind), Connection="close", **({"Retry_After": "1"} if kind == "429" else {}))
            if kind == "refuse":
                return None
            if kind == "page":
                return self.reply(200, b"<html>back soon</html>" * 10000, Content_Type="text/html", Connection="close")
            if kind == "garbage":
                return self.reply(status, b"?" * len(body), **(headers or {}), Connection="close")
            if kind == "slow":
                return self.slow(status, body, headers)
            if kind in ("drip", "drip head"):
                return self.drip(b"HTTP/1.1 200 OK\r\n\r\n" if kind == "drip" else b"HTTP/1.1 ")
            headers = {**(headers or {}), "Connection": "close"}
            half = body[: len(body) // 2]
            if kind != "end":
                headers["Content_Length"] = str(len(half if kind == "truncate" else body))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(half)
            if kind == "stall":
                self.wfile.flush()
                closed.wait(5)
            return None

        def drip(self, head):
            """A byte at a time, for ever."""
            self.wfile.write(head)
            while not closed.wait(0.05):
                self.wfile.write(b"2")
                self.wfile.flush()

        def slow(self, status, body, headers):
            """In ten parts."""
            self.send_response(status)
            more = {"Content_Length": str(len(body)), "Connection": "close"}
            for name, value in {**(headers or {}), **more}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            for i in range(10):
                self.wfile.write(body[i * len(body) // 10 : (i + 1) * len(body) // 10])
                self.wfile.flush()
                time.sleep(0.1)

        def is_away(self, request):
            """Whether this request was answered with a fault of the whole server's."""
            if closed.is_set():  # a connection from before
                self.close_connection = True
                return True
            requests.append(request)
            kind = fault("*")
            if kind:
                self.fail(kind)
            return bool(kind)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            if self.is_away(f"{self.command} {self.path} {self.headers.get('Range', '')}"):
                return None
            if "secret/pictures" in path:
                return self.reply(401, X_Error_Code="GatedRepo", X_Error_Message="Access to dataset is restricted.")
            files = next((files for name, files in repositories.items() if name in path), None)
            if files is None:
                return self.reply(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if "/resolve/" in path:
                name = path.split("/resolve/", 1)[1].split("/", 1)[1]
                if name not in files:
                    return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
                data, etag = files[name], hashlib.sha1(files[name]).hexdigest()
                headers = {"ETag": f'"{etag}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
                if self.command == "HEAD":
                    return self.reply(200, Content_Length=str(len(data)), **headers)
                wanted, status = self.headers.get("Range"), 200
                if wanted:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    first, last = int(first), min(int(last or len(data) - 1), len(data) - 1)
                    headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
                    data, status = data[first : last + 1], 206
                kind = fault(name)
                return self.fail(kind, status, data, headers) if kind else self.reply(status, data, **headers)
            kind = fault(path)
            if kind:
                return self.fail(kind)
            if "/tree/" in path:
                under = path.split("/tree/", 1)[1].split("/", 1)[1:] or [""]
                recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
                names = [n for n in files if n.startswith(under[0])]
                if not names:
                    return self.reply(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
                below = [n[len(under[0]) :].lstrip("/") for n in names]
                folders = sorted({b.split("/")[0] for b in below if "/" in b})
                prefix = f"{under[0]}/" if under[0] else ""
                entries = [{"type": "directory", "path": prefix + f, "size": 0, "oid": COMMIT} for f in folders]
                entries += [describe(files, n) for n, b in zip(names, below, strict=True) if recursive or "/" not in b]
                return self.reply(200, entries, Content_Type="application/json")
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "some/pictures", "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                    "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}  # fmt: skip
            return self.reply(200, info, Content_Type="application/json")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.is_away(f"POST {self.path}"):
                return None
            if "/paths-info/" in self.path:
                files = repositories["some/pictures"]
                text = body.decode()
                paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
                found = [describe(files, p) for p in paths if p in files]
                folders = [p for p in paths if p not in files and any(n.startswith(f"{p}/") for n in files)]
                found += [{"type": "directory", "path": p, "size": 0, "oid": COMMIT} for p in folders]
                return self.reply(200, found, Content_Type="application/json")
            return self.reply(404)

        def log_message(self, *_):
            pass

    return Hub


def files_of(folder):
    """{name: content}"""
    files = sorted(Path(folder).rglob("*")) if folder else []
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


@contextmanager
def serve(folder=None, fault=lambda name: None, port=0, model=None):
    """Yields the environment that points huggingface_hub here, and the list of requests so far. The folders are those
    of the data set some/pictures and of the model some/teacher.

    fault(name) is asked before each answer, with "*" first and then with the name of the file or the path of another
    request, and tells how that answer fails; None: it does not. "503", ...: that status ("429": and one second to
    wait); "refuse": no answer; "drop": half of it, then the connection is gone; "stall": half of it, then silence;
    "end": half of it, without a word on its length; "truncate": half of it, as if that were all; "slow": in ten parts;
    "drip", "drip head": a byte at a time without an end, of it or of its head; "page": a long one in HTML; "garbage":
    as many other bytes.
    """
    repositories = {"some/pictures": files_of(folder), "some/teacher": files_of(model)}
    requests, closed = [], threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(repositories, requests, fault, closed))
    server.handle_error = lambda *_: None  # a client that leaves is no error
    os.register_at_fork(after_in_child=server.socket.close)  # or a client's workers would keep the port open
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}, requests
    finally:
        closed.set()
        server.shutdown()
        server.server_close()
