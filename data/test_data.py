"""What must be true of the grammar, tokenizers, data sets and downloads: a list of claims."""

import argparse
import contextlib
import gzip
import hashlib
import http.server
import math
import os
import random
import re
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import regex

import prepare
import sample
from data import common, facts
from data.bpe import BPE_PATTERN, make_encoding, merge, prune_bpe, train_bpe
from data.client import add_server_options, read_lines
from data.common import download
from data.grammar import Story, read_grammar, split_sentences

# -------------------------------------------------------- the grammar


@pytest.fixture(scope="module")
def stories():
    grammar = read_grammar()
    return [Story(*grammar, random.Random(f"0-{n}")) for n in range(3000)]


def small_grammar(path, rules, scenes):
    path.write_text(f"{rules}\nplot one\nwords a\nsummary s\n\n{scenes}\n", encoding="utf-8")
    return read_grammar(path)


def test_the_sample_is_the_same_everywhere(stories):
    digest = hashlib.sha256("\0".join(story.text for story in stories).encode()).hexdigest()
    assert digest == "84029c3914e86586398a96710c1ff2e9b04bdb9b67fbc6ca7f708db044a5ba8f"


@pytest.mark.parametrize("wrong", [
    r"[{}\[\]|]|  ", r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", r"\b(\w+) \1\b(?<!had had)",
    r"\b(too|so|very) (too|so|very)\b", r"(^|[.!?] )\"?[a-z]", r"[^.!?\"\n]\n", r"[^.!?\"]$"])
def test_generated_stories_are_grammatical(stories, wrong):
    assert not [story.text for story in stories if re.search(wrong, story.text)]


def test_instruct_fields_describe_the_story(stories):
    for story in stories[:500]:
        head, text = story.record().split("\nStory: \n\n")
        fields = dict(line.split(": ", 1) for line in head.split("\n"))
        assert text == story.text
        assert all(word in text for word in fields.get("Words", "").split(", "))
        sentence = fields.get("Random sentence", split_sentences(text)[1])
        assert sentence in split_sentences(text)[1:]


def test_nats_are_the_log_of_the_number_of_options(tmp_path):
    grammar = small_grammar(tmp_path / "g.txt", "hero = Ann | Bob | Cy",
                            "{hero} {ran|sat}. {Hero} {ran|sat}.\n{hero} slept. It was dark.")
    for seed in range(20):
        story = Story(*grammar, random.Random(seed))
        options = 2 * 3 if "slept" in story.text else 2 * 3 * 2 * 2
        assert story.nats == pytest.approx(math.log(options))
        assert len(set(re.findall("Ann|Bob|Cy", story.text))) == 1      # a variable does not change


def test_nats_are_revealed_where_the_options_differ(tmp_path):
    rules = "girl (boy=girl) = Ann | Zoe\nboy (boy=boy) = Al | Bo\nhero = {girl} | {boy}"
    grammar = small_grammar(tmp_path / "g.txt", rules, "A {hero.boy} named {hero}. The {end|tip}.")
    story = Story(*grammar, random.Random(0))
    name, end = story.text.index(story.bindings["hero"][""]), story.text.index("The") + 4
    assert [(where, round(math.exp(nats))) for where, nats in facts.revealed_nats(story)] == [
        (2, 2), (name, 2), (end, 2)]


def test_words_of_the_plot_itself_decide_nothing(tmp_path):
    grammar = small_grammar(tmp_path / "g.txt", "who (he=he) = mom | dad",
                            "The {who} sat.\n\nThe {who} ran to mom and dad.")
    assert facts.decided_words(Story(*grammar, random.Random(0)), "The mom ran.") == []


def test_the_most_specific_form_is_used(tmp_path):
    rules = ("a (s=own) : {c}\nb (he=she, s=shared) : {c} | {d} (s=last)\nc : x (he=he)\n"
             "d : y (s=yy)")
    scene = "{a} {a.s} {a.he} {c.s}. {b.he} {b.s}. {B.S}"
    grammar = small_grammar(tmp_path / "g.txt", rules, scene)
    texts = [Story(*grammar, random.Random(seed)).text.split(". ") for seed in range(40)]
    assert [set(column) for column in zip(*texts)] == [
        {"x own he xs"}, {"she shared", "she last"}, {"Shared", "Last"}]


