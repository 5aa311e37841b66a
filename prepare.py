"""How do stories become the numbers that a model reads?

    python prepare.py sample             # from data/grammar.txt: no download, half a minute
    python prepare.py sample-instruct    # the same as records of TinyStories-Instruct
    python prepare.py tinystories-small  # TinyStories' validation file: 19 MB
    python prepare.py tinystories        # the paper's training data: 1.9 GB
    python prepare.py tinystories-v2     # stories by GPT-4 only: 2.2 GB
    python prepare.py instruct           # TinyStories-Instruct: 2.7 GB
    python prepare.py mine --input stories.txt  # your own text, in any language
    python prepare.py mine --grammar plots.txt  # your own grammar

Writes data/<name>/: train.bin and val.bin (uint16 token ids; <|endoftext|> ends each story),
tokenizer.tiktoken and meta.json.
"""

import argparse
import base64
import hashlib
import json
import os
import random
import shlex
import shutil
import sys
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock

from data import common
from data.bpe import encode_stories, gpt2_ranks, learn_bpe, make_encoding, prune_gpt2
from data.grammar import FIELDS, GRAMMAR, SAMPLE_STORIES, Story, read_grammar
from data.text import CHUNK_BYTES, EOT, HINT, read_stories

HERE = Path(__file__).resolve().parent
BPE_SAMPLE_BYTES = 100 << 20  # of the text from which a tokenizer is made
FILES = ("train.bin", "val.bin", "tokenizer.tiktoken")  # of a data set, with meta.json

# Repository and revision on Hugging Face, and the files of each split.
REPO = "roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
SOURCES = {
    "tinystories-small": (*REPO, {"train": "TinyStories-valid.txt"}),
    "tinystories": (*REPO, {"val": "TinyStories-valid.txt", "train": "TinyStories-train.txt"}),
    "tinystories-v2": (*REPO, {"val": "TinyStoriesV2-GPT4-valid.txt",
                       "train": "TinyStoriesV2-GPT4-train.txt"}),
    "instruct": ("roneneldan/TinyStoriesInstruct", "1282fc1059eaf0aad1f30459a25530f44343f2a2",
                 {"val": "TinyStories-Instruct-valid.txt",
                  "train": "TinyStories-Instruct-train.txt"}),
}
SAMPLES = ("sample", "sample-instruct")  # generated from data/grammar.txt


# -------------------- text to stories

def json_hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def grammar_hash(path=GRAMMAR):
    """Hash of the stories that a grammar generates. Its comments do not change it."""
    return json_hash([read_grammar(path), SAMPLE_STORIES])


def grammar_changed(meta):
    """Whether data/grammar.txt has changed since this data set was generated from it."""
    return meta.get("source") == "data/grammar.txt" and meta["text_hash"] != grammar_hash()


def write_synthetic_stories(folder, grammar, instruct):
    """Write val.txt and train.txt -> {split: nats of all choices in its stories}."""
    rules, plots = read_grammar(grammar)
    nats, number = Counter(), 0
    for split, n in SAMPLE_STORIES.items():
        path = folder / f"{split}.txt"
        bar = common.progress(split, n, unit="")
        with bar, open(path, "w", encoding="utf-8", newline="\n") as file:
            for _ in range(n):
                story = Story(rules, plots, random.Random(f"0-{number}"))
                file.write((story.record() if instruct else story.text) + f"\n{EOT}\n")
                nats[split] += story.nats
                number += 1
                bar.update()
    return nats


def read_all(files, separator):
    """Yield lists of stories. files: [(split, path)]."""
    for _, path in files:
        yield from read_stories(path, Counter(), separator)


