"""How good are a model's stories? A stronger model grades them, like a teacher.

    python grade.py out/tiny_8l                     # 10 completions of each of 50 beginnings
    python grade.py out/tiny_1l out/tiny_8l --n 2   # several models in one table
    python grade.py out/tiny_8l --dry-run           # first request and price; sends nothing
    python grade.py out/tiny_8l --judge llama3.1 --base-url http://localhost:11434/v1
    python grade.py out/tiny_8l --judge none        # only what needs no judge
    python grade.py stories.jsonl                   # {"prompt", "completion", "model"} per line

Stories go to completions.jsonl, replies to grades.jsonl in the run's folder: the same command
continues, and nothing is paid twice. judge.py has the prompt. Method: arXiv 2305.07759.
"""

import argparse
import random
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import prepare
import sample
from data.grammar import FIELDS, format_instructions, split_sentences
from judge import (
    METRICS,
    TASKS,
    VERDICTS,
    Client,
    add_reply,
    add_server_options,
    append_line,
    ask_all,
    build_messages,
    confirm_cost,
    digest,
    grade_schema,
    prompt_version,
    read_lines,
    render_page,
)
from model import NonFiniteLogits

ANCHORS = ("true ending", "sentences shuffled", "random words")     # best first
LOG = "grades.jsonl"

# ------------------------------------------------------------------- the stories

def read_prompts(task, path=None, synthetic=False):
    """-> [{"prompt", perhaps "ending", "right", "kind", "Words", ...}]. synthetic: of our own
    prompts, only those in the words of data/grammar.txt."""
    file, rows = Path(path or prepare.HERE / "data" / TASKS[task][1]), []
    if file.suffix == ".jsonl":
        rows = [{"prompt": format_instructions({k: row[k] for k in row if k in FIELDS}), **row}
                for row in read_lines(file)]
    elif file.suffix == ".yaml":            # the paper's: indented blocks after "- |-"
        rows = [{"prompt": re.sub("(?m)^  ", "", block)}
                for block in re.split(r"(?m)^- \|-.*\n", file.read_text("utf-8"))[1:]]
    else:
        for line in re.findall(r"(?m)^[^#\n].*", file.read_text("utf-8")):
            prompt, _, ending = line.removeprefix("+ ").replace("\\n", "\n").partition("***")
            rows.append({"prompt": prompt, "ending": ending, "sample": line[0] == "+"})
    rows = [{**row, "prompt": str(row["prompt"]).rstrip()} for row in rows
            if path or not synthetic or row.get("sample")]
    if not rows or task == "probes" and not all("right" in row for row in rows):
        raise SystemExit(f"{file} has no prompts for --task {task}; see data/{TASKS[task][1]}")
    return rows


def complete(path, args, client):
    """A run's args.n completions of each prompt. completions.jsonl has those that the same
    checkpoint and the same code have made before."""
    file, folder = sample.find_run(path), sample.results_folder(path)
    synthetic = prepare.read_meta(file.parent).get("dataset") in prepare.SAMPLES
    rows, model, items = read_prompts(args.task, args.prompts, synthetic), None, []
    hashes = [prepare.file_sha256(each)[:16] for each in
              (file, prepare.HERE / "model.py", prepare.HERE / "sample.py")]
    how = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    cache = {line.get("key"): line for line in read_lines(folder / "completions.jsonl")}
    for rep in range(args.n):               # each is one batch with its own seed, whatever n is
        keys = [digest(hashes, how, args.without, args.seed, rep, row["prompt"]) for row in rows]
        missing = not cache.keys() >= {*keys}
        if missing and client is None:
            raise SystemExit(f"{path}: no completions by the present code; first run grade.py")
        if missing and model is None:
            client.connect()                # a missing key is reported before the work
            model, tokenizer, _ = sample.load_run(file, args.device, without=args.without)
        if missing:
            ids = [sample.encode_prompt(tokenizer, row["prompt"], model.config.block_size)
                   for row in rows[:1 if args.dry_run else None]]
            try:
                texts = model.generate(ids, stop=tokenizer.eot_token,
                                       seed=1000 * args.seed + rep, **how)
            except NonFiniteLogits as error:
                raise SystemExit(f"{path}: {error}")
            for key, row, tokens in zip(keys, rows, texts * (len(rows) if args.dry_run else 1)):
                if key not in cache:
                    cache[key] = {"key": key, "rep": rep, "prompt": row["prompt"],
                                  "completion": tokenizer.decode(tokens),
                                  "ended": len(tokens) < args.max_new_tokens}
                    if not args.dry_run:
                        append_line(folder / "completions.jsonl", cache[key])
        about = {"model": path, "folder": folder, "checkpoint": hashes[0], "seed": args.seed}
        items += [{**row, **cache[key], **how, **about} for key, row in zip(keys, rows)]
    return items


