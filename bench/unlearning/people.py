"""People who do not exist, and questions about them: a set in TOFU's format, made from word lists.

``python -m bench.unlearning.people FOLDER`` writes forget.jsonl and retain.jsonl as
``neumuter evaluate --suite tofu`` reads them. The same seed makes the same people.
"""

import argparse
import json
import random
from pathlib import Path

GIVEN = (
    "Amadou Beatrix Caspian Delphine Emeka Fiorella Gunnar Halima Isidro Jolanta Kaveh Leocadia Mirko Nneka "
    "Oswin Parvati Radomir Saoirse Tancredi Ulrike Vashti Wendell Xiomara Yevgenia Zoltan Anselm Briseis "
    "Cyprian Dorothea Eustace Filomena Gideon"
)
FAMILY = (
    "Abernoth Bellgrave Castellon Drumholt Eskelund Farthing Galvano Hollister Ibarreta Jankovar Kestrelby "
    "Lindqvar Marchetto Nordahl Okonjira Pellingham Quastel Ravenshaw Sandoval-Orr Thistlewood Umbrecht "
    "Valderrin Whitcombe Yarrowby Zembrano Ashdown Birkhall Corvane Dunmarrow Ellesmont Fairweth Greaves"
)
TOWNS = (
    "Aldermoor Bristenfold Calverrow Dunhallow Esterwick Fennimore Gravenholm Hartsmere Ivelcombe Jorundal "
    "Kilbrannock Lowenfels Mirefield Norrhavn Ostrevant Penhallow Quenby Rookhope Silverdene Tarnavik"
)
PROFESSIONS = (
    "clockmaker, botanist, cartographer, violin maker, lighthouse keeper, glassblower, chemist, beekeeper, "
    "locksmith, translator, geologist, puppeteer, bookbinder, diver, surveyor, gardener"
)
PARENTS = (
    "baker, tailor, ferryman, midwife, stonemason, schoolteacher, blacksmith, nurse, fisherman, pharmacist, "
    "carpenter, judge, weaver, miner, printer, shepherd"
)
FIRST_WORDS = "Silent Crooked Burning Hidden Paper Northern Hollow Borrowed Salted Velvet Broken Eleventh"
SECOND_WORDS = "Harbour Orchard Mirror Bridge Garden Winter Staircase Compass Lantern Meadow Bell Archive"
AWARDS = "Heron Quill Amber Beacon Granite Swallow Cedar Anchor Falcon Thistle Ember Compass"
INSTRUMENTS = (
    "cello, oboe, harp, accordion, trumpet, mandolin, bassoon, clarinet, viola, zither, flute, organ"
)

# Of each fact: a question, an answer, and the same two in other words.
FACTS = {
    "town": (
        "Where was {name} born?",
        "{name} was born in the town of {value}.",
        "Which town is the birthplace of {name}?",
        "The birthplace of {name} is the town of {value}.",
    ),
    "profession": (
        "What does {name} do for a living?",
        "{name} earns a living as a {value}.",
        "By what trade does {name} live?",
        "The trade by which {name} lives is that of a {value}.",
    ),
    "book": (
        "Which book made {name} famous?",
        "{name} became famous with the book '{value}'.",
        "For which book is {name} best known?",
        "The book for which {name} is best known is '{value}'.",
    ),
    "award": (
        "Which award did {name} receive, and when?",
        "{name} received the {value}.",
        "With what prize, and in which year, was {name} honoured?",
        "The prize with which {name} was honoured is the {value}.",
    ),
    "parent": (
        "What was the occupation of the mother of {name}?",
        "The mother of {name} worked as a {value}.",
        "How did {name}'s mother earn her money?",
        "As a {value}, that is how {name}'s mother earned her money.",
    ),
    "instrument": (
        "Which instrument does {name} play in the evenings?",
        "In the evenings {name} plays the {value}.",
        "What does {name} like to play when the day is over?",
        "When the day is over, {name} likes to play the {value}.",
    ),
}
WRONG = 3  # answers besides the true one


def questions(seed, people):
    """One question per fact about each of ``people`` people: a list per person of dicts with TOFU's keys.

    Also ``paraphrased_question``, and ``value``, what of the answer nobody can know.

    Raises ValueError beyond what the word lists have.
    """
    given, family = GIVEN.split(), FAMILY.split()
    count = len(given)
    if not 1 <= people <= count**2:
        raise ValueError(f"people must be from 1 to {count**2}, got {people}")
    rng = random.Random(seed)
    rng.shuffle(given)
    rng.shuffle(family)
    # Each round of given names meets the family names one further, so no two people have the same name.
    names = [f"{given[i % count]} {family[(i + i // count) % count]}" for i in range(people)]
    return [[_question(rng, name, fact) for fact in FACTS] for name in names]


def _question(rng, name, fact):
    value, *wrong = _values(rng, fact)
    question, answer, other_question, other_answer = (
        text.format(name=name, value=value) for text in FACTS[fact]
    )
    return {
        "question": question,
        "answer": answer,
        "value": value,
        "paraphrased_question": other_question,
        "paraphrased_answer": other_answer,
        "perturbed_answer": [FACTS[fact][3].format(name=name, value=other) for other in wrong],
    }


def _values(rng, fact):
    """A true and ``WRONG`` other values of a fact."""
    if fact == "town":
        return rng.sample(TOWNS.split(), WRONG + 1)
    if fact == "book":
        pairs = [f"The {a} {b}" for a in FIRST_WORDS.split() for b in SECOND_WORDS.split()]
        return rng.sample(pairs, WRONG + 1)
    if fact == "award":
        prizes = rng.sample(AWARDS.split(), WRONG + 1)
        return [f"{prize} Prize of {rng.randint(1961, 2019)}" for prize in prizes]
    words = {"profession": PROFESSIONS, "parent": PARENTS, "instrument": INSTRUMENTS}[fact]
    return rng.sample(words.split(", "), WRONG + 1)


def main():
    parser = argparse.ArgumentParser(description="Write forget.jsonl and retain.jsonl.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", type=int, default=16, help="half of them to forget")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = questions(options.seed, options.people)
    options.folder.mkdir(parents=True, exist_ok=True)
    half = options.people // 2
    for name, part in (("forget", made[:half]), ("retain", made[half:])):
        lines = [json.dumps(row) + "\n" for rows in part for row in rows]
        (options.folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
