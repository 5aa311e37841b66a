"""Do the endings that a model writes fit their stories? Measured exactly, without a judge.

    python -m study.consistency out/demo                  # half a minute
    python -m study.consistency out/demo --autopsy        # what happened at a wrong word?
    python -m study.consistency out/demo_instruct         # does it use the required words?

For models of our own grammar. Five checks of sampled endings, and minimal pairs (arXiv 1912.00582)
in true endings: is the right word more likely than the other words of its list? The pairs have much
less noise, because nothing is sampled. Writes no files.
"""

import math
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # also works as a plain file
import prepare
import sample
from data import common
from data.facts import decided_words, held_out_stories, required_texts, split_story
from model import NonFiniteLogits

LENGTH_FACTOR = 1.2     # sampled texts have at most this times the tokens of the longest true one
CHECKS = {
    "grammar": 'a or an, no word twice in a row, capitals, full stops, quotes',
    "pronoun": "he, she, him, her ... while all people are of one gender",
    "name": "people appear again, with their names, and nobody else",
    "thing": "the toy, its color, the pet ... appear again, unchanged",
    "plot": "all scenes of this plot follow, to its end",
}
CHECKED_KINDS = {"pronoun": ["pronoun"], "name": ["hero", "friend", "other people"],
                 "thing": ["thing", "color"]}


def check_ending(story, ending):
    """-> {check: right or wrong; None: there is nothing to check}."""
    paragraphs, scenes = ending.split("\n\n"), story.plot["scenes"][1:]
    faults = r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(?!had\b)(\w+) \1\b|[.!?] \"?[a-z]"
    results = {"grammar": not re.search(faults, ending) and all(
        re.search(r"[.!?]\"?$", text) and text.count('"') % 2 == 0 for text in paragraphs)}
    words = [(kind, right) for _, kind, right, _ in decided_words(story, ending)]
    for kind, text in required_texts(story):
        words.append((kind, bool(re.search(rf"\b{text}", ending))))
    for check, kinds in CHECKED_KINDS.items():
        right = [right for kind, right in words if kind in kinds]
        results[check] = all(right) if right else None
    results["plot"] = len(paragraphs) == len(scenes) and all(
        any(re.fullmatch(option_pattern(option), text) for option in scene)
        for text, scene in zip(paragraphs, scenes))
    return results


def option_pattern(option):
    """One option of a scene -> a regular expression: its words, with anything at its choices."""
    parts = re.split(r"\{[^{}]*\}", re.sub(r" ?\[\w+\]", "", option))
    parts = [re.sub(r"\b([Aa])\\ $", r"\1n?\\ ", re.escape(part)) for part in parts]
    return '[^.!?"]+?'.join(parts)


def check_endings(stories, endings):
    """{check: (% of the endings that pass it, standard error)}, without those where there is
    nothing to check; nan if that is all of them."""
    results, rates = list(map(check_ending, stories, endings)), {}
    for check in CHECKS:
        right = [result[check] for result in results if result[check] is not None]
        rate = sum(right) / len(right) if right else math.nan
        rates[check] = 100 * rate, 100 * math.sqrt(rate * (1 - rate) / max(1, len(right)))
    return rates


def generate_endings(model, tokenizer, stories, seed=0, temperature=1.0):
    """Let a model continue stories after their first scenes, all at once -> list of str."""
    prompts, true_endings = zip(*map(split_story, stories))
    endings = sample.generate_texts(model, tokenizer, prompts, max_tokens(tokenizer, true_endings),
                                    temperature, seed=seed)
    return [ending.strip() for ending in endings]


def max_tokens(tokenizer, true_texts):
    """The limit of sampled texts that should be like the true ones."""
    return int(LENGTH_FACTOR * max(len(tokenizer.encode_ordinary(text)) for text in true_texts))


def held_out_for_run(meta, n):
    """n held-out stories of our grammar. Says so if the run has learned another version of it."""
    if prepare.grammar_changed(meta):
        print("data/grammar.txt has changed since this model was trained: it never saw such "
              "stories.", file=sys.stderr)
    return held_out_stories(n)


