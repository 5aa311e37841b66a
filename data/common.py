"""What all scripts share: safe writing of files, downloads, and text on the screen."""

import argparse
import errno
import hashlib
import io
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

# Size and sha256 of published files at the revisions of prepare.py. For others, the hub is asked.
PUBLISHED = {
    "TinyStories-valid.txt": (
        19_447_282, "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4"),
    "TinyStories-train.txt": (
        1_924_281_556, "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f"),
    "TinyStoriesV2-GPT4-valid.txt": (
        22_502_601, "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
    "TinyStoriesV2-GPT4-train.txt": (
        2_227_753_162, "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
    "TinyStories-Instruct-valid.txt": (
        None, "68559e01675940bd415fe0b629406897d6f6bfd40067ff411a9b1daf78260c05")}
ROOT = Path(__file__).resolve().parents[1]
MAX_DOWNLOAD = 10 << 30             # bytes, if the server gives no size
TIMEOUT = 10, 60                    # seconds to connect, and without any data
BACKOFF = 1.0                       # seconds before the first retry; then longer


# ----------------------------------------------- files

@contextmanager
def atomic_write(path):
    """Write a whole file or nothing: the old file stays until the new one is complete."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path, text):
    with atomic_write(path) as file:
        file.write(text.encode())


def save_figure(path, figure):
    with atomic_write(path) as file:
        figure.savefig(file, dpi=120)


def file_bytes(path):
    """The content of a file, mapped into memory: large files are not copied."""
    return np.memmap(path, np.uint8, "r") if os.path.getsize(path) else b""


def file_sha256(path):
    return hashlib.sha256(file_bytes(path)).hexdigest()


# ------------------------------------------- downloads

def hub_url(repo, revision, file, kind="datasets/"):
    host = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    return f"{host}/{kind}{repo}/resolve/{revision}/{file}"


def download(url, path):
    """Download to path, complete and checked. What has arrived stays in a .part file, and the next
    attempt continues there. The hub names a size and sha256 that are not in PUBLISHED."""
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
        size, sha256 = PUBLISHED.get(path.name, (None, None))
        size = size or next((int(n) for n in sizes if re.fullmatch("[0-9]{1,15}", n)), None)
        named = re.search("[0-9a-f]{64}", head.headers.get("X-Linked-Etag", ""))
        sha256 = sha256 or (named and named[0])
        if not sha256:
            part.unlink(missing_ok=True)                # it may be of another version
        have = part.stat().st_size if part.exists() else 0
        if have + shutil.disk_usage(part.parent).free < 1.6 * (size or 0):      # text and tokens
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
    """Complete a .part file that has the first `have` bytes, in one request."""
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


# ---------------------------------- text on the screen

def progress(label, total, unit="B"):
    """A progress bar; in a pipe, one line every ten seconds."""
    pause = 0 if sys.stderr and sys.stderr.isatty() else 10
    return tqdm(desc=label, total=total, unit=unit, unit_scale=True, mininterval=max(pause, 0.1),
                delay=pause, disable=sys.stderr is None)


class Console(io.TextIOWrapper):
    """Standard output that ends the program when a write fails (full disk, `| head`)."""

    def write(self, text):
        try:
            super().write(text)
            self.flush()                # now: at exit, Python would print a traceback
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())    # takes what is left
            closed = isinstance(error, BrokenPipeError)
            raise SystemExit(1 if closed else f"Cannot write the output: {error.strerror}")
        return len(text)


def report_error(kind, error, traceback):
    """For errors that nobody caught: Python's traceback, except for Ctrl-C and for a disk that is
    full, broken or not writable. They are not bugs: one sentence. A script that opens a wrong file
    itself has a bug: then the last frame of the traceback is in that script."""
    number = getattr(error, "errno", None)
    in_script = Path(extract_tb(traceback)[-1].filename).parent in (ROOT, ROOT / "study")
    if isinstance(error, KeyboardInterrupt):
        print("\nStopped.", file=sys.stderr)
    elif number == errno.ENOSPC or not in_script and number in (
            errno.EROFS, errno.EIO, errno.EACCES, errno.EISDIR):
        print(f"Cannot read or write a file: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def setup_console(end_on_error=True):
    """Print ? for characters that the console cannot show, and see report_error. end_on_error: see
    Console."""
    sys.excepthook = report_error
    sys.stderr = sys.stderr or open(os.devnull, "w")    # closed with 2>&-
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if end_on_error and sys.stdout and sys.stdout is sys.__stdout__:    # not in tests or notebooks
        sys.stdout = Console(sys.stdout.buffer, sys.stdout.encoding, "replace")


def command_parser(doc):
    """The argument parser of a script, with the script's docstring as its help."""
    setup_console()
    return argparse.ArgumentParser(description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def printable(text):
    """Make text from outside safe for a terminal: escape its control characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
                  lambda match: ascii(match[0])[1:-1], text)


def table_rows(rows):
    """{row name: {column: cell}} -> rows of cells, the heading first; "-" if a cell is missing."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return [["", *columns]] + [[name, *(row.get(column, "-") for column in columns)]
                               for name, row in rows.items()]


def format_table(rows):
    """Rows of cells, the heading first, or {row name: {column: cell}} -> a table in Markdown."""
    rows = table_rows(rows) if isinstance(rows, dict) else rows
    rows = [["<br>".join(str(cell).strip().splitlines()).replace("|", "\\|") for cell in row]
            for row in rows]
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [min(50, max(3, *map(len, column))) for column in zip(*rows)]     # longer: unpadded
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
