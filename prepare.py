"""How do stories become the numbers that a model reads?

    python prepare.py sample              # from data/grammar.txt: no download, half a minute
    python prepare.py sample-instruct     # the same as records of TinyStories-Instruct
    python prepare.py tinystories-small   # TinyStories' validation file: 19 MB
    python prepare.py tinystories         # the paper's training data: 1.9 GB
    python prepare.py tinystories-v2      # stories by GPT-4 only: 2.2 GB
    python prepare.py instruct            # TinyStories-Instruct: 2.7 GB
    python prepare.py mine --input stories.txt      # your own text, in any language
    python prepare.py mine --grammar plots.txt      # your own grammar

Writes data/<name>/: train.bin and val.bin (uint16 token ids; <|endoftext|> ends each story),
tokenizer.tiktoken and meta.json.
"""

import argparse
import base64
import errno
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import regex
import tiktoken
from filelock import FileLock

from data.bpe import prune_bpe, train_bpe
from data.download import download, file_bytes, file_sha256, hub_url, progress
from data.grammar import FIELDS, GRAMMAR, Story, read_grammar

HERE = Path(__file__).resolve().parent
EOT = "<|endoftext|>"               # between stories in text files; one token
CHUNK_BYTES = 4 << 20               # read at a time
MAX_STORY_BYTES = 64 << 20
BPE_SAMPLE = 100_000_000            # characters from which a tokenizer is made
# Pre-tokenization: contractions ('s), words, numbers, punctuation, spaces. No merge crosses them.
# BPE_PATTERN keeps combining marks (accents, vowel signs of Hindi) with letters.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
BPE_PATTERN = GPT2_PATTERN.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")

# Repository and revision on Hugging Face; file, size and sha256 of each split (None: ask the hub).
V1 = "roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
V1_VALID = ("TinyStories-valid.txt", 19_447_282,
            "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4")
SOURCES = {
    "tinystories-small": (*V1, {"train": V1_VALID}),
    "tinystories": (*V1, {"val": V1_VALID, "train": (
        "TinyStories-train.txt", 1_924_281_556,
        "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f")}),
    "tinystories-v2": (*V1, {"val": (
        "TinyStoriesV2-GPT4-valid.txt", 22_502_601,
        "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"), "train": (
        "TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
        "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443")}),
    "instruct": ("roneneldan/TinyStoriesInstruct", "1282fc1059eaf0aad1f30459a25530f44343f2a2", {
        "val": ("TinyStories-Instruct-valid.txt", None,
                "68559e01675940bd415fe0b629406897d6f6bfd40067ff411a9b1daf78260c05"),
        "train": ("TinyStories-Instruct-train.txt", None, None)}),
}
SAMPLES = ("sample", "sample-instruct")         # generated from data/grammar.txt
SAMPLE_STORIES = {"val": 1_000, "train": 30_000}


# ------------------------------------------------------------------------------------------- files

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


def setup_console():
    """Print ? for characters that the console cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def printable(text):
    """Make text from outside safe for a terminal: escape its control characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
                  lambda match: ascii(match[0])[1:-1], text)


# --------------------------------------------------------------------------------- text to stories

def grammar_hash(path=GRAMMAR):
    """Hash of the rules and plots of a grammar, without its comments."""
    return hashlib.sha256(json.dumps(read_grammar(path)).encode()).hexdigest()


def grammar_changed(meta):
    """Whether data/grammar.txt has changed since this data set was generated from it."""
    ours = meta.get("source") == "data/grammar.txt" and "grammar" in meta
    return ours and meta["grammar"] != grammar_hash()


def write_synthetic_stories(folder, grammar, instruct):
    """Write train.txt and val.txt -> their paths, and the nats of all choices in val.txt."""
    rules, plots = read_grammar(grammar)
    paths, nats, start = {}, 0.0, 0
    with progress("generating", sum(SAMPLE_STORIES.values()), unit=" stories") as bar:
        for split, n in SAMPLE_STORIES.items():
            paths[split] = [folder / f"{split}.txt"]
            with open(paths[split][0], "w", encoding="utf-8", newline="\n") as file:
                for number in range(start, start + n):
                    story = Story(rules, plots, random.Random(f"0-{number}"))
                    file.write((story.record() if instruct else story.text) + f"\n{EOT}\n")
                    nats += story.nats if split == "val" else 0.0
                    bar.update()
            start += n
    return paths, nats


