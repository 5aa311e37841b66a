"""What is a story made of?

    rules, plots = read_grammar()  # data/grammar.txt explains its format
    print(Story(rules, plots, random.Random(0)).text)
"""

import itertools
import math
import re
from pathlib import Path

GRAMMAR = Path(__file__).resolve().with_name("grammar.txt")
SAMPLE_STORIES = {"val": 1_000, "train": 30_000}
FIELDS = ("Features", "Words", "Summary", "Random sentence")
FIELD_ORDERS = [order for n in range(1, 5) for order in itertools.permutations(FIELDS, n)]


def read_grammar(path=GRAMMAR):
    """Read a grammar file -> rules {name: (is_variable, entries)}, plots [{"name", "words",
    "summary", "scenes": lists of options}]. An entry is {form: text}; form "" is its own text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise SystemExit(f"Cannot read {path} as UTF-8 text: {error}")
    text = re.sub(r"(?m)^#.*\n?", "", text)
    text = re.sub(r"\n[ \t]+(?=\S)", " ", text)  # an indented line continues the one before
    rule, header = r"(?m)^(\w+)(?: \((.*?)\))? ([=:]) (.*)", r"(?m)^(words|summary) (.*)"
    rules, plots = {}, []
    for name, shared, kind, options in re.findall(rule, text):
        entries = []
        for option in options.split(" | "):
            option, forms = re.fullmatch(r"(.*?)(?: \((.*=.*)\))?", option.strip()).groups("")
            if not option or option != option.strip("|") or option.count("{") != option.count("}"):
                raise SystemExit(f"{path}: {name!r} has an empty option, or spaces in {{a|b}}.")
            forms = re.findall(r"(\w+)=([^,]*)", f"{shared}, {forms}")
            entries.append({**dict(forms), "": option})
        rules[name] = kind == "=", entries
    leftover, *texts = re.split(r"(?m)^plot ", re.sub(rule, "", text))
    if leftover := leftover.strip():
        raise SystemExit(f"{path}: neither a rule nor part of a plot: {leftover[:60]!r}")
    if not texts:
        raise SystemExit(f"{path} has no plot.")
    for text in texts:
        name, _, text = text.partition("\n")
        scenes = re.split(r"\n\s*\n", re.sub(header, "", text).strip())
        plots.append({"name": name, **dict(re.findall(header, text)),
                      "scenes": [scene.split("\n") for scene in scenes if scene]})
        for key in ("words", "summary", "scenes"):
            if not plots[-1].get(key):
                raise SystemExit(f"{path}: the plot {name} has no {key}.")
    return rules, plots


class Story:
    """One story, made by random choices: .text, .plot, .features, .bindings {variable: forms} and
    .nats, the sum of log n over all choices among n options. Other choices may give the same text:
    so it is an upper bound of -log p(text)."""

    def __init__(self, rules, plots, rng, replay=()):  # replay: indices of the first choices
        self.rules, self.plots, self.rng, self.replay = rules, plots, rng, iter(replay)
        self.nats, self.bindings, self.choices = 0.0, {}, []
        self.plot = self.choose(plots)
        text = "\n\n".join(self.expand(self.choose(scene)) for scene in self.plot["scenes"])
        self.features = {*re.findall(r"\[(\w+)\]", text), *(["Dialogue"] if '"' in text else [])}
        self.text = re.sub(r" ?\[\w+\]", "", text)
        self.n_choices = len(self.choices)  # of the text; record() makes more

    def choose(self, options):
        number = next(self.replay, None)  # may come from a longer list
        option = self.rng.choice(options) if number is None else options[number % len(options)]
        self.nats += math.log(len(options))
        self.choices.append((options.index(option), len(options)))
        return option

    def expand(self, template):
        """Fill every {...} of a template, and write "an" before vowels."""
        where = f"The grammar's plot {self.plot['name']!r}"
        try:
            text = re.sub(r"\{([^{}]*)\}", lambda match: self.fill(match[1]), template)
        except KeyError as error:
            raise SystemExit(f"{where}: no rule or form {error} ({template!r}).")
        except RecursionError:
            raise SystemExit(f"{where}: two rules name each other, or a list is too short.")
        if re.search("[{}]", text):
            raise SystemExit(f"{where}: one of {{ and }} is missing ({template!r}).")
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def fill(self, inside):
        if "|" in inside:                      # {red|blue}: one of these
            return self.choose(inside.split("|"))
        name, _, form = inside.partition(".")  # {toy}, {Toy}, {hero.he}, {hero.He}
        capital = (form or name)[:1].isupper()
        name, form = name[:1].lower() + name[1:], form.lower()
        forms = self.bindings.get(name) or self.draw_entry(name)
        if self.rules[name][0] and name not in self.bindings:
            if forms[""] in [other[""] for other in self.bindings.values()]:
                return self.fill(inside)       # again: all variables differ
            self.bindings[name] = forms
        return forms[form][:1].upper() + forms[form][1:] if capital else forms[form]

    def draw_entry(self, name):
        """Draw an entry of a rule -> {form: text}."""
        entry = self.choose(self.rules[name][1])
        if inner := re.fullmatch(r"\{(\w+)\}", entry[""]):  # a list of lists: the inner forms
            forms = self.draw_entry(inner[1])
            return {**forms, **entry, "": forms[""]}
        text = self.expand(entry[""])
        return {**{end: text + end for end in ("s", "ed", "ing")}, **entry, "": text}

    def record(self):
        """The story as a record of TinyStories-Instruct."""
        return format_record(self.text, self.choose, {
            "Features": ", ".join(sorted(self.features)), "Words": self.expand(self.plot["words"]),
            "Summary": self.expand(self.plot["summary"])})


def split_sentences(text):
    """A sentence ends with . ! or ? and perhaps a quote; the next does not begin in lower case."""
    return re.split(r'(?:(?<=[.!?])|(?<=[.!?]["”]))\s+(?![a-z])', text.strip())


def format_instructions(values):
    """The request for a story in the layout of TinyStories-Instruct. values: {field: text}."""
    return "\n".join([*(f"{field}: {text}" for field, text in values.items()), "Story:"])


def format_record(text, choose, values):
    """A record of TinyStories-Instruct: some fields in random order, then the story. choose: picks
    from a list; values: {field: text or ""}, without the random sentence."""
    sentences = [sentence for sentence in split_sentences(text)[1:] if "\n" not in sentence
                 and len(re.findall('["“”]', sentence)) % 2 == 0]  # quotes are closed
    values = {**values, "Random sentence": choose(sentences or [""])}
    order = choose([order for order in FIELD_ORDERS if all(map(values.get, order))])
    return f"{format_instructions({field: values[field] for field in order})} \n\n{text}"
