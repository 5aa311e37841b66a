"""Does the model copy what it has read?

    python -m study.copying out/tiny_8l                 # 100 completions against all it has read
    python -m study.copying out/tiny_8l --n 20 --temperature 0.8
    python -m study.copying out/mine --data /big/mine   # where its train.bin is kept

The model goes on with the first two fifths of 100 stories that it has trained on, and what it
writes is looked for in train.bin: 1.8 million tokens a second on a CPU core, in 1 GB at most. The
answer is in out/<run>/copying.md and copying.png. After arXiv 2305.07759, section 4.4.

Beside a completion stands the true ending of its story. Both are cut to the length of the shorter,
and both are looked for in all training stories but those that were begun: with the same beginning,
the same length and the same stories to be found in, true endings show what an original text shares
with others. The unit is the token of the run's own tokenizer, nearly always a word or a mark; the
paper counts words, cuts nothing and looks in all stories.
"""

import argparse
import html

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import grade
import prepare
import sample

KS = (1, 2, 3, 4, 5)        # tokens of a k-gram
NEAR = (2, 3)               # those by which the nearest story is found
PIECE = 1 << 18             # tokens read at a time
LEAST = 20                  # tokens that are compared: a few words are found somewhere anyway
ROWS = 25                   # completions written at a time
KINDS = ("completions", "true endings")
PAPER = {"(a) 2-grams in the true ending": "nearly all under 0.25",     # what it found
         "(b) Rouge-2 with the most alike other": "most 0.07-0.10, at most 0.20",
         "(c) 4-grams in no story": "most", "(c) 5-grams in no story": "most",
         "(d) 2-grams in the nearest story": "most often 0.25-0.4",
         "(d) 3-grams in the nearest story": "most often 0.1-0.25"}


def hashes(ids, k=5):
    """One number for each k-gram of token ids."""
    ids, prime = np.asarray(ids, np.uint64), np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(max(len(ids) - k + 1, 0), np.uint64)
    for i in range(k):
        total = (total + ids[i:len(total) + i] + np.uint64(1)) * prime
    return total


def find(grams, there):
    """Where in the hashes `there` one of the sorted grams stands, and which."""
    which = np.searchsorted(grams, there).clip(max=len(grams) - 1)
    where = np.flatnonzero(grams[which] == there)
    return where, which[where]


def find_ends(path, eot):
    """Where in a token file its stories end."""
    return np.flatnonzero(np.memmap(path, np.uint16, "r") == eot)


def read_story(path, ends, number):
    start = ends[number - 1] + 1 if number else 0
    return np.fromfile(path, np.uint16, ends[number] - start, offset=2 * int(start))


def members(texts, k):
    """The k-grams of some texts (hashes, sorted, each once), and which text has which: (grams,
    texts) of 0 and 1."""
    mine = [np.unique(hashes(text, k)) for text in texts]
    grams = np.unique(np.concatenate(mine))
    held = torch.zeros(len(grams), len(texts))
    for i, one in enumerate(mine):
        held[np.searchsorted(grams, one), i] = 1
    return grams, held


def search(path, ends, texts, begun):
    """Look for the k-grams of texts in all stories of a token file but those numbered in `begun`.

    -> {k: for each text, how often each of its k-grams occurs}, and {k: for each text, the largest
    share of its k-grams that one story has, and the number of that story}."""
    known = {k: members(texts, k) for k in KS}
    counts = {k: np.zeros(len(grams), np.int64) for k, (grams, _) in known.items()}
    most = {k: np.zeros(len(texts)) for k in NEAR}
    nearest = {k: np.zeros(len(texts), np.int64) for k in NEAR}
    bar = prepare.Progress(f"reading {path.name}", path.stat().st_size)
    data, start, first = np.memmap(path, np.uint16, "r"), 0, 0
    while first < len(ends):
        last = max(int(np.searchsorted(ends, start + PIECE)), first + 1)
        stories = np.arange(last - first)                               # whole ones
        ids = np.array(data[start:ends[last - 1] + 1])
        story = stories.repeat(np.diff(ends[first:last], prepend=start - 1))    # of each token
        ids[np.isin(story, np.subtract(begun, first))] = ids[-1]        # no text has an end mark
        for k, (grams, held) in known.items():
            where, which = find(grams, hashes(ids, k))
            counts[k] += np.bincount(which, minlength=len(grams))
            if k in NEAR:
                pairs = np.unique(story[where] * len(grams) + which)    # each once a story
                bags = np.searchsorted(pairs, stories * len(grams))
                shared = F.embedding_bag(torch.from_numpy(pairs % len(grams)), held,
                                         torch.from_numpy(bags), mode="sum").numpy()
                share = shared.max(0) / held.sum(0).numpy()         # (stories, texts) -> (texts)
                nearest[k] = np.where(share > most[k], first + shared.argmax(0), nearest[k])
                most[k] = np.maximum(share, most[k])
        start, first = int(ends[last - 1]) + 1, last
        bar.show(2 * start)
    seen = {k: [counts[k][one.numpy() > 0] for one in held.T] for k, (_, held) in known.items()}
    return seen, {k: (most[k], nearest[k]) for k in NEAR}


