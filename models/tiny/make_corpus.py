#!/usr/bin/env python3
"""Writes the text that the embedded model is pretrained on: JSON lines {"text": ...}.

    python3 models/tiny/make_corpus.py --out corpus.jsonl [--documents 40000] [--seed 1]

Standard library only; the same bytes from every Python 3. Every fact of world.py appears in every
one of its wordings, with the entity first and the value first, alone, in portraits, lists, stories
and conversations: a model that has seen one wording only can continue that wording but not answer a
question (Allen-Zhu and Li, "Physics of Language Models 3.1"). Nothing here has the form
of an instruction row. Documents are short, 10 to 120 tokens of train_bpe.py's tokenizer.
"""
import argparse
import json

from world import (INPUT_ORDERS, ORDERS, PEOPLE, PERSON_VALUES, QUESTIONS, STATEMENTS, WOMEN,
                   Random, all_facts, ask, capital, state)

# Everyday sentences around the facts. The words of the usual instruction prompt occur here in
# ordinary use, so that their embeddings are trained.
SCENES = [
    "The teacher writes a task on the board below the window.",
    "{a} reads the instruction twice and then completes the task.",
    "{a} writes a letter with a request, and {b} writes a response.",
    "A picture is paired with a word, and the word describes the picture.",
    "The book provides further context that helps {a}.",
    "{a} appropriately thanks {b} for the response.",
    "The answer to the request is input for the next lesson.",
    "{a} gives {b} a name for the new boat.",
    "Tell me a story, says {a} to this person.",
    "Nobody can name this animal, this town or this river.",
    "{a} walks to the market and meets {b}.", "The sun is shining and the air is warm.",
    "In the evening {a} and {b} sit by the fire.", "{a} and {b} laugh and go home.",
    "It rains all day, so {a} stays inside.", "They talk about their friends for an hour.",
    "The road is long but {a} is not tired.", "{b} waits at the bridge with a lamp.",
    "Then {a} sees a bird in the old tree.", "At night the town is quiet.",
]
OPENINGS = ["One morning {a} visits {b}.", "{a} and {b} are good friends.",
            "Last week {a} went to see {b}.", "This is a story about {a} and {b}.",
            "Once {a} met {b} on the road."]
# Questions and answers; in some a sentence stands between, so that the answer must look back.
ASKS = ['{a} asked, "{q}" "{v}," said {b}.', '"{q}" asked {a}. "{v}," answered {b}.',
        '{a} wants to know: "{q}" {scene} {b} says: "{v}."', '"{q}" "{v}. {s}"', '"{q}" "{v}."',
        '"{q}" {scene} "{v}."', '{b} hears the question: "{q}" {scene} Then {b} answers: "{v}."']
# The same with the entity after the question.
CARDS = ['{a} asked, "{q}" and showed a card: {x}. "{v}," said {b}.',
         '"{q}" "Which one?" "{x}." "{v}."', '{a} asks: "{q}" {scene} The card says {x}. "{v}."']
# Who asks and answers. Mostly nobody with a name: a model of this size learns to look up the person
# in a question much later when other people's names stand around it.
SPEAKERS = ["the teacher", "a child", "an old man", "somebody", "a friend", "the guest"]


class Writer:
    """Makes documents from the facts; walks through the facts in shuffled rounds, so that all are
    stated equally often."""

    def __init__(self, seed):
        self.random = Random(seed)
        self.facts = all_facts()
        self.of_person = {person: [] for person in PEOPLE}
        for fact in self.facts:
            if fact[0] in PERSON_VALUES:
                self.of_person[fact[1]].append(fact)
        self.rest = [fact for fact in self.facts if fact[0] not in PERSON_VALUES]
        self.queues = {}

    def draw(self, name, items):
        """The next of `items` in this round's order."""
        queue = self.queues.setdefault(name, [])
        if not queue:
            queue += self.random.shuffled(items)
        return queue.pop()

    def few(self):
        """1, 2 or 3, the small ones more often."""
        return 1 + self.random.below(2) * self.random.below(3)

    def people(self):
        names = PEOPLE if self.random.chance(20) else SPEAKERS
        a = self.random.pick(names)
        return {"a": a, "b": self.random.pick([name for name in names if name != a])}

    def statement(self, fact):
        kind, entity, value = fact
        return state(self.random.pick(STATEMENTS[kind]), entity, value)

    def question(self, fact):
        kind, entity, value = fact
        names = self.people()
        words = {"v": capital(value), "x": capital(entity), "s": self.statement(fact),
                 "scene": capital(self.random.pick(SCENES).format(**names)), **names}
        if self.random.chance(20):
            return capital(self.random.pick(CARDS).format(q=INPUT_ORDERS[kind], **words))
        asked = ask(self.random.pick(QUESTIONS[kind] + ORDERS[kind][:1]), entity)
        return capital(self.random.pick(ASKS).format(q=asked, **words))

    def portrait(self):
        """One person's facts in random order, by name or pronoun."""
        person = self.draw("portrait", PEOPLE)
        pronoun = "She" if person in WOMEN else "He"
        sentences = []
        for kind, entity, value in self.random.shuffled(self.of_person[person]):
            template = self.random.pick(STATEMENTS[kind])
            if sentences and template.startswith("{x} ") and self.random.chance(40):
                entity = pronoun
            sentences.append(state(template, entity, value))
        return sentences

    def gossip(self):
        """Single statements about different people, towns, animals and words."""
        everyone = [fact for person in PEOPLE for fact in self.of_person[person]]
        return ([self.statement(self.draw("people", everyone)) for _ in range(self.few())] +
                [self.statement(self.draw("rest", self.rest)) for _ in range(self.few())])

    def lesson(self):
        """Several facts of one kind."""
        kind = self.draw("lesson", list(STATEMENTS))
        own = [fact for fact in self.facts if fact[0] == kind]
        template = self.random.pick(STATEMENTS[kind])
        same = self.random.chance(50)
        facts = [self.draw("lesson " + kind, own) for _ in range(1 + self.few())]
        return [state(template, entity, value) if same else self.statement((kind, entity, value))
                for kind, entity, value in facts]

    def conversation(self):
        return [self.question(self.draw("conversation", self.facts)) for _ in range(self.few())]

    def story(self):
        a = self.random.pick(PEOPLE)
        names = {"a": a, "b": self.random.pick([person for person in PEOPLE if person != a])}
        sentences = [self.random.pick(OPENINGS).format(**names)]
        known = self.random.shuffled(self.of_person[names["a"]] + self.of_person[names["b"]])
        for fact in known[:3]:
            sentences.append(self.statement(fact))
            if self.random.chance(50):
                sentences.append(capital(self.random.pick(SCENES).format(**names)))
        return sentences + [capital(self.random.pick(SCENES).format(**names))]

    def document(self):
        shapes = [self.portrait, self.story] + 3 * [self.gossip] + 2 * [self.lesson]
        return " ".join(self.random.pick(shapes + 7 * [self.conversation])())


def documents(count, seed):
    writer = Writer(seed)
    return [writer.document() for _ in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with open(arguments.out, "w", encoding="ascii") as file:
        for text in documents(arguments.documents, arguments.seed):
            file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main()