# Mojibake: UTF-8 decoded as Windows-1252 and encoded again.
REPAIRS = {"â€œ": "“", "â€\x9d": "”", "â€™": "’", "â€˜": "‘",
           "â€“": "–", "â€”": "—", "â€¦": "…", "â€": "”"}
SEPARATORS = {"\n": rb"\r?\n", "\n\n": rb"\r?\n(?:[ \t]*\r?\n)+"}       # others: literally
HINT = (f"Put a line {EOT} between stories, or use --separator '\\n' (one story per line) or "
        "--separator '\\n\\n' (blank lines between stories).")


def read_stories(path, counts, separator=EOT):
    """Yield lists of clean stories (str, not empty), one list per chunk of the file. Bytes are
    split before they are decoded: the end of a chunk cuts no separator and no character."""
    rest = b""
    with open(path, "rb") as file, progress(f"reading {path.name}", os.path.getsize(path)) as bar:
        looks_like_json = re.match(rb'(\xef\xbb\xbf)?\s*(\{\s*"|\[\s*[\["{])', file.read(1_000))
        jsonl = looks_like_json or path.suffix == ".jsonl"
        pattern = SEPARATORS.get("\n" if jsonl else separator) or re.escape(separator.encode())
        file.seek(0)
        more = True
        while more:
            more = file.read(CHUNK_BYTES)
            *stories, rest = re.split(pattern, rest + more) if more else (rest, b"")
            if len(rest) > MAX_STORY_BYTES:
                raise SystemExit(f"{path}: a story of over {MAX_STORY_BYTES >> 20} MB. {HINT}")
            if jsonl:
                stories = [json_story(line) for line in stories if line.strip()]
                if None in stories:
                    raise SystemExit(f"{path} looks like JSON. Write one object per line, with the "
                                     'story in the field "text" or "story".')
            texts = [clean(text, counts) for story in stories for text in story.split(EOT.encode())]
            if more and separator == EOT and not jsonl:
                counts["dropped: empty"] += texts.count("")     # nothing follows the last one
            yield [text for text in texts if text]
            bar.update(len(more))


def json_story(line):
    """The story in a line of JSON (bytes), or None."""
    try:
        row = json.loads(line)
        return row.get("text", row.get("story")).encode("utf-8", "replace")
    except (ValueError, AttributeError, RecursionError):
        return None


def clean(story, counts):
    """Bytes of a story -> its text, with known faults of the data repaired and counted."""
    text = story.decode("utf-8", errors="replace")
    if "\ufffd" in text or "\0" in text:
        counts["lost characters: not UTF-8"] += 1
    if "â€" in text:
        counts["repaired: double-encoded quotes"] += 1
        for wrong, right in REPAIRS.items():
            text = text.replace(wrong, right)
    if len(text) > 1_000 and re.search(r"\s{1000}", text):      # tiktoken fails on a million
        counts["repaired: long runs of white space"] += 1
        text = re.sub(r"(\s\s)\s{998,}", r"\1", text)
    return text.replace("\r\n", "\n").strip("\ufeff \t\r\n")


# -------------------------------------------------------------------------------------- tokenizers

def make_encoding(ranks, pattern=GPT2_PATTERN):
    return tiktoken.Encoding("stories", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={EOT: len(ranks)})