def read_stories(path, task):
    """Stories from anywhere, one JSON object per line; repeated ones count once."""
    known = {row["prompt"]: row for row in read_prompts(task)} if task == "probes" else {}
    needed, items = ["model", "prompt", "completion", *["right"] * (task == "probes")], {}
    for line in read_lines(path):
        item = {"model": path.stem, **known.get(line.get("prompt"), {}), **line, "rep": 0,
                "folder": path.parent, "checkpoint": None}
        if not all(isinstance(item.get(name), str) for name in needed) or item["model"] in ANCHORS:
            raise SystemExit(f"{path}: a line needs text as {', '.join(needed)}, and no model may "
                             f"be called like an anchor, but there is {str(line)[:100]}")
        item["completion"] = item["completion"].removeprefix(item["prompt"])
        items[item["model"], item["prompt"], item["completion"]] = item
    return [*items.values()]


def make_anchors(items, n_prompts=10):
    """Stories of known quality. They depend on the prompts, not on the order of the models; without
    a true ending, a model's sentences are shuffled."""
    items = sorted(items, key=lambda item: (bool(item.get("ending")), item["prompt"],
                                            item["completion"]))
    for item in [*{item["prompt"]: item for item in items}.values()][-n_prompts:]:
        rng, text = random.Random(item["prompt"]), item.get("ending") or item["completion"]
        sentences = split_sentences(text.strip())
        mixed = rng.sample(sentences, len(sentences))
        mixed = mixed if mixed != sentences else mixed[::-1]
        noise = rng.choices((item["prompt"] + " " + text).split() or ["a"], k=60)
        texts = item.get("ending"), " ".join(mixed) if len(mixed) > 1 else "", " ".join(noise)
        for name, text in zip(ANCHORS, texts):
            if text:
                yield {"model": name, "prompt": item["prompt"], "completion": f" {text.strip()}",
                       "rep": 0, "folder": item["folder"], "checkpoint": None}


def gather(args, client=None):
    """All stories and anchors, with the replies of the judge so far. Without a client, nothing is
    sampled."""
    items = []
    for path in dict.fromkeys(args.runs):
        items += read_stories(Path(path), args.task) if path.endswith(".jsonl") else \
            complete(path, args, client)
    if args.anchors and args.task != "probes":
        items += make_anchors(items)
    for item in items:
        item["task"] = args.task
        if args.task == "probes":           # the answer is the first sentence
            item["completion"] = re.match(r'(?s).*?([.!?]["”]?(?=\s|$)|$)', item["completion"])[0]
    attach_replies(items, args.judge, Client(args, args.judge).url, args.repeat)
    return items


def attach_replies(items, judge, url, repeat=0):
    """Set the key, the replies and the grades of each item, as far as this judge has graded it. The
    logs of neighbor folders count, too: anchors are paid for once."""
    logs = {path.resolve() for item in items for path in
            [item["folder"] / LOG, *item["folder"].resolve().parent.glob(f"*/{LOG}")]}
    replies = {(line["key"], line["turn"]): line["reply"]
               for path in sorted(logs) for line in read_lines(path) if "turn" in line}
    for item in items:
        version = prompt_version(item["task"])
        item["key"] = digest(judge, url, version, repeat, render_page(item), item.get("right"))
        item.update(judge=judge, url=url, version=version, repeat=repeat, replies=[], grades={},
                    reason="not asked yet", open=True)
        item["empty"] = not re.search(r"\w", item["completion"])
        if item["empty"]:                   # needs no judge
            item.update(reason="", open=False, grades={
                **dict.fromkeys(METRICS, 0.0), "age": "A", "verdict": "wrong"})
        for turn in (0, 1):
            if item["open"] and len(item["replies"]) == turn and (item["key"], turn) in replies:
                add_reply(item, replies[item["key"], turn])