@pytest.mark.parametrize("rules, scene, message", [
    ("hero = Ann", "{hero} saw {dragon}.", "form 'dragon'"), ("", "{} sat.", "form ''"),
    ("hero (he=she) = Ann", "{hero.him} sat.", "form 'him'"),
    ("hero = Ann\nfriend = Ann", "{hero} {friend}.", "list is too short"),
    ("a : {b}\nb : {a}", "{a}.", "name each other"), ("hero = Ann", "{hero} {sat.", "g.*{sat"),
    ("a : red |  | blue", "x", "'a' has an empty option"), ("a : {red | blue}", "x", "spaces"),
    ("He sat.", "x", "neither a rule"), ("plot zero", "x", "zero has no words")])
def test_a_wrong_grammar_gets_one_sentence(tmp_path, rules, scene, message):
    with pytest.raises(SystemExit, match=message):
        Story(*small_grammar(tmp_path / "g.txt", rules, scene), random.Random(0))


def test_a_comment_may_be_the_last_line(tmp_path):
    grammar = small_grammar(tmp_path / "g.txt", "a : b", "One.")
    common.write_text(tmp_path / "g.txt", (tmp_path / "g.txt").read_text() + "# the end")
    assert read_grammar(tmp_path / "g.txt") == grammar


def test_a_grammar_is_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "g.txt"
    grammar = small_grammar(path, "\ufeffhero = Zoé", "{hero} sat.")
    assert Story(*grammar, random.Random(0)).text == "Zoé sat."
    path.write_bytes(path.read_bytes().decode("utf-8-sig").encode("latin-1"))
    for wrong in (path, tmp_path / "missing.txt"):
        with pytest.raises(SystemExit, match="Cannot read"):
            read_grammar(wrong)


# --------------------------------------------------------- tokenizers

def test_bpe_by_hand():
    assert train_bpe({"low": 5, "lower": 2}, 257 + 4) == [
        (b"o", b"w"), (b"l", b"ow"), (b"low", b"e"), (b"lowe", b"r")]      # equal: greater first
    assert train_bpe({"aaaa": 3, "a": 9}, 300) == [(b"a", b"a"), (b"aa", b"aa")]


@pytest.mark.parametrize("alphabet", ["ab", "abc\0\xff", "雪雨雲"])
def test_bpe_equals_counting_all_pairs_after_each_merge(alphabet):
    rng, merges = random.Random(0), []
    words = Counter("".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(300))
    parts = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    while len(merges) < 80:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                pairs[pair] += count
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        parts = {word: merge(part, merges[-1]) for word, part in parts.items()}
    assert train_bpe(words, 257 + 80) == merges


def test_a_pruned_bpe_is_lossless(stories):
    text = "\n".join(story.text for story in stories[:500])
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in train_bpe(Counter(re.findall(r" ?\w+", text)), 900):
        ranks.setdefault(left + right, len(ranks))
    full = prepare.make_encoding(ranks)
    used = np.bincount(full.encode_ordinary(text), minlength=len(ranks))
    small = prepare.make_encoding(prune_bpe(ranks, used, 600))
    assert small.n_vocab <= 600 and small.eot_token == small.n_vocab - 1
    for other in (text, "Zoë saw 雪 and 🦊!\r\n\t\0 “yes”", "<|endoftext|>"):
        assert small.decode(small.encode_ordinary(other)) == other
    for word in set(re.findall(r" ?\w+", text)):        # same boundaries where all tokens are kept
        tokens = full.decode_tokens_bytes(full.encode_ordinary(word))
        if all(token in small._mergeable_ranks for token in tokens):
            assert small.decode_tokens_bytes(small.encode_ordinary(word)) == tokens
    everything = prepare.make_encoding(prune_bpe(ranks, used + 1, 10_000))
    assert everything.encode_ordinary(text) == full.encode_ordinary(text)