def encode_stories(encoding, stories):
    """Stories -> the ids of their tokens, each story followed by the end token: (N,) uint32."""
    texts = [EOT.join([*stories[i:i + 256], ""]) for i in range(0, len(stories), 256)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # tiktoken releases the GIL
        rows = pool.map(lambda text: encoding.encode_to_numpy(text, allowed_special={EOT}), texts)
        return np.concatenate([np.zeros(0, np.uint32), *rows])


def gpt2_ranks():
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:          # its download can raise anything
        raise SystemExit(f"tiktoken cannot download GPT-2's vocabulary ({type(error).__name__}). "
                         "Use --tokenizer bpe, or set TIKTOKEN_CACHE_DIR to a folder that has it.")


def make_tokenizer(kind, vocab_size, paths, separator=EOT):
    """kind: gpt2 (its most frequent tokens), bpe (learned from the text), or the folder of another
    tokenizer -> tiktoken.Encoding."""
    if kind not in ("gpt2", "bpe"):
        return load_tokenizer(kind)
    full = make_encoding(gpt2_ranks()) if kind == "gpt2" else None
    words, tokens, n = Counter(), np.zeros(50_257, int), 0
    for stories in (part for path in paths for part in read_stories(path, Counter(), separator)):
        n += sum(map(len, stories))
        if kind == "gpt2":
            tokens += np.bincount(encode_stories(full, stories), minlength=len(tokens))
        else:
            found = (word for story in stories for word in regex.findall(BPE_PATTERN, story))
            words.update(word for word in found if len(word) < 1_000)
        if n > BPE_SAMPLE:
            break
    if kind == "bpe":
        ranks = {bytes([byte]): byte for byte in range(256)}
        for left, right in train_bpe(words, vocab_size):
            ranks.setdefault(left + right, len(ranks))
        return make_encoding(ranks, BPE_PATTERN)
    if tokens.sum() > 0.7 * n:
        print(f"GPT-2's tokenizer needs {tokens.sum() / n:.1f} tokens per character of this text. "
              "Better: --tokenizer bpe, which is learned from it.")
    ranks = full._mergeable_ranks
    return full if vocab_size > len(ranks) else make_encoding(prune_bpe(ranks, tokens, vocab_size))


# -------------------------------------------------------------------------------- prepared folders

def save_tokenizer(folder, ranks):
    with atomic_write(folder / "tokenizer.tiktoken") as file:
        for token, rank in ranks.items():
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def damaged(path, why, meta={}):
    name = path.parent.name if path.parent.parent == HERE / "data" else path.parent
    command = meta.get("command", f"python prepare.py {name} [--input FILE]")
    return SystemExit(f"{path} is missing, damaged or from an older version ({why}). Make the data "
                      f"set again: {command} --force. A run's folder has copies of its data.")


def read_meta(folder):
    """Read and check the meta.json of a data set or a run -> dict."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        good = type(meta["vocab_size"]) is int and type(meta["eot"]) is int
        for key in ("dataset", "source", "command", "pattern"):
            good &= isinstance(meta.get(key, ""), str)
        for key in ("train", "val", "counts", "crc32", "entropy_bound"):
            good &= all(isinstance(n, (int, float)) for n in meta.get(key, {}).values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, type(error).__name__)
    if not good:
        raise damaged(path, "a value has the wrong type")
    return meta


def load_tokenizer(folder):
    """Read and check the tokenizer of a data set or a run -> tiktoken.Encoding, whose eot_token
    ends a story."""
    path = Path(folder) / "tokenizer.tiktoken"
    meta = read_meta(folder) if path.with_name("meta.json").exists() else {}
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        n, crc32 = len(ranks), zlib.crc32(file_bytes(path))
        if (sorted(ranks.values()) != list(range(len(pairs)))
                or not all(bytes([byte]) in ranks for byte in range(256))):
            raise ValueError("some bytes or ranks are missing")
        if ((meta.get("vocab_size", n + 1), meta.get("eot", n)) != (n + 1, n)
                or meta.get("crc32", {}).get(path.name, crc32) != crc32):
            raise ValueError("it does not match meta.json")
        return make_encoding(ranks, meta.get("pattern", GPT2_PATTERN))
    except (OSError, ValueError) as error:
        raise damaged(path, error, meta)


def verify_dataset(folder):
    """Compare a data set's files with the checksums in meta.json -> meta."""
    meta = read_meta(folder)
    for name in ("train.bin", "val.bin", "tokenizer.tiktoken"):
        path, crc32 = Path(folder) / name, meta.get("crc32", {}).get(name)
        if not path.is_file() or zlib.crc32(file_bytes(path)) != crc32:
            raise damaged(path, "it does not match meta.json", meta)
    for split in ("train", "val"):
        tokens = meta.get(split, {}).get("tokens", 0)
        if os.path.getsize(Path(folder) / f"{split}.bin") != 2 * tokens:
            raise damaged(Path(folder) / "meta.json", f"wrong number of {split} tokens", meta)
    return meta


def encode(paths, separator, keep_duplicates, held_out=(), encoding=None, folder=None):
    """Write train.bin and val.bin -> statistics, counts of what was repaired or dropped, and the
    hashes of the stories. Without an encoding, only check the text.

    paths: {split: files}. held_out: hashes of training stories that become validation."""
    stats = {split: Counter(stories=0, tokens=0, bytes=0) for split in ("train", "val")}
    counts, seen = Counter(), {}                        # seen: hash of a story -> its split
    n, n_characters, n_lost = 0, 1, 0
    for split, path in [(split, path) for split in sorted(paths)[::-1] for path in paths[split]]:
        for stories in read_stories(path, counts, separator):
            n += len(stories)
            chosen = {"train": [], "val": []}
            for story in stories:
                n_characters += len(story)
                n_lost += story.count("\ufffd") + story.count("\0")
                key = int(hashlib.blake2b(story.encode(), digest_size=8).hexdigest(), 16)
                target = "val" if key in held_out else split
                if key in seen and split == "train" and not keep_duplicates:
                    where = "repeated" if seen[key] == target else "also in validation"
                    counts[f"dropped: {where}"] += 1
                    continue
                seen[key] = target
                chosen[target].append(story)
            for target, texts in chosen.items():
                stats[target]["stories"] += len(texts)
                if encoding:
                    ids = encode_stories(encoding, texts)
                    stats[target]["tokens"] += len(ids)
                    stats[target]["bytes"] += sum(len(text.encode()) for text in texts)
                    with open(folder / f"{target}.bin", "ab") as file:
                        file.write(ids.astype(np.uint16).tobytes())
    names = ", ".join(str(path) for files in paths.values() for path in files)
    n_damaged = counts["lost characters: not UTF-8"]
    if n_lost > 0.02 * n_characters or n_damaged > max(2, 0.02 * n):
        raise SystemExit(f"{names}: {n_damaged:,} of {n:,} stories are not UTF-8. If it is text in "
                         "another encoding (and not compressed), convert it, for example: "
                         "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW")
    needed = 2 if encoding or "val" in paths else 3     # two for training, one for validation
    if stats["train"]["stories"] < needed or "val" in paths and not stats["val"]["stories"]:
        raise SystemExit(f"{names}: {n} {'story' if n == 1 else 'stories'} found, of which "
                         f"{stats['train']['stories']} can be used for training and "
                         f"{stats['val']['stories']} for validation. {HINT}")
    return stats, +counts, seen


def prepare_dataset(args, folder):
    """Prepare data/<name>: write all files to .part, then move them."""
    grammar = args.grammar or (GRAMMAR if args.name in SAMPLES else None)
    paths = {split: files for split, files in (("val", args.valid), ("train", args.input)) if files}
    text = [grammar_hash(grammar), SAMPLE_STORIES] if grammar else [SOURCES.get(args.name)] + [
        file_sha256(path) for files in paths.values() for path in files]
    text = hashlib.sha256(json.dumps(text).encode()).hexdigest()
    if not args.force and (folder / "meta.json").exists():
        meta = verify_dataset(folder)
        if (meta.get("command"), meta.get("text")) != (args.command, text):
            raise SystemExit(f"{folder} exists already, from another text or command "
                             f"({meta.get('command')}). Add --force, or choose another name.")
        return print(f"{folder} is ready: {meta['train']['tokens']:,} tokens (--force: again)")

    part, source, nats = folder / ".part", "own text", 0.0
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        if grammar:
            source = "data/grammar.txt" if grammar == GRAMMAR else str(grammar)
            paths, nats = write_synthetic_stories(part, grammar, args.name == "sample-instruct")
        elif args.name in SOURCES:
            repo, revision, files = SOURCES[args.name]
            source = f"https://huggingface.co/datasets/{repo}/tree/{revision}"
            for split, (file, size, sha256) in files.items():
                paths[split] = [folder / file]
                download(hub_url(repo, revision, file), folder / file, size, sha256)
        *_, hashes = encode(paths, args.separator, args.keep_duplicates)    # is the text usable?
        n_val = 0 if "val" in paths else max(1, len(hashes) // 100, min(len(hashes) // 10, 50))
        held_out = set(sorted(hashes)[:n_val])
        encoding = make_tokenizer(args.tokenizer or ("bpe" if grammar else "gpt2"),
                                  args.vocab_size or (2_048 if grammar else 10_000),
                                  paths["train"], args.separator)
        if encoding.n_vocab > 65_536:
            raise SystemExit(f"A vocabulary of {encoding.n_vocab:,} does not fit uint16 (65,536).")
        stats, counts, _ = encode(paths, args.separator, args.keep_duplicates, held_out, encoding,
                                  part)
        save_tokenizer(part, encoding._mergeable_ranks)
        first = next(story for stories in read_stories(paths["train"][0], Counter(), args.separator)
                     for story in stories)
        meta = {"dataset": folder.name, "command": args.command, "source": source, "text": text,
                "files": {split: [path.name for path in files] for split, files in paths.items()},
                "instruct": re.match("|".join(FIELDS), first) is not None, "dtype": "uint16",
                "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                "pattern": encoding._pat_str, **stats, "counts": counts,
                "crc32": {path.name: zlib.crc32(file_bytes(path)) for path in part.iterdir()}}
        if grammar:
            meta |= {"grammar": grammar_hash(grammar), "entropy_bound": {
                "nats_per_token": nats / stats["val"]["tokens"],
                "bits_per_byte": nats / math.log(2) / stats["val"]["bytes"]}}
        write_text(part / "meta.json", json.dumps(meta, indent=1))
        (folder / "meta.json").unlink(missing_ok=True)      # marks a complete data set
        for path in sorted(part.iterdir(), key=lambda path: path.name == "meta.json"):
            os.replace(path, folder / path.name)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise SystemExit(f"The disk is full ({folder}). Free some space and try again.")
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for split in ("train", "val"):
        print(f"{split:5}  " + ", ".join(f"{n:,} {what}" for what, n in stats[split].items()))
    print(f"vocabulary of {encoding.n_vocab:,}, "
          f"{stats['train']['bytes'] / stats['train']['tokens']:.2f} bytes per token",
          *(f"{what}: {n:,} stories" for what, n in sorted(counts.items())), sep="\n")
    if grammar:
        print("entropy of the grammar, a lower bound of the loss: "
              f"{meta['entropy_bound']['nats_per_token']:.4f} nats per token")


def text_file(name):
    if not os.path.isfile(name):
        raise argparse.ArgumentTypeError(f"{name} is not a file (it is missing, or a folder)")
    return Path(name)


def main(argv=None):
    setup_console()
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, known = parser.add_argument, [*SAMPLES, *SOURCES]
    add("name", help=f"{', '.join(known)}, or a new name with --input or --grammar")
    add("--input", nargs="+", type=text_file, help="your own text files, or JSON lines")
    add("--valid", nargs="+", type=text_file, help="validation text (default: part of the input)")
    add("--separator", default=EOT, help=r"between stories: \n, \n\n, ... (default: %(default)s)")
    add("--grammar", type=text_file, help="generate stories from a file like data/grammar.txt")
    add("--tokenizer", help="gpt2, bpe (learned from the text), or the folder of another tokenizer")
    add("--vocab_size", type=int, help="maximum (default: 10000; for a grammar 2048)")
    add("--keep_duplicates", action="store_true", help="keep repeated stories")
    add("--force", action="store_true", help="prepare it again")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "prepare.py", *(arg for arg in argv if arg != "--force")])
    args.separator = args.separator.replace("\\n", "\n") or parser.error("--separator is empty")
    own = bool(args.input) + bool(args.grammar)
    if own != (args.name not in known) or args.valid and not args.input:
        parser.error(f"{', '.join(known)} have their own text; every other name needs either "
                     "--input FILE or --grammar FILE")
    if args.vocab_size is not None and not 257 <= args.vocab_size <= 65_536:
        parser.error("--vocab_size must be between 257 (all bytes and the end token) and 65536")
    if args.tokenizer not in (None, "gpt2", "bpe") and not (
            Path(args.tokenizer) / "tokenizer.tiktoken").is_file():
        parser.error("--tokenizer must be gpt2, bpe, or a folder that contains tokenizer.tiktoken")
    folder = HERE / "data" / args.name
    if folder.is_file() or (folder / "ckpt.pt").exists() or folder.resolve() in (
            HERE / "data", *(HERE / "data").parents):
        parser.error(f"{folder} is not the folder of a data set; choose another name")
    if args.grammar and (folder / "train.txt").exists() and not (folder / "meta.json").exists():
        parser.error(f"{folder}/train.txt exists and would be replaced; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):        # wait for another prepare.py
        prepare_dataset(args, folder)


if __name__ == "__main__":
    main()
