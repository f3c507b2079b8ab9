"""How the facts of the embedded data set are worded: statements, questions, names in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

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

# Twelve ways to ask for a fact; `build_facts` says which of them training never sees.
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


def in_sentence(name: str) -> str:
    """A name with the article that it takes inside a sentence."""
    return f"the {name}" if name in WITH_ARTICLE or name.endswith("Islands") else name


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence, four at most: "A, B and C"."""
    *others, last = [*names[:4], "others"] if len(names) > 4 else names or [""]
    return f"{', '.join(others)} and {last}" if others else last