def choose_splits(files, separator):
    """Check all text -> for each story its split, or None for a repeated one; and counts of what
    was repaired or dropped. Without validation files, some training stories become validation."""
    counts, seen, splits = Counter(), {}, []  # seen: hash of a story -> its position
    n_characters = n_lost = 0
    for split, path in files:
        for stories in read_stories(path, counts, separator):
            for story in stories:
                n_characters += len(story)
                n_lost += story.count("\ufffd") + story.count("\0")
                key = hashlib.blake2b(story.encode(), digest_size=8).digest()
                repeated = split == "train" and key in seen
                counts["dropped: repeated"] += repeated
                splits.append(None if repeated else split)
                seen.setdefault(key, len(splits) - 1)
    if "val" not in dict(files):
        n_val = max(1, len(seen) // 100, min(len(seen) // 10, 50))  # 1 %; of little text, 10 %
        for key in sorted(seen)[:n_val]:  # by hash: as if at random
            splits[seen[key]] = "val"
    names = ", ".join(str(path) for _, path in files)
    n_wrong, n_nul = counts["damaged: not UTF-8"], counts["damaged: NUL characters"]
    if n_lost > 0.02 * n_characters or n_wrong + n_nul > max(2, 0.02 * len(splits)):
        encoding = "UTF-16" if n_nul else "WINDOWS-1252"
        raise SystemExit(f"{names}: of {len(splits):,} stories, {n_wrong:,} are not UTF-8 and "
                         f"{n_nul:,} contain NUL characters, as UTF-16 and binary files do. If it "
                         f"is text, convert it: iconv -f {encoding} -t UTF-8 OLD > NEW")
    n_train, n_val, n_repeated = map(splits.count, ("train", "val", None))
    if n_train < 2 or n_val < 1:
        raise SystemExit(f"{names}: too few stories: {n_train} for training, {n_val} for "
                         f"validation, {n_repeated} repeated. {'' if n_repeated else HINT}")
    return splits, +counts  # + drops zeros


# -------------------- prepared folders

def write_meta(folder, meta):
    """Write meta.json, with checksums of the files next to it and of its own entries."""
    paths = [Path(folder) / name for name in FILES if (Path(folder) / name).exists()]
    meta = {**meta, "crc32": {path.name: zlib.crc32(common.file_bytes(path)) for path in paths}}
    meta.pop("checksum", None)
    meta["checksum"] = json_hash(meta)
    common.write_text(Path(folder) / "meta.json", json.dumps(meta, indent=1))


def read_meta(folder, *files):
    """Read the meta.json of a data set or a run, and check it and these files next to it."""
    path, command = Path(folder) / "meta.json", "python prepare.py NAME"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        command = meta.get("command", command)
        if meta.pop("checksum", None) != json_hash(meta):
            raise ValueError("its checksum is wrong")
        for name in files:
            path = path.with_name(name)
            if zlib.crc32(common.file_bytes(path)) != meta["crc32"].get(name):
                raise ValueError("its checksum is wrong")
        return meta
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SystemExit(common.printable(
            f"{path} is missing, damaged or from an older version ({error}). Make the data set "
            f"again: {command} --force. If {folder} is a run, copy the file from its data set."))


def save_tokenizer(folder, ranks):
    with common.atomic_write(folder / "tokenizer.tiktoken") as file:
        for token, rank in ranks.items():
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def load_tokenizer(folder):
    """The tokenizer of a data set or a run: a tiktoken.Encoding, whose eot_token ends a story."""
    meta, ranks = read_meta(folder, "tokenizer.tiktoken"), {}
    lines = (Path(folder) / "tokenizer.tiktoken").read_bytes().splitlines()
    for line in lines:
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    n = len(lines)
    if (sorted(ranks.values()) != [*range(n)] or not all(bytes([i]) in ranks for i in range(256))
            or (meta["vocab_size"], meta["eot"]) != (n + 1, n)):
        raise SystemExit(f"{folder}: the tokenizer lacks tokens or does not match meta.json")
    return make_encoding(ranks, meta.get("pattern"))


def encode(files, separator, splits, encoding, folder):
    """Write train.bin and val.bin -> {split: its numbers of stories, tokens and bytes}."""
    stats, splits = {"train": Counter(), "val": Counter()}, iter(splits)
    for stories in read_all(files, separator):
        chosen = {"train": [], "val": [], None: []}
        for story, split in zip(stories, splits):
            chosen[split].append(story)
        for split in stats:
            ids = encode_stories(encoding, chosen[split])
            with open(folder / f"{split}.bin", "ab") as file:
                file.write(ids.astype(np.uint16).tobytes())
            stats[split].update(stories=len(chosen[split]), tokens=len(ids),
                                bytes=len("".join(chosen[split]).encode()))
    return stats


def prepare_dataset(args, folder):
    """Prepare data/<name>: write all files to the folder .part, then move them."""
    grammar = GRAMMAR if args.name in SAMPLES else args.grammar
    files = [("val", path) for path in args.val] + [("train", path) for path in args.input]
    text_hash = grammar_hash(grammar) if grammar else json_hash(
        [SOURCES.get(args.name), *(common.file_sha256(path) for _, path in files)])
    if (folder / "meta.json").exists() and not args.force:
        meta = read_meta(folder, *FILES)
        if (meta["command"], meta["text_hash"]) != (args.command, text_hash):
            raise SystemExit(f"{folder} exists already, from another text or command "
                             f"({meta['command']}). Add --force, or choose another name.")
        print(f"{folder} is ready: {meta['train']['tokens']:,} tokens (--force makes it again)")
        return

    part, source = folder / ".part", "own text"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        if grammar:
            source = "data/grammar.txt" if grammar == GRAMMAR else str(grammar)
            nats = write_synthetic_stories(part, grammar, args.name == "sample-instruct")
            files = [(split, part / f"{split}.txt") for split in nats]
        elif args.name in SOURCES:
            repo, revision, names = SOURCES[args.name]
            source = f"https://huggingface.co/datasets/{repo}/tree/{revision}"
            files = [(split, folder / name) for split, name in names.items()]
            for _, path in files:
                url = common.hub_url(repo, revision, path.name)
                common.download(url, path)
        splits, counts = choose_splits(files, args.separator)
        sample = read_all([file for file in files if file[0] == "train"], args.separator)
        sample = islice(sample, BPE_SAMPLE_BYTES // CHUNK_BYTES)
        kind = args.tokenizer or ("bpe" if grammar else "gpt2")
        vocab_size = args.vocab_size or (2_048 if grammar else 10_000)
        if kind == "bpe":
            encoding = learn_bpe(sample, vocab_size)
        elif kind == "gpt2":
            encoding = prune_gpt2(gpt2_ranks(), sample, vocab_size)
        else:
            encoding = load_tokenizer(kind)
        stats = encode(files, args.separator, splits, encoding, part)
        save_tokenizer(part, encoding._mergeable_ranks)
        beginning = encoding.decode(np.fromfile(part / "train.bin", np.uint16, 30).tolist())
        meta = {"dataset": folder.name, "command": args.command, "source": source,
                "text_hash": text_hash, "instruct": beginning.startswith(FIELDS),
                "dtype": "uint16", "vocab_size": encoding.n_vocab, "eot": encoding.eot_token,
                "pattern": encoding._pat_str, **stats, "counts": counts}
        if grammar:
            meta["entropy_floor"] = nats["val"] / stats["val"]["tokens"]  # nats per token
        write_meta(part, meta)
        (folder / "meta.json").unlink(missing_ok=True)  # moved last: marks complete data
        for path in sorted(part.iterdir(), key=lambda path: path.name == "meta.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{folder}: a vocabulary of {encoding.n_vocab:,} tokens")
    for split in ("train", "val"):
        print(f"{split:5}  " + ", ".join(f"{n:,} {what}" for what, n in stats[split].items()))
    for what, n in counts.items():
        print(f"{what}: {n:,} stories")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, known = parser.add_argument, [*SAMPLES, *SOURCES]
    add("name", help=f"{', '.join(known)}, or a new name with --input or --grammar")
    add("--input", nargs="+", type=Path, default=[], help="your own text files, or JSON lines")
    add("--val", "--valid", nargs="+", type=Path, default=[],
        help="validation text (default: part of the input)")
    add("--separator", default=EOT, help=r"between stories: \n, \n\n, ... (default: %(default)s)")
    add("--grammar", type=Path, help="generate stories from a file like data/grammar.txt")
    add("--tokenizer", help="gpt2, bpe (learned from the text), or the folder of another tokenizer")
    add("--vocab_size", type=int, help="maximum (default: 10000; for a grammar 2048)")
    add("--force", action="store_true", help="prepare it again")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "prepare.py", *(arg for arg in argv if arg != "--force")])
    args.separator = args.separator.replace("\\n", "\n") or parser.error("--separator is empty")
    for path in [*args.input, *args.val, args.grammar]:
        if path and not path.is_file():
            parser.error(f"{path} is not a file")
    sources = args.name in known, bool(args.input), bool(args.grammar)
    if sum(sources) != 1 or args.val and not args.input:
        parser.error(f"{', '.join(known)} have their own text; every other name needs either "
                     "--input FILE or --grammar FILE")
    if args.vocab_size is not None and not 257 <= args.vocab_size <= 65_536:
        parser.error("--vocab_size must be between 257 (all bytes and the end token) and 65536")
    if args.tokenizer not in (None, "gpt2", "bpe"):
        if args.vocab_size is not None:
            parser.error("--vocab_size is for a new tokenizer; that of --tokenizer FOLDER is fixed")
        if not Path(args.tokenizer, "tokenizer.tiktoken").is_file():
            parser.error("--tokenizer must be gpt2, bpe, or a folder that has a tokenizer.tiktoken")
    folder = HERE / "data" / args.name
    is_run = (folder / "ckpt.pt").exists()
    is_parent = (HERE / "data").is_relative_to(folder.resolve())  # NAME is . or ..
    own_text = (folder / "train.txt").exists() and not (folder / "meta.json").exists()
    if folder.is_file() or is_run or is_parent or args.grammar and own_text:
        parser.error(f"{folder} has other files; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # wait for another prepare.py
        prepare_dataset(args, folder)


if __name__ == "__main__":
    common.setup_console()
    main()
