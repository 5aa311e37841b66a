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
import html
import json
import re
import string
import sys
from pathlib import Path

import numpy as np
import torch

import model
import prepare
import sample

TOP = 20                    # tokens that are shown and counted of a neuron, as in the paper
SHOWN = 80                  # tokens of a story that a map shows
PARAGRAPH = ("Once there was a girl named Ann. Ann had a red ball and a small dog. One day, the "
             "dog took the red ball and ran away. \"Come back!\" cried Ann. The dog came back, but "
             "the ball was gone. Ann was sad, and the dog was sad, too.")
COLUMNS = {     # of the table of heads
    "distance": "how many tokens back it looks on average. Here and in the next column, what goes "
                "to the first token is left out.",
    "favourite": "the distance that gets most, and its share. Near 100 % is a head that looks a "
                 "fixed distance back; 0 is the token itself.",
    "first": "share on the first token, where heads look that find nothing to look at.",
    "before": "share on the token before.",
    "same": "share on earlier occurrences of the same token, over tokens that have any.",
    "after same": "share on what followed an earlier occurrence of the same token, over tokens "
                  "that have any: induction, by which a model repeats what was said before.",
    "names": "share on names (capitals inside a sentence), over tokens that have any before them."}
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
    for folder in (prepare.HERE / "data" / dataset, Path(dataset)):
        if (folder / "meta.json").is_file() and (folder / "val.bin").is_file():
            tokenizer = prepare.load_tokenizer(folder)
            data = np.memmap(folder / "val.bin", dtype=np.uint16, mode="r")
            ends = np.flatnonzero(data == tokenizer.eot_token)[:n]
            return [tokenizer.decode(data[start:end].tolist())
                    for start, end in zip([0, *(ends + 1)], ends)]
    return []


def spell(tokenizer, ids):
    """What a person reads of each token: of half a character its bytes, of the end mark a box."""
    return ["■" if i == tokenizer.eot_token else
            tokenizer.decode_single_token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]


def facts(words):
    """What can be counted of the tokens of a story -> {what they do: of each token, the word that
    fills the gap, or whether it does}."""
    bare = [word.strip().lower() or "white space" for word in words]
    last, before = ["", *words[:-1]], ["", *bare[:-1]]
    opens = [bool(re.search(r"[.!?\n■]", word)) for word in last]
    pronoun = [word in "i you he she it we they me him her us them".split() for word in bare]
    name = [word.strip()[:1].isupper() and not (start or other or '"' in sign)
            for word, start, other, sign in zip(words, opens, pronoun, last)]
    new = [word not in bare[:t] for t, word in enumerate(bare)]
    return {NAMES: name,
            "are names that are new in their story": [a and b for a, b in zip(name, new)],
            "are new in their story": new,
            "are pronouns": pronoun,
            "follow . ! ? or a new line": opens,
            "follow a, an or the": [word in ("a", "an", "the") for word in before],
            "end in -ed": [word.endswith("ed") for word in bare],
            "stand in quotes": ["".join(words[:t]).count('"') % 2 == 1 for t in range(len(words))],
            "are: {}": bare, "follow: {}": before, "stand before: {}": [*bare[1:], ""]}


def read(gpt, tokenizer, texts):
    """Read texts (lists of ids) -> the words of all N tokens, their facts, all neurons (layers, N,
    4 C), and the means of `measure`."""
    words, known, neurons, columns = [], {}, [], []
    for n, ids in enumerate(texts, 1):
        if sys.stderr.isatty():
            end = "\n" if n == len(texts) else ""
            print(f"\rreading text {n} of {len(texts)}", end=end, file=sys.stderr)
        told = spell(tokenizer, ids)
        _, maps, fired = record(gpt, torch.tensor(ids))
        fired[:, 0] = 0         # on the end mark much is large that says nothing of stories
        words += told
        neurons.append(fired)
        for phrase, answers in facts(told).items():
            known.setdefault(phrase, []).extend(answers)
        name = torch.tensor(known[NAMES][-len(ids):])
        columns.append(measure(maps, torch.tensor(ids), name, gpt.config.block_size))
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