def test_our_bpe_keeps_vowel_signs_with_their_letters():
    assert regex.findall(BPE_PATTERN, "हिन्दी की") == ["हिन्दी", " की"]


# ---------------------------------------------------------- data sets

RAW = ("Onçe upon 雪.\r\nYes.\n<|endoftext|>\nTwo â€œwordsâ€\x9d.\n<|endoftext|>\n \n"
       "<|endoftext|>Onçe upon 雪.\nYes.<|endoftext|>\nIn both.\n<|endoftext|>\n"
       "The last has no mark")


def many(n, separator=prepare.EOT, story="Story {}. сказка"):
    return separator.join(story.format(i) for i in range(n))


def run(folder, text, *options, name="set", suffix=".txt"):
    """Run prepare.py on a text -> meta.json, and the stories in train.bin and val.bin."""
    path = folder / f"text{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    prepare.main([str(folder / name), "--input", str(path), "--tokenizer", "bpe", "--vocab_size",
                  "300", *map(str, options)])
    meta = prepare.read_meta(folder / name, *prepare.FILES)
    encoding = prepare.load_tokenizer(folder / name)
    ids = [np.fromfile(folder / name / f"{split}.bin", np.uint16) for split in ("train", "val")]
    assert all(row.max() < meta["vocab_size"] and row[-1] == meta["eot"] for row in ids)
    return meta, *(encoding.decode(row.tolist()).split(prepare.EOT)[:-1] for row in ids)


def test_stories_are_cleaned_counted_and_deduplicated(tmp_path):
    (tmp_path / "v.txt").write_text("In both.\n<|endoftext|>\nOnly here.", encoding="utf-8")
    meta, train, val = run(tmp_path, RAW, "--val", tmp_path / "v.txt")
    assert train == ["Onçe upon 雪.\nYes.", "Two “words”.", "The last has no mark"]
    assert val == ["In both.", "Only here."] and meta["train"]["stories"] == 3
    assert meta["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert meta["counts"] == {"repaired: mojibake": 1, "dropped: repeated": 2}


def test_damaged_characters_are_counted(tmp_path):
    text = many(50, "\n", '{{"text": "Story {}."}}') + r"""
        {"text": "Half of \ud83d a fox."}
        {"text": "A whole \ud83e\udd8a fox, or \u0000."}"""
    meta, *_ = run(tmp_path, text, suffix=".jsonl")
    assert meta["counts"] == {"damaged: not UTF-8": 1, "damaged: NUL characters": 1}


@pytest.mark.parametrize("separator", [prepare.EOT, "\n", "\n\n"])
def test_story_boundaries_do_not_depend_on_the_chunk_size(tmp_path, monkeypatch, separator):
    (tmp_path / "t.txt").write_text(RAW + "\n \n\r\n\nEnd.\r\n\r\n", encoding="utf-8", newline="")
    found = []
    for chunk in (1 << 20, 64, 7, 1):
        monkeypatch.setattr("data.text.CHUNK_BYTES", chunk)
        found.append(sum(prepare.read_stories(tmp_path / "t.txt", Counter(), separator), []))
    assert all(stories == found[0] for stories in found) and len(found[0]) >= 5


def test_validation_is_chosen_by_hash(tmp_path):
    _, train, val = run(tmp_path, many(6_000))
    assert len(val) == 60 and len(train) == 5_940 and not set(train) & set(val)
    assert run(tmp_path, many(6_000), name="again")[2] == val
    assert run(tmp_path, many(300), name="small")[0]["val"]["stories"] == 30


@pytest.mark.parametrize("text, options, suffix", [
    (many(50, "\n"), ["--separator", r"\n"], ".txt"),
    (many(50, "\r\n \r\n"), ["--separator", r"\n\n"], ".txt"),
    (many(50, "\n", '{{"text": "Story {}. \\u0441казка"}}'), [], ".txt"),
    (many(50, "\n", '{{"id": 1, "story": "Story {}. сказка"}}') + "\n\n", [], ".jsonl")])
def test_other_formats_contain_the_same_stories(tmp_path, text, options, suffix):
    _, train, val = run(tmp_path, text, *options, suffix=suffix)
    assert sorted(train + val) == sorted(many(50).split(prepare.EOT))


@pytest.mark.parametrize("text, message", [
    (b"", "few stories: 0"), (b"One.", "few stories.*separator"), (b"\n<|endoftext|>\n", "few"),
    (many(50, story="Again."), "49 repeated. $"), (many(9).encode("utf-16"), "iconv -f UTF-16"),
    (many(60, story="Ёжик {} шёл.").encode("cp1251"), "not UTF-8.*iconv"),
    (many(60, story="{} “It’s”").encode("cp1252"), "not UTF-8"), (b"\x1f\x8b\x08\0", "binary"),
    (random.Random(0).randbytes(30_000), "not UTF-8"), (many(9).encode("utf-16-le"), "NUL char"),
    ('[{"text": "a"},\n{"text": "b"}]', "like JSON"), ('{"prompt": "a"}\n', "like JSON"),
    (many(9, "\n", '{{"text": "{}"}}') + '\n{"text": 1}', "like JSON"), ("A. " * 9_999, "few")])
def test_an_unusable_text_is_refused_and_replaces_nothing(tmp_path, text, message):
    before = run(tmp_path, many(20))[0]
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, text, "--force")
    assert prepare.read_meta(tmp_path / "set", *prepare.FILES) == before


