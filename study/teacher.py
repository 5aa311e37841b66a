"""Be the judge: how would you grade these stories?

    python -m study.teacher out/demo        # ten pages, about ten minutes; options as grade.py

The pages are shuffled and anonymous: stories of the model, true endings, and shuffled ones. Type
four grades for each. Ctrl-C shows the result; the same command continues, and brings ten more after
ten pages. Grades go to the log of all judges, so that study/report.py can compare you with them.
"""

import itertools
import json
import random
import sys
import textwrap
import time
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import grade
from data import common
from grade import ANCHORS, METRICS, STORY, read_grade
from study import report

EXAMPLE = f"Type {len(METRICS)} grades from 0 to 10 ({', '.join(METRICS)}), for example: 7 6 8 7"
PLURAL = {ANCHORS[0]: "the true endings", ANCHORS[1]: "the shuffled ones"}


def order_pages(items, rng):
    """All pages, ten by ten: models and anchors take turns, those ten are shuffled."""
    groups = [rng.sample(group, len(group)) for name, group in grade.items_by_model(items).items()
              if name != ANCHORS[2]]                    # random words are too easy
    turns = itertools.zip_longest(*groups)
    pages, shuffled = [page for turn in turns for page in turn if page], []
    for i in range(0, len(pages), 10):
        shuffled += rng.sample(pages[i:i + 10], len(pages[i:i + 10]))
    return shuffled


class Human:
    """Answers like grade.Client, from the keyboard."""
    def ask(self, messages, turn=0):
        text = "(by hand)" if turn == 0 else ""            # the first turn is prose
        for line in messages[2]["content"].split("\n")[1:-1] if turn else ():
            print(textwrap.fill(common.printable(line), 80))
        while not text:
            words = input("\n> ").replace(",", " ").split()
            wrong = [repr(word) for word in words if read_grade(METRICS[0], word) is None]
            if wrong:
                print(f"{wrong[0]} is not a grade. {EXAMPLE}")
            elif len(words) != len(METRICS):
                print(f"{len(METRICS)} numbers are needed, not {len(words)}. {EXAMPLE}")
            else:
                text = json.dumps({**dict(zip(METRICS, words)), "age": "-"})
        return {"text": text, "finish": "stop", "tokens": [0, 0], "model": "me",
                "sent": [], "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def show_result(pages, items):
    """The means of models and anchors, which page was which, and agreement with other judges."""
    graded = [item for item in pages if item["grades"]]
    means = [f"{PLURAL.get(name, name)} {fmean(map(report.mean_grade, group)):.1f}"
             for name, group in grade.items_by_model(graded).items()]
    means.sort(key=lambda text: text.startswith("the "))            # models first
    print(f"\nYou gave {', '.join(means) or 'no grades'}.\n")
    for number, item in enumerate(pages, 1):
        if item["grades"]:
            print(f"page {number}: {item['model']}, {report.mean_grade(item):.1f}")
    rows = report.agreement_rows(items)
    if rows := {name: rows[name] for name in rows if "me" in name.split(" - ")}:
        print(f"\nAgreement with other judges:\n\n{common.format_table(rows)}")


def main(argv=None):
    common.setup_console()
    parser = grade.build_parser()
    parser.description = __doc__
    parser.set_defaults(n=1, judge="none")          # completions are sampled, nothing is sent
    args = grade.parse_args(parser, argv)
    if args.task == "probes":
        parser.error("the game has stories only, no --task probes")
    items = grade.gather(args)
    grade.attach_replies(items, "me", "")
    shown = [item for item in items if grade.is_open(item) or item["replies"]]      # not empty
    unique = {item["key"]: item for item in shown}.values()
    pages = order_pages(unique, random.Random(args.seed))
    done = next((i for i, item in enumerate(pages) if not item["grades"]), len(pages) - 1)
    pages = pages[done // 10 * 10:][:10]            # those of this game
    print(textwrap.fill(STORY[1].partition(" Then guess")[0], 80) + f"\n\n{EXAMPLE}")
    try:
        for number, item in enumerate(pages, 1):
            if grade.is_open(item):
                print(f"\n---- page {number} of {len(pages)} ----\n")
                grade.judge_story(Human(), item)
    except (KeyboardInterrupt, EOFError):
        pass
    show_result(pages, items)


if __name__ == "__main__":
    main()
