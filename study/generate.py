"""How do thousands of stories come out of one teacher, all simple and no two the same?

    python -m study.generate --n 1000 --out data/mine.txt --dry-run     # the request, the price
    python -m study.generate --n 1000 --out data/mine.txt               # about 20 cents
    python -m study.generate --n 1000 --out data/spanish.txt --language Spanish
    python -m study.generate --n 1000 --out data/mine.txt --instruct    # the same, with fields
    python -m study.generate --n 100 --out data/mine.txt --teacher llama3.1 \\
        --base-url http://localhost:11434/v1                            # a server of your own
    python prepare.py mine --input data/mine.txt

A teacher that is asked for a story again and again tells the same few. So each request draws a
verb, a noun and an adjective (data/words.txt) and some features that the story must have, as in
arXiv 2305.07759, section 2. The teacher names words and summary as well: a reply without them is
no story (it may be a refusal), and --instruct, which writes them into the file, asks nothing anew.

What comes is kept as it came in data/mine.jsonl, a line a reply, before anything is done with it,
and data/mine.txt is made from that, whole, at the end: the same command goes on where it stopped
and pays for nothing twice. Refusals, cut replies and stories told before are counted and left out;
a story that lacks one of its words is counted and kept (its record does not name them). Begin with
--n 3 and read what comes. The key is read from OPENAI_API_KEY.
"""

import argparse
import random
import re
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import grade
import prepare

# ---------------------------------------------------------- what the teacher is asked: change it

FEATURES = {"Dialogue": "somebody speaks", "BadEnding": "the end is a sad one",
            "MoralValue": "there is something to learn for life",
            "Twist": "something happens that nobody expected",
            "Foreshadowing": "an early hint tells of what comes later",
            "Conflict": "two want different things"}
OFTEN = 1 / 6                       # how likely each feature is: a third of the stories have none
TEMPERATURE, LONGEST = 1, 2_000     # of the teacher; tokens of a reply at most
REQUEST = """Write a short story of three to five paragraphs, in very simple words that a child of \
three or four understands. These words must stand in it, in any form: {words}.{features} Keep to \
very simple words and short sentences.{language}

Answer in this form, without a title:

Words: the words from above, each as it stands in your story, with commas between them
Summary: what happens, in one sentence or two
Story:
the story, with an empty line between paragraphs"""
LANGUAGE = (" Write it in {language}: put the words from above into {language}, too, and all the "
            "rest but the three names Words, Summary and Story.")

# The names may come in capitals or **bold**, and after a word of greeting; a story has a letter.
FORM = r"(?ims)^\W*words\W*?[:：](.+?)^\W*summary\W*?[:：](.+?)^\W*story\W*?[:：](.*\w.*)"


def read_words(path=prepare.HERE / "data" / "words.txt"):
    """-> {"verb": words, ...}: as many lists as the file has."""
    lists = re.split(r"(?m)^(\w+):$", re.sub(r"(?m)^#.*", "", path.read_text("utf-8")))[1:]
    words = {name: text.split() for name, text in zip(lists[::2], lists[1::2])}
    if not words or not all(words.values()):
        raise SystemExit(f"{path} needs a line like 'verb:', and words below it.")
    return words


def draw(lists, seed, number, language=""):
    """What the number-th story shall be: it depends on nothing but these."""
    rng = random.Random(f"{seed}-{number}")
    words = {kind: rng.choice(words) for kind, words in lists.items()}
    features = [name for name in FEATURES if rng.random() < OFTEN]
    clauses = ", and ".join(FEATURES[name] for name in features)
    request = REQUEST.format(
        words=", ".join(f'the {kind} "{word}"' for kind, word in words.items()),
        features=f" In the story, {clauses}." if features else "",
        language=LANGUAGE.format(language=language) if language else "")
    return {"seed": seed, "number": number, "words": words, "features": features,
            "request": [{"role": "user", "content": request}]}


def read_reply(line):
    """A line of the ledger -> {"Words" ("" if one lacks), "Summary", "Story"}, or why there is no
    story in the reply (str)."""
    reply = line["reply"]
    text = grade.spoken(reply).replace(prepare.MARK, " ").replace("\r\n", "\n")
    text = text.encode("utf-8", "replace").decode()                     # no half surrogates
    if reply["refusal"] or reply["finish"] == "content_filter":
        return "a refusal"
    if reply["finish"] == "length":
        return "cut at its length limit"
    parts = re.search(FORM, text)
    if not parts:
        return "not in the form that was asked for" if text.strip() else "empty"
    words, summary, story = (part.strip(" \n*_`") for part in parts.groups())
    words = [word.strip(" \n.\"'“”«»*_") for word in re.split("[,;，、،]", words)]
    there = [word for word in words if word and word.lower() in story.lower()]
    whole = len(there) == len(words) == len(line["words"])
    return {"Words": ", ".join(words) if whole else "", "Summary": " ".join(summary.split()),
            "Story": story}


