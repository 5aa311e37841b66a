"""Are a model's stories right? For stories that our own grammar tells, no judge is needed.

    python -m study.checks out/demo             # seconds
    python -m study.checks out/demo_instruct    # are the words there that it was asked for?

The grammar tells stories that are not in the sample (prepare.py); the model gets the first scene of
each and ends it. What must be true of the ending can then be read off the plot, exactly: the true
endings pass each of the five checks. For each check the command shows an ending that does not.
"""

import argparse
import random
import re

import grade
import prepare
import sample

LONGEST = 200           # tokens of an ending; the true ones have 170 at most


def held_out(n):
    """The first n stories after those of the sample, as the grammar tells them."""
    rules, plots = prepare.read_grammar(prepare.HERE / "data" / "grammar.txt")
    first = sum(prepare.SAMPLE_STORIES.values())
    return [prepare.Story(rules, plots, random.Random(f"0-{first + i}")) for i in range(n)]


def cut(story):
    """The first scene of a story, and its true ending."""
    return story.text.split("\n\n", 1)


# --------------------------------------------------------------------------- what a plot prescribes

def entries(rules, name):
    """All that a variable may hold; a list of lists holds what they hold."""
    ways = [entry[""] for entry in rules[name][1]]
    return set().union(*(entries(rules, way[1:-1]) if way[0] == "{" else {way} for way in ways))


def named(rules, text, join):
    """The variables that a piece of a plot names. Where a rule has several ways to say a thing:
    those that all of them name (join: set.intersection), or that any names (set.union)."""
    found = set()
    for name, form in re.findall(r"\{(\w+)(?:\.(\w+))?\}", text):
        name = name[0].lower() + name[1:]
        variable, ways = rules[name]
        if not variable:
            found |= join(*(named(rules, way[""], join) for way in ways))
        elif form in ("", "s"):                         # {hero.he} does not name the hero
            found.add(name)
    return found


def has(text, entry):
    return re.search(rf"\b{entry}(?:s|es)?\b", text)


def keeps(story, ending, people):
    """Does an ending name again what the first scene has named (people, or things) and what each
    way to tell the plot names later, too? And does it name no more entries of the same list than
    the plot has variables for, so that none stands in the place of another? None: there is nothing
    of that kind to name."""
    rules, scenes, (first, _) = story.rules, story.plot["scenes"], cut(story)
    whole = " ".join(way for scene in scenes for way in scene)
    may, must = named(rules, whole, set.union), set()
    for scene in scenes[1:]:
        must |= set.intersection(*(named(rules, way, set.intersection) for way in scene))
    asked = {name: story.held[name][""] for name in must
             if ("he" in story.held[name]) == people and has(first, story.held[name][""])}
    own = re.sub(r"\{[\w.]+\}", "", whole)              # what the plot says in words of its own
    own += " ".join(text for name in may for entry in rules[name][1]
                    for form, text in entry.items() if form)
    for name, text in asked.items():
        others = entries(rules, name)
        places = sum(bool(others & entries(rules, each)) for each in may)
        there = {entry for entry in others - {*re.findall(r"\w+", own)} if has(ending, entry)}
        if not has(ending, text) or len(there | {text}) > places:
            return False
    return True if asked else None


def as_pattern(way):
    """A way to tell a scene -> a regular expression: its words, and anything for what is chosen."""
    pieces = re.split(r"\{[^{}]*\}", re.sub(r" ?\[\w+\]", "", way))
    pieces = [re.sub(r"\b([Aa])\\ $", r"\1n?\\ ", re.escape(piece)) for piece in pieces]
    return '[^.!?"]+?'.join(pieces)


# ------------------------------------------------------------------------------------- the checks
# Each takes a story of the grammar and an ending of it -> right or wrong; None: nothing to check.

def grammar(story, ending):
    """"an" before a vowel and "a" elsewhere, no word twice, a capital after a full stop, each
    paragraph closes its quotes and ends with a full stop."""
    return not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(?!had\b)(\w+) \1\b|[.!?] \"?[a-z]",
                         ending) and all(
        re.search(r"[.!?]\"?$", part) and part.count('"') % 2 == 0 for part in ending.split("\n\n"))


