"""How does the loss fall with size, and should a model be deep or wide?

    python -m study.scaling --grid demo     # 16 small models; estimate: 12 minutes on two cores
    python -m study.scaling --grid paper    # the paper's shapes: hours on a large GPU

Trains every shape of a grid with train.py in out/scaling/<grid>/, and writes report.md and three
plots there. Stop it at any time; run the same command to continue. Settings of train.py can be
added, such as --dataset=excerpt. The report fits the law L(N) = E + A / N^a (arXiv 2203.15556). For
stories of our own grammar, the true limit E of the loss is known (to 0.4 %): the grammar's entropy.
"""

import itertools
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import sample
import train
from data import common
from study import consistency
from study.dynamics import finish_loss_plot, read_log

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
    budgets = sorted(budgets or grid["budgets"])
    shapes = itertools.product(budgets, grid["widths"], grid["layers"])
    for steps, width, layers in shapes:
        rate = base.learning_rate * base.n_embd / width
        runs.append(train.load_settings([
            grid["config"], f"--learning_rate={rate:.2g}", f"--max_steps={steps}",
            f"--eval_interval={max(1, steps // 10)}", *changes, f"--n_embd={width}",
            f"--n_layer={layers}", f"--n_head={max(2, width // grid['head_size'])}",
            f"--out_dir=out/scaling/{name}/w{width}_l{layers}_s{steps}"]))
    return runs


def flops_per_token(model):
    """Training FLOPs per token: 6 per weight, plus the attention scores."""
    c = model.config
    return 6 * model.num_params() + 12 * c.n_layer * c.n_embd * c.block_size


def measure_run(settings, n):
    """Train one run, or continue it, and measure it -> dict."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.train(settings, train.catch_signals)
    for number, handler in handlers.items():        # Ctrl-C: as before the training
        signal.signal(number, handler)
    torch.compiler.reset()              # it stops compiling after eight shapes
    model, tokenizer, meta = sample.load_run(settings.out_dir, settings.device)
    losses = read_log(settings.out_dir, "val_loss")
    scores = {"loss": losses[-1][1]}
    if meta["dataset"] == "sample":
        scores |= consistency.check_model(model, tokenizer, meta, n)
    flops = flops_per_token(model) * settings.total_batch_size              # per step
    return {"shape": (settings.n_embd, settings.n_layer), "params": model.num_params(False),
            "tokens": settings.max_steps * settings.total_batch_size, "scores": scores,
            "story_loss": read_log(settings.out_dir, "story_loss")[-1][1],
            "curve": [(flops * step, loss) for step, loss in losses],
            "entropy": meta.get("entropy_floor")}


def fit_law(N, L, E=None):
    """Fit L = E + A / N^a by least squares of relative errors -> E, a, A. E is free, or given. For
    one a the law is linear in E and A: so try many a, each with a linear regression."""
    fits = []
    for a in np.linspace(0.02, 2, 199):
        x = N ** -a / L                                 # divided by L, the law is 1 = E / L + A x
        if E is None:
            (A, limit), *_ = np.linalg.lstsq(np.stack((x, 1 / L), axis=1), np.ones(len(N)))
        else:
            A, limit = x @ (1 - E / L) / (x @ x), E
        error = ((limit / L + A * x - 1) ** 2).sum()
        fits.append((error, limit, a, A))
    law = min(fits)[1:]
    return fit_law(N, L, E=0) if law[0] < 0 else np.array(law)      # no loss is negative


def standard_errors(N, L, E=None):
    """Of E, a and A, by the jackknife: leave out one model at a time."""
    others = np.array([fit_law(N[keep], L[keep], E) for keep in ~np.eye(len(N), dtype=bool)])
    return np.sqrt((len(N) - 1) * others.var(axis=0))


def fit_budgets(rows):
    """Fit the runs of each number of tokens, with E free and, if it is known, with the true E
    -> the table of all laws; for E free, list of (tokens, N in 100,000s, L, law, errors)."""
    laws, fits, entropy = {}, [], rows[0]["entropy"]
    for tokens in sorted({row["tokens"] for row in rows}):
        same = [row for row in rows if row["tokens"] == tokens]
        N = np.array([row["params"] / 1e5 for row in same])
        L = np.array([row["story_loss"] for row in same])
        for E in (None, entropy) if entropy else (None,):
            law, errors = fit_law(N, L, E), standard_errors(N, L, E)
            name = f"{tokens / 1e6:.3g} M tokens, E {'= entropy' if E else 'free'}"
            laws[name] = {letter: f"{value:.3f} ± {2 * error:.3f}"
                          for letter, value, error in zip("EaA", law, errors)}
            if E is None:
                fits.append((tokens, N, L, law, errors))
    return laws, fits


def write_report(folder, rows, n):
    """Write report.md and the plots -> the table of the report."""
    most, entropy, cells = max(row["tokens"] for row in rows), rows[0]["entropy"], {}
    final = [row for row in rows if row["tokens"] == most]
    for row in final:
        width, layers = row["shape"]
        cells[f"{width} x {layers}"] = cell = {"parameters": f"{row['params']:,}"}
        same_shape = [other for other in rows if other["shape"] == row["shape"]]
        for other in same_shape:
            cell[f"stories, {other['tokens'] / 1e6:.3g} M"] = f"{other['story_loss']:.3f}"
        if entropy and len(same_shape) > 1:             # in the order of their budgets
            first, *_, last = [other["story_loss"] - entropy for other in same_shape]
            cell["undertraining"] = f"{1 - last / first:.0%}"
        for name, value in row["scores"].items():
            cell[name] = f"{value:.3g}"
    (laws, fits), table = fit_budgets(rows), common.format_table(cells)
    plot_maps(folder / "maps.png", final)
    plot_frontiers(folder / "frontiers.png", final)
    plot_fit(folder / "fit.png", fits, entropy)
    common.write_text(folder / "report.md", f"""# How does the loss fall with size?

