"""What do the grades say?

    python -m study.report out/demo                     # by the judge with the most replies
    python -m study.report out/tiny_1l out/tiny_8l --judge gpt-6-luna
    python -m study.report stories.jsonl                # options as grade.py; or a grades.jsonl

Asks nobody and costs nothing. Writes one HTML page next to the log: stories, replies, grades with
95 % intervals (their unit is the prompt), all pairs of models, and the agreement of all judges in
the log, also with `me` (study/teacher.py) and with themselves (grade.py --repeat). 3 seconds.
"""

import base64
import csv
import html
import io
import itertools
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import numpy as np
from matplotlib.figure import Figure

import grade
import prepare
import sample
from data import common
from grade import ANCHORS, METRICS, VERDICTS, by_prompt, mean_interval, render_page
from model import read_checkpoint

HEAD = """<!-- written by study/report.py -->
<!DOCTYPE html><html lang="en"><meta charset="utf-8"><style>
body { font: 15px/1.5 sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em }
td { padding: .2em .6em; border-bottom: 1px solid #ccc } table, details { margin: 1em 0 }
pre { white-space: pre-wrap; font: inherit } i { color: #777 } pre + pre { color: #246 }</style>"""


def logged_stories(logs, task):
    """The stories that files grades.jsonl have replies about."""
    stories = {}
    for log in logs:
        for line in grade.read_lines(log):
            if line.get("task") == task and "turn" in line:
                stories[line["model"], render_page(line)] = {**line, "folder": log.parent}
    return [*stories.values()]


def judges_in(items):
    """Who graded these stories: a list of (name, url, repeat), the busiest first."""
    pages = {render_page(item) for item in items}
    counts = Counter((line["judge"], line["url"], line["repeat"])
                     for line in grade.read_log(items) if render_page(line) in pages)
    return [judge for judge, _ in counts.most_common()]


def describe_judge(name, url, repeat):
    return name + f" at {url}" * bool(url) + f", repeat {repeat}" * bool(repeat)


def mean_grade(item):
    if item["task"] == "probes":
        return -VERDICTS.index(item["grades"]["verdict"])
    return np.mean([item["grades"][metric] for metric in METRICS])


def normalized_score(stories, by_model):
    """Where a model is between random words (0 %) and true endings (100 %), with half of its 95 %
    interval, on the prompts that all three have (delta method); None if there is no such scale."""
    model, best, worst = (by_prompt(items, *METRICS) for items in (
        stories, by_model.get(ANCHORS[0], []), by_model.get(ANCHORS[-1], [])))
    prompts = [prompt for prompt in model if prompt in best and prompt in worst]
    gains, scales = (np.array([np.mean(grades[p]) - np.mean(worst[p]) for p in prompts])
                     for grades in (model, best))
    scale, half = mean_interval([[x] for x in scales])
    if not scale > half:
        return None
    ratio = gains.mean() / scale
    _, half = mean_interval([[x] for x in gains - ratio * scales])
    return 100 * ratio, 100 * half / scale


def spearman(pairs):
    """Rank correlation of pairs of numbers; nan if all numbers of one side are equal."""
    a, b = ([(column < x).sum() + (column <= x).sum() for x in column]      # ties: the mean rank
            for column in np.array(pairs).T)
    return np.corrcoef(a, b)[0, 1] if np.std(a) > 0 and np.std(b) > 0 else np.nan


def spearman_interval(groups):
    """A list of pairs per prompt -> rank correlation, low and high end of its 95 % interval, by a
    jackknife over prompts in Fisher's z. Simulated coverage at 5 to 50 prompts: 92 to 97 %."""
    groups, n = list(groups), len(groups)
    samples = [groups] + [groups[:i] + groups[i + 1:] for i in range(n) if n > 2]
    rho = [spearman(sum(sample, [])) for sample in samples]
    z, *without_one = np.arctanh(np.clip(rho, -0.999, 0.999))
    _, half = mean_interval([[n * z - (n - 1) * other] for other in without_one])
    return rho[0], np.tanh(z - half), np.tanh(z + half)


