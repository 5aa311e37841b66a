"""How does the loss fall with size, and should a model be deep or wide?

    python -m study.scaling --grid demo     # 16 small models: about 12 minutes on two cores (estimate)
    python -m study.scaling --grid paper    # the paper's shapes: hours on a large GPU

Trains every shape of a grid with train.py, in out/scaling/<grid>/, and writes report.md and three
plots there. Stop it at any time; the same command continues. Settings of train.py can be added:
--dataset=excerpt. For stories of our own grammar the limit of the loss is known, the grammar's
entropy: it can be compared with the E of a fitted law L(N) = E + A / N^a (arXiv 2203.15556).
"""

import argparse
import itertools
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import prepare
import sample
import train
from study import consistency
from study.dynamics import loss_axis, read_log

GRIDS = {
    "demo": dict(config="config/demo.py", budgets=[350, 1_050], head_size=32,   # steps per run
                 widths=[32, 64, 128, 192], layers=[1, 2]),
    "paper": dict(config="config/tiny_8l.py", budgets=[7_000], head_size=64,
                  widths=[64, 128, 256, 512, 768, 1024], layers=[1, 2, 4, 8, 12]),
}


def plan_runs(name, budgets=None, changes=()):
    """The settings of all runs of a grid. The learning rate is proportional to 1 / width."""
    grid, runs = GRIDS[name], []
    base = train.load_settings([grid["config"]])
    shapes = itertools.product(budgets or grid["budgets"], grid["widths"], grid["layers"])
    for steps, width, layers in shapes:
        rate = base.learning_rate * base.n_embd / width
        runs.append(train.load_settings([
            grid["config"], f"--learning_rate={rate:.2g}", f"--max_steps={steps}",
            f"--eval_interval={max(1, steps // 10)}", *changes, f"--n_embd={width}",
            f"--n_layer={layers}", f"--n_head={max(2, width // grid['head_size'])}",
            f"--out_dir=out/scaling/{name}/w{width}_l{layers}_s{steps}"]))
    return runs


def measure_run(settings, n, signals=list):
    """Train one run, or continue it, and measure it -> dict, also stored in its folder."""
    row, file = {}, Path(settings.out_dir, "scaling.json")
    wanted = {name: value for name, value in asdict(settings).items()
              if name not in train.MAY_CHANGE}
    if file.is_file() and not settings.overwrite:
        row = json.loads(file.read_text(encoding="utf-8"))
    if row.get("settings") != wanted:
        train.train(settings, signals)
        torch.compiler.reset()          # it stops compiling after eight shapes
    elif row["n"] == n:
        return row
    model, tokenizer, meta = sample.load_run(settings.out_dir, settings.device)
    log = [row for row in read_log(settings.out_dir) if "val_loss" in row]
    scores = {"loss": log[-1]["val_loss"]}
    if meta["dataset"] == "sample":
        stories = consistency.held_out_stories(n)
        endings = consistency.generate_endings(model, tokenizer, stories)
        for name, share in consistency.check_endings(stories, endings).items():
            scores[name] = 100 * share
    row = {"settings": wanted, "n": n, "scores": scores, "story_loss": log[-1]["story_loss"],
           "shape": [settings.n_embd, settings.n_layer],
           "params": model.num_params(embeddings=False), "tokens": log[-1]["tokens"],
           "entropy": meta.get("entropy_bound", {}).get("nats_per_token"),
           "curve": [[model.flops_per_token() * row["tokens"], row["val_loss"]] for row in log]}
    prepare.write_text(file, json.dumps(row))
    return row