def check_model(model, tokenizer, meta, n):
    """Let a model end n held-out stories -> {check: % of its endings that pass it}."""
    stories = held_out_for_run(meta, n)
    rates = check_endings(stories, generate_endings(model, tokenizer, stories))
    return {check: rate for check, (rate, _) in rates.items()}


def required_words(model, tokenizer, stories, seed, temperature):
    """For a model of instructions -> for each story, which required words it contains."""
    requests = [story.record().partition(" \n\n")[0] for story in stories]
    longest = max_tokens(tokenizer, [story.text for story in stories])
    texts = sample.generate_texts(model, tokenizer, requests, longest, temperature, seed=seed)
    words = [re.findall(r"\w+", " ".join(re.findall("Words: (.*)", text))) for text in requests]
    return [[bool(re.search(rf"\b{word}", text, re.I)) for word in row]
            for row, text in zip(words, texts) if row]


def minimal_pairs(story, tokenizer):
    """Positions in [end token, *tokens of the story] where the word is decided -> list of
    (position, kind, id of the right word, ids of the other words of its list)."""
    first, ending = split_story(story)
    text, starts = tokenizer.decode_with_offsets(tokenizer.encode_ordinary(story.text))
    pairs = []
    for match, kind, _, others in decided_words(story, ending):
        start = len(first) + 2 + match.start()
        space = " " if text[start - 1] == " " else ""           # belongs to the token
        words = [match[0], *sorted(others)]
        if match[0][0].isupper():
            words = [word.capitalize() for word in words]
        right_id, *other_ids = [tokenizer.encode_ordinary(space + word)[0] for word in words]
        plural = match.lastindex and match[0] != match[1]
        if start - len(space) in starts and others and right_id not in other_ids and not plural:
            pairs.append((1 + starts.index(start - len(space)), kind, right_id, [*{*other_ids}]))
    return pairs


@torch.inference_mode()
def score_pairs(model, tokenizer, stories):
    """One forward pass per story -> {kind: (number of pairs, % of them where the right word is more
    likely than all other words of its list, mean probability of the right word in %, if only the
    words of its list are possible, standard error of this mean)}."""
    scores, results, device = {}, {}, model.token_embedding.weight.device
    for number, story in enumerate(stories):
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(story.text)]
        idx = torch.tensor([ids[:model.config.block_size]], device=device)  # (1, T)
        logits = model(idx)[0][0].float().cpu().numpy()                     # (T, V)
        if not np.isfinite(logits).all():
            raise SystemExit(NonFiniteLogits.__doc__)
        for position, kind, right, others in minimal_pairs(story, tokenizer):
            if position <= len(logits):
                odds = np.exp(logits[position - 1, others] - logits[position - 1, right])
                row = (number, odds.max() < 1, 1 / (1 + odds.sum()))
                scores.setdefault(kind, []).append(row)
    for kind, rows in sorted(scores.items()):
        number, correct, p = np.array(rows, dtype=float).T
        sums = np.bincount(number.astype(int), p - p.mean())    # pairs of a story are dependent
        error = np.sqrt((sums ** 2).sum()) / len(p)
        results[kind] = len(p), 100 * correct.mean(), 100 * p.mean(), 100 * error
    return results


@torch.inference_mode()
def attention_weights(model, idx):
    """idx (1, T) -> for each layer, where its heads look: (H, T, T); each row sums to 1."""
    weights = []

    def record(module, args):
        x, rope, v1, *_ = args
        q, k, *_ = module.project_qkv(x, rope, v1)                  # (1, H, T, D)
        eye = torch.eye(q.size(2)).expand(*q.shape[:2], -1, -1)     # as values: weights @ eye
        weights.append(module.apply_attention(q, k, eye.to(q))[0].float())

    hooks = [block.attn.register_forward_pre_hook(record) for block in model.blocks]
    model(idx)
    for hook in hooks:
        hook.remove()
    return weights


