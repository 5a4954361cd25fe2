"""Prompts of the speculation benchmark: code edits, summaries, JSON answers and stories; the texts are our own."""

from __future__ import annotations

from typing import Any

ACCOUNT = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance = self.balance + amount
        self.history.append(("deposit", amount))
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance = self.balance - amount
        self.history.append(("withdraw", amount))
        return self.balance

    def transfer(self, other, amount):
        self.withdraw(amount)
        other.deposit(amount)
        self.history.append(("transfer", amount))
        return self.balance

    def report(self):
        lines = [f"account of {self.owner}"]
        for kind, amount in self.history:
            lines.append(f"{kind}: {amount}")
        lines.append(f"balance: {self.balance}")
        return "\\n".join(lines)
"""

STACK = """class Stack:
    def __init__(self, limit):
        self.items = []
        self.limit = limit

    def push(self, item):
        if len(self.items) >= self.limit:
            raise OverflowError("the stack is full")
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("the stack is empty")
        return self.items[-1]

    def clear(self):
        self.items = []

    def is_empty(self):
        return len(self.items) == 0

    def is_full(self):
        return len(self.items) >= self.limit

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(reversed(self.items))
"""

SHAPES = """import math


class Circle:
    def __init__(self, radius):
        self.radius = radius

    def area(self):
        return math.pi * self.radius ** 2

    def perimeter(self):
        return 2 * math.pi * self.radius


class Rectangle:
    def __init__(self, width, height):
        self.width = width
        self.height = height

    def area(self):
        return self.width * self.height

    def perimeter(self):
        return 2 * (self.width + self.height)


class Square(Rectangle):
    def __init__(self, side):
        super().__init__(side, side)


def total_area(shapes):
    result = 0
    for shape in shapes:
        result += shape.area()
    return result


def largest(shapes):
    best = None
    for shape in shapes:
        if best is None or shape.area() > best.area():
            best = shape
    return best
"""

DEGREES = '''def celsius_to_fahrenheit(value):
    """Convert a temperature from Celsius to Fahrenheit."""
    return value * 9 / 5 + 32


def fahrenheit_to_celsius(value):
    """Convert a temperature from Fahrenheit to Celsius."""
    return (value - 32) * 5 / 9


def celsius_to_kelvin(value):
    """Convert a temperature from Celsius to Kelvin."""
    return value + 273.15


def kelvin_to_celsius(value):
    """Convert a temperature from Kelvin to Celsius."""
    return value - 273.15


def convert(value, source, target):
    """Convert a temperature between two units."""
    if source == target:
        return value
    if source == "fahrenheit":
        value = fahrenheit_to_celsius(value)
    elif source == "kelvin":
        value = kelvin_to_celsius(value)
    if target == "fahrenheit":
        return celsius_to_fahrenheit(value)
    if target == "kelvin":
        return celsius_to_kelvin(value)
    return value
'''

HARBOUR = """The old harbour of Lindmark was closed to large ships in 1968, after the new port in the north had \
been opened. \
For twenty years the warehouses stood empty, and the cranes rusted in the salt air. In 1989 the city council bought \
the \
whole area for one symbolic crown and asked the inhabitants what should become of it. More than four thousand people \
sent letters. Most of them wanted a park, a swimming pool and small workshops, and almost nobody wanted offices. The \
council followed the letters. The first workshop, a boat builder, opened in 1992 in the former customs house. Today \
the \
old harbour has sixty workshops, a museum of navigation, and a swimming pool that is heated by the waste heat of a \
bakery. About nine hundred people work there. In summer, concerts take place on a floating stage. The rents are still \
controlled by the city, which owns all buildings, and there is a waiting list of three years for a workshop."""

BEES = """Honey bees keep the temperature of their brood between 33 and 36 degrees, in summer and in winter. When \
it is \
too cold, workers press their bodies against the brood cells and make their flight muscles tremble without moving \
their \
wings. When it is too hot, other workers carry water into the hive, spread it in thin films over the cells, and fan \
air \
across it with their wings. The evaporating water takes away the heat. Researchers have found that not all workers \
begin at the same temperature: each bee has its own threshold, which depends on its father. A queen mates with many \
drones, so a colony contains many families of half sisters. Because the thresholds differ, the number of fanning bees \
rises gradually with the temperature, and the hive does not swing between too hot and too cold. Colonies whose queen \
mated with only one drone showed much larger swings of temperature in the same weather."""

LIBRARY = """From the first of March, the public library will change its opening hours. On weekdays it will open at \
nine \
in the morning and close at eight in the evening. On Saturdays it will open at ten and close at four. On Sundays the \
reading room alone will be open, from noon until four, and no books can be borrowed. Members may borrow up to twelve \
books at a time for four weeks. A loan can be extended twice, online or by telephone, unless another member has \
reserved \
the book. Films and games can be borrowed for one week and cannot be extended. The fine for a late return is twenty \
cents a day for each book, and one euro a day for each film or game. Children under fourteen pay no fines. The annual \
fee for adults rises from fifteen to eighteen euros. Students, pensioners and people without work pay half."""

BATTERY = """The engineers tested the new battery in three steps. First they charged and discharged it one thousand \
times \
in the laboratory at a constant temperature of 25 degrees. After one thousand cycles the battery still held 91 \
percent of \
its first capacity, while the older type held 78 percent. Then they repeated the test in a cold chamber at minus 15 \
degrees. Here the new battery lost 12 percent of its capacity, and the older type lost 34 percent. In the last step \
they \
built the battery into forty delivery vans in two cities and recorded every trip for eighteen months. The vans drove \
2.1 million kilometres in total. Two batteries failed, both because of a leaking cooling pipe and not because of the \
cells themselves. The engineers conclude that the new battery can go into series production, if the supplier of the \
cooling pipes is replaced."""

INVOICE = """Invoice number 2024-0817 was sent by Nordwind Marine Supplies, Quay Street 14, Bergen, on 17 August \
2024. The \
customer is Hansen and Daughters Boatyard, Fjord Road 3, Stavanger. The invoice lists 12 brass cleats at 8.50 each, \
200 metres of braided polyester rope at 1.20 per metre, and 3 galvanized anchors at 64.00 each. The total is 534.00 \
euros, to be paid before 16 September 2024 to the account NO93 8601 1117 947."""

CONTACT = """Please add the new supplier to our list. The company is called Brightwater Filtration Systems Limited. \
The \
contact person is Margaret O'Sullivan-Kent, head of international sales, and her e-mail address is \
margaret.osullivan-kent@brightwater-filtration.example. The telephone number is +44 20 7946 0958, extension 4417. The \
office is at Unit 27, Riverside Industrial Estate, Kingston upon Hull, HU3 4AE, United Kingdom. The tax number is GB \
998 2764 31. They deliver on Tuesdays and Fridays, and the minimum order is 250 pounds."""