def agree(values, where, answers):
    """What do the top tokens of each neuron have in common? values, where (layers, TOP, neurons):
    their activations and their places among N tokens; answers: a list of N for each fact -> three
    tensors (facts, layers, neurons): how many of the top agree, the share of all tokens that do
    the same, and the place of one that does."""
    found = []
    for answer in answers:
        place = {}              # of the first token with this answer; one that has none is alone
        code = torch.tensor([place.setdefault(a or (t,), t) for t, a in enumerate(answer)])
        most = code[where].mode(dim=1).values                           # (layers, neurons)
        count = ((code[where] == most[:, None]) & (values > 0)).sum(dim=1)
        found.append((count, code.bincount()[most] / len(code), most))
    return [torch.stack(tensors) for tensors in zip(*found)]


def show_heads(maps, columns):
    """Print the table of heads -> the maps and the table as HTML."""
    reach = columns[5:]                                                 # (longest, heads + 1)
    distance = torch.arange(len(reach)).float() @ reach / reach.sum(dim=0)
    favourite, back = reach.max(dim=0)
    shares = torch.cat((favourite[None], columns[:5])).T.nan_to_num()   # (heads + 1, 6)
    most = (shares - shares[-1]).argmax(dim=1)                          # compared with all alike
    names = [f"{layer}.{head}" for layer in range(len(maps)) for head in range(len(maps[0]))]
    names.append("all alike")
    titles, table, drawn = ["head", *COLUMNS], "", ""
    print(" ".join(f"{title:>10}" for title in titles))
    for head, row in enumerate(shares.tolist()):
        cells = [names[head], f"{distance[head]:.1f}", f"{back[head]} ({row[0]:.0%})",
                 *(f"{share:.0%}" for share in row[1:])]
        print(" ".join(f"{cell:>10}" for cell in cells))
        table += "<tr>" + "".join(map(tinted, ["td"] * 8, cells, [0, 0, *row])) + "</tr>\n"
        if head < len(names) - 1:
            column = int(most[head]) + 2
            drawn += draw_map(names[head], f"{titles[column]} {cells[column]}",
                              maps.flatten(0, 1)[head])
    return drawn, "<tr><th>" + "<th>".join(titles) + "</tr>\n" + table


def show_neurons(words, known, neurons, chosen, n):
    """Print and draw the neurons `chosen` -> HTML. If none are, n: the one with the largest
    activation, then for each fact the one whose top tokens agree most, then the second ..."""
    tops = [layer.topk(min(TOP, len(words)), dim=0) for layer in neurons]
    values, where = map(torch.stack, zip(*tops))                        # (layers, TOP, 4 C)
    counts, bases, most = agree(values, where, known.values())
    share, width = counts / values.size(1), neurons.size(2)
    gain = torch.xlogy(share, share / bases.clamp(min=0.01))                # common only here,
    gain *= 1 - neurons.mean(dim=1) / values.mean(dim=1).clamp(min=1e-9)    # and silent elsewhere
    if not chosen:
        best = gain.flatten(1).topk(min(n, gain[0].numel())).indices.T      # (n, facts)
        order = dict.fromkeys([int(values[:, 0].argmax()), *best.flatten().tolist()])
        chosen = [divmod(place, width) for place in order][:n]
    drawn = ""
    for layer, i in chosen:
        fires, says = int((values[layer, :, i] > 0).sum()), []
        for fact in gain[:, layer, i].argsort(descending=True)[:3].tolist():
            count, place = int(counts[fact, layer, i]), int(most[fact, layer, i])
            if 2 * count >= fires and count > 2 and gain[fact, layer, i] > 0:
                phrase = list(known)[fact].format(list(known.values())[fact][place])
                says.append(f"{count} of {fires} {phrase} ({bases[fact, layer, i]:.1%} of all)")
        says = "; ".join(says) or ("nothing that is counted is common to its top tokens" if fires
                                   else "it fires on none of the tokens")
        says = "the largest of all; " * bool(values[layer, 0, i] == values.max()) + says
        places = where[layer, :fires, i].tolist()
        print(f"\n{layer}.{i}: {says}\n   ", *(repr(words[place])[1:-1] for place in places[:12]))
        drawn += draw_neuron(f"{layer}.{i}", says, words, neurons[layer, :, i].tolist(), places)
    return drawn


# ----------------------------------------------------------------------------------------- the page

PAGE = prepare.HERE / "study" / "inside.html"      # with $names for what is filled in


def tinted(tag, text, share):
    text = html.escape(text.replace("\n", "↵"))
    return f'<{tag} style="background: rgba(204, 68, 0, {max(share, 0):.2f})">{text}</{tag}>'


