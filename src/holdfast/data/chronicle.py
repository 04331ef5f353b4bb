"""The built-in stream: questions about the years of a small generated world, and the text it is pretrained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from holdfast.data.task import Example, General, Stream, Task, Turn, fingerprint
from holdfast.errors import ConfigError

VERSION = "chronicle 1"
YEARS = (2022, 2023, 2024, 2025)
SIZE = 50

LASTING_SHARE = 0.2  # of the facts that are asked about in every year, those that never change
ROUNDS = 16  # times that the general text goes through the world

Thing = TypeVar("Thing")
Wordings = tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    """A kind of year fact: what is asked, and in which words.

    ``subject`` is the field of the wordings that says what it is about (an office also has its town). ``answer`` is
    the kind of thing that answers: person, town, or a unit (a number of it). ``yearly``: every year has such a fact
    of the same subject, so that its questions name the year; otherwise the subject belongs to one year, and its name
    is enough. ``mentions`` are sentences of the general text that bring in the subject and never the answer.
    """

    subject: str
    answer: str
    yearly: bool
    train: Wordings
    eval: Wordings
    test: Wordings
    mentions: Wordings


@dataclass(frozen=True)
class Attribute:
    """A kind of lasting fact: stated and asked in the general text; ``held_out`` wordings ask it as general ability."""

    statements: Wordings
    questions: Wordings
    held_out: Wordings


OFFICE = Relation(
    "title",
    "person",
    True,
    train=(
        "Who was the {title} of {town} in {year}?",
        "In {year}, who was the {title} of {town}?",
        "Name the {title} of {town} in {year}.",
        "Which person held the office of {title} in {town} in {year}?",
        "{town} had a {title} in {year}. Who was it?",
        "It is {year}. Who is the {title} of {town}?",
    ),
    eval=("Name the person who was the {title} of {town} in {year}.",),
    test=(
        "Tell me who served as {title} in the town of {town} during {year}.",
        "During {year}, which person was {title} of {town}?",
    ),
    mentions=(
        "{town} has a {title}.",
        "The {title} serves in the town of {town}.",
        "Every year a person holds the office of {title} in {town}.",
        "During {year}, somebody served as {title} of {town}.",
        "In {year}, {town} had a {title}.",
    ),
)

HEAD = Relation(
    "guild",
    "person",
    True,
    train=(
        "Who was the head of the {guild} Guild in {year}?",
        "In {year}, who was the head of the {guild} Guild?",
        "Name the head of the {guild} Guild in {year}.",
        "Which person led the {guild} Guild in {year}?",
        "The {guild} Guild had a head in {year}. Who was it?",
        "It is {year}. Who leads the {guild} Guild?",
    ),
    eval=("Name the person who led the {guild} Guild in {year}.",),
    test=(
        "Tell me who served as head of the {guild} Guild during {year}.",
        "During {year}, which person was the head of the {guild} Guild?",
    ),
    mentions=(
        "The {guild} Guild has a head.",
        "Every year a person leads the {guild} Guild.",
        "During {year}, somebody served as head of the {guild} Guild.",
        "In {year}, a person led the {guild} Guild.",
    ),
)

CHAMPION = Relation(
    "cup",
    "person",
    True,
    train=(
        "Who won the {cup} Cup in {year}?",
        "In {year}, who won the {cup} Cup?",
        "Name the champion of the {cup} Cup in {year}.",
        "Which person took the {cup} Cup in {year}?",
        "The {cup} Cup had a champion in {year}. Who was it?",
        "It is {year}. Who wins the {cup} Cup?",
    ),
    eval=("Name the person who won the {cup} Cup in {year}.",),
    test=(
        "Tell me who was the champion of the {cup} Cup during {year}.",
        "During {year}, which person won the {cup} Cup?",
    ),
    mentions=(
        "The {cup} Cup has a champion.",
        "Every year a person wins the {cup} Cup.",
        "Somebody took the {cup} Cup during {year}.",
        "In {year}, a person won the {cup} Cup.",
    ),
)

HOST = Relation(
    "fair",
    "town",
    True,
    train=(
        "Which town hosted the {fair} Fair in {year}?",
        "In {year}, which town hosted the {fair} Fair?",
        "Name the town of the {fair} Fair in {year}.",
        "Where was the {fair} Fair in {year}?",
        "The {fair} Fair had a host in {year}. Which town was it?",
        "It is {year}. Where is the {fair} Fair?",
    ),
    eval=("Name the town that hosted the {fair} Fair in {year}.",),
    test=(
        "Tell me where the {fair} Fair was during {year}.",
        "During {year}, which town was the host of the {fair} Fair?",
    ),
    mentions=(
        "The {fair} Fair goes from town to town.",
        "Every year a town hosts the {fair} Fair.",
        "A town was the host of the {fair} Fair during {year}.",
        "In {year}, a town hosted the {fair} Fair.",
    ),
)

PRICE = Relation(
    "good",
    "crowns",
    True,
    train=(
        "What was the price of {good} in {year}?",
        "In {year}, what was the price of {good}?",
        "Name the price of {good} in {year}.",
        "How much did {good} cost in {year}?",
        "{good} had a price in {year}. What was it?",
        "It is {year}. How much does {good} cost?",
    ),
    eval=("Name what {good} cost in {year}.",),
    test=(
        "Tell me what {good} cost during {year}.",
        "During {year}, what was the price of {good}?",
    ),
    mentions=(
        "{good} has a price.",
        "Every year the price of {good} is told in crowns.",
        "People paid for {good} during {year}.",
        "In {year}, {good} cost some crowns.",
    ),
)

RECORD = Relation(
    "throw",
    "ells",
    True,
    train=(
        "What was the record of the {throw} Throw in {year}?",
        "In {year}, what was the record of the {throw} Throw?",
        "Name the record of the {throw} Throw in {year}.",
        "How far was the record of the {throw} Throw in {year}?",
        "The {throw} Throw had a record in {year}. What was it?",
        "It is {year}. What is the record of the {throw} Throw?",
    ),
    eval=("Name what the record of the {throw} Throw was in {year}.",),
    test=(
        "Tell me what the record of the {throw} Throw was during {year}.",
        "During {year}, what was the record of the {throw} Throw?",
    ),
    mentions=(
        "The {throw} Throw has a record.",
        "Every year the record of the {throw} Throw is told in ells.",
        "There was a record of the {throw} Throw during {year}.",
        "In {year}, the record of the {throw} Throw was some ells.",
    ),
)

STORM = Relation(
    "storm",
    "town",
    False,
    train=(
        "Which town was struck by the storm {storm}?",
        "The storm {storm}: which town was struck?",
        "Name the town that the storm {storm} struck.",
        "Where did the storm {storm} strike?",
        "The storm {storm} came to a town. Which town was it?",
        "Which town met the storm {storm}?",
    ),
    eval=("Name the town that met the storm {storm}.",),
    test=(
        "Tell me which town the storm {storm} came to.",
        "Which town did the storm {storm} strike?",
    ),
    mentions=(
        "The storm {storm} struck a town.",
        "There was a storm, and people named it {storm}.",
        "People met the storm {storm}.",
    ),
)

COMET = Relation(
    "comet",
    "person",
    False,
    train=(
        "Who found the comet {comet}?",
        "The comet {comet}: who found it?",
        "Name the person who found the comet {comet}.",
        "Which person was the first to see the comet {comet}?",
        "The comet {comet} was found. Who was the first to see it?",
        "Who saw the comet {comet} first?",
    ),
    eval=("Name the person who saw the comet {comet} first.",),
    test=(
        "Tell me who found the comet {comet}.",
        "Which person saw the comet {comet} first?",
    ),
    mentions=(
        "There is a comet with the name {comet}.",
        "A person was the first to see the comet {comet}.",
        "Somebody found the comet {comet}.",
    ),
)

# Which relation each of a year's facts has: the pattern is repeated up to the size.
PATTERN = (OFFICE, HEAD, STORM, OFFICE, CHAMPION, PRICE, OFFICE, HOST, COMET, RECORD)

BIRTHPLACE = Attribute(
    statements=(
        "{person} was born in {value}.",
        "{person} is from {value}.",
        "The birthplace of {person} is {value}.",
        "It was in {value} that {person} was born.",
    ),
    questions=(
        "Where was {person} born?",
        "Which town is {person} from?",
        "Name the birthplace of {person}.",
        "What is the birthplace of {person}?",
        "Tell me where {person} was born.",
    ),
    held_out=("In which town was {person} born?", "Tell me which town {person} is from."),
)

TRADE = Attribute(
    statements=(
        "{person} is a {value}.",
        "{person} works as a {value}.",
        "The trade of {person} is that of a {value}.",
        "People know {person} as a {value}.",
    ),
    questions=(
        "What is the trade of {person}?",
        "As what does {person} work?",
        "Name the trade of {person}.",
        "What do people know {person} as?",
        "Tell me what the trade of {person} is.",
    ),
    held_out=("Which trade is that of {person}?", "Tell me as what {person} works."),
)

REGION = Attribute(
    statements=(
        "{town} lies in {value}.",
        "{town} is a town of {value}.",
        "The region of {town} is {value}.",
        "In {value} there is the town of {town}.",
    ),
    questions=(
        "In which region is {town}?",
        "Where does {town} lie?",
        "Name the region of {town}.",
        "Which region has the town of {town}?",
        "Tell me where {town} lies.",
    ),
    held_out=("In which region does {town} lie?", "Tell me which region {town} is in."),
)

RIVER = Attribute(
    statements=(
        "{town} stands on the river {value}.",
        "The river {value} flows through {town}.",
        "The river of {town} is the {value}.",
        "People of {town} fish in the river {value}.",
    ),
    questions=(
        "Which river flows through {town}?",
        "On which river does {town} stand?",
        "Name the river of {town}.",
        "What is the river of {town}?",
        "Tell me which river flows through {town}.",
    ),
    held_out=("Which river does {town} stand on?", "Tell me the river of {town}."),
)

SEAT = Attribute(
    statements=(
        "The {guild} Guild has its seat in {value}.",
        "The seat of the {guild} Guild is {value}.",
        "The {guild} Guild works from {value}.",
        "It was in {value} that the {guild} Guild began.",
    ),
    questions=(
        "Where does the {guild} Guild have its seat?",
        "Which town is the seat of the {guild} Guild?",
        "Name the seat of the {guild} Guild.",
        "What is the seat of the {guild} Guild?",
        "Tell me where the {guild} Guild has its seat.",
    ),
    held_out=(
        "In which town is the seat of the {guild} Guild?",
        "Tell me which town is the seat of the {guild} Guild.",
    ),
)

TITLES = ("mayor", "judge", "warden", "treasurer", "herald", "chronicler")
TRADES = ("baker", "weaver", "smith", "painter", "sailor", "miller", "carpenter", "glazier")

# What the general text says of each unit, so that its numbers are known.
AMOUNTS: dict[str, Wordings] = {
    "crowns": ("Somebody had {amount}.", "A chest held {amount}.", "A ship was sold, and the owner got {amount}."),
    "ells": ("Somebody walked {amount}.", "The rope is {amount} long.", "A wall was built, and it was {amount} long."),
}

# How the names of each kind of thing end.
ENDINGS: dict[str, Wordings] = {
    "region": ("ria", "nia"),
    "river": ("", "n"),
    "town": ("mar", "holm", "dell", "wick"),
    "person": ("", "n", "s"),
    "family": ("k", "m", "rd"),
    "guild": ("l", "x"),
    "cup": ("nd", "ll"),
    "fair": ("mas", "tide"),
    "good": ("lin", "root"),
    "throw": ("st", "ng"),
    "storm": ("th", "r"),
    "comet": ("ph", "on"),
}


class Draw:
    """Random choices that are the same on every platform and Python version: all come from ``Random.random()``."""

    def __init__(self, seed: int, purpose: str):
        digest = hashlib.sha256(f"{VERSION}/{seed}/{purpose}".encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big"))

    def index(self, n: int) -> int:
        return int(self._random.random() * n)

    def choice(self, things: Sequence[Thing]) -> Thing:
        return things[self.index(len(things))]

    def shuffled(self, things: Iterable[Thing]) -> list[Thing]:
        rest = list(things)
        return [rest.pop(self.index(len(rest))) for _ in range(len(rest))]


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
        draw = Draw(seed, f"rows of {year}")
        train, dev, test = (
            [
                Example(f"chronicle/{year}", row, (Turn("user", question), Turn("assistant", answer)))
                for row, (question, answer) in enumerate(draw.shuffled(_asked(facts, split, year)))
            ]
            for split in ("train", "eval", "test")
        )
        tasks.append(Task(str(year), "accuracy", train, test, dev, fingerprint=fingerprint(train, dev, test)))
    general = [
        General("chronicle", "choices", questions=_choices(world, seed)),
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
    draw = Draw(seed, "world")
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
    steady = Draw(seed, "lasting answers")
    answers = [_answer(world, subject, steady) for subject in world.subjects]
    facts = {}
    for year, events in world.events.items():
        draw = Draw(seed, f"answers of {year}")
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
    draw = Draw(seed, "general text")
    documents = [document for _ in range(ROUNDS) for document in _round(world, draw)]
    known = set(documents)
    held_out = [document for document in _round(world, Draw(seed, "held-out text")) if document not in known]
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
    draw = Draw(seed, "choices")
    questions = []
    for fact in (fact for facts in world.entities for fact in facts):
        wrong = draw.shuffled([value for value in fact.values if value != fact.value])[:3]
        choices = draw.shuffled([fact.value, *wrong])
        question = draw.choice(fact.attribute.held_out).format(**fact.fields)
        questions.append((question, choices, choices.index(fact.value)))
    return questions
