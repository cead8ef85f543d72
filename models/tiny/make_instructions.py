#!/usr/bin/env python3
"""Writes instructions.jsonl (training) and heldout.jsonl (20 rows) beside this file.

    python3 models/tiny/make_instructions.py

Rows {"instruction", "input"?, "output"} ask for facts of world.py. A held-out row asks for a fact
that no training row asks for in any wording; of opposites, the reverse pair is left out too. Every
held-out answer about a person or a river also answers training rows about others, so
neither the entity, nor the attribute, nor the answer is new, only their combination: it has to come
from the pretraining text.
"""
import json
import os

from world import INPUT_ORDERS, ORDERS, QUESTIONS, Random, all_facts, answer, ask

HERE = os.path.dirname(os.path.abspath(__file__))
HELD_OUT = {"home": 2, "colour": 2, "food": 2, "job": 2, "pet": 2, "instrument": 2, "craft": 1,
            "river": 1, "sound": 1, "young": 1, "opposite": 2, "plural": 1, "next_month": 1}
ASKED = 85       # percent of the remaining facts that training rows ask for
TWICE = 80       # percent of those that are asked for in a second wording
WITH_INPUT = 15  # percent of the rows that give the entity as "input"


def row(random, fact):
    kind, entity, value = fact
    if random.chance(WITH_INPUT):
        return {"instruction": INPUT_ORDERS[kind], "input": entity, "output": answer(value)}
    asked = ask(random.pick(QUESTIONS[kind] + ORDERS[kind]), entity)
    return {"instruction": asked, "output": answer(value)}


def choose():
    """(training facts, held-out facts)."""
    random, facts = Random(7), all_facts()
    held_out = []
    for kind, count in HELD_OUT.items():
        distinct = {}  # by answer, so that somebody else with the same answer remains
        for fact in random.shuffled([fact for fact in facts if fact[0] == kind]):
            distinct.setdefault(fact[2], fact)
        held_out += list(distinct.values())[:count]
    never = {fact[:2] for fact in held_out}
    never |= {(kind, value) for kind, _, value in held_out if kind == "opposite"}
    wanted = {(kind, value) for kind, _, value in held_out}
    training = [fact for fact in facts if fact[:2] not in never and
                (random.chance(ASKED) or (fact[0], fact[2]) in wanted)]
    return training, held_out


def write(name, rows):
    with open(os.path.join(HERE, name), "w", encoding="ascii") as file:
        for one in rows:
            file.write(json.dumps(one) + "\n")


def main():
    training, held_out = choose()
    asked = {fact[:2] for fact in training}
    answers = {(kind, value) for kind, _, value in training}
    assert not asked & {fact[:2] for fact in held_out}
    for kind, entity, value in held_out:
        if kind in ("home", "colour", "food", "job", "pet", "instrument", "river"):
            assert (kind, value) in answers, (kind, entity, value)
    random, rows = Random(8), []
    for fact in training:
        rows.append(row(random, fact))
        if random.chance(TWICE):
            again = row(random, fact)
            if again not in rows:
                rows.append(again)
    write("instructions.jsonl", random.shuffled(rows))
    write("heldout.jsonl", [row(random, fact) for fact in random.shuffled(held_out)])


if __name__ == "__main__":
    main()