def test_long_white_space_and_long_words_are_harmless(tmp_path):
    text = many(30) + "Long" + "\n" * 1_100_000 + "end." + prepare.EOT + "xyz" * 10_000
    meta, train, val = run(tmp_path, text)
    assert meta["counts"] == {"repaired: long runs of white space": 1}
    assert meta["vocab_size"] == run(tmp_path, many(31), name="plain")[0]["vocab_size"]
    encoding = make_encoding({bytes([i]): i for i in range(256)})
    ids = sample.encode_prompt(encoding, "a" + " " * 1_000_000 + "b", block_size=10)
    assert ids == [256, *b"a  b"]


def test_a_data_set_is_prepared_once(tmp_path, capsys):
    run(tmp_path, many(30))
    before = (tmp_path / "set" / "train.bin").stat().st_mtime_ns
    run(tmp_path, many(30))
    assert "is ready" in capsys.readouterr().out
    for text, options in ((many(31), []), (many(30), ["--separator", "x"])):
        with pytest.raises(SystemExit, match="--force"):
            run(tmp_path, text, *options)
    assert (tmp_path / "set" / "train.bin").stat().st_mtime_ns == before


def test_several_files_and_the_tokenizer_of_a_run(tmp_path):
    meta, *_ = run(tmp_path, many(30))
    (tmp_path / "more.txt").write_text(many(20, story="More {}."))
    prepare.main([str(tmp_path / "both"), "--input", str(tmp_path / "text.txt"),
                  str(tmp_path / "more.txt"), "--tokenizer", str(tmp_path / "set")])
    both, name = prepare.read_meta(tmp_path / "both", *prepare.FILES), "tokenizer.tiktoken"
    assert both["train"]["stories"] + both["val"]["stories"] == 50
    assert both["crc32"][name] == meta["crc32"][name] and both["pattern"] == meta["pattern"]
    with pytest.raises(SystemExit, match="2"):      # run() also gives --vocab_size
        run(tmp_path, many(30), "--tokenizer", tmp_path / "set", name="both")