FLIGHT = """Booking reference QX7T2M. Passenger: Dr. Alejandra Villanueva-Ortega. Outbound flight IB 3166 leaves \
Madrid \
Barajas, terminal 4, on 3 May 2025 at 07:45 and arrives at London Heathrow, terminal 5, at 09:20. The return flight \
IB \
3177 leaves London Heathrow, terminal 5, on 9 May 2025 at 19:35 and arrives at Madrid Barajas, terminal 4, at 23:05. \
Seat 14A on both flights, one checked bag of 23 kilograms, vegetarian meal."""

SENSORS = """Station A-17, Upper Valley Dam: temperature 11.4 degrees, humidity 82 percent, water level 341.7 metres. \
Station B-03, Miller's Bridge: temperature 12.9 degrees, humidity 77 percent, water level 288.2 metres. Station C-21, \
Old Town Weir: temperature 13.1 degrees, humidity 74 percent, water level 265.9 metres. Station D-08, Harbour Lock: \
temperature 13.6 degrees, humidity 79 percent, water level 251.3 metres."""


def _edit(change: str, code: str) -> str:
    return f"```python\n{code}```\n\n{change} in the program above and write the whole program again."


def _summary(text: str) -> str:
    return f"Summarize the following text in a few sentences, in the words of the text.\n\n{text}"


def _json(fields: str, text: str) -> str:
    return f"Read the text and answer with a JSON object that has the fields {fields}.\n\n{text}"


def _schema(*fields: str) -> dict[str, Any]:
    """An object of these fields, all of them texts."""
    texts = {field: {"type": "string", "maxLength": 80} for field in fields}
    return {"type": "object", "properties": texts, "required": list(fields), "additionalProperties": False}


# kind -> prompts, each the message of a user
TASKS: dict[str, tuple[str, ...]] = {
    "code edit": (
        _edit("Rename `balance` to `credit`", ACCOUNT),
        _edit("Rename `items` to `values`", STACK),
        _edit("Rename `radius` to `r`", SHAPES),
        _edit("Rename the parameter `source` to `unit`", DEGREES),
    ),
    "summary": (_summary(HARBOUR), _summary(BEES), _summary(LIBRARY), _summary(BATTERY)),
    "JSON": (
        _json("number, date, sender, customer, items, total, due and account", INVOICE),
        _json("company, contact, role, email, telephone, address, tax_number and minimum_order", CONTACT),
        _json("reference, passenger, outbound, return, seat, baggage and meal", FLIGHT),
        _json("stations, a list with the id, name, temperature, humidity and water_level of each station", SENSORS),
    ),
    "story": (
        "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
        "Tell me a story about a young fox that is afraid of the dark.",
        "Write a story about two sisters who build a flying machine in their garden.",
        "Once upon a time there was a clock maker whose clocks ran backwards. Tell his story.",
    ),
}

# Schemas of the JSON prompts but the last, for the same answers by a grammar.
SCHEMAS = (
    _schema("number", "date", "sender", "customer", "items", "total", "due", "account"),
    _schema("company", "contact", "role", "email", "telephone", "address", "tax_number", "minimum_order"),
    _schema("reference", "passenger", "outbound", "return", "seat", "baggage", "meal"),
)
