"""What happens inside a trained model?

    python -m study.explore out/demo        # seconds; writes out/demo/explore.html

Writes one web page that contains the model. Open it in a browser: it needs no server and no
network, and can be sent to a friend. The model writes stories there. You see its choices, attention
and neurons, can switch off heads, and can compare it with the grammar of its stories.
The template, study/explore.html, holds a second, short version of model.py in JavaScript.
"""

import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import prepare
import sample
from data import common
from data.facts import held_out_stories, revealed_nats, split_story
from study.consistency import first_wrong_word, generate_endings, held_out_for_run

MAX_MB = 60
STORIES = 8                 # held-out stories of the grammar in the page
TOP = 10                    # tokens stored for each neuron
NEURON_STORIES = 30         # stories among whose tokens they are


def encode_array(array, dtype):
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def validation_stories(dataset, n):
    """Validation stories of a data set (if it is not on this machine: stories of our grammar)."""
    folder = prepare.HERE / "data" / (dataset or "unknown")
    if not (folder / "meta.json").is_file():
        return [story.text for story in held_out_stories(n)]
    tokenizer = prepare.load_tokenizer(folder)
    ids = np.fromfile(folder / "val.bin", np.uint16, count=1_000_000)
    ends = np.flatnonzero(ids == tokenizer.eot_token)[:n]
    return [tokenizer.decode(text[:-1]) for text in np.split(ids, ends + 1)[:-1]]


@torch.inference_mode()
def reference_logits(model, ids):
    """The logits after a short text (longer than a window), for the page to check its own."""
    ids = ids[:min(model.config.block_size, max(48, model.config.window + 16))]
    logits = model(torch.tensor([ids]))[0][0, -1]                   # (V,)
    return {"ids": ids, "logits": encode_array(logits, np.float32),
            "tolerance": 1e-3 * max(1.0, logits.abs().max().item())}


@torch.inference_mode()
def top_tokens(model, texts):
    """The tokens with each neuron's largest activations. texts: lists of ids -> activations, and
    places in the concatenation of all texts, each (layers * 4C, TOP)."""
    hidden, activations = [], []
    hooks = [block.mlp.c_proj.register_forward_pre_hook(lambda _, x: hidden.append(x[0][0]))
             for block in model.blocks]
    for ids in texts:
        hidden.clear()
        model(torch.tensor([ids]))
        activations.append(torch.cat(hidden, dim=1).T)              # (layers * 4C, T)
        activations[-1][:, 0] = 0       # those on the end token say nothing about stories
    for hook in hooks:
        hook.remove()
    activations = torch.cat(activations, dim=1)
    return activations.topk(min(TOP, activations.size(1)))


def describe_story(story, tokenizer):
    """A story with the grammar's nats on each token: those that its characters reveal."""
    ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(story.text), tokenizer.eot_token]
    ends = np.cumsum([len(tokenizer.decode_single_token_bytes(i)) for i in ids[1:-1]])
    nats = np.zeros(len(ids))
    for position, revealed in revealed_nats(story):
        start = len(story.text[:position].encode())                 # in bytes, like the tokens
        nats[1 + np.searchsorted(ends, start, side="right")] += revealed
    return {"title": story.plot["name"], "ids": ids, "nats": nats.tolist()}


def describe_autopsy(story, ending, tokenizer):
    """An ending with a wrong word: where it is, and the word that would have been right there."""
    position, wrong, right = first_wrong_word(story, ending)
    first = split_story(story)[0] + "\n\n"
    before = (first + ending[:position]).removesuffix(" ")          # a token brings its own space
    rest = (first + ending)[len(before):]
    right = rest[:rest.index(wrong)] + sorted(right)[0]
    prompt, before, rest, right = map(tokenizer.encode_ordinary, (first, before, rest, right))
    return {"title": f"{story.plot['name']}: {wrong}", "typed": 1 + len(prompt),
            "ids": [tokenizer.eot_token, *before, *rest], "at": 1 + len(before), "right": right[0]}


def build_page(model, tokenizer, meta, name):
    """Everything that the page shows -> a dict for JSON. Rounds the model's weights to float16."""
    config, eot, dataset = model.config, tokenizer.eot_token, meta.get("dataset", "")
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()              # what the page holds
    weights = model.state_dict()
    weights["token_embedding.weight"] = weights["token_embedding.weight"][:config.vocab_size]
    texts = validation_stories(dataset, NEURON_STORIES)
    prompt = texts[0][:40].rpartition(" ")[0]
    texts = [[eot, *tokenizer.encode_ordinary(text)][:config.block_size] for text in texts]
    ids, (values, places) = sum(texts, []), top_tokens(model, texts)
    largest = values[:, 0].topk(min(12, len(values))).indices.tolist()
    stories = held_out_for_run(meta, 100) if dataset == "sample" else []    # of our own grammar
    endings = generate_endings(model, tokenizer, stories) if stories else []
    wrong = [pair for pair in zip(stories, endings) if first_wrong_word(*pair)]
    return {
        "name": name, "config": asdict(config), "prompt": prompt, "eot": eot,
        "about": f"{model.num_params() / 1e6:.1f} million parameters (float16), {config.n_layer} "
                 f"layers of {config.n_head} heads and {4 * config.n_embd:,} neurons, context of "
                 f"{config.block_size:,} tokens, trained on {dataset or 'unknown text'}.",
        "tokens": [base64.b64encode(tokenizer.decode_single_token_bytes(i)).decode()
                   for i in range(config.vocab_size)],
        "pattern": tokenizer._pat_str,
        "tensors": [[key, weight.numel()] for key, weight in weights.items()],
        "weights": encode_array(torch.cat([w.flatten() for w in weights.values()]), np.float16),
        "reference": reference_logits(model, ids),
        "neurons": {"n_top": values.size(1), "ids": ids, "places": encode_array(places, np.uint16),
                    "values": encode_array(values.clamp(max=65_000), np.float16),
                    "largest": [divmod(i, 4 * config.n_embd) for i in largest]},
        "stories": [describe_story(story, tokenizer) for story in stories[:STORIES]],
        "autopsies": [describe_autopsy(*pair, tokenizer) for pair in wrong[:STORIES]],
    }


def write_html(path, page):
    template = Path(__file__).with_name("explore.html").read_text(encoding="utf-8")
    data = json.dumps(page).replace("<", "\\u003c")     # so that no text can end the script
    common.write_text(path, template.replace("DATA", data, 1))


def main(argv=None):
    parser = common.command_parser(__doc__)
    parser.add_argument("run", help="a run's folder, or a checkpoint file")
    parser.add_argument("--force", action="store_true", help=f"also a page of over {MAX_MB} MB")
    args = parser.parse_args(argv)
    model, tokenizer, meta = sample.load_run(args.run, "cpu", torch.float32)
    size = 2 * model.num_params() * 4 / 3 / 1e6                     # float16 in base64
    if size > MAX_MB and not args.force:
        raise SystemExit(f"The page would have {size:.0f} MB, too much for many browsers "
                         f"(at most {MAX_MB}). Add --force to write it anyway.")
    path = sample.results_folder(args.run) / "explore.html"
    write_html(path, build_page(model, tokenizer, meta, path.parent.as_posix()))
    print(f"Open {path.as_posix()} in a browser ({path.stat().st_size / 1e6:.1f} MB).")


if __name__ == "__main__":
    main()