def judge_story(client, item):
    """Both turns about a story; each reply is stored before it is parsed."""
    names = ("key", "task", "judge", "url", "version", "repeat", "model", "checkpoint", "prompt",
             "completion", "rep")
    turn = -1
    while item["open"] and turn < len(item["replies"]):     # an unusable reply: not again now
        turn = len(item["replies"])
        reply = client.ask(build_messages(item), grade_schema(item["task"]) if turn else None)
        if isinstance(reply, str):
            item["reason"] = reply
            return
        append_line(item["folder"] / LOG, {**{name: item[name] for name in names}, "turn": turn,
                                           "reply": reply})
        add_reply(item, reply)


# ------------------------------------------------------------------- statistics and tables

def mean_interval(groups):
    """Groups of numbers, one group per prompt -> the mean of the group means, and half the width of
    its 95 % t-interval (nan for one group). Completions of one prompt are not independent."""
    means = [np.mean(group) for group in groups]
    df = len(means) - 1
    if df < 1:
        return (*means, np.nan, np.nan)[:2]
    t = 1.96 + 2.37 / df + 2.82 / df**2 + 2.53 / df**3          # Student's t: Cornish-Fisher
    t = (12.706, 4.303, 3.182, 2.776)[df - 1] if df < 5 else t
    return np.mean(means), t * np.std(means, ddof=1) / len(means) ** 0.5


def by_prompt(items, *metrics):
    """{prompt: [the mean of the metrics for each graded story]}"""
    groups = {}
    for item in items:
        if item["grades"]:
            grade = np.mean([item["grades"][name] for name in metrics])
            groups.setdefault(item["prompt"], []).append(grade)
    return groups


def paired_interval(a, b):
    """mean_interval of a - b over the prompts that both have; a and b as from by_prompt."""
    return mean_interval([[np.mean(a[prompt]) - np.mean(b[prompt])] for prompt in a if prompt in b])


def items_by_model(items):
    groups = {}
    for item in items:
        groups.setdefault(item["model"], []).append(item)
    return groups


def anchors_in_order(by_model):
    """Whether each anchor is significantly better than the next; None if there is only one."""
    grades = [by_prompt(by_model[name], *METRICS) for name in ANCHORS if name in by_model]
    steps = [paired_interval(*pair) for pair in zip(grades, grades[1:])]
    return all(mean - half > 0 for mean, half in steps) if steps else None


def normalized_score(items, by_model):
    """Where a model is between random words (0 %) and true endings (100 %), with its interval; None
    if no judge or no true ending makes a scale. The same prompts for all three; delta method."""
    model, best, worst = (by_prompt(stories, *METRICS) for stories in (
        items, by_model.get(ANCHORS[0], []), by_model.get(ANCHORS[-1], [])))
    prompts = [prompt for prompt in model if prompt in best and prompt in worst]
    gains, scales = (np.array([np.mean(grades[p]) - np.mean(worst[p]) for p in prompts])
                     for grades in (model, best))
    mean, half = mean_interval([[scale] for scale in scales])
    if not mean - half > 0:
        return None
    ratio = gains.mean() / mean
    _, half = mean_interval([[rest] for rest in gains - ratio * scales])
    return 100 * ratio, 100 * half / mean


def format_interval(interval, form=".2f"):
    mean, half = interval
    half = "-" if np.isnan(half) else f"{half:{form.strip('+')}}"
    return "-" if np.isnan(mean) else f"{mean:{form}} ± {half}"