def agreement_rows(items):
    """All pairs of judges, on the stories that both graded."""
    rows, graded = {}, {}
    for judge in judges_in(items):
        copies = [dict(item) for item in items]
        grade.attach_replies(copies, *judge)
        copies = [item for item in copies if item["grades"] and item["replies"]]
        graded[describe_judge(*judge)] = {render_page(item): item for item in copies}
    for (a, first), (b, second) in itertools.combinations(graded.items(), 2):
        groups = {}
        for page in first.keys() & second.keys():
            pair = mean_grade(first[page]), mean_grade(second[page])
            groups.setdefault(first[page]["prompt"], []).append(pair)
        if groups:
            rho, low, high = spearman_interval(groups.values())
            rows[f"{a} - {b}"] = {
                "stories": sum(map(len, groups.values())), "prompts": len(groups),
                "rank correlation": f"{rho:.2f} [{low:.2f}, {high:.2f}]".replace("nan", "-"),
                "mean difference": grade.format_interval(mean_interval(
                    [[x - y for x, y in pairs] for pairs in groups.values()]), "+.2f")}
    return rows


def difference_rows(by_model, models):
    """All pairs of models: the difference of each grade, on the prompts that both have."""
    rows = {}
    for a, b in itertools.combinations(models, 2):
        row = rows[f"{a} - {b}"] = {}
        for metric in METRICS:
            pair = (by_prompt(by_model[name], metric) for name in (a, b))
            interval = grade.paired_interval(*pair)
            row[metric] = grade.format_interval(interval, "+.2f")
    return rows


def probe_rows(by_model):
    """Right/partly/wrong for each kind of probe, as in the paper's Figures 9-11."""
    rows = {}
    for name, items in by_model.items():
        counts = Counter((item.get("kind") or "all", item["grades"].get("verdict"))
                         for item in items)
        rows[name] = {kind: "/".join(str(counts[kind, verdict]) for verdict in VERDICTS)
                      for kind, _ in counts}
    return rows


def paper_rows(names, columns):
    """The paper's results for models of the same shape, unless they learned synthetic stories."""
    rows, table = {}, (prepare.HERE / "data" / "paper.csv").read_text("utf-8").splitlines()
    for name in [name for name in names if Path(name).is_dir()]:
        config = read_checkpoint(sample.find_run(name))["model_config"]
        synthetic = prepare.read_meta(name).get("dataset") in prepare.SAMPLES
        for row in csv.DictReader(table):
            shape = int(row["width"]), int(row["layers"])
            if shape == (config["n_embd"], config["n_layer"]) and not synthetic:
                rows[f"paper, like {name}"] = {key: row[key] for key in columns if row.get(key)}
    return rows


def judge_rows(items):
    """Who graded, when, and what was sent."""
    replies = [reply for item in items for reply in item["replies"]]
    dates = sorted(reply["date"][:10] for reply in replies)
    sent = Counter(", ".join(reply["sent"]) or "no parameters" for reply in replies)
    reasons = Counter(item["reason"] for item in items if not item["grades"])
    runs = {f"{item['model']} {item['checkpoint']}, temperature {item['temperature']}, seed "
            f"{item['seed']}" for item in items if "seed" in item}
    rows = {
        "judge asked for": describe_judge(*(items[0][x] for x in ("judge", "url", "repeat"))),
        "judge returned": ", ".join(sorted({str(reply["model"]) for reply in replies})),
        "dates": f"{dates[0]} to {dates[-1]}", "prompt version": items[0]["version"],
        "replies": "; ".join(f"{n} with {names}" for names, n in sent.items()),
        "unscored": "; ".join(f"{n} x {why}" for why, n in reasons.most_common()) or "none",
        "checkpoints": "; ".join(sorted(runs)) or "unknown"}
    return {name: {"": fact} for name, fact in rows.items()}


def escape(text):
    """Text from outside, without markup and with visible control characters."""
    return html.escape(common.printable(str(text).encode("utf-8", "replace").decode()))


def html_table(rows):
    """{row name: {column: cell}} -> a table."""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in common.table_rows(rows)]
    return "<table><tr>" + "</tr>\n<tr>".join(lines) + "</tr></table>" if rows else "<p>none</p>"


