"""What does our own grammar say about the words of a story?

Used by study/consistency.py and study/explore.py. If the first scene says that Mia lost a red kite,
then the ending can only name Mia, red and kite, and say "she" while no boy is there.
"""

import math
import os
import random
import re

from data.grammar import SAMPLE_STORIES, Story, read_grammar

OTHER_GENDER = {"he": {"she"}, "him": {"her"}, "his": {"her"}, "himself": {"herself"},
                "she": {"he"}, "her": {"him", "his"}, "herself": {"himself"}}


def held_out_stories(n):
    """The first n stories of the grammar after those of the sample."""
    rules, plots = read_grammar()
    first = sum(SAMPLE_STORIES.values())
    return [Story(rules, plots, random.Random(f"0-{first + i}")) for i in range(n)]


def split_story(story):
    """The first scene of a story, and its true ending."""
    return story.text.split("\n\n", 1)


def list_entries(rules, variable):
    """All texts that a variable may hold, including those of nested lists."""
    texts = set()
    for entry in rules[variable][1]:
        nested = entry[""][0] == "{"
        texts |= list_entries(rules, entry[""][1:-1]) if nested else {entry[""]}
    return texts


def named_variables(rules, text):
    """The variables that a text of the grammar names, itself or through other rules. {hero.he} does
    not name the hero."""
    found = set()
    for name in re.findall(r"\{(\w+)(?:\.s)?\}", text):
        name = name[0].lower() + name[1:]
        is_variable, entries = rules[name]
        if is_variable:
            found.add(name)
        else:
            found |= named_variables(rules, " ".join(entry[""] for entry in entries))
    return found


def always_named(rules, scene):
    """The variables that every option of a scene names."""
    return set.intersection(*(named_variables(rules, option) for option in scene))


def kind_of(name, forms):
    if name in ("hero", "friend", "color"):
        return name
    return "other people" if "he" in forms else "thing"


def required_texts(story):
    """What the first scene names and the ending must name again -> list of (kind, text)."""
    first, *scenes = [always_named(story.rules, scene) for scene in story.plot["scenes"]]
    return [(kind_of(name, story.bindings[name]), story.bindings[name][""])
            for name in first & set.union(*scenes)]


def decided_words(story, ending):
    """Words of an ending that the story has already decided: people, things and colors that every
    option of the first scene names, and pronouns while all people named so far are of one gender
    -> list of (match, kind, right, others), in order. others: words of the same list, all wrong
    here; or, if the word itself is wrong (right is False), what would have been right."""
    rules, scenes = story.rules, story.plot["scenes"]
    known = always_named(rules, scenes[0])
    plot = " ".join(option for scene in scenes for option in scene)
    variables = named_variables(rules, plot)
    fixed = {*re.findall(r"\w+", re.sub(r"\{[\w.]+\}", "", plot))}     # words of its own
    bound = {name: forms[""] for name, forms in story.bindings.items()}
    found = []
    for name in known:
        kind = kind_of(name, story.bindings[name])
        entries = list_entries(rules, name)
        if entries <= fixed:                        # all are words of the plot
            continue
        places = sum(bool(entries & list_entries(rules, other)) for other in variables)
        seen = {bound[other] for other in known} & entries
        for match in re.finditer(rf"\b({'|'.join(sorted(entries - fixed))})(?:s|es)?\b", ending):
            word, all_named = match[1], len(seen) >= places
            if all_named and word == bound[name]:
                found.append((match, kind, True, entries - fixed - {*bound.values()}))
            elif all_named and word not in seen:        # the plot has no place for another one
                found.append((match, kind, False, {bound[name]}))
            else:
                seen.add(word)

    gender = {forms[""]: forms["he"] for _, entries in rules.values() for forms in entries
              if "he" in forms}
    genders = {gender.get(word) for word in re.findall(r"\w+", split_story(story)[0])} - {None}
    for match in re.finditer(r"\w+", ending):
        word = match[0].lower()
        if match[0] in gender:
            genders.add(gender[match[0]])
        elif len(genders) == 1 and word in OTHER_GENDER:
            right = (word in ("he", "him", "his", "himself")) == ("he" in genders)
            found.append((match, "pronoun", right, OTHER_GENDER[word]))
    return sorted(found, key=lambda item: item[0].start())


def revealed_nats(story):
    """Where the text reveals its choices -> [(position, nats)]; the sum is story.nats.

    For each choice, the story is generated with every other option. Where m options that fit
    the text become k, it reveals log(m / k) nats: a hero's name at the name, not at "girl",
    where it was drawn. What is never revealed counts at the end."""
    numbers, found = [number for number, _ in story.choices], []
    for i, (number, m) in enumerate(story.choices[:story.n_choices]):
        ends = []
        for other in set(range(m)) - {number}:
            replay = [*numbers[:i], other, *numbers[i + 1:]]
            text = Story(story.rules, story.plots, random.Random(0), replay).text
            ends.append(len(os.path.commonprefix([story.text, text])))
        for position in sorted(ends):               # one more option no longer fits
            found.append((position, math.log(m / (m - 1))))
            m -= 1
    return sorted(found)
