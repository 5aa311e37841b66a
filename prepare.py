"""How do stories become the numbers that a model reads?

    python prepare.py sample           # told by data/grammar.txt: no download, half a minute
    python prepare.py tinystories      # what the paper trained on (V1): a download of 1.9 GB
    python prepare.py tinystories-v2   # the part of it that GPT-4 wrote, and more: 2.2 GB
    python prepare.py instruct         # TinyStories-Instruct: 2.7 GB
    python prepare.py sample-instruct  # the same from the grammar
    python prepare.py instruct --ood   # data/instruct-ood: no summary together with words in train
    python prepare.py mine --input stories.txt [--valid other.txt]   # your own, in any language

It writes data/<name>/train.bin and val.bin (uint16 token ids; the id of <|endoftext|> follows each
story), tokenizer.tiktoken (the tokens in order of rank, as tiktoken stores them) and, last,
meta.json: without it, nothing is there. A text of 1.9 GB took three minutes of two CPU cores, and
0.3 GB of memory.
"""

import argparse
import base64
import contextlib
import difflib
import errno
import hashlib
import heapq
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
GRAMMAR = HERE / "data" / "grammar.txt"
MARK = "<|endoftext|>"      # stands between stories in the text files, and is one token
PACKED = b"\x1f\x8b", b"PK\3\4", b"PAR1", b"BZh", b"\xff\xfe", b"\xfe\xff"    # or UTF-16
PIECE = 4 << 20             # bytes read at a time
LONGEST = 64 << 20          # bytes of the longest story that we take
COUNTED = 100 << 20         # bytes of text from which a tokenizer is made
# How GPT-2 cuts text before it merges bytes: 's and the like, words, numbers, signs, blanks.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# On the hub: repository, revision, and the file, size and sha256 of each split (None: it is asked).
V1 = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
SOURCES = {
    "tinystories": ("roneneldan/TinyStories", V1, {
        "val": ("TinyStories-valid.txt", 19_447_282,
                "94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4"),
        "train": ("TinyStories-train.txt", 1_924_281_556,
                  "c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f")}),
    "tinystories-v2": ("roneneldan/TinyStories", V1, {
        "val": ("TinyStoriesV2-GPT4-valid.txt", 22_502_601,
                "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"),
        "train": ("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
                  "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443")}),
    "instruct": ("roneneldan/TinyStoriesInstruct", "1282fc1059eaf0aad1f30459a25530f44343f2a2", {
        "val": ("TinyStories-Instruct-valid.txt", None,
                "68559e01675940bd415fe0b629406897d6f6bfd40067ff411a9b1daf78260c05"),
        "train": ("TinyStories-Instruct-train.txt", None, None)}),
}
SOURCES["instruct-ood"] = SOURCES["instruct"]
SAMPLES = ("sample", "sample-instruct", "sample-instruct-ood")      # told by the grammar
SAMPLE_STORIES = {"val": 1_000, "train": 30_000}


def command(work, *arguments, folder=None):
    """Do the work of a script and leave with the exit code that it returns. Whatever can come in
    its way from outside ends in a sentence. folder: what it must have for itself meanwhile."""
    for stream in (sys.stdout, sys.stderr):     # a console that lacks a character shows a ?
        if hasattr(stream, "reconfigure"):      # a notebook's needs none
            stream.reconfigure(errors="replace")
    lock = None
    try:
        lock = claim(folder) if folder else None
        code = work(*arguments)
        sys.stdout.flush()
    except (KeyboardInterrupt, EOFError):
        print("\nStopped. Where the work is a long one, the same command goes on with it.",
              file=sys.stderr)
        code = 130
    except BrokenPipeError:                     # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            what = f"Cannot read or write {error.filename}: " if error.filename else ""
            raise SystemExit(f"{what}{error.strerror or error}.")
        free = f": {shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in {folder}" \
            if folder and folder.is_dir() else ""
        raise SystemExit(f"The disk is full{free}. Make room and run the same command again.")
    except (MemoryError, RuntimeError) as error:
        torch_says = re.search("out of memory|can't allocate", str(error))
        if not torch_says and not isinstance(error, MemoryError):
            raise
        why = str(error).partition("\n")[0].partition(" GPU ")[0][:100] or type(error).__name__
        raise SystemExit(f"The memory does not suffice ({why}). Ask for less at a time (train.py: "
                         "--micro_batch=16, then 4, which changes no result), or for a smaller "
                         "model.")
    finally:
        if lock is not None:
            os.close(lock)
    if code:
        raise SystemExit(code)


