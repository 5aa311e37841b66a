"""How large must a model be to tell a story, and should it be deep or wide?

    python -m study.sizes --grid demo       # nine small models: two cores, 17 minutes (estimated)
    python -m study.sizes --grid paper      # the paper's Figure 4: hours on a large GPU
    python -m study.sizes --grid heads      # its Figure 24: two, four, eight heads
    python -m study.sizes --grid demo --grade "--judge llama3.1 --n 2"      # options of grade.py

Every shape of a grid is trained on the same tokens, as a run of train.py in out/sizes/<grid>/, and
then looked at: its loss, the checks of study/checks.py, a judge's grades where there are any. The
report and its two pictures are written there after each run. Ctrl-C whenever you like; the same
command goes on. Settings of train.py can be added, as in --dataset=excerpt --max_steps=558.
"""

import argparse
import contextlib
import json
import math
import shlex
import signal
from pathlib import Path

import numpy as np
import torch

import grade
import prepare
import sample
import train
from model import GPT
from study.checks import CHECKS, check_run

# A grid: the config that it starts from, what it changes there, and the shapes; `head` is the width
# of a head. Half the width and four times the layers are as many parameters.
GRIDS = {
    "demo": dict(config="config/demo.py", head=16, widths=(32, 64, 128), layers=(1, 2, 4),
                 changes=("--max_steps=1_000", "--eval_interval=200", "--eval_tokens=20_480")),
    "paper": dict(config="config/tiny_8l.py", head=64, widths=(64, 128, 256, 512, 768, 1024),
                  layers=(1, 2, 4, 8, 12), changes=("--micro_batch=32",)),
    "heads": dict(config="config/tiny_8l.py", heads=(2, 4, 8), widths=(768,), layers=(1, 2),
                  changes=()),
}


# ---------------------------------------------------------------------------------------- the runs

