"""Does the model copy its training stories?

    python -m study.memorization out/demo               # 100 completions, 15 seconds
    python -m study.memorization out/mine --data FOLDER # where its train.bin is

The model continues 100 training stories after two fifths of their length. We search its completions
and, for comparison, the true endings (cut to the same length) in all other training stories, as in
section 4.4 of arXiv 2305.07759, but with tokens for words. Copies of the story itself only show in
(a), its true ending. TinyStories: 10 minutes. Writes memorization.md and memorization.png.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import prepare
import sample
from data import common

KS = (1, 2, 3, 4, 5)            # tokens of a k-gram
MIN_TOKENS = 20                 # shorter completions are left out: chance hits are common
ROWS, CHUNK = 25, 2_000         # completions generated, and stories searched, at a time
GROUPS = ("completions", "true endings")
PAPER = {"(a) 2-grams in the true ending": "nearly all under 0.25",     # what the paper found
         "(b) Rouge-2 with the most similar other": "most 0.07-0.10, at most 0.20",
         "(d) 2-grams in the nearest story": "most often 0.25-0.4",
         "(d) 3-grams in the nearest story": "most often 0.1-0.25"}


def hash_kgrams(ids, k):
    """Token ids (N,) -> one 64-bit hash for each of the N - k + 1 k-grams."""
    ids = np.asarray(ids, np.uint64)
    hashes = np.zeros(max(len(ids) - k + 1, 0), np.uint64)
    for i in range(k):
        hashes = (hashes + ids[i:i + len(hashes)] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return hashes


def precision(text, other, k=2):
    """The share of a text's k-grams that occur in another text."""
    return np.isin(np.unique(hash_kgrams(text, k)), hash_kgrams(other, k)).mean()


def largest_rouge(texts, k=2):
    """For each text, the largest Rouge-k (harmonic mean of both precisions) with another one."""
    sets = [set(hash_kgrams(text, k).tolist()) for text in texts]
    rouge = np.array([[2 * len(a & b) / (len(a) + len(b)) for b in sets] for a in sets])
    np.fill_diagonal(rouge, 0)
    return rouge.max(0)


def read_story(path, ends, number):
    start = int(ends[number - 1]) + 1 if number else 0
    return np.fromfile(path, np.uint16, ends[number] - start, offset=2 * start)


def search(path, ends, texts, k, excluded):
    """Search the k-grams of texts in the stories of a token file, but those numbered in `excluded`.
    ends: positions of the end tokens. Returns for each text: how often each of its k-grams occurs
    (an array), the largest share of its k-grams that one story has, the number of that story."""
    grams = [np.unique(hash_kgrams(text, k)) for text in texts]
    known = np.unique(np.concatenate(grams))                        # (G,) sorted
    owned = np.stack([np.isin(known, mine) for mine in grams], axis=1)
    owned = torch.from_numpy(owned).float()                         # (G, texts)
    counts = torch.zeros(len(known))
    share, nearest = torch.zeros(len(texts)), torch.zeros(len(texts), dtype=torch.long)
    data, start = np.memmap(path, np.uint16, "r"), 0
    for first in tqdm(range(0, len(ends), CHUNK), f"searching {k}-grams", disable=None):
        chunk = ends[first:first + CHUNK]
        ids = np.array(data[start:chunk[-1] + 1])
        story = np.arange(len(chunk)).repeat(np.diff(chunk, prepend=start - 1))     # per token
        ids[np.isin(first + story, excluded)] = ids[-1]             # end token: in no text
        hashes = hash_kgrams(ids, k)
        column = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        found = np.flatnonzero(known[column] == hashes)
        where = torch.from_numpy(np.stack((story[found], column[found])))
        occurs = torch.sparse_coo_tensor(where, torch.ones(len(found)), (len(chunk), len(known)),
                                         check_invariants=True).coalesce()  # (stories, G)
        counts += torch.sparse.sum(occurs, 0).to_dense()
        occurs.values().clamp_(max=1)
        best, row = (occurs @ owned / owned.sum(0)).max(0)                  # over the stories
        nearest = torch.where(best > share, first + row, nearest)
        share, start = torch.maximum(best, share), chunk[-1] + 1
    return [counts[mine > 0] for mine in owned.T], share.numpy(), nearest.numpy()