def unseen(texts, path, k=5):
    """The share of all k-grams of some texts that are not in a token file; None if they have
    none."""
    mine = np.concatenate([hashes(text, k) for text in texts])
    if not len(mine):
        return None
    grams, place = np.unique(mine, return_inverse=True)
    seen, data = np.zeros(len(grams), bool), np.memmap(path, np.uint16, "r")
    for start in range(0, len(data), PIECE):
        piece = data[start:start + PIECE + k - 1]           # some lie across the edge of a piece
        seen[find(grams, hashes(piece, k))[1]] = True
    return 1 - seen[place].mean()


def precision(text, other, k=2):
    """The share of a text's k-grams that are in another text."""
    return np.isin(np.unique(hashes(text, k)), hashes(other, k)).mean()


def most_alike(texts, k=2):
    """For each text the largest Rouge-k with another: the harmonic mean of both precisions."""
    _, held = members(texts, k)
    size = held.sum(0)
    rouge = 2 * held.T @ held / (size + size[:, None])                  # (texts, texts)
    return rouge.fill_diagonal_(0).max(0).values.numpy()


# -------------------------------------------------------------------------------------- the report

def draw(path, shared, seen, title):
    """A histogram of each share, and how often the k-grams occur."""
    figure = Figure(figsize=(15, 8), layout="constrained")
    figure.suptitle(title)
    for i, (name, both) in enumerate(shared.items(), 1):
        ax = figure.add_subplot(2, 3, i)
        ax.hist(both.T, np.linspace(0, 1, 41), histtype="stepfilled", alpha=0.5, label=KINDS)
        ax.set(title=name, xlabel="share", ylabel="texts")
        ax.legend()
    ax = figure.add_subplot(2, 3, 5)
    for k in KS:
        for kind, times, style in zip(KINDS, seen[k], ("o-", "x:")):
            digits = [len(str(n)) if n else 0 for n in times.tolist()]
            ax.plot(np.bincount(digits) / len(digits), style, color=f"C{k}", label=f"{k}: {kind}")
    ax.set(title="(c) k-grams in all stories", xlabel="how often: 0, or a number of so many digits",
           ylabel="share of the k-grams")
    ax.legend(fontsize=8)
    prepare.write_picture(path, figure)


def marked(tokenizer, ids, other, k=3):
    """A text as HTML in a cell of a table; what it shares with another, from k tokens on, bold."""
    bold = np.zeros(len(ids), bool)
    for start in np.flatnonzero(np.isin(hashes(ids, k), hashes(other, k))):
        bold[start:start + k] = True
    text, edges = "", np.flatnonzero(np.diff(bold)) + 1
    for run, on in zip(np.split(ids, edges), bold[[0, *edges]]):
        piece = html.escape(tokenizer.decode(run.tolist()), quote=False).replace("|", "&#124;")
        text += f"<b>{piece}</b>" if on else piece
    return "<br>".join(text.strip().splitlines())