def plan(name, changes=()):
    """The settings of all runs of a grid. The wider a model, the smaller its learning rate: with
    one over the square root of the width, as in config/."""
    grid, runs = GRIDS[name], []
    base = train.load_config([grid["config"]])
    for width in grid["widths"]:
        rate = base.learning_rate * math.sqrt(base.n_embd / width)
        for layers in grid["layers"]:
            for heads in grid.get("heads") or [max(2, width // grid["head"])]:
                runs.append(train.load_config([
                    grid["config"], f"--learning_rate={rate:.2g}", *grid["changes"], *changes,
                    f"--n_embd={width}", f"--n_layer={layers}", f"--n_head={heads}",
                    f"--out_dir=out/sizes/{name}/w{width}_l{layers}_h{heads}"]))
    return runs


def work(settings):
    """Operations of a run, if it goes to its end."""
    _, meta = train.find_data(settings.dataset)
    with torch.device("meta"):                          # no memory for the weights
        model = GPT(train.model_config(settings, meta["vocab_size"]))
    return model.flops_per_token() * settings.batch_tokens * settings.max_steps


def run(settings):
    """Train one shape, go on with it, or see that it is finished; what train.py says is kept."""
    folder = Path(settings.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.txt", "a", encoding="utf-8") as page, \
            contextlib.redirect_stdout(page):
        try:
            train.train(settings)
        except SystemExit as error:
            raise KeyboardInterrupt if error.code == 130 else error
    torch.compiler.reset()              # after some shapes, it would give up compiling
    signal.signal(signal.SIGINT, signal.default_int_handler)        # train.py has its own
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def measure(settings, n):
    """What a finished run has come to; kept beside it, for it takes a while."""
    folder = Path(settings.out_dir)
    path, of = folder / "sizes.json", [prepare.file_sha256(folder / "ckpt.pt"), n]
    kept = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if kept.get("of") != of:
        data, meta = train.find_data(settings.dataset)
        model, tokenizer = sample.load_run(folder, settings.device, torch.float32)
        told = meta["dataset"] == "sample"              # by the grammar, which can check it
        stories = train.validation(data / "val.bin", meta, settings.block_size,
                                   0 if told else settings.eval_tokens, 16)[1]
        looks = [row for row in train.read_log(folder / "log.csv") if row["val_loss"]]
        kept = {"of": of, "width": settings.n_embd, "layers": settings.n_layer,
                "heads": settings.n_head, "parameters": model.count_parameters(embeddings=False),
                "loss": float(looks[-1]["val_loss"]), "seconds": float(looks[-1]["seconds"]),
                "entropy": meta.get("entropy_bound", {}).get("nats_per_token"),
                "whole stories": train.evaluate(model, stories, model.token_embedding.weight.device,
                                                contextlib.nullcontext),
                "looks": [[model.flops_per_token() * int(row["tokens"]), float(row["val_loss"])]
                          for row in looks],
                "scores": {check: 100 * passed for check, passed in check_run(
                    model, tokenizer, n).items()} if told else {}}
        prepare.write_whole(path, lambda file: file.write(json.dumps(kept).encode()))
    return {**kept, "scores": kept["scores"] | grades(folder)}


def grades(folder):
    """A run's mean grades out of ten, by the judges in its ledger (see grade.py)."""
    lines, found = {line["key"]: line for line in grade.read_lines(folder / "grades.jsonl")}, {}
    for line in lines.values():
        if line["task"] == "story" and line["model"] == folder.name and "grades" in line:
            for metric in grade.NUMBERS:
                found.setdefault(f"{metric} ({line['judge']})", []).append(line["grades"][metric])
    return {metric: float(np.mean(marks)) for metric, marks in found.items()}


# -------------------------------------------------------------------------------- what they tell

def shared(rows):
    """The scores that all have: a judge may have been stopped on its way."""
    return [score for score in next(iter(rows.values()))["scores"]
            if all(score in row["scores"] for row in rows.values())]


def conclusions(rows, n):
    """What the numbers say by themselves -> lines of Markdown."""
    names = sorted(rows, key=lambda name: rows[name]["parameters"])
    scores, reached = shared(rows), []
    for score in scores:
        marks = {name: rows[name]["scores"][score] for name in names}
        half, unit = (50, " %") if score in CHECKS else (5, " of 10")
        able, best = [name for name in names if marks[name] >= half], max(names, key=marks.get)
        line = f"{able[0]} is the smallest that reaches" if able else "none reaches"
        line = f"* {score}: {line} {half}{unit}; the best is {best} with {marks[best]:.3g}{unit}"
        reached.append((names.index(able[0]) if able else len(names), line))
    lines = [line for _, line in sorted(reached)]       # what a small model can do stands first
    for what, wider, deeper, headed in (
            ("Twice the width, as many layers (four times the parameters)", 2, 1, None),
            ("Twice the layers, the same width (twice the parameters)", 1, 2, 1),
            ("Half the width, four times the layers (as many parameters)", 0.5, 4, None),
            ("Twice the heads, the same width and layers", 1, 1, 2)):
        gains = [[b["loss"] - a["loss"], *(b["scores"][score] - a["scores"][score]
                                           for score in scores)]
                 for a in rows.values() for b in rows.values()
                 if b["width"] == wider * a["width"] and b["layers"] == deeper * a["layers"]
                 and headed in (None, b["heads"] / a["heads"])]
        if gains:
            loss, *more = np.mean(gains, axis=0)
            lines.append(f"* {what}: loss {loss:+.3f}" + "".join(
                f", {score} {gain:+.1f}" for score, gain in zip(scores, more))
                + f" (the mean of {len(gains)} pairs)")
    if scores:
        lines.append(f"* Chance: two shares of {n} endings may well be equal if they differ by "
                     f"less than {196 * math.sqrt(0.5 / n):.0f} points, and each shape was trained "
                     "with one seed only.")
    return lines


def frontier(rows):
    """Of all looks at all runs, those that none after fewer operations beats
    -> [(operations, loss, name)]."""
    best = []
    for look in sorted((*look, name) for name, row in rows.items() for look in row["looks"]):
        if not best or look[1] < best[-1][1]:
            best.append(look)
    return best


READ = """\
# How large must a model be?

{table}

Loss: nats per token of the validation text, in windows and in whole stories{bound}.
Parameters: without embeddings. The paper's columns (its Figure 4) are of the same width and layers,
but of GPT-Neo's architecture, some 1.8 billion tokens of TinyStories, and grades out of ten by
GPT-4: compare which row is better than which, never the numbers.

{checks}

## What it says

{conclusions}

## Width and depth

![maps](maps.png)

To the right models get wider, downwards deeper: where the color changes faster, more can be gained.

## How large a model for how much compute?

![frontiers](frontiers.png)

Left, the end of each run, ringed where no smaller model has a lower loss. Right, every look at
every run; in black the lowest loss for the operations spent. A run whose learning rate has yet to
fall looks worse than one that was planned to end there: the black line is an upper bound. The
lowest loss belongs, from so many operations on, to {frontier}.
"""


def report(folder, rows, n):
    """Write report.md and its pictures -> the table."""
    cells = {}
    for name, row in rows.items():
        paper = grade.of_the_paper([{"shape": [row["width"], row["layers"]]}])
        above = f" ({row['whole stories'] / row['entropy'] - 1:+.0%})" if row["entropy"] else ""
        cells[name] = {key: row[key] for key in ("width", "layers", "heads")} | {
            "parameters": f"{row['parameters']:,}", "loss": f"{row['loss']:.3f}",
            "whole stories": f"{row['whole stories']:.3f}{above}"} | {
            score: f"{value:.3g}" for score, value in row["scores"].items()} | {
            f"paper: {key}": paper.get(key, "-")
            for key in ("loss", "grammar", "consistency", "plot")}
    best, checked = frontier(rows), [name for name in CHECKS if name in row["scores"]]
    first = [best[0]] + [b for a, b in zip(best, best[1:]) if a[2] != b[2]]
    text = READ.format(
        table=(table := grade.table(cells)), conclusions="\n".join(conclusions(rows, n)),
        bound=", in brackets how far above the grammar's own entropy" if above else "",
        checks="\n".join(f"* {name}, % of endings: {' '.join(CHECKS[name].__doc__.split())}"
                         for name in checked) or "There are no checks: these are not the stories "
        "of our grammar.",
        frontier=", ".join(f"{name} ({operations:.1e})" for operations, _, name in first))
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw_maps(folder / "maps.png", rows)
    draw_frontiers(folder / "frontiers.png", rows, best)
    return table


def subplots(down, across, size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    return figure, axes.flatten()


def draw_maps(path, rows):
    """Layers by widths (or heads): the loss and the scores."""
    across = sorted({(row["width"], row["heads"]) for row in rows.values()})
    down = sorted({row["layers"] for row in rows.values()})
    whats = ["loss", *shared(rows)]
    figure, axes = subplots(math.ceil(len(whats) / 3), 3, (10, 3.2 * math.ceil(len(whats) / 3)))
    for ax in axes[len(whats):]:
        ax.remove()
    for ax, what in zip(axes, whats):
        values = np.full((len(down), len(across)), math.nan)
        for row in rows.values():
            place = down.index(row["layers"]), across.index((row["width"], row["heads"]))
            values[place] = row["loss"] if what == "loss" else row["scores"][what]
        image = ax.imshow(values, aspect="auto", **(
            {"cmap": "viridis_r"} if what == "loss" else
            {"cmap": "viridis", "vmin": 0, "vmax": 100 if what in CHECKS else 10}))
        for (y, x), value in np.ndenumerate(values):
            light = sum(image.cmap(image.norm(value))[:3]) > 1.5
            ax.text(x, y, f"{value:.3g}", ha="center", va="center", color="k" if light else "w")
        ax.set(title=what + (", nats per token" if what == "loss" else ", % of endings"
                             if what in CHECKS else ""),
               xlabel="width", xticks=range(len(across)), ylabel="layers", yticks=range(len(down)),
               xticklabels=[f"{width}\n({heads} heads)" for width, heads in across],
               yticklabels=down)
    figure.savefig(path, dpi=120)


def draw_frontiers(path, rows, best):
    """The loss against parameters and against operations, on logarithmic axes."""
    figure, (left, right) = subplots(1, 2, (12, 4.5))
    layers, lowest = sorted({row["layers"] for row in rows.values()}), math.inf
    for row in sorted(rows.values(), key=lambda row: (row["parameters"], row["loss"])):
        color, end = f"C{layers.index(row['layers'])}", (row["parameters"], row["loss"])
        left.plot(*end, "o", color=color)
        if row["loss"] < lowest:
            lowest = row["loss"]
            left.plot(*end, "o", color="k", fillstyle="none", markersize=12)
        right.plot(*zip(*row["looks"]), ".-", color=color, alpha=0.7)
        for ax, point in ((left, end), (right, row["looks"][-1])):
            ax.annotate(f"{row['width']} x {row['layers']}", point, (7, 3), fontsize=8,
                        textcoords="offset points")
    right.plot(*zip(*[look[:2] for look in best]), "k-", label="the lowest loss so far")
    right.legend()
    for ax, what in ((left, "parameters without embeddings"), (right, "operations of training")):
        ax.set(xscale="log", yscale="log", xlabel=what, ylabel="loss, nats per token")
        ax.yaxis.set_major_formatter("{x:.2g}")
        ax.yaxis.set_minor_formatter("{x:.2g}")
        ax.grid(alpha=0.3, which="both")
        ax.margins(x=0.12)
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------ main

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True, choices=GRIDS)
    parser.add_argument("-n", type=int, default=200, help="stories to check (default 200)")
    parser.add_argument("--grade", nargs="?", const="", metavar="OPTIONS",
                        help="let a judge grade all runs; OPTIONS are grade.py's, in quotes")
    args, changes = parser.parse_known_args(argv)
    if args.n < 1:
        parser.error("-n must be 1 or more")
    prepare.command(study, args, changes)


def study(args, changes):
    runs, rows = plan(args.grid, changes), {}
    folder, costs = Path(runs[0].out_dir).parent, [work(settings) for settings in runs]
    print(f"{len(runs)} runs, {sum(costs):.1e} operations in all", flush=True)
    for i, settings in enumerate(runs):
        name = Path(settings.out_dir).name
        left = sum(costs[i:]) / max(sum(costs[:i]), 1) * sum(
            row["seconds"] for row in rows.values()) / 60
        print(f"{i + 1} of {len(runs)}, " + f"{left:.0f} minutes of training left, " * bool(rows)
              + f"writes {folder / name / 'train.txt'}", flush=True)
        known = (folder / name / "sizes.json").exists()
        run(settings)
        rows[name] = measure(settings, args.n)
        if not known or i + 1 == len(runs):
            table = report(folder, rows, args.n)
    if args.grade is not None:
        try:
            grade.main([*(settings.out_dir for settings in runs), *shlex.split(args.grade)])
        finally:                        # what was judged is in the ledgers, wherever it stopped
            rows = {Path(settings.out_dir).name: measure(settings, args.n) for settings in runs}
            table = report(folder, rows, args.n)
    print(f"\n{table}\n\n" + "\n".join(conclusions(rows, args.n))
          + f"\n\nThe report: {folder / 'report.md'}")


if __name__ == "__main__":
    main()