def plot_grades(by_model, title):
    """Grades and their intervals -> an <img> that contains the picture."""
    figure, file = Figure(figsize=(9, 4.5), layout="constrained"), io.BytesIO()
    ax = figure.subplots()
    for i, (name, items) in enumerate(by_model.items()):
        intervals = [mean_interval(by_prompt(items, metric).values()) for metric in METRICS]
        x = np.arange(len(METRICS)) + 0.7 * ((i + 0.5) / len(by_model) - 0.5)     # side by side
        ax.errorbar(x, *np.transpose(intervals), fmt="x" if name in ANCHORS else "o", capsize=3,
                    label=name.replace("$", r"\$"))
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xticks=range(len(METRICS)), xticklabels=METRICS, ylim=(-0.3, 10.3),
           ylabel="grade out of 10", title=title.replace("$", r"\$"))
    figure.savefig(file)
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def render_story(item, label):
    """A story with its grades and replies, folded unless it is the best or the worst."""
    grades = ", ".join(f"{name} {value}" for name, value in item["grades"].items())
    given, _, written = render_page(item).partition("***")
    replies = "".join(f"<pre>{escape(reply['text'])}</pre>" for reply in item["replies"])
    return (f"<details{' open' * (label in ('best', 'worst'))}><summary><b>{label}</b> "
            f"{escape(item['model'])}: {escape(grades or item['reason'])}</summary>"
            f"<pre><i>{escape(given)}***</i>{escape(written)}</pre>{replies}</details>\n")


def render_stories(items):
    """All stories: the unscored ones first, then from the best to the worst."""
    unscored = [render_story(item, "unscored") for item in items if not item["grades"]]
    scored = sorted((item for item in items if item["grades"]), key=mean_grade, reverse=True)
    labels = ["best", *[""] * (len(scored) - 2), "worst"]
    return "".join(unscored + list(map(render_story, scored, labels)))


def main(argv=None):
    common.setup_console()
    parser = grade.build_parser()
    parser.description = __doc__
    parser.set_defaults(judge="")
    args = grade.parse_args(parser, argv)
    logs = [Path(run) for run in args.runs if Path(run).name == grade.LOG]
    if 0 < len(logs) < len(args.runs):
        parser.error(f"give either runs or files {grade.LOG}, not both")
    items = logged_stories(logs, args.task) or grade.gather(args)
    judges = [x for x in judges_in(items) if args.judge in ("", x[0]) and args.repeat == x[2]]
    if judges:
        grade.attach_replies(items, *judges[0])
    if not any(item["replies"] for item in items):
        raise SystemExit(f"No replies yet. First: python grade.py {shlex.join(sys.argv[1:])}")
    by_model, rows = grade.items_by_model(items), grade.summary_rows(items)
    judge = describe_judge(judges[0][0], "", args.repeat)
    models = [model for model in by_model if model not in ANCHORS]
    title = escape(f"{', '.join(models)}: graded by {judge}")
    parts = [HEAD, f"<title>{title}</title><h1>{title}</h1>", html_table(judge_rows(items))]
    if args.task == "probes":
        kinds = probe_rows(by_model) | paper_rows(by_model, ("knowledge", "reasoning", "context"))
        parts += [html_table(rows), "<h2>Right / partly / wrong</h2>", html_table(kinds)]
    else:
        for model, stories in by_model.items():
            rows[model]["prompts"] = len(by_prompt(stories, *METRICS))
            if model in models and (score := normalized_score(stories, by_model)):
                rows[model]["anchor-normalized"] = grade.format_interval(score, ".0f") + " %"
        paper = paper_rows(by_model, ["instruct"] if args.task == "instruct" else METRICS)
        order = {True: "in order", False: "NOT in order", None: "too few to order"}
        parts += [
            html_table(rows | paper), "<p>Mean ± half of its 95 % interval over prompts. For this "
            f"judge, the anchors are {order[grade.anchors_in_order(by_model)]}.</p>",
            plot_grades(by_model, f"graded by {judge}, {len(by_prompt(items, *METRICS))} prompts"),
            "<h2>All pairs of models</h2>", html_table(difference_rows(by_model, models)),
            "<p>If nothing differs, one in twenty of these intervals excludes 0 by chance.</p>",
            "<h2>Agreement of judges</h2>", html_table(agreement_rows(items)),
            "<p>Anchors raise the correlation, because they differ more than models.</p>"]
    words = "_".join(["report", *(Path(run).stem for run in args.runs), judge, args.task])
    path = items[0]["folder"] / (re.sub(r"[^\w.-]", "-", words)[:200] + ".html")
    if path.exists() and not path.read_bytes().startswith(HEAD[:30].encode()):
        raise SystemExit(f"{path} was not written by this command; move it away first")
    common.write_text(path, "".join([*parts, "<h2>Stories</h2>", render_stories(items)]))
    print(f"{common.format_table(rows)}\nReport: {path}")


if __name__ == "__main__":
    main()
