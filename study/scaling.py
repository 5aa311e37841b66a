"""How does the loss fall with size, and should a model be deep or wide?

    python -m study.scaling --grid demo     # 16 small models; estimate: 12 minutes on two cores
    python -m study.scaling --grid paper    # the paper's shapes: hours on a large GPU

Trains every shape of a grid with train.py in out/scaling/<grid>/, and writes report.md and fit.png
there. Stop it at any time; run the same command to continue. Settings of train.py can be added,
such as --dataset=excerpt. The report fits the law L(N) = E + A / N^a (arXiv 2203.15556). For
stories of our own grammar, the true limit E of the loss is known: the grammar's entropy.
"""

import itertools
import json
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


def measure_run(settings, n):
    """Train one run, or continue it, and measure it -> dict, also stored in its folder."""
    row, file = {}, Path(settings.out_dir, "scaling.json")
    wanted = {name: value for name, value in asdict(settings).items()
              if name not in train.MAY_CHANGE}
    if file.is_file() and not settings.overwrite:
        row = json.loads(file.read_text(encoding="utf-8"))
    if row.get("settings") != wanted:
        train.train(settings, train.catch_signals)
        torch.compiler.reset()          # it stops compiling after eight shapes
    elif row["n"] == n:
        return row
    model, tokenizer, meta = sample.load_run(settings.out_dir, settings.device)
    _, story_loss = read_log(settings.out_dir, "story_loss")[-1]
    _, loss = read_log(settings.out_dir, "val_loss")[-1]
    scores = {"loss": loss}
    if meta["dataset"] == "sample":
        scores |= consistency.check_model(model, tokenizer, n)
    row = {"settings": wanted, "n": n, "scores": scores, "story_loss": story_loss,
           "shape": [settings.n_embd, settings.n_layer],
           "params": model.num_params(embeddings=False),
           "tokens": settings.max_steps * settings.total_batch_size,
           "entropy": meta.get("entropy_floor", {}).get("nats_per_token")}
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
        width, layers = row["shape"]
        cells[f"{width} x {layers}"] = cell = {"parameters": f"{row['params']:,}"}
        same_shape = [other for other in rows if other["shape"] == row["shape"]]
        for other in same_shape:
            cell[f"stories, {other['tokens'] / 1e6:.3g} M"] = f"{other['story_loss']:.3f}"
        if entropy:
            gaps = [other["story_loss"] - entropy for other in same_shape]
            cell["undertraining"] = f"{1 - min(gaps) / max(gaps):.0%}"
        for name, value in row["scores"].items():
            cell[name] = f"{value:.3g}"
    table = sample.format_table(cells)
    laws = {name: {letter: f"{value:.3f} ± {2 * error:.3f}"
                   for letter, value, error in zip("EaA", law, errors)}
            for name, _, _, law, errors in fits}
    plot_fit(folder / "fit.png", fits, entropy)
    prepare.write_text(folder / "report.md", f"""# How does the loss fall with size?

{table}

Width x layers; parameters without embeddings. Nats per token of whole stories after so many tokens,
and of windows (loss). Undertraining: the part of the distance to the true limit that the largest
budget removed. Checks: % of {n} endings that are right (study/consistency.py).

## The scaling law L(N) = E + A / N^a, with N in 100,000 parameters

{sample.format_table(laws)}

±: two standard errors (jackknife over the models, one seed each). For our own grammar, E is also
fixed to the true limit, the entropy.

![fit](fit.png)
""")
    return table


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
    parser = prepare.command_parser(__doc__)
    parser.add_argument("--grid", required=True, choices=GRIDS)
    parser.add_argument("-n", type=int, default=100, help="stories to check (default 100)")
    parser.add_argument("--budgets", type=int, nargs="+", help="training steps: --budgets 250 750")
    args, changes = parser.parse_known_args(argv)
    if args.n < 1:
        parser.error("-n must be at least 1")
    for name in ("--n_embd", "--n_layer", "--n_head", "--out_dir", "--max_steps"):
        if any(change.startswith(name) for change in changes):
            parser.error(f"{name}: the grid sets this (and --budgets the steps)")
    rows, runs = [], plan_runs(args.grid, args.budgets, changes)
    for i, settings in enumerate(runs, 1):
        print(f"\nRun {i} of {len(runs)}: {settings.out_dir}")
        with train.lock_run(settings.out_dir):
            rows.append(measure_run(settings, args.n))
    folder = Path("out/scaling", args.grid)
    print(f"\n{write_report(folder, rows, args.n)}\n\nThe report: {folder / 'report.md'}")


if __name__ == "__main__":
    main()