def complete(model, tokenizer, stories, temperature, seed):
    """Continue the first two fifths of stories (arrays of ids) -> completions, true endings."""
    completions, endings = [], []
    for i in range(0, len(stories), ROWS):
        halves = [np.split(story, [2 * len(story) // 5]) for story in stories[i:i + ROWS]]
        prompts, true = zip(*halves)
        prompts = [tokenizer.decode(prompt.tolist()) for prompt in prompts]
        texts = sample.generate_texts(model, tokenizer, prompts, max(map(len, true)), temperature,
                                      seed=seed + i)
        for text, ending in zip(texts, true):
            ids = tokenizer.encode_ordinary(text)[:len(ending)]
            if len(ids) >= MIN_TOKENS:
                completions.append(np.array(ids, np.uint16))
                endings.append(ending[:len(ids)])
    return completions, endings


def plot(path, shares, novel, title):
    """shares: (4, 2, texts), the 4 of PAPER for the 2 GROUPS; novel: {k: 2 shares}."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(title, fontsize=14)
    *axes, last, empty = figure.subplots(2, 3).flatten()
    for ax, name, groups in zip(axes, PAPER, shares):
        ax.hist(list(groups), np.linspace(0, 1, 21))
        ax.set(title=name, xlabel="share of the text's k-grams", ylabel="number of texts")
    lines = last.plot(KS, list(novel.values()), "o-")
    last.set(title="(c) k-grams in no other story", xlabel="k (tokens)", xticks=KS)
    last.yaxis.set_major_formatter("{x:.1%}")
    empty.axis("off")
    empty.legend(lines, GROUPS, loc="center", fontsize=14)
    common.save_figure(path, figure)


def main(argv=None):
    parser = common.command_parser(__doc__)
    parser.add_argument("run", help="a run's folder, or a checkpoint file")
    parser.add_argument("-n", type=int, default=100, help="stories (default 100)")
    parser.add_argument("--data", help="folder of its train.bin (default: in data/)")
    sample.add_sampling_options(parser, temperature=1.0)
    args = sample.parse_args(parser, argv)
    model, tokenizer, meta = sample.load_run(args.run, args.device, without=args.without)
    folder = sample.results_folder(args.run)
    data = Path(args.data or prepare.HERE / "data" / meta["dataset"])
    path = data / "train.bin"
    if not path.is_file() or prepare.read_meta(data).get("train") != meta.get("train"):
        raise SystemExit(f"{args.run} was not trained on {path}. Name the right folder with --data")
    ends = np.flatnonzero(np.memmap(path, np.uint16, "r") == tokenizer.eot_token)
    long_enough = np.flatnonzero(np.diff(ends, prepend=-1) > 2 * MIN_TOKENS)
    chosen = np.random.default_rng(args.seed).permutation(long_enough)[:max(0, args.n)]
    stories = [read_story(path, ends, number) for number in chosen]
    completions, endings = complete(model, tokenizer, stories, args.temperature, args.seed)
    n = len(completions)
    if n < 2:
        raise SystemExit(f"Only {n} completions have {MIN_TOKENS} tokens: train longer, or use a "
                         "larger -n")
    texts = [*completions, *endings]
    others = [*endings, *endings[1:], endings[0]]       # a true ending: with that of another story
    found = {k: search(path, ends, texts, k, chosen) for k in KS}
    novel = {k: [np.mean(np.concatenate(found[k][0][i:i + n]) == 0) for i in (0, n)] for k in KS}
    overlap = [precision(text, other) for text, other in zip(texts, others)]
    rouge = [*largest_rouge(completions), *largest_rouge(endings)]

    rows, shares = [], np.reshape([overlap, rouge, found[2][1], found[3][1]], (4, 2, n))
    for name, groups in zip(PAPER, shares):
        cells = [f"{np.median(group):.2f}, at most {group.max():.2f}" for group in groups]
        rows.append([name, *cells, PAPER[name]])
    for k in KS:
        cells = [f"{share:.1%}" for share in novel[k]]
        rows.append([f"(c) {k}-grams in no other story", *cells, "most" if k > 3 else "-"])
    table = common.format_table([["", *GROUPS, "the paper"], *sorted(rows)])
    title = (f"{novel[5][0]:.1%} of the 5-grams that {folder.resolve().name} writes occur in no "
             f"other training story (true endings: {novel[5][1]:.1%})")
    facts = (f"{n} completions at temperature {args.temperature:g}, {len(ends) - len(chosen):,} "
             "other training stories. Medians and maxima; (a) of a true ending: with that of "
             "another story.")
    i = int(found[3][1][:n].argmax())
    parts = [f"# {title}", facts, table, "![histograms](memorization.png)",
             f"The completion with the nearest story ({found[3][1][i]:.0%}), and that story:"]
    for ids in (texts[i], read_story(path, ends, found[3][2][i])):
        text = textwrap.fill(tokenizer.decode(ids.tolist()).strip(), 90)
        parts.append(textwrap.indent(text, "    "))     # a code block: no live links or images
    plot(folder / "memorization.png", shares, novel, title)
    common.write_text(folder / "memorization.md", "\n\n".join(parts) + "\n")
    print(f"{title}.\n{facts}\n\n{table}\n\nWrote {folder}/memorization.md and memorization.png")


if __name__ == "__main__":
    main()
