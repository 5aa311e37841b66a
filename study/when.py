"""What does a model learn when?

    python train.py config/demo.py --out_dir=out/when --keep_checkpoints=True --save_interval=250 \\
        --eval_interval=250
    python -m study.when out/when                       # seconds
    python -m study.when out/when --prompt "Tom was sad because" --prompt "Once" --temperature 0.8

A run that keeps its checkpoints can be asked again at every age. Each of them goes on with the same
three beginnings; what they say stands one under the other in out/<run>/when.md, with the loss, the
checks of study/checks.py if the stories are our grammar's, and the grades if grade.py has graded
these checkpoints. when.png draws the curves. After arXiv 2305.07759, Figure 3.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import grade
import prepare
import sample
import train
from study.checks import EXPLAINED, check_run

CHECKED = 100                       # stories that each checkpoint ends, where they can be checked
PAPER = ("The paper (Figure 3: width 768, TinyStories, constant learning rate): grammar stops "
         "rising after 300-500 steps, consistency and creativity go on; the validation loss of 4, "
         "8 and 12 layers is flat from 1,000-1,500 steps on, while the training loss still falls, "
         "and ends at 1.20, 1.18 and 1.21 nats per token (1 layer: 1.54, 2 layers: 1.31).")


def kept(folder):
    """The checkpoints that a run has kept, in order -> {step: file}."""
    files = {int(re.search(r"\d+", file.stem)[0]): file for file in folder.glob("ckpt_[0-9]*.pt")}
    if not files:
        if not (folder / "ckpt.pt").is_file():
            sample.load_run(folder)                         # says what is missing
        raise SystemExit(f"{folder} has kept its last checkpoint only. Train it anew, with "
                         "--keep_checkpoints=True --save_interval=250 --overwrite=True")
    return dict(sorted(files.items()))


def draw(path, panels):
    """panels: {what: {curve: points}}; a point is (step, value) or (step, mean, low, high)."""
    panels = {what: curves for what, curves in panels.items() if curves}
    figure = Figure(figsize=(2 + 5 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels) or 1, squeeze=False, sharex=True)[0]
    for ax, (what, curves) in zip(axes, panels.items()):
        for label, points in curves.items():
            x, y, *bounds = np.array(points).T
            error = [y - bounds[0], bounds[1] - y] if bounds else None
            ax.errorbar(x, y, error, fmt=".-", capsize=3, label=label)
        ax.set(xscale="log", xlabel="step", ylabel=what)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.xaxis.set_minor_formatter("")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    prepare.write_picture(path, figure)


def study(args):
    folder = Path(args.run).parent if Path(args.run).is_file() else Path(args.run)
    files, meta, log = kept(folder), grade.read_meta(folder), train.read_log(folder / "log.csv")
    dataset = meta.get("dataset", "unknown")
    prompts = args.prompt or [row["prompt"] for row in grade.read_prompts(
        "instruct" if "instruct" in dataset else "story", sample=dataset in prepare.SAMPLES)[:3]]
    graded, judge = grade.graded(folder), ""
    losses, grades, checks = {}, {}, {}
    for name in ("train_loss", "val_loss"):
        if points := [(int(row["step"]), float(row[name])) for row in log if row[name]]:
            losses[name.replace("_", " ")] = points
    batch = int(log[-1]["tokens"]) // max(int(log[-1]["step"]), 1) if log else 0
    rows, told = {}, {}
    for step, file in files.items():
        model, tokenizer = sample.load_run(file, args.device)
        told[step] = sample.tell(model, tokenizer, prompts, temperature=args.temperature,
                                 seed=args.seed, max_new_tokens=args.max_new_tokens)
        print(f"step {step:>6,}: ... {' '.join(told[step][0].split())[:80]}", flush=True)
        row = rows[f"step {step:,}"] = {"tokens": f"{step * batch:,}"}
        for name in ("train loss", "val loss"):
            loss = dict(losses.get(name, ())).get(step)
            row[name] = f"{loss:.3f}" if loss else "-"
        if lines := graded.get(prepare.file_sha256(file)[:16]):
            judge = lines[0]["judge"]
            for name in grade.NUMBERS:
                marks = grade.scores(lines, name).values()
                row[name] = grade.cell(marks)
                grades.setdefault(name, []).append((step, *grade.interval(marks)))
        if dataset == "sample":             # told by our grammar, which can check it
            for name, share in check_run(model, tokenizer, CHECKED).items():
                row[f"checked: {name}"] = f"{share:.0%}"
                checks.setdefault(name, []).append((step, share))

    table, notes = grade.table(rows), []
    if bound := meta.get("entropy_bound", {}).get("nats_per_token"):
        notes.append(f"The grammar's own entropy: {bound:.3f} nats per token of whole stories.")
        losses["the grammar's own (whole stories)"] = [(step, bound) for step in files]
    if checks:
        notes.append(EXPLAINED)
    notes.append(f"Grades by {judge}: means and 95 % intervals, without empty stories." if judge
                 else "No judge has graded these checkpoints: python grade.py "
                 f"{(folder / 'ckpt_*.pt').as_posix()} --n 1")
    differs = f"Its steps read {80 * 16 * 512:,} tokens each, these {batch:,}. " + (
        "Its losses compare as far as its 10,000 tokens are alike." if dataset == "tinystories" else
        f"This text is another one ({dataset}): compare what comes first, not the numbers.")
    parts = [f"# What {folder.resolve().name} learned when", table, *notes, f"{PAPER} {differs}",
             "![curves](when.png)", f"Told at temperature {args.temperature:g} (seed {args.seed}):"]
    for i, prompt in enumerate(prompts):
        lines = [f"* **{step:,}** ... " + " ".join(told[step][i].split()) for step in files]
        parts += [grade.quote(f"{prompt} ..."), "\n".join(lines).replace("<", "&lt;")]
    prepare.write_text(folder / "when.md", "\n\n".join(parts) + "\n")
    draw(folder / "when.png", {"nats per token": losses, "grade out of ten": grades,
                               "share of stories that pass": checks})
    print("\n" + "\n\n".join([table, *notes]) + f"\n\nWhat it said: {folder / 'when.md'}   The "
          f"curves: {folder / 'when.png'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run")
    parser.add_argument("--prompt", action="append", help="how a story begins; more than one "
                        "can be given (default: three of ours, see data/)")
    parser.add_argument("--max_new_tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.0, help="default 0: the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1 or args.temperature < 0 or args.seed < 0:
        parser.error("--max_new_tokens must be 1 or more; --temperature and --seed not negative")
    prepare.command(study, args)


if __name__ == "__main__":
    main()