def tell(model, tokenizer, stories, temperature, seed):
    """Let a model go on with the first two fifths of stories -> (completion, beginning, ending) of
    each."""
    trios, eot = [], tokenizer.eot_token
    for i in range(0, len(stories), ROWS):
        halves = [np.split(story, [2 * len(story) // 5]) for story in stories[i:i + ROWS]]
        told = model.generate([[eot, *given.tolist()] for given, _ in halves], max(
            len(ending) for _, ending in halves), temperature, stop=eot, seed=seed + i)
        trios += [(np.array(ids, np.uint16), *half) for ids, half in zip(told, halves)]
        print(f"told {len(trios)} of {len(stories)}", flush=True)
    return trios


def study(args):
    folder = sample.find_run(args.run).parent
    model, tokenizer = sample.load_run(args.run, args.device)
    path = grade.training_file(folder, args.data)
    if not path:
        raise SystemExit(f"The train.bin that {folder} has learned from is not in "
                         f"{args.data or 'the folder of data/ that its meta.json names'}, or has "
                         "another size. Name its folder: --data FOLDER")
    ends = find_ends(path, tokenizer.eot_token)
    begun = np.flatnonzero(np.diff(ends, prepend=-1) > 2 * LEAST)
    begun = np.random.default_rng(args.seed).permutation(begun)[:args.n]
    trios = tell(model, tokenizer, [read_story(path, ends, number) for number in begun],
                 args.temperature, args.seed)
    trios = [trio for trio in trios if len(trio[0]) >= LEAST]
    n, short = len(trios), len(begun) - len(trios)
    if n < 2:
        raise SystemExit(f"{n} of {len(begun)} completions have {LEAST} tokens: nothing to "
                         "compare. Take a larger --n, or train for longer.")
    completions, given, endings = zip(*trios)
    texts = [*(text[:len(ending)] for text, ending in zip(completions, endings)),
             *(ending[:len(text)] for text, ending in zip(completions, endings))]
    seen, near = search(path, ends, texts, begun)
    shared = {"(a) 2-grams in the true ending":
              [*map(precision, texts, [*endings, *endings[1:], endings[0]])],
              "(b) Rouge-2 with the most alike other":
              [*most_alike(texts[:n]), *most_alike(texts[n:])],
              "(d) 2-grams in the nearest story": near[2][0],
              "(d) 3-grams in the nearest story": near[3][0]}
    shared = {name: np.reshape(values, (2, n)) for name, values in shared.items()}
    seen = {k: [np.concatenate(half) for half in (seen[k][:n], seen[k][n:])] for k in KS}

    rows = {name: [f"{np.median(values):.2f}, at most {values.max():.2f}" for values in both]
            for name, both in shared.items()} | {
        f"(c) {k}-grams in no story": [f"{np.mean(times == 0):.1%}" for times in seen[k]]
        for k in KS}
    table = grade.table({name: dict(zip((*KINDS, "the paper"), [*cells, PAPER.get(name, "-")]))
                         for name, cells in sorted(rows.items())})
    title = f"Does {folder.resolve().name} copy?"
    facts = (f"{n} completions at temperature {args.temperature:g} (seed {args.seed}) against "
             f"{len(ends):,} training stories, {path.stat().st_size // 2:,} tokens; {short} more "
             f"ended before {LEAST} tokens.")
    parts = [f"# {title}", facts, table, "Medians, and the largest. (a) of a true ending is about "
             "the ending of another story.", "![histograms](copying.png)",
             " ".join(__doc__.split("\n\n")[-1].split())]
    for kind, i in zip(KINDS, near[3][0].reshape(2, n).argmax(1) + [0, n]):
        share, number = near[3][0][i], near[3][1][i]
        story = read_story(path, ends, number)
        parts += [f"## The worst of the {kind}: {share:.0%} of its 3-grams are in one story",
                  f"| ... {marked(tokenizer, given[i % n][-25:], [])} ... | training story "
                  f"{number:,} |\n|---|---|\n| {marked(tokenizer, texts[i], story)} | "
                  f"{marked(tokenizer, story, texts[i])} |"]
    draw(folder / "copying.png", shared, seen, f"{title} {facts}")
    prepare.write_text(folder / "copying.md", "\n\n".join(parts) + "\n")
    print(f"\n{facts}\n\n{table}\n\nSide by side: {folder / 'copying.md'}   The picture: "
          f"{folder / 'copying.png'}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, or a checkpoint file")
    parser.add_argument("--n", type=int, default=100, help="stories; default 100")
    parser.add_argument("--data", help="the folder of its train.bin, if that is not in data/")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the completions")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args(argv)
    if args.n < 2 or args.temperature < 0 or args.seed < 0:
        parser.error("--n must be 2 or more; --temperature and --seed must not be negative")
    prepare.command(study, args)


if __name__ == "__main__":
    main()