def first_wrong_word(story, ending):
    """-> (its position in the ending, the word, the words that were right there), or None."""
    for match, _, is_right, right_words in decided_words(story, ending):
        if not is_right:
            if match[0][0].isupper():
                right_words = {word[0].upper() + word[1:] for word in right_words}
            return match.start(), match[0], right_words


@torch.inference_mode()
def autopsy(model, tokenizer, story, ending):
    """What happened at the first wrong word of an ending -> text."""
    position, wrong, right = first_wrong_word(story, ending)
    before = f"{split_story(story)[0]}\n\n{ending[:position]}"
    ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(before.rstrip(" "))]
    ids = ids[-model.config.block_size:]
    idx = torch.tensor([ids], device=model.token_embedding.weight.device)       # (1, T)
    p = model(idx)[0][0, -1].float().softmax(0)                                 # (V,)
    text = textwrap.fill(f"{before}[{wrong}]", 96) + "\n"
    space = " " if before[-1] == " " else ""                        # belongs to the next token
    for word in (wrong, *sorted(right)):
        token = tokenizer.encode_ordinary(space + word)[0]
        text += f"{'wrong' if word == wrong else 'right'}: {word}, probability {p[token]:.1%}\n"
    text += "Where each head (layer.head) looked most:\n"
    for layer, weights in enumerate(attention_weights(model, idx)):
        for head, row in enumerate(weights[:, -1]):                             # (T,)
            text += f"    {layer}.{head}:"
            for i in row.argsort().flip(0)[:4]:
                text += f" {tokenizer.decode([ids[i]])!r} {row[i]:.0%}"
            text += "\n"
    return common.printable(text)


def main(argv=None):
    parser = common.command_parser(__doc__)
    parser.add_argument("run", help="a run's folder, or a checkpoint file, trained on the sample")
    parser.add_argument("-n", type=int, default=200, help="stories (default 200)")
    parser.add_argument("--autopsy", action="store_true", help="explain the first wrong endings")
    sample.add_sampling_options(parser, temperature=1.0)
    args = sample.parse_args(parser, argv)
    if args.n < 1:
        parser.error("-n must be at least 1")
    model, tokenizer, meta = sample.load_run(args.run, args.device, without=args.without)
    if meta.get("dataset") not in prepare.SAMPLES:
        raise SystemExit(f"{args.run} was not trained on {' or '.join(prepare.SAMPLES)}. "
                         "Train such a model: python train.py config/demo.py")
    stories = held_out_for_run(meta, args.n)
    if meta.get("instruct"):
        used = required_words(model, tokenizer, stories, args.seed, args.temperature)
        print(f"{np.mean(sum(used, [])):.0%} of the required words are in their stories; "
              f"{np.mean([all(row) for row in used]):.0%} of {len(used)} stories have all of them.")
        return
    endings = generate_endings(model, tokenizer, stories, args.seed, args.temperature)
    if args.autopsy:
        wrong = [pair for pair in zip(stories, endings) if first_wrong_word(*pair)]
        print(f"{len(wrong)} of {args.n} endings have a wrong name, thing or pronoun.\n")
        for story, ending in wrong[:3]:
            print(autopsy(model, tokenizer, story, ending))
        return
    rows = {}
    for check, (rate, error) in check_endings(stories, endings).items():
        rows[check] = {"right, %": f"{rate:.1f}", "standard error": f"{error:.1f}",
                       "right means": CHECKS[check]}
    print(f"{args.n} sampled endings\n\n{common.format_table(rows)}")
    rows = {}
    for kind, (n, correct, p, error) in score_pairs(model, tokenizer, stories).items():
        rows[kind] = {"pairs": n, "right word most likely, %": f"{correct:.1f}",
                      "probability, %": f"{p:.2f}", "standard error": f"{error:.2f}"}
    print(f"\nMinimal pairs in {args.n} true endings: the right word against the others of its list"
          f"\n\n{common.format_table(rows)}")


if __name__ == "__main__":
    main()