def claim(folder):
    """Make a folder and lock it: a second command that wants it waits. The lock ends with its
    process, however that ends -> what closes it, or None where folders have no locks (Windows)."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another command is at work in {folder}; waiting for its end.", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:                             # some disks of a network have none, either
        pass
    return lock


@contextlib.contextmanager
def whole(path):
    """Write a file whole or not at all: what is opened is a temporary one, which takes its place in
    the end. Whatever goes wrong, what was there before stays."""
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
    with whole(path) as file:
        file.write(text.encode())


def write_picture(path, figure):
    with whole(path) as file:
        figure.savefig(file, dpi=120)


# ---------------------------------------------------------------------------- the grammar's stories

FIELDS = ("Features", "Words", "Summary", "Random sentence")
FIELD_ORDERS = [order for n in range(1, 5) for order in itertools.permutations(FIELDS, n)]


def read_grammar(path):
    """Read a grammar file (its head explains the format) -> rules, plots.

    rules: {name: (is a variable, entries)}, an entry: {form: text}, whose form "" is the entry
    itself; plots: dicts of name, words, summary, scenes."""
    text = re.sub(r"(?m)^#.*\n", "", Path(path).read_text(encoding="utf-8"))
    text = re.sub(r"\n[ \t]+(?=\S)", " ", text)
    rule, fact = r"(?m)^(\w+)(?: \((.*?)\))? ([=:]) (.*)", r"(?m)^(words|summary) (.*)"
    rules, plots = {}, []
    for name, shared, kind, ways in re.findall(rule, text):
        entries = []
        for way in ways.split(" | "):
            way, own = re.fullmatch(r"(.*?)(?: \((.*=.*)\))?", way.strip()).groups("")
            if not way or way != way.strip("|") or way.count("{") != way.count("}"):
                raise SystemExit(f"{path}: a way of the rule {name!r} is empty, or cut in a brace "
                                 "(inside {...}, no blanks around |).")
            pairs = re.findall(r"(\w+)=([^,]*)", f"{shared}, {own}")
            entries.append({**dict(pairs), "": way})
        rules[name] = kind == "=", entries
    strange, *told = re.split(r"(?m)^plot ", re.sub(rule, "", text))
    if strange := strange.strip():
        raise SystemExit(f"{path}: neither a rule nor part of a plot: {strange[:60]!r}")
    for text in told or ["(none)"]:
        name, _, text = text.partition("\n")
        scenes = re.split(r"\n\s*\n", re.sub(fact, "", text).strip())
        plots.append({"name": name, **dict(re.findall(fact, text)),
                      "scenes": [scene.split("\n") for scene in scenes if scene]})
        for key in ("words", "summary", "scenes"):
            if not plots[-1].get(key):
                raise SystemExit(f"{path}: the plot {name} has no {key}.")
    return rules, plots


class Story:
    """One walk through the grammar. Each choice among n ways adds log n to `nats`: minus the
    log-probability of the walk, and so an upper bound on that of its text (another walk may lead
    to the same words)."""

    def __init__(self, rules, plots, rng):
        self.rules, self.rng, self.nats, self.held = rules, rng, 0.0, {}
        self.plot = self.choose(plots)
        told = "\n\n".join(self.tell(self.choose(scene)) for scene in self.plot["scenes"])
        self.features = {*re.findall(r"\[(\w+)\]", told), *(["Dialogue"] if '"' in told else [])}
        self.text = re.sub(r" ?\[\w+\]", "", told)

    def choose(self, ways):
        self.nats += math.log(len(ways))
        return self.rng.choice(ways)

    def tell(self, text):
        """Fill every {...} of a text, and say "an" where it must be."""
        try:
            filled = re.sub(r"\{([^{}]*)\}", lambda match: self.fill(match[1]), text)
            if torn := re.search(r"[{}][^ ]*", filled):
                raise KeyError(torn[0])
        except KeyError as error:
            raise SystemExit(f"The grammar cannot tell its plot {self.plot['name']!r}: {error} is "
                             f"no rule, and no form of one, in {text!r}.")
        except RecursionError:
            raise SystemExit(f"The grammar cannot tell its plot {self.plot['name']!r}: two of its "
                             "rules name each other, or a list is too short for its variables.")
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", filled)

    def fill(self, inside):
        if "|" in inside:                               # {red|blue}: one of these
            return self.choose(inside.split("|"))
        name, _, form = inside.partition(".")           # {toy}, {Toy}, {hero.he}, {hero.He}
        capital = (form or name)[:1].isupper()
        name, form = name[:1].lower() + name[1:], form.lower()
        forms = self.held.get(name) or self.draw(name)
        if self.rules[name][0] and name not in self.held:
            if forms[""] in [held[""] for held in self.held.values()]:
                return self.fill(inside)                # no two variables hold the same text
            self.held[name] = forms
        return forms[form][:1].upper() + forms[form][1:] if capital else forms[form]

    def draw(self, name):
        """Draw an entry of a rule -> {form: text}."""
        entry = self.choose(self.rules[name][1])
        if inner := re.fullmatch(r"\{(\w+)\}", entry[""]):      # a list of lists: the inner
            drawn = self.draw(inner[1])                         # brings its forms
            return {**drawn, **entry, "": drawn[""]}
        text = self.tell(entry[""])
        appended = {end: text + end for end in ("s", "ed", "ing")}  # for lack of forms of its own
        return {**appended, **entry, "": text}

    def record(self):
        return write_record(self.text, self.choose, {
            "Features": ", ".join(sorted(self.features)), "Words": self.tell(self.plot["words"]),
            "Summary": self.tell(self.plot["summary"])})


def instructions(values):
    """What asks for a story, in the layout of TinyStories-Instruct. values: {field: text}."""
    return "\n".join([*(f"{field}: {text}" for field, text in values.items()), "Story:"])


def write_record(text, choose, values):
    """A story as TinyStories-Instruct has it: some fields in some order, then the story. choose:
    picks from a list; values: {field: text, or "" if there is none}, but for the sentence."""
    sentences = re.split(r'(?:(?<=[.!?])|(?<=[.!?]["”]))\s+(?![a-z])', text)[1:]
    whole = [one for one in sentences if "\n" not in one and       # no half of a quotation
             len(re.findall('["“”]', one)) % 2 == 0]
    values = {**values, "Random sentence": choose(whole or [""])}
    order = choose([order for order in FIELD_ORDERS if all(map(values.get, order))])
    return f"{instructions({field: values[field] for field in order})} \n\n{text}"


def sample_text():
    """What the sample is told by: when it changes, the sample must be told anew."""
    return [file_sha256(GRAMMAR), SAMPLE_STORIES]


def tell_sample(folder, instruct):
    """Write train.txt and val.txt -> their paths, and the nats that the grammar spent on val."""
    rules, plots = read_grammar(GRAMMAR)
    paths, nats, numbers = {}, 0.0, itertools.count()
    for split, stories in SAMPLE_STORIES.items():
        paths[split] = folder / f"{split}.txt"
        with open(paths[split], "w", encoding="utf-8", newline="\n") as file:
            for number in itertools.islice(numbers, stories):
                story = Story(rules, plots, random.Random(f"0-{number}"))   # each by itself
                file.write((story.record() if instruct else story.text) + f"\n{MARK}\n")
                nats += story.nats if split == "val" else 0.0
    return paths, nats


# ----------------------------------------------------------------------------------------- download

class Progress:
    """A line that says how far a job is: redrawn on a terminal, ten lines at most in a pipe."""

    def __init__(self, label, total, done=0, unit="MB"):
        self.label, self.total, self.begin, self.unit = label, max(total, 1), done, unit
        self.start, self.shown, self.live = time.time(), 0.0, sys.stderr.isatty()

    def show(self, done):
        done = min(done, self.total)
        share, due = done / self.total, self.shown + (0.001 if self.live else 0.1)
        if share < min(due, 1) or self.shown == 1:
            return
        self.shown, taken, come = share, time.time() - self.start, done - self.begin
        one = 1e6 if self.unit == "MB" else 1
        line = (f"{self.label}: {share:4.0%} of {self.total / one:,.0f} {self.unit}, "
                f"{come / one / max(taken, 1e-3):.1f} {self.unit}/s, "
                f"{taken * (self.total - done) / max(come, 1):.0f} s left")
        print(f"\r{line:79}" if self.live else line, end="" if self.live and share < 1 else "\n",
              file=sys.stderr)


def hub_url(repo, revision, file, kind="datasets/"):
    host = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    return f"{host}/{kind}{repo}/resolve/{revision}/{file}"


def download(url, path, size=None, sha256=None, pauses=(1, 2, 4, 8, 16), timeout=(10, 60)):
    """Fetch `url` into `path`, whole and checked, or exit with one sentence. What has come is kept
    in a .part file, and the next call goes on from there. Size and hash that are not known are
    asked of the hub."""
    import requests
    if path.exists():
        return
    part, headers, wrong = path.with_name(path.name + ".part"), {"Accept-Encoding": "identity"}, 0
    if token := os.environ.get("HF_TOKEN", "").strip():
        headers["Authorization"] = f"Bearer {token}"        # dropped by requests on other hosts
    for pause in (*pauses, None):
        wait = pause or 0
        try:
            if not (size and sha256):       # a HEAD is not redirected: the hub's own headers
                head = requests.head(url, headers=headers, timeout=timeout).headers
                size = size or int(head.get("X-Linked-Size", 0))
                tag = head.get("X-Linked-Etag", "").strip('W/"')
                sha256 = sha256 or (tag if len(tag) == 64 else None)    # a small file's is git's
            have = part.stat().st_size if part.exists() else 0
            if have < size or not size:
                have = fetch(url, part, have, size, headers, timeout)
            if have < size:
                why = f"only {have:,} of {size:,} bytes came"
            elif not sha256 or (found := file_sha256(part)) == sha256:
                return os.replace(part, path)
            else:
                why, wrong = f"it does not hold what it should: sha256 {found}", wrong + 1
                part.unlink()
        except requests.RequestException as error:
            asked = getattr(error.response, "headers", {}).get("Retry-After", "")
            why, wait = str(error), max(wait, min(int(asked), 300) if asked.isdigit() else 0)
        if pause is None or wrong == 2:
            raise SystemExit(f"Cannot download {url}: {why}. Run the same command again to go on. "
                             "Without a network: python train.py config/demo.py, or prepare.py "
                             "mine --input FILE")
        print(f"{path.name}: {why[:150]}; again in {wait} s", file=sys.stderr)
        time.sleep(wait)


def fetch(url, part, have, size, headers, timeout):
    """One request for what a .part file of `have` bytes still lacks -> the bytes it has then."""
    import requests
    need, free = 1.6 * (size - have), shutil.disk_usage(part.parent).free
    if free < need:                         # the token file takes half of the text again
        raise SystemExit(f"{part.parent} has {free / 1e9:.1f} GB free; {part.stem} and its tokens "
                         f"need {need / 1e9:.1f} GB. Make room and run the same command again.")
    headers = {**headers, "Range": f"bytes={have}-"} if have else headers
    with requests.get(url, headers=headers, timeout=timeout, stream=True) as reply:
        page = reply.ok and "text/html" in reply.headers.get("Content-Type", "")
        if page or reply.status_code in (400, 401, 403, 404, 410):
            raise SystemExit(f"{url} answers {reply.status_code} {reply.reason}"
                             f"{', a web page (of a login?)' if page else ''}. Check HF_ENDPOINT "
                             "and HF_TOKEN, or fetch it yourself: prepare.py mine --input FILE")
        if reply.status_code == 416:        # nothing lies beyond what we have, so that is no good
            part.unlink()
        reply.raise_for_status()
        have = have if reply.status_code == 206 else 0          # 200: it sends the whole file
        total = size or int(reply.headers.get("Content-Length", 0)) + have
        bar = Progress(part.stem, total, have)
        with open(part, "ab" if have else "wb") as file:
            for chunk in reply.iter_content(1 << 18):
                file.write(chunk)
                bar.show(have := have + len(chunk))
    return have


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while read := file.read(PIECE):
            digest.update(read)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------- text to stories

# UTF-8 that somebody read as Windows-1252 and wrote as UTF-8 again.
REPAIRS = {"â€œ": "“", "â€\x9d": "”", "â€™": "’", "â€˜": "‘",
           "â€“": "–", "â€”": "—", "â€¦": "…", "â€": "”"}


def read_stories(path, counts, label, limit=math.inf):
    """Yield lists of clean stories (str, none empty) from one read each, until `limit` bytes are
    read. A file is cut at the end marks before it is decoded, so that neither a mark nor a
    character can be torn by the edge of a read."""
    rest, mark, bar = b"", MARK.encode(), Progress(label, min(os.path.getsize(path), limit))
    with open(path, "rb") as file:
        while file.tell() < limit:
            read = file.read(PIECE)
            *stories, rest = (rest + (read or mark)).split(mark)    # the last may have no mark
            if len(rest) > LONGEST:
                raise SystemExit(f"{path}: a story of over {LONGEST >> 20} MB. Put a line {MARK} "
                                 "between stories.")
            texts = [clean(story, counts) for story in stories]
            if read:                        # what stands after the last mark need not be a story
                counts["dropped: empty"] += texts.count("")
            yield [text for text in texts if text]
            if not read:
                return
            bar.show(file.tell())


def clean(story, counts):
    """Bytes of a story -> its text, with the known faults of the data mended and counted."""
    try:
        text = story.decode("utf-8")
    except UnicodeDecodeError:
        counts["lost characters: not UTF-8"] += 1
        text = story.decode("utf-8", errors="replace")
    if "â€" in text:
        counts["repaired: double-encoded quotes"] += 1
        for wrong, right in REPAIRS.items():
            text = text.replace(wrong, right)
    return text.replace("\r\n", "\n").strip("\ufeff \t\r\n")


def keep_apart(record, counts):
    """An instruct record with a summary and words -> the same with only one of them, so that a
    model never sees both while it learns (the paper's TinyStories-Instruct-OOD)."""
    head, story, text = record.partition("\nStory:")
    names = re.findall(r"(?m)^(Summary|Words): ", head)
    if len({*names}) < 2:
        return record
    counts["changed: words or summary left out"] += 1
    fields = re.split(rf"(?m)^(?=(?:{'|'.join(FIELDS)}): )", head)      # a summary may have lines
    drop = names[len(text) % 2] + ": "
    left = [field for field in fields if not field.startswith(drop)]
    return "".join(left).rstrip("\n") + story + text


# --------------------------------------------------------------------------------------- tokenizers

def train_bpe(words, vocab_size):
    """Learn byte-pair merges (arXiv 1508.07909, on bytes as GPT-2 does).

    words: counts of pre-tokens, {str: int}. Returns the merges in order, as pairs of bytes, as many
    as fill vocab_size together with the 256 bytes and the end mark, or fewer if the text has no
    more. Of pairs equally frequent, the lexicographically greater one goes first, as in Stanford's
    CS336."""
    times = list(words.values())
    words = [[bytes([byte]) for byte in word.encode()] for word in words]
    counts, where = Counter(), defaultdict(set)     # how often a pair occurs, and in which words

    def count(index, sign):
        pairs = list(zip(words[index], words[index][1:]))
        for pair in pairs:
            counts[pair] += sign * times[index]
            where[pair].add(index)
        return pairs

    def entry(pair):            # the smallest entry of the heap: most frequent, then greatest;
        # bytes are negated for that, and closed by 1, so that "ab" comes before "a"
        return -counts[pair], [(*(-byte for byte in half), 1) for half in pair], pair

    for index in range(len(words)):
        count(index, 1)
    heap, merges = [entry(pair) for pair in counts], []
    heapq.heapify(heap)
    while heap and len(merges) < vocab_size - 257:
        n, _, best = heapq.heappop(heap)
        if -n != counts[best] or n == 0:    # an old entry: the pair has been counted anew since
            continue
        merges.append(best)
        changed = set()
        for index in where.pop(best):       # only words that hold the pair change
            changed.update(count(index, -1))
            words[index] = merge(words[index], best)
            changed.update(count(index, 1))
        for pair in changed:
            heapq.heappush(heap, entry(pair))
    return merges


def merge(parts, pair):
    """Join each occurrence of a pair in a list of bytes, from left to right."""
    merged, i = [], 0
    while i < len(parts):
        hit = parts[i] == pair[0] and i + 1 < len(parts) and parts[i + 1] == pair[1]
        merged.append(pair[0] + pair[1] if hit else parts[i])
        i += 2 if hit else 1
    return merged


def halves(token, ranks):
    """The two tokens from which BPE makes this one: run the merges of lower rank over its bytes."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = zip(parts, parts[1:])
        parts = merge(parts, min(pairs, key=lambda pair: ranks.get(pair[0] + pair[1], math.inf)))
    return parts


def prune_bpe(ranks, counts, vocab_size):
    """Keep the commonest tokens of a BPE -> ranks of at most vocab_size - 1 tokens (the end mark
    takes the last id).

    counts[rank] says how often a token occurs. A token is kept together with the two that it is
    made from, and theirs: what is closed under merges is again a BPE, which still spells every
    text."""
    kept = {bytes([byte]) for byte in range(256)}

    def lacking(token):         # it and what it is made from, as far as that is not kept yet
        if token in kept:
            return set()
        return {token}.union(*map(lacking, halves(token, ranks)))

    for token in sorted(ranks, key=lambda token: (-counts[ranks[token]], ranks[token])):
        new = lacking(token) if counts[ranks[token]] else set()
        if len(kept) + len(new) < vocab_size:
            kept |= new
    return {token: new for new, token in enumerate(sorted(kept, key=ranks.get))}


def to_ids(encoding, stories):
    """Stories -> the ids of their tokens, each story followed by the end mark, (N,) uint32."""
    texts = [MARK.join([*stories[i:i + 256], ""]) for i in range(0, len(stories), 256)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:        # tiktoken lets others work
        rows = pool.map(lambda text: encoding.encode_to_numpy(text, allowed_special={MARK}), texts)
        return np.concatenate([np.zeros(0, np.uint32), *rows])


def as_encoding(ranks):
    import tiktoken
    return tiktoken.Encoding("stories", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens={MARK: len(ranks)})


def load_tokenizer(folder):
    """Read the tokenizer.tiktoken of a data set or a run -> tiktoken.Encoding, whose eot_token ends
    a story."""
    lines = (Path(folder) / "tokenizer.tiktoken").read_bytes().splitlines()
    pairs = map(bytes.split, lines)
    return as_encoding({base64.b64decode(token): int(rank) for token, rank in pairs})


def save_tokenizer(folder, ranks):
    with whole(folder / "tokenizer.tiktoken") as file:
        for token, rank in ranks.items():
            file.write(base64.b64encode(token) + b" %d\n" % rank)


def gpt2_ranks():
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:          # tiktoken passes on whatever its download met
        raise SystemExit(f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}). Run "
                         "it once where there is a network, and set TIKTOKEN_CACHE_DIR to a folder "
                         "that holds its files; or use our own: --tokenizer bpe")


def make_tokenizer(kind, vocab_size, path):
    """Make a tokenizer from the beginning of a text file -> ranks."""
    read = read_stories(path, Counter(), "reading for the tokenizer", COUNTED)
    if kind == "bpe":
        counts = Counter()
        import regex                    # comes with tiktoken; Python's own re does not know \p{L}
        for stories in read:
            for story in stories:
                counts.update(word for word in regex.findall(PATTERN, story)
                              if len(word) < 1_000)     # longer, it is none, and takes hours
        ranks = {bytes([byte]): byte for byte in range(256)}
        for left, right in train_bpe(counts, vocab_size):
            ranks.setdefault(left + right, len(ranks))
        return ranks
    ranks = gpt2_ranks()
    if vocab_size > len(ranks):         # all of it, and the end mark
        return ranks
    full = as_encoding(ranks)
    times = np.zeros(full.n_vocab, int)
    for stories in read:
        times += np.bincount(to_ids(full, stories), minlength=full.n_vocab)
    return prune_bpe(ranks, times, vocab_size)


# --------------------------------------------------------------------------------------------- main

def encode(paths, encoding, folder, keep_duplicates=False, ood=False):
    """Write folder/{train,val}.bin from {"val": path, "train": path} -> statistics of each split,
    and counts of what was dropped or repaired. Without a path for val, one story in a hundred goes
    there, chosen by its hash. ood: see `keep_apart`."""
    stats = {split: Counter(stories=0, tokens=0, bytes=0) for split in ("train", "val")}
    counts, seen = Counter(), {}                        # seen: hash of a story -> its split
    with whole(folder / "train.bin") as train, whole(folder / "val.bin") as val:
        for split in sorted(paths, reverse=True):       # val first: train must not repeat it
            for stories in read_stories(paths[split], counts, f"encoding {split}"):
                chosen = {"train": [], "val": []}
                for story in stories:
                    key = int(hashlib.blake2b(story.encode(), digest_size=8).hexdigest(), 16)
                    target = "val" if "val" not in paths and key % 100 == 0 else split
                    if split == "train" and key in seen:
                        why = "repeated" if seen[key] == target else "also in validation"
                        counts[f"{'kept' if keep_duplicates else 'dropped'}: {why}"] += 1
                        if not keep_duplicates:
                            continue
                    seen[key] = target
                    apart = ood and target == "train"
                    chosen[target].append(keep_apart(story, counts) if apart else story)
                for target, file in (("train", train), ("val", val)):
                    ids = to_ids(encoding, chosen[target])
                    if ids.max(initial=0) >= min(encoding.n_vocab, 65_536):
                        raise SystemExit(f"The id {ids.max()} does not fit the vocabulary of "
                                         f"{encoding.n_vocab:,} and uint16 (65,536 at most).")
                    file.write(ids.astype(np.uint16).tobytes())
                    stats[target].update(stories=len(chosen[target]), tokens=len(ids), bytes=sum(
                        len(story.encode()) for story in chosen[target]))
        for split, found in stats.items():
            if not found["tokens"]:
                why = ", ".join(f"{what}: {n:,}" for what, n in (+counts).items()) or "no text"
                raise SystemExit(f"{' and '.join(map(str, paths.values()))}: nothing left for "
                                 f"{split} ({why}). Put a line {MARK} between stories (a few "
                                 "hundred of them at least), or name a validation file with "
                                 "--valid.")
    return stats, +counts                               # +: without those that are 0


def is_ready(folder, asked):
    """Whether a data set is there, whole and with the settings asked for. SystemExit: with
    others."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for split in ("train", "val"):
            if (folder / f"{split}.bin").stat().st_size != 2 * meta[split]["tokens"]:
                return False
        differ = [key for key in asked if meta[key] != asked[key]]
        tokens = meta["train"]["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if differ:
        key = differ[0]
        of = "from another text" if key == "text" else f"with {key} {meta[key]}, not {asked[key]}"
        raise SystemExit(f"{folder} is prepared already, {of}. Add --force to do it again, or give "
                         "it another name.")
    print(f"{folder} is ready: {tokens:,} tokens (--force does it again)")
    return True


def prepare(args):
    """Prepare data/<name>. What is there with the same settings is left as it is."""
    name, folder = args.name, HERE / "data" / args.name
    kind = args.tokenizer or ("bpe" if name in SAMPLES else "gpt2")
    vocab_size = args.vocab_size or (2_048 if name in SAMPLES else 10_000)
    given = (("val", args.valid), ("train", args.input))
    paths = {split: Path(path) for split, path in given if path}
    text = [file_sha256(path) for path in paths.values()] or (
        sample_text() if name in SAMPLES else SOURCES[name][1])
    asked = {"text": text, "tokenizer": kind, "vocab_size_asked": vocab_size,
             "keep_duplicates": args.keep_duplicates}
    if not args.force and is_ready(folder, asked):
        return
    (folder / "meta.json").unlink(missing_ok=True)

    meta, nats = {"dataset": folder.name}, None
    if name in SAMPLES:
        meta["source"] = "data/grammar.txt"
        paths, nats = tell_sample(folder, "instruct" in name)
    elif name in SOURCES:
        repo, meta["revision"], files = SOURCES[name]
        meta["source"] = f"https://huggingface.co/datasets/{repo}"
        raw = HERE / "data" / name.removesuffix("-ood")             # downloaded once for both
        raw.mkdir(exist_ok=True)
        for split, (file, size, sha256) in files.items():
            paths[split] = raw / file
            download(hub_url(repo, meta["revision"], file), paths[split], size, sha256)
    else:
        meta["source"] = "own text"
        for path in paths.values():
            with open(path, "rb") as file:
                if file.read(4).startswith(PACKED):
                    raise SystemExit(f"{path} is packed, or UTF-16; make it plain text in UTF-8.")
    meta["files"] = {split: {"name": path.name, "sha256": file_sha256(path)}
                     for split, path in paths.items()}

    ranks = make_tokenizer(kind, vocab_size, paths["train"])
    encoding = as_encoding(ranks)
    stats, counts = encode(paths, encoding, folder, args.keep_duplicates, name.endswith("-ood"))
    meta |= {**asked, "vocab_size": encoding.n_vocab, "eot": encoding.eot_token, "dtype": "uint16",
             "story_mark": encoding.encode_ordinary("Story:"), **stats, "counts": counts}
    for split, found in stats.items():
        print(f"{split:5}  " + ", ".join(f"{n:,} {what}" for what, n in found.items()))
    bytes_a_token = stats["train"]["bytes"] / stats["train"]["tokens"]
    print(f"vocabulary of {encoding.n_vocab:,} ({kind}), {bytes_a_token:.2f} bytes a token")
    for what, n in sorted(counts.items()):
        print(f"{what}: {n:,} stories")
    if nats:
        a_token = nats / stats["val"]["tokens"]
        bits = nats / math.log(2) / stats["val"]["bytes"]
        meta["entropy_bound"] = {"nats_per_token": a_token, "bits_per_byte": bits}
        print(f"no model can do much better than the grammar itself: {a_token:.4f} nats per token, "
              f"{bits:.4f} bits per byte")
    save_tokenizer(folder, ranks)
    write_text(folder / "meta.json", json.dumps(meta, indent=1))


def main(argv=None):
    known = [*SAMPLES, *SOURCES]
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", help=f"{', '.join(known)}, or a name of your own with --input")
    add("--input", help=f"a text file of your own, stories separated by lines {MARK}")
    add("--valid", help="its validation file (default: one story in a hundred)")
    add("--tokenizer", choices=("gpt2", "bpe"), help="GPT-2's, or one learned from the text")
    add("--vocab_size", type=int, help="entries at most (default 10000; the samples: 2048)")
    add("--keep_duplicates", action="store_true", help="keep stories that the raw files repeat")
    add("--ood", action="store_true", help="instruct records that have words or a summary, "
        "but never both, to learn from; validation has both")
    add("--force", action="store_true", help="do it again even if it is there")
    args = parser.parse_args(argv)
    if args.ood and not args.name.endswith("-ood"):
        args.name += "-ood"
    if args.name in known and (args.input or args.valid):
        parser.error(f"{args.name} has its own text; choose another name for yours")
    if args.name not in known and not args.input:
        near = difflib.get_close_matches(args.name, known, n=1)
        hint = f"did you mean {near[0]}? F" if near else "f"
        parser.error(f"{args.name!r} is none of {', '.join(known)}; {hint}or a text of your own "
                     "add --input FILE")
    for path in (args.input, args.valid):
        if path and not os.path.isfile(path):
            parser.error(f"{path} is no file (it is missing, or a folder)")
    if args.vocab_size is not None and not 257 <= args.vocab_size <= 65_536:
        parser.error("--vocab_size must lie between 257 (the bytes and the end mark) and 65,536 "
                     "(what uint16 holds)")
    command(prepare, args, folder=HERE / "data" / args.name)


if __name__ == "__main__":
    main()
