"""What do the heads of a model look at, and what do its neurons fire on?

    python -m study.inside out/demo             # seconds; writes a page, out/demo/inside.html
    python -m study.inside out/demo --text "Ann had a ball. Tom had a kite. Ann liked her"
    python -m study.inside out/demo --neuron 1.37 2.100     # layer 1, neuron 37; both count from 0

For each token, a head shares its attention among the tokens up to it: a map. A neuron is one number
of an MLP's hidden layer, after the activation: large on some tokens, small on the others. All of
them are held at once, for 8,000 tokens: tiny_8l takes 1 GB, and half a minute. After arXiv
2305.07759, section 5.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import grade
import model
import prepare
import sample

TOP = 20                    # tokens that are shown and counted of a neuron, as in the paper
SHOWN = 80                  # tokens of a story that a map shows
PARAGRAPH = ("Once there was a girl named Ann. Ann had a red ball and a small dog. One day, the "
             "dog took the red ball and ran away. \"Come back!\" cried Ann. The dog came back, but "
             "the ball was gone. Ann was sad, and the dog was sad, too.")
# Of the table of heads; the page explains them.
COLUMNS = ("distance", "favourite", "first", "before", "same", "after same", "names")
PRONOUNS = "i you he she it we they me him her us them".split()
NAMES = "are names (capitals inside a sentence)"


# ------------------------------------------------------------------------------------------ reading

@torch.no_grad()
def record(gpt, ids):
    """Read ids (T,) -> logits (T, V); the maps of all heads (layers, H, T, T), whose row i is what
    token i looks at; all neurons (layers, T, 4 C)."""
    maps, neurons, attend = [], [], model.attend

    def watched(q, k, v, mask=None, dropout=0.0):
        unit = torch.eye(k.size(2)).expand(*k.shape[:3], -1)    # gathered, they are the shares
        maps.append(attend(q, k, unit, mask)[0])
        return attend(q, k, v, mask, dropout)

    hooks = [block.mlp.down.register_forward_pre_hook(lambda _, x: neurons.append(x[0][0]))
             for block in gpt.blocks]
    model.attend = watched
    try:
        logits, _ = gpt(ids[None])
    finally:
        model.attend = attend
        for hook in hooks:
            hook.remove()
    return logits[0], torch.stack(maps), torch.stack(neurons)


def read_stories(dataset, n):
    """The text of the first n validation stories of a prepared data set; [] if it is not there."""
    named = prepare.HERE / "data" / dataset
    folder = named if named.is_dir() else Path(dataset)
    if not (folder / "meta.json").is_file():
        return []
    tokenizer = prepare.load_tokenizer(folder)
    data = np.fromfile(folder / "val.bin", np.uint16)
    ends = np.flatnonzero(data == tokenizer.eot_token)[:n]
    return [tokenizer.decode(data[start:end]) for start, end in zip([0, *(ends + 1)], ends)]


def spell(tokenizer, ids):
    """What a person reads of each token: of half a character its bytes, of the end mark a box."""
    return ["■" if i == tokenizer.eot_token else
            tokenizer.decode_single_token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]


def facts(words):
    """What can be counted of the tokens of a story -> of each, a list of phrases."""
    found, bare = [], [word.strip().lower() or "white space" for word in [*words, "the end"]]
    for t, word in enumerate(words):
        last, before = (words[t - 1], bare[t - 1]) if t else ("", "nothing")
        opens, pronoun = re.search(r"[.!?\n■]", last), bare[t] in PRONOUNS
        name = word.strip()[:1].isupper() and not (opens or pronoun or '"' in last)
        is_true = {NAMES: name, "are names that are new in their story": name and bare[t] not in
                   bare[:t], "are pronouns": pronoun, "follow . ! ? or a new line": opens,
                   "follow a, an or the": before in ("a", "an", "the"),
                   "end in -ed": bare[t].endswith("ed"),
                   "stand in quotes": "".join(words[:t]).count('"') % 2,
                   f"are: {bare[t]}": True, f"follow: {before}": True,
                   f"stand before: {bare[t + 1]}": True}
        found.append([phrase for phrase in is_true if is_true[phrase]])
    return found


def read(gpt, tokenizer, texts):
    """Read texts (lists of ids) -> the words of all N tokens, their facts, all neurons (layers, N,
    4 C), and the means of `measure`."""
    words, known, neurons, columns = [], [], [], []
    bar = prepare.Progress("reading", len(texts), unit="texts")
    for n, ids in enumerate(texts, 1):
        _, maps, fired = record(gpt, torch.tensor(ids))
        fired[:, 0] = 0         # on the end mark much is large that says nothing of stories
        told = spell(tokenizer, ids)
        said = facts(told)
        name = torch.tensor([NAMES in phrases for phrases in said])
        columns.append(measure(maps, torch.tensor(ids), name, gpt.config.block_size))
        neurons.append(fired)
        words += told
        known += said
        bar.show(n)
    return words, known, torch.cat(neurons, dim=1), torch.stack(columns).nanmean(dim=0)


# -------------------------------------------------------------------------------- heads and neurons

def measure(maps, ids, name, longest):
    """What the heads do in one text -> (5 + longest, heads + 1): the five shares of the table (nan
    where no token has any), then the attention at each distance. The last column is no head: it
    looks at all tokens alike."""
    T = len(ids)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    maps = torch.cat((maps.flatten(0, 1), ((j <= i) / (i + 1.0))[None]))    # (heads + 1, T, T)
    same = ids[:, None] == ids
    where = torch.stack(((j == 0) & (i > 0), j == i - 1, same & (j < i),
                         same.roll(1, dims=1) & (0 < j) & (j <= i), name & (j < i)))
    tokens = where.any(dim=2).sum(dim=1)[:, None]                       # that could look there
    reach = torch.zeros(longest, len(maps)).index_add_(
        0, (i - j[1:]).clamp(min=0).flatten(), maps[:, :, 1:].flatten(1).T) / T
    return torch.cat((torch.einsum("hij,cij->ch", maps, where.float()) / tokens, reach))


def describe_heads(maps, columns):
    """-> {head: its map (T, T) and what it does most}, and the table of heads."""
    reach = columns[5:]                                                 # (longest, heads + 1)
    distance = torch.arange(len(reach)).float() @ reach / reach.sum(dim=0)
    favourite, back = reach.max(dim=0)
    shares = torch.cat((favourite[None], columns[:5])).T.nan_to_num()   # (heads + 1, 6)
    most = 1 + (shares - shares[-1]).argmax(dim=1)                      # compared with all alike
    names = [f"{layer}.{head}" for layer in range(len(maps)) for head in range(len(maps[0]))]
    table, heads = {}, {}
    for head, name in enumerate([*names, "all alike"]):
        first, *others = (f"{share:.0%}" for share in shares[head])
        cells = f"{distance[head]:.1f}", f"{back[head]} ({first})", *others
        table[name] = dict(zip(COLUMNS, cells))
        heads[name] = f"{COLUMNS[most[head]]} {cells[most[head]]}"
    percent = (100 * maps).round().int().flatten(0, 1).tolist()
    return {name: {"says": heads[name], "shares": shares}
            for name, shares in zip(names, percent)}, grade.table(table)


def common(known, base, places):
    """What do some tokens, at these places among all, have in common? known: the facts of all;
    base: how many have each -> [(score, count, phrase)], the best first: what nearly all of them
    do, and few others."""
    found = []
    for phrase, count in Counter(phrase for place in places for phrase in known[place]).items():
        share, usual = count / len(places), max(base[phrase] / len(known), 0.01)
        found.append((share * math.log(share / usual), count, phrase))
    return sorted(found, reverse=True)


def choose(neurons, known, base, n):
    """The n neurons to show -> [(layer, number)]: the one with the largest activation; for each
    kind of phrase, the one whose top tokens share it best; and whose share anything best."""
    ranked, best = [], {}
    for layer, fired in enumerate(neurons):                             # (N, 4 C)
        values, places = fired.topk(min(TOP, len(known)), dim=0)        # (TOP, 4 C)
        for i in (values[-1] > 0).nonzero().flatten().tolist():
            score, _, phrase = common(known, base, places[:, i].tolist())[0]
            ranked.append((score, phrase.partition(":")[0], (layer, i)))
    for _, kind, neuron in sorted(ranked, reverse=True):
        best.setdefault(kind, neuron)
    largest = divmod(int(neurons.amax(dim=1).argmax()), neurons.size(2))
    others = [neuron for _, _, neuron in sorted(ranked, reverse=True)]
    return [*dict.fromkeys([largest, *best.values(), *others])][:n]


def describe_neurons(words, known, neurons, chosen, n):
    """The neurons `chosen`; if none are, n that `choose` finds -> {neuron: what its top tokens have
    in common, and each of them with what stands around it}."""
    base, described = Counter(phrase for phrases in known for phrase in phrases), {}
    for layer, i in chosen or choose(neurons, known, base, n):
        fired = neurons[layer, :, i].tolist()
        places = sorted(range(len(words)), key=lambda t: -fired[t])[:TOP]
        places = [t for t in places if fired[t] > 0]
        says = [f"{count} of {len(places)} {phrase} ({base[phrase] / len(words):.1%} of all)"
                for score, count, phrase in common(known, base, places)[:3]
                if score > 0 and count > 2]
        if places and fired[places[0]] == neurons.max():
            says.insert(0, "the largest of all")
        around = [range(max(t - 6, 0), min(t + 5, len(words))) for t in places]
        described[f"{layer}.{i}"] = {
            "says": "; ".join(says) or "nothing that is counted is common to its top tokens",
            "tokens": [[[words[t], round(fired[t], 2), t == place] for t in near]
                       for near, place in zip(around, places)]}
    return described


# ------------------------------------------------------------------------------------------ main

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="folder of a run, or a checkpoint file")
    add("--text", help="what the maps show (default: how the first validation story begins)")
    add("--neurons", type=int, default=12, help="how many neurons are shown (default 12)")
    add("--neuron", nargs="+", default=[], metavar="LAYER.NUMBER", help="show these instead")
    add("--stories", type=int, default=40, help="validation stories that it reads (default 40)")
    add("--dataset", help="where they are from (default: what the run learned from)")
    args = parser.parse_args(argv)
    if args.stories < 1 or args.neurons < 1:
        parser.error("--stories and --neurons must be 1 or more")
    prepare.command(study, parser, args)


def study(parser, args):
    gpt, tokenizer = sample.load_run(args.run, "cpu", torch.float32)
    layers, width, longest = gpt.config.n_layer, 4 * gpt.config.n_embd, gpt.config.block_size
    names = {f"{layer}.{i}": (layer, i) for layer in range(layers) for i in range(width)}
    if unknown := {*args.neuron} - {*names}:
        parser.error(f"there is no neuron {unknown.pop()}: the model has {layers} layers of "
                     f"{width} neurons, named 0.0 to {layers - 1}.{width - 1}")

    folder = sample.find_run(args.run).parent
    dataset = args.dataset or grade.read_meta(folder).get("dataset", "unknown")
    stories, note = read_stories(dataset, args.stories), ""
    if not stories:
        note = (f"The stories of {dataset} are not there: it reads one text only. To make them: "
                f"python prepare.py {dataset} (and --input FILE if they are your own); others: "
                "--dataset NAME")
        if args.dataset or args.neuron:
            raise SystemExit(note)
        print(note, file=sys.stderr)

    def encode(text):
        return [tokenizer.eot_token, *tokenizer.encode_ordinary(text)]

    told = [encode(story)[:longest] for story in stories or [PARAGRAPH]]
    ids = told[0][:SHOWN] if args.text is None else encode(args.text)
    if not 2 <= len(ids) <= longest:
        parser.error(f"--text has {len(ids) - 1} tokens; the model, whose context is {longest}, "
                     f"reads 1 to {longest - 1} after the end mark")
    words, known, neurons, columns = read(gpt, tokenizer, told)
    heads, table = describe_heads(record(gpt, torch.tensor(ids))[1], columns)
    shown = describe_neurons(words, known, neurons, [names[name] for name in args.neuron],
                             args.neurons)
    print(table)
    for name, neuron in shown.items():
        tops = [word for around in neuron["tokens"] for word, _, top in around if top]
        print(f"\n{name}: {neuron['says']}\n   ", *(repr(word)[1:-1] for word in tops[:12]))
    across, about = gpt.config.n_head, f"that read {len(told)} texts, {len(words):,} tokens. {note}"
    data = {"run": folder.as_posix(), "words": spell(tokenizer, ids), "heads": heads,
            "across": across, "table": table, "neurons": shown, "about":
            f"{layers} layers, each of {across} heads and {width} neurons, {about}"}
    page = (prepare.HERE / "study" / "inside.html").read_text("utf-8")
    data = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")     # no tag ends it early
    prepare.write_text(folder / "inside.html", page.replace("DATA", data))
    print(f"\nOpen {(folder / 'inside.html').as_posix()} in a browser.")


if __name__ == "__main__":
    main()