{table}

Width x layers; parameters without embeddings. Nats per token of whole stories after so many tokens,
and of windows (loss). Undertraining: how much of the distance to the true limit after the fewest
tokens has gone after the most. Checks: % of {n} endings that pass (study/consistency.py).

## The scaling law L(N) = E + A / N^a, with N in 100,000 parameters

{common.format_table(laws)}

±: two standard errors (jackknife over the models, one seed each).

![fit](fit.png) ![maps](maps.png) ![frontiers](frontiers.png)
""")
    return table


def plot_maps(path, rows):
    """A heat map of each score, layers against width."""
    widths, layers = (sorted({*values}) for values in zip(*(row["shape"] for row in rows)))
    names = list(rows[0]["scores"])                                 # the loss, perhaps five checks
    down, across = (2, 3) if len(names) > 1 else (1, 1)
    figure = Figure(figsize=(3 + 2.7 * across, 1 + 3 * down), layout="constrained")
    best = min(rows, key=lambda row: row["scores"]["loss"])["shape"]
    figure.suptitle("The lowest loss has {} x {} (width x layers)".format(*best))
    for ax, name in zip(figure.subplots(down, across, squeeze=False).flat, names):
        values = np.reshape([row["scores"][name] for row in rows], (len(widths), len(layers))).T
        for (y, x), value in np.ndenumerate(values):
            ax.text(x, y, f"{value:.3g}", ha="center", va="center")
        limits = dict(cmap="Blues_r") if name == "loss" else dict(cmap="Blues", vmin=0, vmax=100)
        ax.imshow(values, aspect="auto", origin="lower", alpha=0.6, **limits)   # dark: better
        ax.set(title="loss, nats per token" if name == "loss" else f"{name}, % right",
               xlabel="width", xticks=range(len(widths)), xticklabels=widths,
               ylabel="layers", yticks=range(len(layers)), yticklabels=layers)
    common.save_figure(path, figure)


def plot_frontiers(path, rows):
    """The loss against the compute of training; in gray, the lowest so far."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax, layers = figure.subplots(), sorted({row["shape"][1] for row in rows})
    for row in rows:
        width, depth = row["shape"]
        label = f"layers: {depth}" if width == rows[0]["shape"][0] else None
        ax.plot(*zip(*row["curve"]), ".-", color=f"C{layers.index(depth)}", label=label)
        ax.annotate(width, row["curve"][-1], (3, 4), fontsize=8, textcoords="offset points")
    points = sorted((*point, row["shape"]) for row in rows for point in row["curve"])
    flops, losses, shapes = zip(*points)
    lowest = np.minimum.accumulate(losses)
    best = {shape for shape, loss, low in zip(shapes, losses, lowest) if loss == low}
    ax.step(flops, lowest, "k-", where="post", alpha=0.3, lw=4, label="lowest so far")
    ax.set(xlabel="compute of training (FLOPs)", xscale="log")
    finish_loss_plot(ax, f"Of {len(rows)} shapes, {len(best)} are best at some compute (numbers: "
                     "widths)")
    common.save_figure(path, figure)


def plot_fit(path, fits, entropy):
    """The losses of all models, and the fitted laws with E free."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for i, (tokens, N, L, (E, a, A), errors) in enumerate(fits):
        x = np.geomspace(N.min(), 30 * N.max())
        limit = f"{E:.2f} ± {2 * errors[0]:.2f}"
        ax.plot(1e5 * N, L, f"C{i}o", label=f"models, {tokens / 1e6:.3g} M tokens")
        ax.plot(1e5 * x, E + A / x ** a, f"C{i}-", label=f"law: E = {limit}")
    ax.set(xlabel="parameters without embeddings", xscale="log")
    truth = f", the true limit: {entropy:.2f}" if entropy else ""       # limit: of the last fit
    finish_loss_plot(ax, f"The fitted limit of the loss: {limit}{truth}", entropy)
    common.save_figure(path, figure)


def main(argv=None):
    parser = common.command_parser(__doc__)
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
