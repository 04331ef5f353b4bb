"""The relations, names and wordings of chronicle's world."""

from __future__ import annotations

from dataclasses import dataclass

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
