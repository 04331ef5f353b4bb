"""The built-in stream: questions about the years of a small generated world, and the text it is pretrained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.api.task import Example, General, Stream, Task, Turn, fingerprint
from holdfast.data.streams.chronicle.relations import (
    AMOUNTS,
    BIRTHPLACE,
    ENDINGS,
    HEAD,
    OFFICE,
    PATTERN,
    REGION,
    RIVER,
    SEAT,
    TITLES,
    TRADE,
    TRADES,
    Attribute,
    Relation,
)
from holdfast.data.streams.draw import Draw
from holdfast.errors import ConfigError

VERSION = "chronicle 1"
YEARS = (2022, 2023, 2024, 2025)
SIZE = 50

LASTING_SHARE = 0.2  # of the facts that are asked about in every year, those that never change
ROUNDS = 16  # times that the general text goes through the world


class Names:
    """Invents names from syllables, never the same one twice."""

    ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr", "st", "tr")
    VOWELS = ("a", "e", "i", "o", "u")
    MIDDLES = ("", "l", "n", "r", "s")

    def __init__(self, draw: Draw):
        self._draw = draw
        self._used: set[str] = set()

    def new(self, kind: str) -> str:
        choice = self._draw.choice
        while True:
            first, second = (choice(self.ONSETS) + choice(self.VOWELS) for _ in range(2))
            name = (first + choice(self.MIDDLES) + second + choice(ENDINGS[kind])).capitalize()
            if name not in self._used:
                self._used.add(name)
                return name


@dataclass(frozen=True)
class LastingFact:
    """An attribute of an entity; ``values`` are all that this attribute takes in the world."""

    attribute: Attribute
    fields: dict[str, str]
    value: str
    values: Sequence[str]


@dataclass(frozen=True)
class Subject:
    """What a year fact is about: the fields of its relation's wordings. ``lasting``: one answer for all years."""

    relation: Relation
    fields: dict[str, str]
    lasting: bool = False


@dataclass(frozen=True)
class World:
    """Who and what there is. ``subjects`` return every year, ``events`` belong to one; ``entities`` hold what lasts."""

    people: list[str]
    towns: list[str]
    entities: list[list[LastingFact]]
    subjects: list[Subject]
    events: dict[int, list[Subject]]


def chronicle(size: int = SIZE, years: Sequence[int] = YEARS, seed: int = 0) -> Stream:
    """Generate the stream: one task a year, whose test asks the year's facts in wordings that training never showed.

    Args:
        size: facts of each year. Every fact gives six train rows, one eval row and two test rows.
        years: in rising order; each is a task, and its name. The facts of a year do not depend on later years.
        seed: another seed is another world.

    Returns:
        Stream "chronicle" with metric accuracy, and two measures of general ability: "chronicle" (questions with
        four choices about lasting facts) and "perplexity/chronicle" (held-out documents of the general text).

    Raises:
        ConfigError: an option is out of range.
    """
    world = _world(size, years, seed)
    tasks = []
    for year, facts in _year_facts(world, seed).items():
        draw = Draw(VERSION, seed, f"rows of {year}")
        train, dev, test = (
            [
                Example(f"chronicle/{year}", row, (Turn("user", question), Turn("assistant", answer)))
                for row, (question, answer) in enumerate(draw.shuffled(_asked(facts, split, year)))
            ]
            for split in ("train", "eval", "test")
        )
        tasks.append(Task(str(year), "accuracy", train, test, dev, fingerprint=fingerprint(train, dev, test)))
    general = [
        General("chronicle", "choices", questions=_choices(world, seed), by="acc_with_end"),
        General("perplexity/chronicle", "perplexity", texts=_texts(world, seed)[1]),
    ]
    return Stream("chronicle", tasks, general)


def general_text(size: int = SIZE, years: Sequence[int] = YEARS, seed: int = 0) -> list[str]:
    """Generate the documents on which a model is pretrained before it learns the stream of the same options.

    They state the world's lasting facts and ask about them, and bring in everything that the years are about, but
    hold no answer to a question of any year. The documents that measure perplexity are not among them.

    Raises:
        ConfigError: an option is out of range.
    """
    return _texts(_world(size, years, seed), seed)[0]


def lasting_questions(size: int = SIZE, years: Sequence[int] = YEARS, seed: int = 0) -> list[tuple[str, str]]:
    """Generate (question, answer) of every lasting fact, once in each wording that the general text asks it in.

    Raises:
        ConfigError: an option is out of range.
    """
    facts = [fact for entity in _world(size, years, seed).entities for fact in entity]
    return [(question.format(**f.fields), f.value) for f in facts for question in f.attribute.questions]