def format_table(rows):
    """{row name: {column: cell}} -> a Markdown table that is readable as it is."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    lines = [["", *columns]] + [[name, *(row.get(column, "-") for column in columns)]
                                for name, row in rows.items()]
    lines = [[" ".join(prepare.printable(str(cell)).replace("|", "\\|").split()) for cell in line]
             for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def contains_word(word, text):
    """Whether a text has an English word, perhaps with a regular ending: make, makes, making."""
    stem, end = (word[:-1], word[-1]) if word[-1:] in ("e", "y") else (word, "")
    forms = rf"{re.escape(stem)}({end}|i?e?|{word[-1:]})(s|d|ed|ing|r|er|st|est|ly)?"
    return bool(re.search(rf"(?i)\b({re.escape(word)}|{forms})\b", text))


def without_judge(items):
    """What can be said about stories without a judge -> {column: cell}."""
    found = {"end by themselves": [item["ended"] for item in items if "ended" in item]}
    for item in items:
        text = " ".join(item["completion"].lower().split())
        for word in re.findall(r"[^\s,][^,]*", item.get("Words", "")):
            found.setdefault("required words", []).append(contains_word(word, text))
        if sentence := item.get("Random sentence", "").lower():
            found.setdefault("required sentences", []).append(" ".join(sentence.split()) in text)
    return {name: f"{np.mean(values):.0%}" for name, values in found.items() if values}


def summary_rows(items):
    """One row per model and anchor."""
    rows = {}
    for name, stories in items_by_model(items).items():
        graded = [item["grades"] for item in stories if item["grades"]]
        rows[name] = {"stories": len(stories)}
        if items[0]["judge"] != "none":
            rows[name]["graded"] = len(graded)
        if items[0]["task"] == "probes" and items[0]["judge"] != "none":
            verdicts = [grades["verdict"] for grades in graded]
            rows[name] |= {verdict: verdicts.count(verdict) for verdict in VERDICTS}
        elif items[0]["judge"] != "none":
            rows[name] |= {metric: format_interval(mean_interval(
                by_prompt(stories, metric).values())) for metric in METRICS}
            ages = sorted(grades["age"] for grades in graded) or ["-"]
            rows[name]["age"] = ages[len(ages) // 2]
        rows[name] |= without_judge(stories)
    return rows


# ------------------------------------------------------------------- command line

def build_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs, checkpoint files, .jsonl files of stories")
    add("--task", default="story", choices=TASKS)
    add("--n", type=int, default=10, help="completions of each prompt (default %(default)s)")
    add("--prompts", help="a file like those in data/, or the paper's evaluation_prompts.yaml")
    add("--judge", default="gpt-6-luna", help="a model of the server; me; or none")
    add("--repeat", type=int, default=0, help="another number: grade again, to see the noise")
    add("--anchors", action=argparse.BooleanOptionalAction, default=True, help="grade also true "
        "endings, shuffled sentences and random words")
    add("--max_new_tokens", type=int, default=400, help="of a completion")
    sample.add_sampling_options(parser, temperature=1.0)
    add_server_options(parser)
    return parser


def parse_args(parser, argv=None):
    if parser.parse_known_args(argv)[0].task == "probes":       # short answers, the likeliest
        parser.set_defaults(n=1, temperature=0.0, max_new_tokens=40)
    args = sample.parse_args(parser, argv)
    if args.n < 1 or args.max_new_tokens < 1:
        parser.error("--n and --max_new_tokens must be above 0")
    for name in [*args.runs, args.prompts or ""]:
        if name.endswith((".jsonl", ".txt", ".yaml")) and not Path(name).is_file() or \
                Path(name).name == LOG:
            parser.error(f"{name} is no file of stories or prompts")
    return args


def main(argv=None):
    args = parse_args(build_parser(), argv)
    if args.judge == "me":
        raise SystemExit(f"Be the judge: python -m study.teacher {shlex.join(args.runs)}")
    args.anchors &= args.judge != "none"
    client = Client(args, args.judge)
    items = gather(args, client)
    if args.judge == "none":
        return print(format_table(summary_rows(items)))
    todo = [*{item["key"]: item for item in items if item["open"]}.values()]
    if todo or args.dry_run:
        confirm_cost(client, f"{len(items):,} stories and anchors, {len(todo):,} to grade",
                     [build_messages(item) for item in todo or items], 2 * len(todo),
                     250 * len(todo))
        random.Random(0).shuffle(todo)
        todo.sort(key=lambda item: item["rep"])     # stopped early, all prompts are graded
        ask_all(client, lambda item: judge_story(client, item), todo, "graded")
        reasons = {item["key"]: item["reason"] for item in todo}
        attach_replies(items, args.judge, client.url, args.repeat)
        for item in items:                          # equal texts have one reply
            item["reason"] = reasons.get(item["key"], item["reason"])
        print(f"\nSpent: {client.spent_text()}")
    print("\n" + format_table(summary_rows(items)))
    if args.task != "probes":
        order = "puts" if anchors_in_order(items_by_model(items)) else "does not put"
        print(f"Grades: mean ± half of the 95 % interval over {len(by_prompt(items, METRICS[0]))} "
              "prompts." + f" The judge {order} the anchors in order." * args.anchors)
    unscored = Counter(item["reason"] for item in items if not item["grades"])
    for reason, n in unscored.most_common(5):
        print(f"unscored: {n} x {reason}", file=sys.stderr)
    argv = sys.argv[1:] if argv is None else argv
    print(f"Stories and replies: python -m study.report {shlex.join(argv)}")
    if client.stop or sum(unscored.values()) > 0.05 * len(items):
        print(f"{client.stop or 'Many are unscored'}. The same command continues.", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