def fit_law(N, L, E=None):
    """Fit L = E + A / N^a by least squares of relative errors -> E, a, A. E is free, or given. For
    one a the law is linear in E and A: so try many a, each with a linear regression."""
    fits = []
    for a in np.linspace(0.02, 2, 199):
        X = np.stack((np.ones(len(N)), N ** -a), axis=1) / L[:, None]       # (models, 2)
        y = np.ones(len(N))
        if E is not None:
            X, y = X[:, 1:], 1 - E / L
        solution, *_ = np.linalg.lstsq(X, y)
        fits.append((((X @ solution - y) ** 2).sum(), a, *solution))
    _, a, *solution = min(fits)
    if E is None and solution[0] < 0:
        return fit_law(N, L, E=0)                       # no loss is negative
    return np.array([solution[0] if E is None else E, a, solution[-1]])


def standard_errors(N, L, E=None):
    """Of E, a and A, by the jackknife: leave out one model at a time."""
    others = np.array([fit_law(N[keep], L[keep], E) for keep in ~np.eye(len(N), dtype=bool)])
    return np.sqrt((len(N) - 1) * others.var(axis=0))


def fit_budgets(rows):
    """Fit each budget -> list of (name, N in 100,000 parameters, L, law, its errors)."""
    fits, entropy = [], rows[0]["entropy"]
    for tokens in sorted({row["tokens"] for row in rows}):
        N, L = np.array([(row["params"] / 1e5, row["story_loss"]) for row in rows
                         if row["tokens"] == tokens], dtype=float).T
        for E in (None, entropy) if entropy else (None,):
            name = f"{tokens / 1e6:.3g} M tokens, E {'free' if E is None else '= entropy'}"
            fits.append((name, N, L, fit_law(N, L, E), standard_errors(N, L, E)))
    return fits


def write_report(folder, rows, n):
    """Write report.md and the plots -> the table of the report."""
    fits, tokens, cells = fit_budgets(rows), max(row["tokens"] for row in rows), {}
    final, entropy = [row for row in rows if row["tokens"] == tokens], rows[0]["entropy"]
    for row in final:
        cell = cells["{} x {}".format(*row["shape"])] = {"parameters": f"{row['params']:,}"}
        losses = {other["tokens"] / 1e6: other["story_loss"] for other in rows
                  if other["shape"] == row["shape"]}
        cell |= {f"stories, {budget:.3g} M": f"{loss:.3f}" for budget, loss in losses.items()}
        if entropy:
            gaps = [loss - entropy for loss in losses.values()]
            cell["undertraining"] = f"{1 - min(gaps) / max(gaps):.0%}"
        cell |= {name: f"{value:.3g}" for name, value in row["scores"].items()}
    table = sample.format_table(cells)
    laws = {name: {letter: f"{value:.3f} ± {2 * error:.3f}"
                   for letter, value, error in zip("EaA", law, errors)}
            for name, _, _, law, errors in fits}
    limit = f"The true E is the grammar's entropy, {entropy:.3f}." if entropy else ""
    plot_maps(folder / "maps.png", final)
    plot_frontiers(folder / "frontiers.png", final)
    plot_fit(folder / "fit.png", fits, entropy)
    prepare.write_text(folder / "report.md", f"""# How does the loss fall with size?

{table}

Width x layers; parameters without embeddings. Nats per token of whole stories after so many tokens,
and of windows (loss). Undertraining: the part of the distance to the true limit that the largest
budget removed. Checks: % of {n} endings that are right (study/consistency.py).

## The scaling law L(N) = E + A / N^a, with N in 100,000 parameters

{sample.format_table(laws)}

±: two standard errors (jackknife over the models, one seed each). {limit}

![fit](fit.png) ![maps](maps.png) ![frontiers](frontiers.png)
""")
    return table