def test_a_grammar_becomes_a_data_set_with_its_entropy(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_STORIES", {"val": 50, "train": 400})
    words = " | ".join(f"w{i}" for i in range(40))
    grammar = f"a : {words}\nplot one\nwords a\nsummary s\n\n{{a}} {{a}} {{a}}.\n"
    (tmp_path / "g.txt").write_text(grammar)
    prepare.main([str(tmp_path / "set"), "--grammar", str(tmp_path / "g.txt")])
    meta = prepare.read_meta(tmp_path / "set", *prepare.FILES)
    nats = meta["entropy_floor"] * meta["val"]["tokens"]
    assert nats == pytest.approx(50 * 3 * math.log(40)) and not prepare.grammar_changed(meta)


@pytest.mark.parametrize("name", [*prepare.FILES, "meta.json"])
def test_every_flipped_bit_is_detected(tmp_path, name):
    meta, *_ = run(tmp_path, many(100))
    path, rng = tmp_path / "set" / name, random.Random(0)
    good = path.read_bytes()
    for _ in range(300 if name == "meta.json" else 50):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            prepare.load_tokenizer(tmp_path / "set")
            assert prepare.read_meta(tmp_path / "set", *prepare.FILES) == meta     # white space
        except SystemExit as error:
            assert re.search("set again: .* --force", str(error))


@pytest.mark.parametrize("text", ["[" * 300_000, "{", "[]", "5", '{"vocab_size": 5}', "\udc80"])
def test_a_damaged_meta_json_gets_one_sentence(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SystemExit, match="meta.json"):
        prepare.read_meta(tmp_path)


@pytest.mark.parametrize("output", ["/dev/full", "pipe"])
def test_an_output_that_cannot_be_written_gets_one_sentence_or_silence(output):
    code = "from data import common; common.setup_console(); print('once')"
    read, write = os.pipe()
    os.close(read)
    with open(write if output == "pipe" else output, "w") as stdout:
        done = subprocess.run([sys.executable, "-c", code], cwd=prepare.HERE, stdout=stdout,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == (output != "pipe"), done.stderr


@pytest.mark.parametrize("code, lines", [
    ("open('.')", 1), ("open('/dev/full', 'w').write(9_999 * 'x')", 1), ("open('missing')", 3),
    ("exec(compile('open(chr(46))', common.ROOT / 'train.py', 'exec'))", 6)])
def test_a_full_disk_is_one_sentence_and_a_bug_a_traceback(code, lines):
    code = f"from data import common\ncommon.setup_console()\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=prepare.HERE, capture_output=True)
    assert done.returncode == 1 and done.stderr.count(b"\n") == lines, done.stderr


def test_preparing_may_be_killed_at_any_moment(tmp_path):
    (tmp_path / "t.txt").write_text(many(3000))
    command = [str(prepare.HERE / "prepare.py"), str(tmp_path / "set"), "--input",
               str(tmp_path / "t.txt"), "--tokenizer", "bpe", "--vocab_size", "400"]
    for seconds in (0.5, 1.0, 1.5):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, *command], stderr=subprocess.DEVNULL, timeout=seconds)
        if (tmp_path / "set" / "meta.json").exists():
            prepare.read_meta(tmp_path / "set", *prepare.FILES)
    prepare.main(command[1:])
    assert prepare.read_meta(tmp_path / "set", *prepare.FILES)["val"]["stories"] == 50


# ---------------------------------------------------------- downloads

