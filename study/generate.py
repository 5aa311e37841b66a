"""How does one teacher write thousands of different stories?

    python -m study.generate --out data/mine.txt --dry-run      # first request and price
    python -m study.generate --out data/mine.txt                # 1,000 stories: about 20 cents
    python prepare.py mine --input data/mine.txt

The same request brings the same few stories. So each one has a random verb, noun and adjective
(data/words.txt) and random features (arXiv 2305.07759, section 2). Replies are stored in
data/mine.jsonl, and data/mine.txt is made from all of them: nothing is paid for twice, and another
--seed adds stories. The key is read from OPENAI_API_KEY.
"""

import random
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import grade
import prepare
from data import common
from data.grammar import format_record

# --------------------------------- the request: change it as you like
FEATURES = {
    "Dialogue": "somebody speaks", "BadEnding": "the ending is sad",
    "MoralValue": "there is a lesson", "Twist": "something unexpected happens",
    "Foreshadowing": "a hint points to a later event", "Conflict": "two want different things"}
FEATURE_PROBABILITY = 1 / 6         # of each one; a third of the stories have none
TEMPERATURE, MAX_TOKENS = 1.0, 2_000
REQUEST = """Write a short story of three to five paragraphs. Use only very simple words that a \
child of three or four understands. The story must contain these words, in any form: \
{words}.{features} Remember to use very simple words and short sentences.{language}

Answer in this form, without a title:
Words: the words from above, as they appear in your story, separated by commas
Summary: what happens, in one or two sentences
Story:
the story, with an empty line between paragraphs"""
LANGUAGE = (" Write in {language}: translate the words from above into {language}, and write "
            "everything in it except the three labels Words, Summary and Story.")
# Labels may be in capitals or bold, and a greeting may come first.
REPLY = r"(?ims)^\W*words\W*?[:：](.+?)^\W*summary\W*?[:：](.*?\w.*?)^\W*story\W*?[:：](.*\w.*)"


def read_words(path=prepare.HERE / "data" / "words.txt"):
    """-> {"verb": [words], ...}, one entry for each list in the file."""
    parts = re.split(r"(?m)^(\w+):$", re.sub(r"(?m)^#.*", "", path.read_text("utf-8")))
    return {name: text.split() for name, text in zip(parts[1::2], parts[2::2])}


def build_request(lists, seed, number, language=""):
    """A request that depends on nothing else."""
    rng = random.Random(f"{seed}-{number}")
    words = {kind: rng.choice(words) for kind, words in lists.items()}
    features = [name for name in FEATURES if rng.random() < FEATURE_PROBABILITY]
    clauses = ", and ".join(FEATURES[name] for name in features)
    text = REQUEST.format(
        words=", ".join(f'the {kind} "{word}"' for kind, word in words.items()),
        features=f" In the story, {clauses}." * bool(features),
        language=LANGUAGE.format(language=language) * bool(language))
    return {"seed": seed, "number": number, "language": language, "words": words,
            "features": features, "request": [{"role": "user", "content": text}]}


ENDINGS = {"noun": "ies", "verb": "ies|ied|ed|ing", "adjective": "ier|iest|ily|er|est|ly|y|ally"}


def contains(story, word, kind):
    """Does an English story contain a word in any common form? Not inside of another word."""
    irregular = (prepare.HERE / "data" / "irregular.txt").read_text("utf-8")    # mouse mice
    known = " ".join(re.findall(rf"(?m)^{re.escape(word)} (.+)", irregular)).split()
    stem = re.sub(r"(e|(?<![aeiou])y)$", "", word)                      # hop-ing, cr-ied
    if re.fullmatch(r"([^aeiou]|qu)*[aeiou][^aeiouwxy]", word):
        stem = word + word[-1]                                          # hopp-ing
    word, stem, last = map(re.escape, (word, stem, word[-1]))
    endings = ENDINGS.get(kind) or "|".join(ENDINGS.values())
    forms = [f"{word}(s|(?<=[sxzho])es)?", f"{stem}{last}?({endings})", *known]
    return bool(re.search(rf"(?i)(?<!\w)({'|'.join(forms)})(?!\w)", story))


