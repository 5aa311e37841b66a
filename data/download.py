"""How does a large file arrive complete?

Downloads continue where they stopped, and are checked. prepare.py and study/hf.py use this.
"""

import hashlib
import os
import re
import shutil
import sys
import time

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

MAX_DOWNLOAD = 10 << 30             # bytes, if the server gives no size
TIMEOUT = 10, 60                    # seconds to connect, and without any data
BACKOFF = 1.0                       # seconds before a retry; then more


def progress(label, total, unit="B"):
    """A progress bar; in a pipe, one line every ten seconds."""
    pause = 0 if sys.stderr and sys.stderr.isatty() else 10
    return tqdm(desc=label, total=total, unit=unit, unit_scale=True, mininterval=max(pause, 0.1),
                delay=pause, disable=sys.stderr is None)


def file_bytes(path):
    return np.memmap(path, np.uint8, "r") if os.path.getsize(path) else b""


def file_sha256(path):
    return hashlib.sha256(file_bytes(path)).hexdigest()


def hub_url(repo, revision, file, kind="datasets/"):
    host = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    return f"{host}/{kind}{repo}/resolve/{revision}/{file}"


def download(url, path, sha256=None):
    """Download to path, complete and checked. What has arrived stays in a .part file, and the next
    attempt continues there. The hub names the size, and the sha256 if it is not given."""
    if path.exists():
        return
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise SystemExit("HF_TOKEN contains a space, a line break or a letter that no token has.")
    session, part, failures = requests.Session(), path.with_name(path.name + ".part"), 0
    session.headers.update({"Accept-Encoding": "identity"})
    if token:
        session.headers["Authorization"] = f"Bearer {token}"    # requests drops it on other hosts
    retry = Retry(5, connect=2, read=2, backoff_factor=BACKOFF,
                  status_forcelist=(429, 500, 502, 503, 504))
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    try:
        head = session.head(url, timeout=TIMEOUT)       # not redirected: the hub's own headers
        sizes = [head.headers.get("X-Linked-Size", "")]
        sizes += [head.headers.get("Content-Length", "")] * (head.status_code == 200)
        size = next((int(n) for n in sizes if re.fullmatch("[0-9]{1,15}", n)), None)
        named = re.search("[0-9a-f]{64}", head.headers.get("X-Linked-Etag", ""))
        sha256 = sha256 or (named and named[0])
        if not sha256:
            part.unlink(missing_ok=True)                # it may be of another version
        if shutil.disk_usage(part.parent).free < 1.6 * (size or 0):     # text and tokens
            raise SystemExit(f"{part.parent} needs {1.6 * size / 1e9:.1f} GB of free space.")
        etag = None if sha256 else head.headers.get("ETag")
        with progress(path.name, size) as bar:
            while failures < 5:
                before = part.stat().st_size if part.exists() else 0
                try:
                    receive(session, url, part, before, size, etag, bar)
                    break
                except requests.RequestException:
                    grown = part.exists() and part.stat().st_size > before
                    failures = 0 if grown else failures + 1
                    if failures == 5:
                        raise
                    time.sleep(BACKOFF * failures)
    except requests.RequestException as error:
        cause = str(getattr(error.args[0], "reason", error) if error.args else error)
        raise SystemExit("Without a network: python train.py config/demo.py, or python prepare.py "
                         "NAME --input FILE. Otherwise, run the same command again to continue. "
                         f"Cannot download {path.name}: {cause[-150:]}")
    if sha256 and (found := file_sha256(part)) != sha256:
        part.unlink()
        raise SystemExit(f"{url} has the sha256 {found}, not {sha256}. Run the command again.")
    os.replace(part, path)


def receive(session, url, part, have, size, etag, bar):
    """Complete a .part file of `have` bytes in one request."""
    if have == size:
        return
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and etag:
        headers["If-Range"] = etag                      # sends the whole file, if it has changed
    with session.get(url, headers=headers, timeout=TIMEOUT, stream=True) as reply:
        kind = f"{reply.headers.get('Content-Type')} {reply.headers.get('Content-Encoding')}"
        if reply.status_code in (400, 401, 403, 404) or re.search("html|gzip|deflate", kind):
            raise SystemExit(f"{url} answers {reply.status_code} {reply.reason} ({kind}). Check "
                             "HF_ENDPOINT and HF_TOKEN, or use your own text with --input FILE.")
        resumed = reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if reply.status_code == 416 or reply.status_code == 206 and not resumed:
            part.unlink(missing_ok=True)                # begin again
            raise requests.HTTPError("the server has another version of the file")
        reply.raise_for_status()
        with open(part, "ab" if resumed else "wb", buffering=0) as file:
            for chunk in reply.iter_content(4096):      # a broken connection loses less than this
                file.write(chunk)
                bar.update(file.tell() - bar.n)
                if file.tell() > (size or MAX_DOWNLOAD):
                    part.unlink()
                    raise SystemExit(f"{url} sends more than {size or MAX_DOWNLOAD:,} bytes.")
            if file.tell() < (size or 0):
                raise requests.ConnectionError(f"only {file.tell():,} of {size:,} bytes arrived")
