"""How large must a model be to tell a story, and should it be deep or wide?

    python -m study.sizes --grid demo       # nine small models: 9 minutes on two CPU cores
    python -m study.sizes --grid paper      # the paper's Figure 4: hours on a large GPU
    python -m study.sizes --grid heads      # its Figure 24: two, four, eight heads
    python grade.py out/sizes/demo/w*       # a judge's grades; the grid, run again, puts them in

Every shape of a grid is trained on the same tokens, as a run of train.py in out/sizes/<grid>/, and
then looked at: its loss, the checks of study/checks.py, a judge's grades where there are any. The
report and its two pictures are written there after each run. Ctrl-C whenever you like; the same
command goes on. Settings of train.py can be added, as in --dataset=excerpt --max_steps=558.
"""

import argparse
import contextlib
import math
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import grade
import prepare
import sample
import train
from model import GPT
from study.checks import CHECKS, EXPLAINED, check_run

# A grid: the config that it starts from, what it changes there, and the shapes (width, layers,
# heads). Half the width and four times the layers are as many parameters.
GRIDS = {
    "demo": dict(config="config/demo.py",
                 changes=("--max_steps=750", "--eval_interval=150", "--eval_tokens=20_480"),
                 shapes=[(width, layers, width // 16)
                         for width in (32, 64, 128) for layers in (1, 2, 4)]),
    "paper": dict(config="config/tiny_8l.py", changes=("--micro_batch=32",),
                  shapes=[(width, layers, max(2, width // 64))
                          for width in (64, 128, 256, 512, 768, 1024)
                          for layers in (1, 2, 4, 8, 12)]),
    "heads": dict(config="config/tiny_8l.py", changes=(),
                  shapes=[(768, layers, heads) for layers in (1, 2) for heads in (2, 4, 8)]),
}
# What is compared: two runs whose shapes differ by these factors (None: any).
PAIRS = {"Twice the width, as many layers (four times the parameters)": (2, 1, None),
         "Twice the layers, the same width (twice the parameters)": (1, 2, 1),
         "Half the width, four times the layers (as many parameters)": (0.5, 4, None),
         "Twice the heads, the same width and layers": (1, 1, 2)}


# ---------------------------------------------------------------------------------------- the runs

def plan(name, changes=()):
    """The settings of all runs of a grid. The wider a model, the smaller its learning rate: with
    one over the width, as in config/."""
    grid, runs = GRIDS[name], []
    base = train.load_config([grid["config"]])
    for width, layers, heads in grid["shapes"]:
        rate = base.learning_rate * base.n_embd / width
        runs.append(train.load_config([
            grid["config"], f"--learning_rate={rate:.2g}", *grid["changes"], *changes,
            f"--n_embd={width}", f"--n_layer={layers}", f"--n_head={heads}",
            f"--out_dir=out/sizes/{name}/w{width}_l{layers}_h{heads}"]))
    return runs


def work(settings):
    """Operations of training that a run still needs, about (a vocabulary of 10,000 is guessed)."""
    with torch.device("meta"):                          # no memory for the weights
        model = GPT(train.model_config(settings, 10_000))
    log = Path(settings.out_dir, "log.csv")
    begun = log.exists() and not settings.overwrite
    steps = [int(row["step"]) for row in train.read_log(log)] if begun else []
    left = settings.max_steps - max(steps, default=0)
    if left < 0:
        raise SystemExit(f"{settings.out_dir} has made more steps than {settings.max_steps}: throw "
                         "the grid away with --overwrite=True, or move it.")
    return left * settings.batch_tokens * model.flops_per_token()


def measure(settings, n):
    """What a finished run has come to."""
    folder = Path(settings.out_dir)
    data, meta = train.find_data(settings.dataset)
    model, tokenizer = sample.load_run(folder, settings.device, torch.float32)
    told = meta["dataset"] == "sample"                  # by the grammar, which can check it
    mark = meta.get("story_mark", (-1,)) if settings.story_only else ()
    stories = train.validation(data / "val.bin", meta, settings.block_size,
                               0 if told else settings.eval_tokens, 16, mark)[1]
    looks = [(model.flops_per_token() * int(look["tokens"]), float(look["val_loss"]))
             for look in train.read_log(folder / "log.csv") if look["val_loss"]]
    checked = check_run(model, tokenizer, n) if told else {}
    return {"shape": (settings.n_embd, settings.n_layer, settings.n_head), "looks": looks,
            "parameters": model.count_parameters(embeddings=False),
            "whole stories": train.evaluate(model, stories, model.token_embedding.weight.device,
                                            contextlib.nullcontext),
            "entropy": None if mark else meta.get("entropy_bound", {}).get("nats_per_token"),
            "scores": {"loss": looks[-1][1], **{check: 100 * share
                                                for check, share in checked.items()}}}


def grades(folder):
    """A run's mean grades out of ten, by the last judge in its ledger (see grade.py)."""
    lines = grade.graded(folder).get(prepare.file_sha256(folder / "ckpt.pt")[:16], [])
    return {f"{metric} ({lines[0]['judge']})": float(np.mean([line["grades"][metric]
                                                              for line in lines]))
            for metric in grade.NUMBERS if lines}


# -------------------------------------------------------------------------------------- the report

READ = """\
# How large must a model be?

{table}

Loss: nats per token of the validation text, in windows and in whole stories (in brackets, where it
is known, how far above the grammar's own entropy). Parameters: without embeddings. Columns of the
paper's (its Figure 4), if it has such shapes, are of GPT-Neo's architecture, some 1.8 billion
tokens of TinyStories, and grades out of ten by GPT-4: compare which row is better than which, never
the numbers.

{checks}

{conclusions}

Each shape was trained with one seed only, and two shares of {n} endings may well be equal if they
differ by less than {chance:.0f} points.

![Wider to the right, deeper downwards](maps.png)

![How large for how much compute](frontiers.png)

Left, the end of each run; right, every look at every run. The black line is the lowest loss for so
many parameters (the best shapes are its corners), and for the operations spent: there an upper
bound, for a run whose learning rate has yet to fall looks worse than one planned to end there.
"""


def shared(rows):
    """The scores that all have: a judge may have been stopped on its way."""
    return [score for score in next(iter(rows.values()))["scores"]
            if all(score in row["scores"] for row in rows.values())]


def best(score):
    return 100 if score in CHECKS else 10


def conclusions(rows):
    """What the numbers say by themselves -> Markdown."""
    lines, scores = [], shared(rows)
    smallest_first = sorted(rows, key=lambda name: rows[name]["parameters"])
    for score in scores[1:]:                            # without the loss: it has no half
        able = [name for name in smallest_first
                if rows[name]["scores"][score] >= best(score) / 2] or ["none of them"]
        lines.append(f"* {score}: the smallest that reaches {best(score) / 2:.0f} is {able[0]}")
    for what, factors in PAIRS.items():
        gains = [[b["scores"][score] - a["scores"][score] for score in scores]
                 for a in rows.values() for b in rows.values()
                 if all(factor in (None, y / x)
                        for factor, x, y in zip(factors, a["shape"], b["shape"]))]
        if gains:
            means = zip(scores, np.mean(gains, axis=0))
            lines.append(f"* {what}: " + ", ".join(f"{score} {gain:+.3g}" for score, gain in means)
                         + f" (the mean of {len(gains)} pairs)")
    return "\n".join(lines)


def report(folder, rows, n):
    """Write report.md and its pictures about runs that are measured -> the table."""
    cells = {}
    for name, row in rows.items():
        row["scores"] |= grades(folder / name)
        scores, whole, entropy = row["scores"], row["whole stories"], row["entropy"]
        paper = grade.of_the_paper([{"shape": row["shape"][:2]}])
        cells[name] = {
            **dict(zip(("width", "layers", "heads"), row["shape"])),
            "parameters": f"{row['parameters']:,}", "loss": f"{scores['loss']:.3f}",
            "whole stories": f"{whole:.3f}" + (f" ({whole / entropy - 1:+.0%})" if entropy else ""),
            **{score: f"{scores[score]:.3g}" for score in scores if score != "loss"},
            **{f"paper: {score}": paper[score]
               for score in ("loss", "grammar", "consistency", "plot") if paper.get(score)}}
    table = grade.table(cells)
    prepare.write_text(folder / "report.md", READ.format(
        table=table, conclusions=conclusions(rows), n=n, chance=196 * math.sqrt(0.5 / n),
        checks=EXPLAINED if "plot" in scores else "Other stories than our grammar's: no checks."))
    draw_maps(folder / "maps.png", rows)
    draw_frontiers(folder / "frontiers.png", rows)
    return table


def draw_maps(path, rows):
    """The loss and the scores, layers by widths (or heads), three maps in a line."""
    across = sorted({(row["shape"][0], row["shape"][2]) for row in rows.values()})
    layers = sorted({row["shape"][1] for row in rows.values()})
    down = math.ceil(len(shared(rows)) / 3)
    figure = Figure(figsize=(10, 3.2 * down), layout="constrained")
    for number, score in enumerate(shared(rows), 1):
        ax = figure.add_subplot(down, 3, number)
        values = np.full((len(layers), len(across)), math.nan)
        for row in rows.values():
            width, deep, heads = row["shape"]
            y, x = layers.index(deep), across.index((width, heads))
            values[y, x] = row["scores"][score]
            ax.text(x, y, f"{values[y, x]:.3g}", ha="center", va="center")
        limits = {} if score == "loss" else {"vmin": 0, "vmax": best(score)}
        ax.imshow(values, aspect="auto", alpha=0.6, **limits)
        ax.set(title=score + ", % of endings" * (score in CHECKS), xlabel="width", ylabel="layers",
               xticks=range(len(across)), yticks=range(len(layers)), yticklabels=layers,
               xticklabels=[f"{width}\n({heads} heads)" for width, heads in across])
    prepare.write_picture(path, figure)


def draw_frontiers(path, rows):
    """The loss against parameters and against operations; in black, the lowest so far."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    ends = {name: [(row["parameters"], row["looks"][-1][1])] for name, row in rows.items()}
    looks = {name: row["looks"] for name, row in rows.items()}
    layers = sorted({row["shape"][1] for row in rows.values()})
    for ax, what, points in zip(figure.subplots(1, 2), (
            "parameters without embeddings", "operations of training"), (ends, looks)):
        for name, row in rows.items():
            color = f"C{layers.index(row['shape'][1])}"             # as many layers, one color
            ax.plot(*zip(*points[name]), ".-", color=color)
            ax.annotate(name, points[name][-1], (7, 3), fontsize=8, textcoords="offset points")
        across, losses = zip(*sorted(sum(points.values(), [])))
        ax.plot(across, np.minimum.accumulate(losses), "k-", drawstyle="steps-post", alpha=0.5)
        ax.set(xscale="log", yscale="log", xlabel=what, ylabel="loss, nats per token")
        ax.yaxis.set_major_formatter("{x:.2g}")
        ax.yaxis.set_minor_formatter("{x:.2g}")
        ax.grid(alpha=0.3, which="both")
        ax.margins(x=0.12)
    prepare.write_picture(path, figure)


# ------------------------------------------------------------------------------------------ main

def study(args, changes):
    runs, rows = plan(args.grid, changes), {}
    folder, costs, began = Path("out/sizes", args.grid), [*map(work, runs)], time.time()
    for number, settings in enumerate(runs):
        spent = sum(costs[:number])
        left = sum(costs[number:]) / spent * (time.time() - began) / 60 if spent else 0
        print(f"\n{number + 1} of {len(runs)}" + f", {left:.0f} minutes left" * bool(left))
        train.train(settings)               # or go on with it, or see that it is finished
        torch.compiler.reset()              # after some shapes, it would give up compiling
        rows[Path(settings.out_dir).name] = measure(settings, args.n)
        if costs[number] or settings is runs[-1]:       # a report is there that knows all others
            table = report(folder, rows, args.n)
    print(f"\n{table}\n\nThe report: {folder / 'report.md'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True, choices=GRIDS)
    parser.add_argument("-n", type=int, default=200, help="stories to check (default 200)")
    args, changes = parser.parse_known_args(argv)
    if args.n < 1:
        parser.error("-n must be 1 or more")
    for change in changes:
        if change.partition("=")[0] in ("--n_embd", "--n_layer", "--n_head", "--out_dir"):
            parser.error(f"{change}: that is what the grid itself sets")
    prepare.command(study, args, changes, folder=Path("out/sizes", args.grid))


if __name__ == "__main__":
    main()