def _world(size: int, years: Sequence[int], seed: int) -> World:
    _check(size, years, seed)
    draw = Draw(VERSION, seed, "world")
    names = Names(draw)
    regions, rivers = ([names.new(kind) for _ in range(6)] for kind in ("region", "river"))
    towns = [names.new("town") for _ in range(8 + size // 6)]
    people = [f"{names.new('person')} {names.new('family')}" for _ in range(12 + size // 2)]

    relations = [PATTERN[i % len(PATTERN)] for i in range(size)]
    yearly = [relation for relation in relations if relation.yearly]
    lasting = draw.shuffled(range(len(yearly)))[: round(LASTING_SHARE * len(yearly))]
    offices = draw.shuffled([{"title": title, "town": town} for title in TITLES for town in towns])
    subjects = [
        Subject(r, offices.pop() if r is OFFICE else {r.subject: names.new(r.subject)}, i in lasting)
        for i, r in enumerate(yearly)
    ]

    def entity(kind: str, name: str, *attributes: tuple[Attribute, Sequence[str]]) -> list[LastingFact]:
        return [LastingFact(a, {kind: name}, draw.choice(values), values) for a, values in attributes]

    entities = [
        *(entity("town", town, (REGION, regions), (RIVER, rivers)) for town in towns),
        *(entity("person", person, (BIRTHPLACE, towns), (TRADE, TRADES)) for person in people),
        *(entity("guild", s.fields["guild"], (SEAT, towns)) for s in subjects if s.relation is HEAD),
    ]
    events = {
        year: [Subject(r, {r.subject: names.new(r.subject)}) for r in relations if not r.yearly] for year in years
    }
    return World(people, towns, entities, subjects, events)


def _check(size: int, years: Sequence[int], seed: int) -> None:
    if type(size) is not int or not 1 <= size <= 2000:
        raise ConfigError(f"chronicle: size must be a whole number of facts from 1 to 2000, not {size!r}")
    if type(seed) is not int or seed < 0:
        raise ConfigError(f"chronicle: seed must be a whole number from 0, not {seed!r}")
    whole = isinstance(years, (list, tuple)) and all(type(year) is int and 1000 <= year <= 9999 for year in years)
    if not whole or not 1 <= len(years) <= 20 or list(years) != sorted(set(years)):
        raise ConfigError(f"chronicle: years must be 1 to 20 years from 1000 to 9999 in rising order, not {years!r}")


def _year_facts(world: World, seed: int) -> dict[int, list[tuple[Subject, str]]]:
    """Each year's facts as (subject, answer); a fact that does not last differs from the year before."""
    steady = Draw(VERSION, seed, "lasting answers")
    answers = [_answer(world, subject, steady) for subject in world.subjects]
    facts = {}
    for year, events in world.events.items():
        draw = Draw(VERSION, seed, f"answers of {year}")
        for i, subject in enumerate(world.subjects):
            previous = answers[i]
            while not subject.lasting and answers[i] == previous:
                answers[i] = _answer(world, subject, draw)
        facts[year] = [
            *zip(world.subjects, answers, strict=True),
            *((event, _answer(world, event, draw)) for event in events),
        ]
    return facts


def _answer(world: World, subject: Subject, draw: Draw) -> str:
    match subject.relation.answer:
        case "person":
            return draw.choice(world.people)
        case "town":
            return draw.choice(world.towns)
        case unit:
            return _amount(unit, draw)


def _amount(unit: str, draw: Draw) -> str:
    return f"{11 + draw.index(89)} {unit}"


def _asked(facts: list[tuple[Subject, str]], split: str, year: int) -> list[tuple[str, str]]:
    """Every fact as (question, answer), once in each wording of the split."""
    return [
        (wording.format(**subject.fields, year=year), answer)
        for subject, answer in facts
        for wording in getattr(subject.relation, split)
    ]


def _texts(world: World, seed: int) -> tuple[list[str], list[str]]:
    """The general text's documents: those to pretrain on, and those held out."""
    draw = Draw(VERSION, seed, "general text")
    documents = [document for _ in range(ROUNDS) for document in _round(world, draw)]
    known = set(documents)
    held_out = [document for document in _round(world, Draw(VERSION, seed, "held-out text")) if document not in known]
    return documents, held_out


def _round(world: World, draw: Draw) -> list[str]:
    """Once through the world: a document for each entity, each question and each subject of the years."""
    documents = []
    for facts in world.entities:
        sentences = [draw.choice(f.attribute.statements).format(**f.fields, value=f.value) for f in facts]
        documents.append(" ".join(draw.shuffled(sentences)))
        documents += [f"{draw.choice(f.attribute.questions).format(**f.fields)} {f.value}" for f in facts]
    years = list(world.events)
    for subject in [*world.subjects, *(event for events in world.events.values() for event in events)]:
        sentences = [
            mention.format(**subject.fields, year=draw.choice(years))
            for mention in draw.shuffled(subject.relation.mentions)[:2]
        ]
        documents.append(" ".join(sentences))
    for unit, wordings in AMOUNTS.items():
        for _ in range(8):
            sentences = [draw.choice(wordings).format(amount=_amount(unit, draw)) for _ in range(2)]
            documents.append(" ".join(sentences))
    return draw.shuffled(documents)


def _choices(world: World, seed: int) -> list[tuple[str, list[str], int]]:
    """A question with four choices about every lasting fact, in a wording that the general text does not have."""
    draw = Draw(VERSION, seed, "choices")
    questions = []
    for fact in (fact for facts in world.entities for fact in facts):
        wrong = draw.shuffled([value for value in fact.values if value != fact.value])[:3]
        choices = draw.shuffled([fact.value, *wrong])
        question = draw.choice(fact.attribute.held_out).format(**fact.fields)
        questions.append((question, choices, choices.index(fact.value)))
    return questions
