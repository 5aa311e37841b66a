"""What do the heads of a model look at, and what do its neurons fire on?

    python -m study.inside out/demo             # seconds; writes a page, out/demo/inside.html
    python -m study.inside out/demo --text "Ann had a ball. Tom had a kite. Ann liked her"
    python -m study.inside out/demo --neuron 1.37 0.100     # layer 1, neuron 37; both count from 0

For each token, a head shares its attention among the tokens up to it: a map. A neuron is one number
of an MLP's hidden layer, after the activation: large on some tokens, small on the others. All of
them are held at once, for 8,000 tokens: tiny_8l takes 1 GB, and five seconds. After arXiv
2305.07759, section 5.
"""

import argparse
import json
from collections import Counter

import numpy as np
import torch

import grade
import model
import prepare
import sample
from study.checks import held_out

TOP = 20                    # tokens that are shown of a neuron, as in the paper
SHOWN = 80                  # tokens of a story that a map shows
COLUMNS = ("distance", "first", "before", "same", "after same")     # the page explains them


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
    """The text of the first n validation stories of a data set; if it is not here, of our own
    grammar."""
    folder = prepare.HERE / "data" / dataset
    if not (folder / "meta.json").is_file():
        return [story.text for story in held_out(n)]
    tokenizer = prepare.load_tokenizer(folder)
    data = np.fromfile(folder / "val.bin", np.uint16)
    ends = np.flatnonzero(data == tokenizer.eot_token)[:n]
    return [tokenizer.decode(data[start:end]) for start, end in zip([0, *(ends + 1)], ends)]


def spell(tokenizer, ids):
    """What a person reads of each token: of half a character its bytes, of the end mark a box."""
    return ["■" if i == tokenizer.eot_token else
            tokenizer.decode_single_token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]


# -------------------------------------------------------------------------------- heads and neurons

def measure(maps, ids):
    """What the heads do in one text: maps (layers, H, T, T), ids (T,) -> (layers, H, 5), the means
    of COLUMNS over all tokens (nan where no token has any to look at)."""
    i, j = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    same = ids[:, None] == ids
    inner = maps[..., 1:]                   # a head that finds nothing looks at the first token
    columns = [(inner * (i - j[1:])).sum((2, 3)) / inner.sum((2, 3))]
    for where in ((j == 0) & (i > 0), j == i - 1, same & (j < i),
                  same.roll(1, dims=1) & (0 < j) & (j <= i)):
        columns.append((maps * where).sum((2, 3)) / where.any(dim=1).sum())
    return torch.stack(columns, dim=-1)


def describe_heads(maps, columns):
    """-> {head: its map (T, T) in per cent, and what stands under it}, and the table."""
    heads, rows = {}, {}
    for layer, head in np.ndindex(*columns.shape[:2]):
        distance, *shares = columns[layer, head].nan_to_num().tolist()
        cells = f"{distance:.1f}", *(f"{share:.0%}" for share in shares)
        rows[f"{layer}.{head}"] = dict(zip(COLUMNS, cells))
        heads[f"{layer}.{head}"] = {"says": f"{distance:.1f} back",
                                    "shares": (100 * maps[layer, head]).round().int().tolist()}
    return heads, grade.table(rows)


def describe_neuron(words, fired):
    """words and activations of all tokens that were read -> the TOP tokens with what stands around
    each, and what most of them have in common."""
    values, places = (each.tolist() for each in fired.topk(min(TOP, len(words))))
    places = [place for place, value in zip(places, values) if value > 0]
    says = []
    for what, step in (("follow", -1), ("are", 0), ("come before", 1)):
        there = Counter(words[(place + step) % len(words)].strip() for place in places)
        says += [f"{count} of {len(places)} {what} “{word or '↵'}”"
                 for word, count in there.most_common(1) if 2 * count > len(places)]
    around = [range(max(place - 6, 0), min(place + 5, len(words))) for place in places]
    return {"says": "; ".join(says) or "no one word is common to most of its top tokens",
            "tokens": [[[words[t], round(fired[t].item(), 2), t == place] for t in near]
                       for near, place in zip(around, places)]}


# ------------------------------------------------------------------------------------------ main

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="folder of a run, or a checkpoint file")
    add("--text", help="what the maps show (default: how the first story begins)")
    add("--neurons", type=int, default=12, help="how many neurons are shown (default 12)")
    add("--neuron", nargs="+", default=[], metavar="LAYER.NUMBER", help="show these instead")
    add("--stories", type=int, default=40, help="stories that it reads (default 40)")
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
    stories = read_stories(grade.read_meta(folder).get("dataset", "unknown"), args.stories)
    told = [[tokenizer.eot_token, *tokenizer.encode_ordinary(story)] for story in stories]
    ids = told[0][:min(SHOWN, longest)]
    if args.text is not None:
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(args.text)]
    if not 2 <= len(ids) <= longest:
        parser.error(f"--text has {len(ids) - 1} tokens; the model, whose context is {longest}, "
                     f"reads 1 to {longest - 1} after the end mark")

    words, neurons, columns = [], [], []
    bar = prepare.Progress("reading", len(told), unit="stories")
    for n, story in enumerate(told, 1):
        story = torch.tensor(story[:longest])
        _, maps, fired = record(gpt, story)
        fired[:, 0] = 0         # on the end mark much is large that says nothing of stories
        words += spell(tokenizer, story.tolist())
        neurons.append(fired)
        columns.append(measure(maps, story))
        bar.show(n)
    neurons = torch.cat(neurons, dim=1)                                 # (layers, all tokens, 4 C)
    heads, table = describe_heads(record(gpt, torch.tensor(ids))[1],
                                  torch.stack(columns).nanmean(dim=0))
    largest = neurons.amax(dim=1).flatten().argsort(descending=True)[:args.neurons].tolist()
    chosen = [names[name] for name in args.neuron] or [divmod(at, width) for at in largest]
    shown = {f"{layer}.{i}": describe_neuron(words, neurons[layer, :, i]) for layer, i in chosen}

    print(table)
    for name, neuron in shown.items():
        tops = [word for around in neuron["tokens"] for word, _, top in around if top]
        print(f"\n{name}: {neuron['says']}\n   ", *(repr(word)[1:-1] for word in tops[:12]))
    across = gpt.config.n_head
    data = {"run": folder.as_posix(), "words": spell(tokenizer, ids), "heads": heads,
            "across": across, "table": table, "neurons": shown, "about":
            f"{layers} layers, each of {across} heads and {width} neurons, that read "
            f"{len(told)} stories, {len(words):,} tokens."}
    page = (prepare.HERE / "study" / "inside.html").read_text("utf-8")
    data = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")     # no tag ends it early
    prepare.write_text(folder / "inside.html", page.replace("DATA", data))
    print(f"\nOpen {(folder / 'inside.html').as_posix()} in a browser.")


if __name__ == "__main__":
    main()