def draw_map(name, says, shares):
    """One head's map (T, T): a token is a unit wide, and what is under 2 % is left out."""
    rows, size = "", len(shares) + 8.5
    for i, row in enumerate(shares.tolist()):
        dots = "".join(f'<path d="M{j} {i}.5h1" opacity="{share ** 0.5:.2f}"/>'
                       for j, share in enumerate(row) if share >= 0.02)
        data = " ".join(f"{100 * share:.0f}" for share in row[:i + 1])
        rows += f'<g data-shares="{data}"><path class="row" d="M0 {i}.5h{i + 1}"/>{dots}</g>\n'
    return (f'<figure><svg id="{name}" viewBox="-8 -8 {size} {size}"><use href="#labels"/>{rows}'
            f'</svg><figcaption><b>{name}</b> {says}</figcaption></figure>\n')


def draw_neuron(name, says, words, activations, places):
    """A neuron's top tokens, each in the middle of a few words of its context."""
    rows = ""
    for place in places:
        spans = [tinted("span", words[t], activations[t] / activations[places[0]])
                 for t in range(max(place - 6, 0), min(place + 5, len(words)))]
        here = min(place, 6)
        rows += (f'<tr><td>{"".join(spans[:here])}</td><td>{"".join(spans[here:])}</td>'
                 f'<td>{activations[place]:.2f}</td></tr>\n')
    return f"<div><h3>{name}</h3><p>{html.escape(says)}</p><table>{rows}</table></div>\n"


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
    chosen = []
    for name in args.neuron:
        layer, number = map(int, name.split(".") if re.fullmatch(r"\d+\.\d+", name) else (-1, -1))
        if not (0 <= layer < layers and 0 <= number < width):
            parser.error(f"there is no neuron {name}: the model has {layers} layers of {width} "
                         f"neurons, named 0.0 to {layers - 1}.{width - 1}")
        chosen.append((layer, number))

    folder = sample.find_run(args.run).parent
    dataset, meta = args.dataset or "", folder / "meta.json"
    if not dataset and meta.is_file():
        dataset = json.loads(meta.read_text(encoding="utf-8")).get("dataset", "")
    stories = read_stories(dataset, args.stories) if dataset else []
    own = "" if dataset in (*prepare.SAMPLES, *prepare.SOURCES) else " --input STORIES.txt"
    lack = (f"Neurons need stories, and the data set {dataset or 'of the run'} is not there. Make "
            f"it: python prepare.py {dataset or 'mine'}{own}; or name another: --dataset NAME")
    if not stories and (chosen or args.dataset):
        raise SystemExit(lack)
    text = args.text if args.text is not None else stories[0] if stories else PARAGRAPH
    ids, *told = ([tokenizer.eot_token, *tokenizer.encode_ordinary(t)] for t in (text, *stories))
    ids = ids if args.text is not None else ids[:min(SHOWN, longest)]
    if not 2 <= len(ids) <= longest:
        parser.error(f"--text has {len(ids) - 1} tokens; the model, whose context is {longest}, "
                     f"reads 1 to {longest - 1} after the end mark")

    told = [story[:longest] for story in told] or [ids]
    words, known, neurons, columns = read(gpt, tokenizer, told)
    maps, table = show_heads(record(gpt, torch.tensor(ids))[1], columns)
    if stories:
        drawn = show_neurons(words, known, neurons, chosen, args.neurons)
    else:
        print(lack, file=sys.stderr)
        drawn = html.escape(lack)
    labels = [html.escape(word.replace("\n", "↵")) for word in spell(tokenizer, ids)]
    page = string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        run=html.escape(folder.as_posix()), heads=gpt.config.n_head, maps=maps, table=table,
        about=f"{layers} layers, each of {gpt.config.n_head} heads and {width} neurons, that read "
        + (f"{len(stories)} stories of {html.escape(dataset)}." if stories else "the text below."),
        words="".join(f"<span>{label}</span>" for label in labels), tokens=f"{len(words):,}",
        labels="".join(f'<text x="-.3" y="{i}.8" text-anchor="end">{label}</text><text transform='
                       f'"translate({i}.8 -.3) rotate(-90)">{label}</text>'
                       for i, label in enumerate(labels)),
        columns="".join(f"<li><b>{name}</b>: {what}</li>" for name, what in COLUMNS.items()),
        neurons=drawn, top=TOP)
    out = folder / "inside.html"
    prepare.write_whole(out, lambda file: file.write(page.encode()))
    print(f"\nOpen {out.as_posix()} in a browser.")


if __name__ == "__main__":
    main()