def pronoun(story, ending):
    """As long as those who have been named are all girls or all boys, he, she, him, her ... are of
    their kind."""
    people, speaks = {}, {}                             # {"Tom": "he"}, {"his": "he"}
    for _, ways in story.rules.values():
        for forms in ways:
            if "he" in forms:
                people[forms[""]] = forms["he"]
                speaks |= {forms[word]: forms["he"] for word in {"he", "him", "his", "himself"}
                           & {*forms}}
    seen, fits = {people[word] for word in re.findall(r"\w+", cut(story)[0]) if word in people}, []
    for word in re.findall(r"\w+", ending):
        if word in people:
            seen.add(people[word])
        elif len(seen) == 1 and word.lower() in speaks:
            fits.append(speaks[word.lower()] in seen)
    return all(fits) if fits else None


def name(story, ending):
    """Those whom the first scene names are still called so, and nobody is there for whom the plot
    has no part."""
    return keeps(story, ending, people=True)


def thing(story, ending):
    """The toy, its color, the pet ... of the first scene are named again, and no other toy, color,
    pet ... is in their place."""
    return keeps(story, ending, people=False)


def plot(story, ending):
    """It goes on through the scenes of this plot, each told in one of its ways, to the last."""
    parts, scenes = ending.split("\n\n"), story.plot["scenes"][1:]
    return len(parts) == len(scenes) and all(
        any(re.fullmatch(as_pattern(way), part) for way in scene)
        for part, scene in zip(parts, scenes))


CHECKS = {check.__name__: check for check in (grammar, pronoun, name, thing, plot)}


EXPLAINED = "\n".join(f"* {name}, % of endings: {' '.join(check.__doc__.split())}"
                      for name, check in CHECKS.items())


# -------------------------------------------------------------------------------------- the pupil

def endings(model, tokenizer, stories, seed=0, temperature=1.0):
    """Let a model end stories after their first scenes, all at once -> list of str."""
    told = sample.tell(model, tokenizer, [cut(story)[0] for story in stories],
                       max_new_tokens=LONGEST, temperature=temperature, seed=seed)
    return [ending.strip() for ending in told]


def share(stories, told):
    """{check: the share of endings that pass it, of those that have something to check}."""
    passed = {}
    for name, check in CHECKS.items():
        marks = [mark for mark in map(check, stories, told) if mark is not None]
        passed[name] = sum(marks) / max(len(marks), 1)
    return passed


def check_run(model, tokenizer, n):
    """Check a model of the sample's stories on n that it has not seen -> {check: share}. With 200
    stories a share is known to 7 points at worst (95 %)."""
    return share(held_out(n), endings(model, tokenizer, held_out(n)))


def obeys(model, tokenizer, n, seed=0, temperature=1.0):
    """Let a model of sample-instruct tell n held-out records -> {what was asked for: a list of
    whether it stands in the story that was asked for it}."""
    heads = [story.record().partition(" \n\n")[0] for story in held_out(n)]
    told = sample.tell(model, tokenizer, heads, max_new_tokens=2 * LONGEST,
                       temperature=temperature, seed=seed)
    found = {}
    for head, story in zip(heads, told):
        asked = dict(re.findall("(?m)^(.*?): (.*)$", head))
        for what, marks in grade.obeyed(asked, story).items():
            found.setdefault(what, []).extend(marks)
            if what == "required words" and marks:
                found.setdefault("stories with all their words", []).append(all(marks))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or a checkpoint file, trained on the sample")
    parser.add_argument("-n", type=int, default=200, help="stories (default 200)")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.n < 1 or args.temperature < 0:
        parser.error("-n must be 1 or more, and --temperature not negative")
    prepare.command(study, args)


def study(args):
    dataset = grade.read_meta(sample.find_run(args.run).parent).get("dataset", "")
    if dataset.startswith("sample-instruct"):
        for what, marks in obeys(*sample.load_run(args.run), args.n, args.seed,
                                 args.temperature).items():
            print(f"{what}: {sum(marks) / max(len(marks), 1):.0%} of {len(marks)}")
        return
    if dataset != "sample":
        raise SystemExit(f"{args.run} has learned from {dataset or 'unknown stories'}; only those "
                         "of our own grammar (sample, sample-instruct) can be checked.")
    stories = held_out(args.n)
    told = endings(*sample.load_run(args.run), stories, args.seed, args.temperature)
    for check, passed in share(stories, told).items():
        print(f"\n{check}: {passed:.0%}   {' '.join(CHECKS[check].__doc__.split())}")
        wrong = [pair for pair in zip(stories, told) if CHECKS[check](*pair) is False]
        for story, ending in wrong[:1]:
            print("    " + f"{cut(story)[0]} *** {ending}".replace("\n\n", "\n    "))


if __name__ == "__main__":
    main()
