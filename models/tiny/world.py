"""The small invented world that the embedded model knows: who lives where, what a cow says.

A fact is (kind, entity, value): ("home", "Ada", "Harwick"). make_corpus.py states every fact in
many ways; make_instructions.py asks for some of them. All choices come from Random below, so the
same files come out of every Python 3.
"""

import re

MASK = (1 << 64) - 1


class Random:
    """splitmix64 (Steele, Lea, Flood 2014). Python's own random does not promise its sequence."""

    def __init__(self, seed):
        self.state = seed & MASK

    def below(self, count):
        """An integer in [0, count); the modulo bias below 2^-50 does not matter here."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return (z ^ (z >> 31)) % count

    def chance(self, percent):
        return self.below(100) < percent

    def pick(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items):
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items


WOMEN = "Ada Bella Clara Dora Greta Hanna Iris Julia Lena Mira Nora Olga".split()
MEN = "Adam Boris Carl David Emil Felix Hugo Ivan Kurt Leo Max Oscar".split()
PEOPLE = WOMEN + MEN

TOWNS = ("Arden Birkby Colwick Dunmore Eastry Fernhill Glenby Harwick Kirkdale Millport Northam "
         "Oakford").split()

# Values of the people's attributes: twelve each, so that every value belongs to two people.
PERSON_VALUES = {
    "home": TOWNS,
    "colour": "red blue green yellow white black brown pink purple grey gold silver".split(),
    "food": "bread soup cheese rice fish pasta honey apples cake beans eggs plums".split(),
    "job": "baker farmer teacher doctor painter sailor miller carpenter tailor singer gardener "
           "weaver".split(),
    "pet": "cat dog rabbit parrot goat hen duck turtle pony mouse hamster goose".split(),
    "instrument": "piano flute drum harp violin trumpet guitar cello horn lute organ "
                  "banjo".split(),
}
TOWN_VALUES = {
    "craft": "clocks boats lamps carpets shoes ropes kites bells candles baskets gloves "
             "hats".split(),
    "river": "Alder Bourne Calder Derwent Esk Foss".split() * 2,
}

SOUNDS = ("dog barks, cat meows, cow moos, sheep bleats, horse neighs, duck quacks, hen clucks, "
          "pig grunts, frog croaks, lion roars, bee buzzes, owl hoots")
BABIES = ("dog puppy, cat kitten, cow calf, sheep lamb, horse foal, duck duckling, hen chick, "
          "pig piglet, frog tadpole, lion cub, goat kid, rabbit bunny")
OPPOSITES = ("hot cold, big small, fast slow, happy sad, light dark, open closed, full empty, "
             "wet dry, high low, early late, rich poor, strong weak, loud quiet, hard soft, "
             "near far, clean dirty")
PLURALS = ("cat cats, house houses, box boxes, child children, mouse mice, foot feet, tooth teeth, "
           "man men, leaf leaves, knife knives, city cities, tree trees")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = ("January February March April May June July August September October November "
          "December").split()


def pairs(text):
    return [tuple(item.split()) for item in text.split(", ")]


def all_facts():
    """Every fact, in a fixed order; (kind, entity) is unique."""
    random, facts = Random(2024), []
    for kind, values in PERSON_VALUES.items():
        facts += [(kind, person, value)
                  for person, value in zip(PEOPLE, random.shuffled(values * 2))]
    for kind, values in TOWN_VALUES.items():
        facts += [(kind, town, value) for town, value in zip(TOWNS, random.shuffled(values))]
    facts += [("sound", animal, sound) for animal, sound in pairs(SOUNDS)]
    facts += [("young", animal, young) for animal, young in pairs(BABIES)]
    for one, other in pairs(OPPOSITES):
        facts += [("opposite", one, other), ("opposite", other, one)]
    facts += [("plural", one, many) for one, many in pairs(PLURALS)]
    for kind, names in (("next_day", DAYS), ("next_month", MONTHS)):
        facts += [(kind, name, names[(i + 1) % len(names)]) for i, name in enumerate(names)]
    return facts


# How a fact is stated. {x} is the entity, {v} the value; both orders occur for every kind.
STATEMENTS = {
    "home": ["{x} lives in {v}.", "{x} has a house in {v}.", "{x} comes from the town of {v}.",
             "{v} is the town where {x} lives.", "The home of {x} is in {v}.",
             "In {v} you can meet {x}."],
    "colour": ["{x} likes the colour {v}.", "{x} paints every door {v}.",
               "{x} always wears a {v} coat.", "The favourite colour of {x} is {v}.",
               "{v} is the colour that {x} likes best.", "A {v} coat belongs to {x}."],
    "food": ["{x} likes to eat {v}.", "{x} eats {v} every evening.", "{x} asks for {v} at dinner.",
             "The favourite food of {x} is {v}.", "{v} is the food that {x} likes best.",
             "There is always {v} on the table of {x}."],
    "job": ["{x} works as a {v}.", "{x} is a {v}.", "{x} learned the work of a {v}.",
            "The job of {x} is {v}.", "{v} is the job of {x}.",
            "People need a {v}, so they call {x}."],
    "pet": ["{x} has a pet {v}.", "{x} keeps a {v} at home.", "{x} takes good care of a {v}.",
            "The pet of {x} is a {v}.", "A {v} is the pet of {x}.", "The {v} sleeps near {x}."],
    "instrument": ["{x} plays the {v}.", "{x} practises the {v} every day.",
                   "{x} owns an old {v}.", "The instrument of {x} is the {v}.",
                   "The {v} is the instrument that {x} plays.",
                   "Listen to the {v}, it is {x} again."],
    "craft": ["{x} is known for its {v}.", "{x} makes the best {v}.", "{x} sells many {v}.",
              "The town of {x} is famous for {v}.", "Good {v} come from {x}.",
              "{v} are made in {x}."],
    "river": ["{x} lies on the river {v}.", "{x} has a bridge over the river {v}.",
              "The town of {x} stands by the river {v}.", "The river of {x} is the {v}.",
              "The river {v} flows through {x}.", "On the river {v} you can sail to {x}."],
    "sound": ["A {x} {v}.", "The {x} {v} in the morning.", "The {x} {v} when it is hungry.",
              "Everybody knows that a {x} {v}.", "If it {v}, it is a {x}.",
              "What {v} there? It is the {x}."],
    "young": ["A young {x} is called a {v}.", "A baby {x} is a {v}.", "The {x} has a little {v}.",
              "The {x} looks for its {v}.", "A {v} is a young {x}.",
              "The {v} grows up and becomes a {x}."],
    "opposite": ["The opposite of {x} is {v}.", "{x} is the opposite of {v}.",
                 "If it is not {x}, it is {v}.", "One says {x} and the other says {v}.",
                 "Not {x} but {v}.", "{x} and {v} are opposites."],
    "plural": ["The plural of {x} is {v}.", "One {x}, two {v}.", "First one {x}, then many {v}.",
               "{v} is the plural of {x}.", "Many {v} came after one {x}.",
               "We say {v} for more than one {x}."],
    "next_day": ["After {x} comes {v}.", "{x} is followed by {v}.", "The day after {x} is {v}.",
                 "{v} comes after {x}.", "{v} is the day after {x}.",
                 "Today is {x}, tomorrow is {v}."],
    "next_month": ["After {x} comes {v}.", "{x} is followed by {v}.",
                   "The month after {x} is {v}.", "{v} comes after {x}.",
                   "{v} is the month after {x}.", "When {x} ends, {v} begins."],
}

# Questions that people ask each other in the corpus; the first of ORDERS occurs there too.
QUESTIONS = {
    "home": ["Where does {x} live?", "In which town does {x} live?"],
    "colour": ["What colour does {x} like?", "What is the favourite colour of {x}?"],
    "food": ["What does {x} like to eat?", "What is the favourite food of {x}?"],
    "job": ["What is the job of {x}?", "What work does {x} do?"],
    "pet": ["What pet does {x} have?", "Which animal does {x} keep?"],
    "instrument": ["What instrument does {x} play?", "Which instrument does {x} practise?"],
    "craft": ["What is {x} known for?", "What is made in {x}?"],
    "river": ["Which river flows through {x}?", "On which river does {x} lie?"],
    "sound": ["What does a {x} do?", "Which sound does a {x} make?"],
    "young": ["What is a young {x} called?", "What is a baby {x}?"],
    "opposite": ["What is the opposite of {x}?", "Which word is the opposite of {x}?"],
    "plural": ["What is the plural of {x}?", "What do we say for more than one {x}?"],
    "next_day": ["Which day comes after {x}?", "What day follows {x}?"],
    "next_month": ["Which month comes after {x}?", "What month follows {x}?"],
}

# Orders; the second of each pair occurs in instruction rows only. Then the wordings for rows whose
# entity is the "input".
ORDERS = {
    "home": ["Name the town where {x} lives.", "Tell me the home town of {x}."],
    "colour": ["Name the favourite colour of {x}.", "Tell me the colour that {x} likes best."],
    "food": ["Name the favourite food of {x}.", "Tell me the food that {x} likes best."],
    "job": ["Name the job of {x}.", "Tell me the work of {x}."],
    "pet": ["Name the pet of {x}.", "Tell me the animal that {x} keeps at home."],
    "instrument": ["Name the instrument of {x}.", "Tell me the instrument that {x} plays."],
    "craft": ["Name the things that are made in {x}.",
              "Tell me what the town of {x} is famous for."],
    "river": ["Name the river of {x}.", "Tell me the river that flows through {x}."],
    "sound": ["Name the sound of a {x}.", "Tell me what a {x} does."],
    "young": ["Name the young of a {x}.", "Tell me what a young {x} is called."],
    "opposite": ["Name the opposite of {x}.", "Tell me the opposite of {x}."],
    "plural": ["Name the plural of {x}.", "Tell me the plural of {x}."],
    "next_day": ["Name the day after {x}.", "Tell me the day after {x}."],
    "next_month": ["Name the month after {x}.", "Tell me the month after {x}."],
}
INPUT_ORDERS = {
    "home": "In which town does this person live?",
    "colour": "Name the favourite colour of this person.",
    "food": "Name the favourite food of this person.",
    "job": "What is the job of this person?",
    "pet": "Name the pet of this person.",
    "instrument": "Which instrument does this person play?",
    "craft": "What is this town known for?",
    "river": "Which river flows through this town?",
    "sound": "What does this animal do?",
    "young": "What is the young of this animal called?",
    "opposite": "Give the opposite of this word.",
    "plural": "Give the plural of this word.",
    "next_day": "Name the day after this day.",
    "next_month": "Name the month after this month.",
}


def capital(text):
    return text[0].upper() + text[1:]


def with_articles(text):
    """"a owl" becomes "an owl"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def state(template, entity, value):
    return capital(with_articles(template.format(x=entity, v=value)))


def ask(template, entity):
    return with_articles(template.format(x=entity))


def answer(value):
    return capital(value) + "."
