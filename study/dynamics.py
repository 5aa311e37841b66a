"""What does a model learn when?

    python train.py config/demo.py --out_dir=out/dynamics --keep_checkpoints=True \\
        --save_interval=250 --eval_interval=250
    python -m study.dynamics out/dynamics           # a minute

Loads every checkpoint that a run has kept. Writes dynamics.md (how each continues the same
beginnings, losses, and for our own grammar the checks of study/consistency.py) and dynamics.png.
"""

import csv
import sys
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import prepare
import sample
from data import common
from study import consistency

PROMPTS = ["Once upon a time, there was", "Tom had a red ball. One day,", "Lily was sad. Her mom"]
CURVES = {"train_loss": "training", "val_loss": "validation", "story_loss": "whole stories"}
N_STORIES = 100         # whose endings are checked


def read_log(folder, column):
    """A column of a run's log.csv -> list of (step, number), without the lines that lack it."""
    file = Path(folder, "log.csv")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{file} cannot be read as a log of train.py: {error}")
    return [(int(row["step"]), float(row[column])) for row in csv.DictReader(lines)
            if row.get("step") and row.get(column)]


def kept_checkpoints(folder):
    """The checkpoints that a run has kept -> {step: file}, in order."""
    files = {int(file.stem.split("_")[1]): file for file in folder.glob("ckpt_[0-9]*.pt")
             if file.stem[5:].isdecimal()}
    if not files:
        raise SystemExit(f"{folder} has kept no earlier checkpoints. Train it with "
                         "--keep_checkpoints=True --save_interval=250 --overwrite=True")
    return dict(sorted(files.items()))


def finish_loss_plot(ax, title, entropy=None):
    """Add a title, a legend, the entropy of the grammar and a logarithmic axis for the loss."""
    if entropy:
        ax.axhline(entropy, color="k", ls=":", label=f"entropy of the grammar: {entropy:.2f}")
    ax.set(title=title, yscale="log", ylabel="loss (nats per token)")
    ax.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10]))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.3)
    ax.legend()


def plot_curves(path, losses, checks, entropy):
    """losses and checks: {name: list of (step, value)}."""
    figure = Figure(figsize=(11 if checks else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 1 + bool(checks), squeeze=False)[0]
    for i, (name, points) in enumerate((losses | checks).items()):
        x, y = np.reshape(points, (-1, 2)).T
        axes[int(name in checks)].plot(x, y, ".-", color=f"C{i}", label=name)
    finish_loss_plot(axes[0], "The loss falls fast, then slowly", entropy)
    figure.supxlabel("training step")
    if checks:
        first, *_, last = sorted(checks, key=lambda name: -np.nan_to_num(checks[name]).sum(0)[1])
        axes[1].set(title=f"Of the five checks, {first} is learned first, {last} last",
                    ylabel="% of endings that are right", ylim=(0, 103))
        axes[1].grid(alpha=0.3)
        axes[1].legend()
    common.save_figure(path, figure)


def main(argv=None):
    parser = common.command_parser(__doc__)
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--prompt", action="append", help="a beginning; may be repeated")
    sample.add_sampling_options(parser, temperature=0.0)
    args = sample.parse_args(parser, argv)
    folder, prompts = Path(args.run), args.prompt or PROMPTS
    files, meta = kept_checkpoints(folder), prepare.read_meta(folder)
    losses = {name: read_log(folder, column) for column, name in CURVES.items()}
    checks, cells, continuations = {}, {}, dict.fromkeys(prompts, "")
    for step, file in tqdm(files.items()):
        model, tokenizer, _ = sample.load_run(file, args.device, without=args.without)
        texts = sample.generate_texts(model, tokenizer, prompts, max_new_tokens=60,
                                      temperature=args.temperature, seed=args.seed)
        for prompt, text in zip(prompts, texts):        # indented: shown as it is, not as HTML
            line = common.printable(f"step {step:,}: {' '.join(text.split())}")
            continuations[prompt] += textwrap.indent(textwrap.fill(line, 90), " " * 4) + "\n"
        cells[f"step {step:,}"] = row = {}
        for name, points in losses.items():
            row[name] = f"{dict(points)[step]:.3f}" if step in dict(points) else "-"
        if meta.get("dataset") == "sample":
            for name, rate in consistency.check_model(model, tokenizer, meta, N_STORIES).items():
                checks.setdefault(name, []).append((step, rate))
                row[f"{name}, % right"] = f"{rate:.0f}"
    table = common.format_table(cells)
    parts = [f"# What {folder.resolve().name} learned when", table,
             "Losses in nats per token (after the last step, often of more validation text); % of "
             f"{N_STORIES} endings that pass each check of study/consistency.py.",
             "![curves](dynamics.png)"]
    parts += [f"{prompt} ...\n\n{lines}" for prompt, lines in continuations.items()]
    common.write_text(folder / "dynamics.md", "\n\n".join(parts) + "\n")
    entropy = meta.get("entropy_floor")
    plot_curves(folder / "dynamics.png", losses, checks, entropy)
    print(f"\n{table}\n\nThe report: {folder / 'dynamics.md'}")


if __name__ == "__main__":
    main()