def parse_reply(line):
    """A line of the log -> {"Words": the requested words that the story contains, "Summary",
    "Story"}, or the reason why the reply has no story (str)."""
    reply = line["reply"]
    if reply["finish"] in ("content_filter", "length"):
        return "cut at its length limit" if reply["finish"] == "length" else "refused"
    text = reply["text"].encode("utf-8", "replace").decode()            # no lone surrogates
    text = grade.strip_thinking(text).replace(prepare.EOT, " ").replace("\r\n", "\n")
    if not (parts := re.search(REPLY, text)):
        return "not in the requested form" if text.strip() else "empty"
    named, summary, story = (part.strip(" \n*_`") for part in parts.groups())
    words = [word for kind, word in line["words"].items() if contains(story, word, kind)]
    if line["language"]:                    # the teacher has translated the words
        named = map(str.strip, re.split("[,;،、\n\"“”«»*_.]+", named))
        words = [word for word in named if word and word.lower() in story.lower()]
    return {"Words": ", ".join(words), "Summary": " ".join(summary.split()), "Story": story}


def write_stories(args, log):
    """Write all stories of the log -> {what: how many}."""
    texts, counts = {}, Counter()           # texts: {story: its text in the file}
    for line in sorted(log.values(), key=lambda line: (line["seed"], line["number"])):
        fields = parse_reply(line)
        if isinstance(fields, str):
            counts[f"left out: {fields}"] += 1
            continue
        story, fields["Features"] = fields.pop("Story"), ", ".join(sorted(line["features"]))
        n_words = fields["Words"].count(", ") + bool(fields["Words"])
        counts["without a requested word"] += n_words < len(line["words"])
        rng = random.Random(f"{line['seed']}-{line['number']} fields")
        texts[story] = format_record(story, rng.choice, fields) if args.instruct else story
    common.write_text(args.out, "".join(f"{text}\n{prepare.EOT}\n" for text in texts.values()))
    return counts + Counter({"different stories": len(texts)})


def main(argv=None):
    parser = common.command_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a text file, .txt; the log is next to it")
    add("--n", type=int, default=1_000, help="stories of this seed (default 1000)")
    add("--teacher", default="gpt-6-luna", help="a model of the server")
    add("--language", default="", help="of the stories (default: English)")
    add("--instruct", action="store_true", help="write records as in TinyStories-Instruct")
    add("--seed", type=int, default=0, help="another seed adds stories with other words")
    grade.add_server_options(parser)
    args = parser.parse_args(argv)
    if args.n < 1 or args.out.suffix != ".txt" or args.out.is_dir():
        parser.error("--n must be at least 1, and --out a text file like data/mine.txt")
    client = grade.Client(args, args.teacher, None, TEMPERATURE, MAX_TOKENS)
    path, lists, failures = args.out.with_suffix(".jsonl"), read_words(), Counter()
    log = {line.get("key"): line for line in grade.read_lines(path)}
    if any(line.get("language") != args.language for line in log.values()) or (
            args.out.exists() and not path.exists()):
        raise SystemExit(f"{args.out} or {path} was not written by this command, or is in another "
                         "language. Give another --out.")
    items = [build_request(lists, args.seed, i, args.language) for i in range(args.n)]
    for item in items:
        item["key"] = grade.digest(client.name, client.url, args.seed, item["request"])
    todo = [item for item in items if item["key"] not in log]

    def ask(item):
        if isinstance(reply := client.ask(item["request"]), str):
            failures[f"failed: {reply}"] += 1
            return
        log[item["key"]] = {**item, "teacher": client.name, "url": client.url, "reply": reply}
        grade.append_line(path, log[item["key"]])

    if todo or args.dry_run:
        grade.confirm_cost(client, f"{args.n:,} stories, {len(todo):,} of them to request",
                           [item["request"] for item in todo or items], len(todo), 330 * len(todo))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        path.touch()                        # fails before anything is paid
        grade.ask_all(client, ask, todo, "stories")
    print(f"{args.out} ({client.spent_text()} spent now)")
    for what, count in (write_stories(args, log) + failures).most_common():
        print(f"{count:,} {common.printable(what)}")
    if not all(item["key"] in log for item in items):
        print(f"{client.stop or 'Some failed'}. Run the same command again to continue.",
              file=sys.stderr)
        return 3
    print(f"Next: python prepare.py {args.out.stem} --input {args.out}"
          + " --tokenizer bpe" * bool(args.language))


if __name__ == "__main__":
    sys.exit(main())
