"""How do clean stories come out of a text file?

Stories are separated by <|endoftext|>, by line breaks or blank lines, or are the lines of a JSONL
file. Known faults of the data are repaired and counted.
"""

import json
import os
import re

from data.common import progress

EOT = "<|endoftext|>"               # between stories in text files; one token
CHUNK_BYTES = 4 << 20               # read at a time
MAX_STORY_BYTES = 64 << 20

# Mojibake: UTF-8 decoded as Windows-1252 and encoded again.
MOJIBAKE = {"â€œ": "“", "â€\x9d": "”", "â€™": "’", "â€˜": "‘",
            "â€“": "–", "â€”": "—", "â€¦": "…", "â€": "”"}
SEPARATORS = {"\n": rb"\r?\n", "\n\n": rb"\r?\n(?:[ \t]*\r?\n)+"}       # others: literally
HINT = (f"Put a line {EOT} between stories, or use --separator '\\n' (one story per line) or "
        "--separator '\\n\\n' (blank lines between stories).")


def shorten_spaces(text):
    """Two instead of a thousand or more: tiktoken fails on a million."""
    return re.sub(r"(\s\s)\s{998,}", r"\1", text) if len(text) > 1_000 else text


def clean(story, counts):
    """Bytes of a story -> its text, with known faults of the data repaired and counted."""
    text = story.decode("utf-8", errors="replace")
    counts["damaged: not UTF-8"] += "\ufffd" in text
    counts["damaged: NUL characters"] += "\0" in text
    if "â€" in text:
        counts["repaired: mojibake"] += 1
        for wrong, right in MOJIBAKE.items():
            text = text.replace(wrong, right)
    length, text = len(text), shorten_spaces(text)
    counts["repaired: long runs of white space"] += len(text) < length
    return text.replace("\r\n", "\n").strip("\ufeff \t\r\n")


def json_story(line, path):
    """The story in a line of JSON, as bytes."""
    try:
        row = json.loads(line)
        return row.get("text", row.get("story")).encode("utf-8", "surrogatepass")
    except (ValueError, AttributeError, RecursionError):
        raise SystemExit(f"{path} looks like JSON. Write one object per line, with the story in "
                         f'the field "text" or "story"; not {line[:60]}')


def read_stories(path, counts, separator=EOT):
    """Yield lists of clean stories (str, not empty), one list per chunk of the file. Bytes are
    split before they are decoded: the end of a chunk cuts no separator and no character."""
    rest = b""
    with open(path, "rb") as file, progress(f"reading {path.name}", os.path.getsize(path)) as bar:
        head = file.read(1_000)
        # JSON begins with { or [, perhaps after a byte order mark.
        jsonl = path.suffix == ".jsonl" or re.match(rb'(\xef\xbb\xbf)?\s*[\[{]\s*[\[{"]', head)
        pattern = SEPARATORS.get("\n" if jsonl else separator) or re.escape(separator.encode())
        file.seek(0)
        more = True
        while more:
            more = file.read(CHUNK_BYTES)
            if more:            # the last story may go on in the next chunk
                *stories, rest = re.split(pattern, rest + more)
            else:
                stories, rest = [rest], b""
            if len(rest) > MAX_STORY_BYTES:
                raise SystemExit(f"{path}: a story of over {MAX_STORY_BYTES >> 20} MB. {HINT}")
            if jsonl:
                stories = [json_story(line, path) for line in stories if line.strip()]
            texts = [clean(text, counts) for story in stories for text in story.split(EOT.encode())]
            yield [text for text in texts if text]
            bar.update(len(more))