def write(args, items, have):
    """Make the text file anew from the ledger -> how many stories it has, how many of them lack a
    word, and what was left out ({why: how often})."""
    texts, lack, left_out = {}, 0, Counter()            # texts: {story: what is written of it}
    for item in items:
        line = have.get(item["key"])
        story = read_reply(line) if line else item.get("failed", "not asked yet")
        if not isinstance(story, str) and story["Story"] in texts:
            story = "told before, word for word"
        if isinstance(story, str):
            left_out[story] += 1
            continue
        lack += not story["Words"]
        text = story.pop("Story")
        texts[text] = text
        if args.instruct:
            rng = random.Random(f"{item['seed']}-{item['number']} as a record")
            fields = {"Features": ", ".join(sorted(item["features"])), **story}
            texts[text] = prepare.write_record(text, rng.choice, fields)
    prepare.write_text(args.out, "".join(f"{text}\n{prepare.MARK}\n" for text in texts.values()))
    return len(texts), lack, left_out


def generate(args):
    """Ask for what is not there yet, and write the file -> the exit code."""
    teacher = grade.Judge(args, args.teacher, TEMPERATURE, LONGEST)
    ledger, lists = args.out.with_suffix(".jsonl"), read_words()
    have = {line.get("key"): line for line in grade.read_lines(ledger)}
    if any("reply" not in line for line in have.values()) or (
            args.out.exists() and not ledger.exists()):
        raise SystemExit(f"{args.out} or {ledger} was not made by this command, which would "
                         "change it; give another --out.")
    items = [draw(lists, args.seed, number, args.language) for number in range(args.n)]
    for item in items:
        item["key"] = grade.digest(teacher.name, teacher.url, args.seed, item["number"],
                                   item["request"])
    todo = [item for item in items if item["key"] not in have]

    def ask(item):
        reply = teacher.ask(item["request"])
        if isinstance(reply, str):
            item["failed"] = reply          # nothing was paid: the same command asks again
            return
        line = {**item, "teacher": teacher.name, "base_url": teacher.url, "reply": reply,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        grade.append(ledger, line)
        have[item["key"]] = line

    if todo or args.dry_run:
        tokens = sum(len(str(item["request"])) for item in todo) // 4, 330 * len(todo)
        grade.go_on(teacher, f"{args.n:,} stories, {len(todo):,} of them to be asked for",
                    (todo or items)[0]["request"], len(todo), tokens)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        ledger.touch()                      # it cannot be written? Better said before it is paid
        grade.ask_all(teacher, ask, todo, "told")
    stories, lack, left_out = write(args, items, have)
    print(f"stories in {args.out}: {stories:,}, without a word that they should have: {lack:,}"
          + teacher.paid())
    for why, n in left_out.most_common():
        print(f"left out: {n:,} x {why}")
    if not all(item["key"] in have for item in items):
        print(f"{teacher.stop or 'Some did not come'}. What came is kept; the same command goes "
              "on.", file=sys.stderr)
        return teacher.code or 3
    print(f"Next: python prepare.py {args.out.stem} --input {args.out}"
          + " --tokenizer bpe" * bool(args.language))
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a text file, .txt; the ledger stands beside it")
    add("--n", type=int, default=1_000, help="stories to ask for (default 1000)")
    add("--teacher", default="gpt-6-luna", help="a model of the server")
    add("--language", default="", help="of the stories (default: English)")
    add("--instruct", action="store_true", help="write records as TinyStories-Instruct has them")
    add("--seed", type=int, default=0, help="another one draws other words")
    grade.add_options(parser)
    args = parser.parse_args(argv)
    grade.check_options(parser, args, args.teacher, (args.n < 1, "--n must be 1 or more"),
                        (args.out.suffix != ".txt" or args.out.is_dir(),
                         "--out must be the name of a text file, something.txt"))
    prepare.command(generate, args)


if __name__ == "__main__":
    main()