def plot_maps(path, rows):
    """A heat map of each score, layers against width."""
    widths, layers = (sorted({*values}) for values in zip(*(row["shape"] for row in rows)))
    names = list(rows[0]["scores"])
    across, down = min(3, len(names)), math.ceil(len(names) / 3)
    figure = Figure(figsize=(3 + 2.7 * across, 1 + 3 * down), layout="constrained")
    checks = sorted(names[1:], key=lambda name: -sum(row["scores"][name] for row in rows))
    figure.suptitle("Larger models (right, up) have a lower loss"
                    + f" and better endings: {checks[0]} first, {checks[-1]} last" * bool(checks))
    for ax, name in zip(figure.subplots(down, across, squeeze=False).flat, names):
        values = np.full((len(layers), len(widths)), np.nan)
        for row in rows:
            x, y = widths.index(row["shape"][0]), layers.index(row["shape"][1])
            values[y, x] = row["scores"][name]
            ax.text(x, y, f"{values[y, x]:.3g}", ha="center", va="center")
        limits = dict(cmap="Blues_r") if name == "loss" else dict(cmap="Blues", vmin=0, vmax=100)
        ax.imshow(values, aspect="auto", origin="lower", alpha=0.6, **limits)
        ax.set(title="loss, nats per token" if name == "loss" else f"{name}, % right",
               xlabel="width", xticks=range(len(widths)), xticklabels=widths,
               ylabel="layers", yticks=range(len(layers)), yticklabels=layers)
    prepare.save_figure(path, figure)


def plot_frontiers(path, rows):
    """The loss against the compute of training; in black, the lowest so far."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax, layers = figure.subplots(), sorted({row["shape"][1] for row in rows})
    for row in rows:
        width, depth = row["shape"]
        label = f"layers: {depth}" if width == rows[0]["shape"][0] else None
        ax.plot(*zip(*row["curve"]), ".-", lw=1, color=f"C{layers.index(depth)}", label=label)
        ax.annotate(width, row["curve"][-1], (3, 4), fontsize=8, textcoords="offset points")
    flops, losses = zip(*sorted(point for row in rows for point in row["curve"]))
    ax.plot(flops, np.minimum.accumulate(losses), "k-", alpha=0.3, lw=4, label="lowest so far",
            drawstyle="steps-post")
    loss_axis(ax)
    ax.set(title="The best shape depends on the compute (numbers: widths)", xscale="log",
           xlabel="compute of training (FLOPs)")
    ax.legend()
    prepare.save_figure(path, figure)


def plot_fit(path, fits, entropy):
    """The losses of all models, and the fitted laws with E free."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for i, (name, N, L, (E, a, A), errors) in enumerate(fit for fit in fits if "free" in fit[0]):
        x = np.geomspace(N.min(), 30 * N.max())
        ax.plot(1e5 * N, L, f"C{i}o", label=f"models, {name.partition(',')[0]}")
        label = f"law: E = {E:.2f} ± {2 * errors[0]:.2f}"
        ax.plot(1e5 * x, E + A / x ** a, f"C{i}-", label=label)
    title = f"The fitted limit of the loss: {E:.2f} ± {2 * errors[0]:.2f}"
    if entropy:
        ax.axhline(entropy, color="k", ls=":", label=f"entropy of the grammar: {entropy:.2f}")
        title += f", the true limit: {entropy:.2f}"
    loss_axis(ax)
    ax.set(title=title, xscale="log", xlabel="parameters without embeddings")
    ax.legend()
    prepare.save_figure(path, figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", required=True, choices=GRIDS)
    parser.add_argument("-n", type=int, default=100, help="stories to check (default 100)")
    parser.add_argument("--budgets", type=int, nargs="+", help="training steps: --budgets 250 750")
    args, changes = parser.parse_known_args(argv)
    for name in ("--n_embd", "--n_layer", "--n_head", "--out_dir", "--max_steps"):
        if any(change.startswith(name) for change in changes):
            parser.error(f"{name}: the grid sets this (and --budgets the steps)")
    rows, runs, signals = [], plan_runs(args.grid, args.budgets, changes), train.catch_signals
    for i, settings in enumerate(runs, 1):
        print(f"\nRun {i} of {len(runs)}: {settings.out_dir}")
        rows.append(measure_run(settings, args.n, signals))
    folder = Path("out/scaling", args.grid)
    print(f"\n{write_report(folder, rows, args.n)}\n\nThe report: {folder / 'report.md'}")


if __name__ == "__main__":
    main()