class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that misbehaves: `faults` says how it answers one GET after the other."""
    body = bytes(range(256)) * 800
    known = {"X_Linked_Size": len(body), "X_Linked_Etag": hashlib.sha256(body).hexdigest()}

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def do_HEAD(self):
        self.reply(302 if self.head else 501, **self.head)

    def do_GET(self):
        fault, size = self.faults.pop(0) if self.faults else "", len(self.body)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.requests.append((start, self.headers.get("Authorization")))
        part = self.body[start:]
        headers = dict(ETag='"1"', Content_Length=size - start,
                       Content_Range=f"bytes {start}-{size - 1}/{size}" if start else None)
        if isinstance(fault, int):
            return self.reply(fault, Retry_After=0)
        if fault == "elsewhere":                                # where the hub keeps large files
            return self.reply(302, Location=f"http://localhost:{self.server.server_port}/f")
        if fault == "html" or fault == "gzip":
            return self.reply(200, gzip.compress(self.body), Content_Type=f"text/{fault}")
        if fault == "changed" and '"1"' in self.headers.get("If-Range", ""):
            return self.reply(200, b"y" * 200_000, ETag='"2"')
        if fault in ("no range", "wrong"):
            return self.reply(200, self.body if fault == "no range" else b"x" * size)
        if fault in ("close", "endless"):
            headers["Content_Length"] = None
        end = 30_000 if fault in ("cut", "close") else size
        self.reply(206 if start else 200, part[:end] * (9 if fault == "endless" else 1), **headers)


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Download with faults -> the content of the file, or the error message."""
    monkeypatch.setattr("data.common.BACKOFF", 0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def fetch(*faults, known=True, **head):
        Hub.faults, Hub.requests, Hub.head = list(faults), [], Hub.known if known else head
        (tmp_path / "f").unlink(missing_ok=True)
        try:
            download(f"http://127.0.0.1:{server.server_port}/f", tmp_path / "f")
        except SystemExit as error:
            assert not (tmp_path / "f").exists()
            return str(error)
        return (tmp_path / "f").read_bytes()

    yield fetch
    server.shutdown()


@pytest.mark.parametrize("faults", [[], ["cut", "close"], ["cut", "no range"], [429, 503],
                                    ["cut", 416], ["cut"] * 6])
def test_a_download_survives_faults(fetch, faults):
    assert fetch(*faults) == Hub.body
    assert fetch(*faults, known=False, X_Linked_Size=len(Hub.body), ETag='"1"') == Hub.body
    assert faults[:1] != ["cut"] or Hub.requests[1][0] > 24_000     # it continued there


@pytest.mark.parametrize("faults, known, head, message", [
    ([404], True, {}, "404"), (["html"], True, {}, "text/html"), (["gzip"], False, {}, "gzip"),
    (["wrong"], True, {}, "sha256"), (["endless"], True, {}, "more than"),
    ([503] * 99, True, {}, "503"),
    (["close"] * 9, False, {"X_Linked_Size": 999_999}, "version|arrived")])
def test_a_failed_download_gets_one_sentence(fetch, faults, known, head, message):
    assert re.search(message, fetch(*faults, known=known, **head))


def test_a_nonsense_size_is_ignored_and_a_changed_file_is_not_mixed(fetch):
    assert fetch(known=False, X_Linked_Size="12 parsecs", X_Linked_Etag="?") == Hub.body
    assert set(fetch("cut", "changed", known=False, ETag='"1"')) == {ord("y")}


def test_the_token_is_sent_to_the_hub_only_and_never_printed(fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    assert "hf_secret" not in fetch(404) and fetch("elsewhere") == Hub.body
    assert [token for _, token in Hub.requests] == ["Bearer hf_secret", None]
    monkeypatch.setenv("HF_TOKEN", "hf_se\ncret")
    assert "HF_TOKEN" in fetch() and "cret" not in fetch()


def test_without_a_network_the_hint_comes_first(tmp_path):
    with pytest.raises(SystemExit, match="^Without a network: python train.py.*refused"):
        download("http://127.0.0.1:9/f", tmp_path / "f")


@pytest.mark.parametrize("option", ["--timeout=-1", "--timeout=nan", "--timeout=1e99",
                                    "--workers=0", "--max-tokens=-1", "--max-cost=nan"])
def test_a_limit_is_a_number_above_zero(option, capsys):
    parser = argparse.ArgumentParser()
    add_server_options(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([option])
    assert stopped.value.code == 2 and "above 0" in capsys.readouterr().err


def test_a_damaged_line_is_left_out_of_a_log_but_is_an_error_in_stories(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[]\n\n{"a": 2}\n{"a')
    assert read_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}]
    with pytest.raises(SystemExit, match=r"not a JSON object: b'\[\]'"):
        read_lines(tmp_path / "a.jsonl", strict=True)


def test_a_tokenizer_is_checked_even_if_its_checksum_fits(tmp_path):
    meta, *_ = run(tmp_path, many(100))
    path = tmp_path / "set" / "tokenizer.tiktoken"
    lines = path.read_bytes().splitlines(keepends=True)
    for wrong in (lines[:-1], lines[1:] + lines[:1] * 2, lines[:5] + lines[6:]):
        path.write_bytes(b"".join(wrong))
        prepare.write_meta(path.parent, meta)
        with pytest.raises(SystemExit, match="tokenizer"):
            prepare.load_tokenizer(path.parent)
