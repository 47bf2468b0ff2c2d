"""Rows of `general` that a program writes: worked problems, tables, records, queries, and chats about countries.

All of it is ours but the country profiles (public domain). The same program writes the same rows on every machine.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random
from typing import Any

Made = tuple[str, str, str, str | list[dict[str, str]]]  # kind, language, document, content

FIRST = "Ada Amara Anders Beatriz Chen Chidi Dmitri Elif Emeka Fatima Greta Hana Hiro Ingrid Ivan Jamal Javier Kofi Leila Lucía".split()
FIRST += "Mateo Mei Mina Nadia Noor Olga Omar Paulo Priya Rania Sakura Sven Tariq Uma Viktor Wanjiru Yara Yusuf Zofia Zuri".split()
LAST = "Abbott Berg Costa Dubois Eriksen Ferrari Garcia Haddad Ito Jensen Kowalski Lindqvist Mensah Novak Okafor Petrov Quispe".split()
LAST += "Rossi Schmidt Tanaka Usman Vargas Weber Xu Yamamoto Zhang".split()
CITIES = "Accra Ankara Bergen Bogotá Chennai Dakar Gdańsk Hanoi Izmir Kyoto Lagos Lima Lyon Malmö Nairobi Oaxaca Porto Quito".split()
CITIES += "Riga Seoul Tallinn Utrecht Valencia Warsaw Zürich".split()
GOODS = [
    "lamp",
    "desk",
    "kettle",
    "notebook",
    "backpack",
    "headphones",
    "bicycle pump",
    "garden hose",
    "wool scarf",
    "tent",
]
GOODS += [
    "coffee beans",
    "screwdriver set",
    "water filter",
    "rain jacket",
    "chess set",
    "pocket knife",
    "yoga mat",
    "globe",
]
STATES = ["paid", "pending", "shipped", "cancelled", "returned"]
TOPICS = ["sensor", "invoice", "session", "shipment", "ticket", "booking", "deployment", "experiment"]


def name(random: Random) -> str:
    return f"{random.choice(FIRST)} {random.choice(LAST)}"


def date(random: Random) -> str:
    return f"{random.randint(1995, 2025)}-{random.randint(1, 12):02}-{random.randint(1, 28):02}"


# --- maths: (question, answer in steps)


def signed(value: int | Fraction, symbol: str = "", first: bool = False) -> str:
    """A term with its sign: `+ 3x`, `- x`; nothing for 0."""
    if value == 0:
        return ""
    size = abs(value)
    number = "" if size == 1 and symbol else latex(size)
    sign = ("-" if value < 0 else "") if first else (" - " if value < 0 else " + ")
    return f"{sign}{number}{symbol}"


def latex(value: int | Fraction) -> str:
    value = Fraction(value)
    sign = "-" if value < 0 else ""
    return (
        str(value.numerator)
        if value.denominator == 1
        else rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    )


def polynomial(coefficients: list[int], variable: str = "x") -> str:
    """Coefficients from the highest power down, as LaTeX."""
    text = ""
    for power, value in zip(range(len(coefficients) - 1, -1, -1), coefficients, strict=True):
        symbol = "" if power == 0 else variable if power == 1 else f"{variable}^{{{power}}}"
        text += signed(value, symbol, first=not text)
    return text or "0"


def quadratic(random: Random) -> tuple[str, str]:
    p, q, a = random.randint(-9, 9), random.randint(-9, 9), random.choice([1, 1, 2, 3])
    b, c = -a * (p + q), a * p * q
    equation = polynomial([a, b, c])
    steps = f"The discriminant is $\\Delta = b^2 - 4ac = ({b})^2 - 4\\cdot {a}\\cdot ({c}) = {b * b - 4 * a * c}$"
    steps += f", so $\\sqrt{{\\Delta}} = {abs(a * (p - q))}$.\n\nThen\n\n$$x = \\frac{{-({b}) \\pm {abs(a * (p - q))}}}{{{2 * a}}},$$\n\n"
    steps += f"which gives $x = {max(p, q)}$" + (f" and $x = {min(p, q)}$." if p != q else ", a double root.")
    return (
        f"Solve ${equation} = 0$.",
        steps + f"\n\nCheck: the roots sum to ${p + q} = -b/a$ and their product is ${p * q} = c/a$.",
    )


def derivative(random: Random) -> tuple[str, str]:
    c = [random.randint(-7, 7) for _ in range(random.randint(3, 5))]
    c[0] = c[0] or 2
    slope = [value * power for value, power in zip(c, range(len(c) - 1, 0, -1), strict=False)]
    at = random.randint(-3, 3)
    value = sum(k * at**power for k, power in zip(slope, range(len(slope) - 1, -1, -1), strict=True))
    height = sum(k * at**power for k, power in zip(c, range(len(c) - 1, -1, -1), strict=True))
    text = f"By the power rule each term $c\\,x^n$ becomes $nc\\,x^{{n-1}}$:\n\n$$f'(x) = {polynomial(slope)}.$$\n\n"
    text += f"At $x = {at}$ the slope is $f'({at}) = {value}$ and $f({at}) = {height}$, so the tangent is $y = {value}(x - ({at})) + ({height})$."
    return f"Let $f(x) = {polynomial(c)}$. Find $f'(x)$ and the tangent at $x = {at}$.", text


def integral(random: Random) -> tuple[str, str]:
    c = [random.randint(-6, 6) or 1 for _ in range(random.randint(2, 4))]
    low, high = random.randint(-2, 1), random.randint(2, 4)
    parts = [Fraction(k, power + 1) for k, power in zip(c, range(len(c) - 1, -1, -1), strict=True)]
    primitive = "".join(
        signed(k, "x" if power == 1 else f"x^{{{power}}}", first=not index)
        for index, (k, power) in enumerate(zip(parts, range(len(parts), 0, -1), strict=True))
    )

    def at(x: int) -> Fraction:
        return sum((k * x**power for k, power in zip(parts, range(len(parts), 0, -1), strict=True)), Fraction(0))

    text = f"An antiderivative is $F(x) = {primitive}$. By the fundamental theorem\n\n"
    text += f"\\[ \\int_{{{low}}}^{{{high}}} f(x)\\,dx = F({high}) - F({low}) = {latex(at(high))} - ({latex(at(low))}) = {latex(at(high) - at(low))}. \\]"
    return f"Compute $\\int_{{{low}}}^{{{high}}} \\left({polynomial(c)}\\right) dx$.", text


def system(random: Random) -> tuple[str, str]:
    x, y = random.randint(-6, 6), random.randint(-6, 6)
    a, b, c, d = (random.randint(1, 6) for _ in range(4))
    if a * d == b * c:
        d += 1
    p, q = a * x + b * y, c * x + d * y
    text = f"The determinant is ${a}\\cdot {d} - {b}\\cdot {c} = {a * d - b * c}$, which is not zero, so there is one solution. By Cramer's rule\n\n"
    text += f"x = ({p}*{d} - {b}*{q}) / {a * d - b * c} = {x}\ny = ({a}*{q} - {c}*{p}) / {a * d - b * c} = {y}\n\nSubstituting back: {a}*({x}) + {b}*({y}) = {p}, as required."
    return f"Solve the system\n\n{a}x + {b}y = {p}\n{c}x + {d}y = {q}", text


def divisor(random: Random) -> tuple[str, str]:
    common = random.randint(2, 30)
    a, b = common * random.randint(20, 90), common * random.randint(5, 60)
    lines, u, v = [], max(a, b), min(a, b)
    while v:
        lines.append(f"{u} = {u // v} * {v} + {u % v}")
        u, v = v, u % v
    text = (
        "Euclid's algorithm:\n\n"
        + "\n".join(lines)
        + f"\n\nThe last remainder that is not zero is {u}, so gcd({a}, {b}) = {u}"
    )
    return (
        f"Find the greatest common divisor and the least common multiple of {a} and {b}.",
        text + f" and lcm = {a} * {b} / {u} = {a * b // u}.",
    )


def shop(random: Random) -> tuple[str, str]:
    who, good, other = random.choice(FIRST), *random.sample(GOODS, 2)
    n, m, p, q, off = (
        random.randint(2, 9),
        random.randint(1, 6),
        random.randint(3, 60),
        random.randint(2, 45),
        random.choice([5, 10, 15, 20, 25]),
    )
    total = n * p + m * q
    text = f"First the full price: {n} × {p} = {n * p} and {m} × {q} = {m * q}, together {total}.\n"
    text += f"The discount is {off} % of {total}, that is {total * off / 100:g}.\n{who} pays {total} − {total * off / 100:g} = **{total - total * off / 100:g}** euros."
    return (
        f"{who} orders {n} of the item '{good}' at {p} euros each and {m} of the item '{other}' at {q} euros each, with {off} % off the whole order. How much is it?",
        text,
    )


def dice(random: Random) -> tuple[str, str]:
    n, k = random.randint(3, 8), random.randint(1, 3)
    chance = Fraction(math.comb(n, k) * 5 ** (n - k), 6**n)
    text = f"The number of sixes is binomial with $n = {n}$ and $p = 1/6$:\n\n$$P(X = {k}) = \\binom{{{n}}}{{{k}}}\\left(\\frac16\\right)^{{{k}}}\\left(\\frac56\\right)^{{{n - k}}}"
    return (
        f"A fair die is rolled {n} times. What is the probability of exactly {k} six(es)?",
        f"{text} = {latex(chance)} \\approx {float(chance):.4f}.$$\n\nThe expected number of sixes is $np = {latex(Fraction(n, 6))}$.",
    )


def matrix(random: Random) -> tuple[str, str]:
    a, b = ([[random.randint(-5, 5) for _ in range(2)] for _ in range(2)] for _ in range(2))
    c = [[sum(a[i][k] * b[k][j] for k in range(2)) for j in range(2)] for i in range(2)]
    show: Callable[[list[list[int]]], str] = lambda m: (
        r"\begin{pmatrix} " + r" \\ ".join(" & ".join(map(str, row)) for row in m) + r" \end{pmatrix}"
    )
    det = [m[0][0] * m[1][1] - m[0][1] * m[1][0] for m in (a, b, c)]
    text = f"Row by column:\n\n$$AB = {show(a)}{show(b)} = {show(c)}.$$\n\nDeterminants multiply: $\\det A = {det[0]}$, $\\det B = {det[1]}$ and $\\det AB = {det[2]}$."
    return f"Compute $AB$ and check the determinant for $A = {show(a)}$ and $B = {show(b)}$.", text


def speed(random: Random) -> tuple[str, str]:
    a, b, ahead = random.choice(CITIES), random.choice(CITIES), random.randint(1, 3)
    v, w = random.randint(40, 70), random.randint(80, 120)
    hours = Fraction(v * ahead, w - v)
    text = f"When the second train leaves, the first is {v} × {ahead} = {v * ahead} km ahead. The gap closes by {w} − {v} = {w - v} km every hour, so it takes t = {v * ahead}/{w - v} = {hours} h"
    return (
        f"A train leaves {a} for {b} at {v} km/h; {ahead} hour(s) later another follows at {w} km/h. When does it catch up?",
        f"{text} ≈ {float(hours):.2f} h, at {float(hours * w):.1f} km from {a}.",
    )


def series(random: Random) -> tuple[str, str]:
    a, r, n = random.randint(1, 9), random.choice([2, 3, -2]), random.randint(5, 9)
    d = random.randint(2, 12)
    text = f"Arithmetic: $S_{{{n}}} = \\tfrac{{n}}{{2}}(2a + (n-1)d) = \\tfrac{{{n}}}{{2}}(2\\cdot{a} + {n - 1}\\cdot{d}) = {n * (2 * a + (n - 1) * d) // 2}$.\n\n"
    text += f"Geometric: $S_{{{n}}} = a\\frac{{r^n - 1}}{{r - 1}} = {a}\\cdot\\frac{{({r})^{{{n}}} - 1}}{{{r - 1}}} = {a * (r**n - 1) // (r - 1)}$."
    return (
        f"Sum the first {n} terms of the arithmetic sequence with $a = {a}$, $d = {d}$ and of the geometric one with $a = {a}$, $r = {r}$.",
        text,
    )


def statistics(random: Random) -> tuple[str, str]:
    values = [random.randint(10, 99) for _ in range(random.choice([5, 7, 9]))]
    mean = Fraction(sum(values), len(values))
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    text = f"Sorted: {sorted(values)}\nmean = {sum(values)}/{len(values)} = {float(mean):.3f}\nmedian = {sorted(values)[len(values) // 2]}\n"
    return (
        f"Mean, median and standard deviation of {values}?",
        text
        + f"variance = {spread**2:.3f}, standard deviation = {spread:.3f} (population), range = {max(values) - min(values)}",
    )


def induction(random: Random) -> tuple[str, str]:
    a = random.randint(2, 9)
    text = f"*Base case.* For $n = 1$ both sides are ${a}$.\n\n*Step.* Suppose $\\sum_{{k=1}}^{{n}} {a}k = \\frac{{{a}n(n+1)}}{{2}}$. Then\n\n\\begin{{align}}\n"
    text += f"\\sum_{{k=1}}^{{n+1}} {a}k &= \\frac{{{a}n(n+1)}}{{2}} + {a}(n+1) \\\\\n&= \\frac{{{a}(n+1)(n+2)}}{{2}},\n\\end{{align}}\n\nwhich is the claim for $n + 1$. $\\blacksquare$"
    return f"Prove by induction that $\\sum_{{k=1}}^{{n}} {a}k = \\frac{{{a}n(n+1)}}{{2}}$ for all $n \\ge 1$.", text


PROBLEMS = [quadratic, derivative, integral, system, divisor, shop, dice, matrix, speed, series, statistics, induction]


# --- data: tables and records


def orders(random: Random, count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": random.randint(1000, 99999),
            "date": date(random),
            "customer": name(random),
            "city": random.choice(CITIES),
            "item": random.choice(GOODS),
            "quantity": random.randint(1, 12),
            "price": round(random.uniform(2, 400), 2),
            "status": random.choice(STATES),
        }
        for _ in range(count)
    ]


def nested(random: Random, depth: int = 0) -> Any:
    """A record as an interface returns it: nested objects, lists, numbers, nulls."""
    keys = "id name owner tags limits region created_at updated_at enabled retries timeout_ms labels parent ratio notes".split()
    record: dict[str, Any] = {}
    for key in random.sample(keys, random.randint(4, 9)):
        record[key] = random.choice(
            [
                random.randint(0, 10**6),
                round(random.random(), 4),
                None,
                True,
                False,
                name(random),
                date(random),
                random.choice(CITIES),
            ]
        )
    if depth < 2:
        record[random.choice(TOPICS)] = nested(random, depth + 1)
        record[random.choice(TOPICS) + "s"] = [nested(random, depth + 1) for _ in range(random.randint(1, 3))]
    return record


def markdown(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows])


def separated(rows: list[dict[str, Any]], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def fixed(rows: list[dict[str, Any]]) -> str:
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    lines = ["  ".join(key.upper().ljust(width) for key, width in widths.items())]
    return "\n".join(
        lines + ["  ".join(str(row[key]).ljust(width) for key, width in widths.items()).rstrip() for row in rows]
    )


def yaml(value: Any, indent: int = 0) -> str:
    lines = []
    for key, item in value.items():
        pad = " " * indent
        if isinstance(item, dict):
            lines.append(f"{pad}{key}:\n{yaml(item, indent + 2)}")
        elif isinstance(item, list):
            lines.append(f"{pad}{key}:\n" + "\n".join(f"{pad}  -\n{yaml(part, indent + 4)}" for part in item))
        else:
            lines.append(f"{pad}{key}: {json.dumps(item, ensure_ascii=False)}")
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{key}</th>" for key in rows[0])
    body = "\n".join("    <tr>" + "".join(f"<td>{value}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f'<table class="orders">\n  <thead><tr>{head}</tr></thead>\n  <tbody>\n{body}\n  </tbody>\n</table>'


def log(random: Random, count: int) -> str:
    lines, second = [], random.randint(0, 80000)
    for _ in range(count):
        second += random.randint(0, 40)
        stamp = f"2024-{random.randint(1, 12):02}-{random.randint(1, 28):02}T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}Z"
        what = random.choice(
            [
                f"GET /api/v2/{random.choice(TOPICS)}s/{random.randint(1, 9999)} {random.choice([200, 200, 404, 500])} {random.randint(2, 900)}ms",
                f"worker-{random.randint(1, 16)} finished {random.choice(TOPICS)} {random.getrandbits(32):08x}",
                f"connection to 10.{random.randint(0, 255)}.{random.randint(0, 255)}.7:{random.choice([5432, 6379, 9092])} lost, retry {random.randint(1, 5)}",
                f"user={random.choice(FIRST).lower()} action=login result={random.choice(['ok', 'denied'])}",
            ]
        )
        lines.append(f"{stamp} {random.choice(['INFO', 'INFO', 'WARN', 'ERROR', 'DEBUG'])} {what}")
    return "\n".join(lines)


def data(random: Random) -> tuple[str, str]:
    """(format, text) of one table or record."""
    rows = orders(random, random.randint(8, 26))
    keys = random.sample(list(rows[0]), random.randint(4, 8))
    rows = [{key: row[key] for key in keys} for row in rows]
    record = nested(random)
    made: list[tuple[str, Callable[[], str]]] = [
        ("Markdown", lambda: markdown(rows)),
        ("CSV", lambda: separated(rows, ",")),
        ("CSV", lambda: separated(rows, random.choice("\t;"))),
        ("table", lambda: fixed(rows)),
        ("JSON", lambda: json.dumps(rows, ensure_ascii=False, indent=random.choice([2, 4, None]))),
        ("JSON", lambda: json.dumps(record, ensure_ascii=False, indent=random.choice([2, 4, None]))),
        ("JSON", lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("YAML", lambda: yaml(record)),
        ("HTML", lambda: page(rows)),
        ("log", lambda: log(random, random.randint(12, 40))),
    ]
    form, make = random.choice(made)
    return form, make()


# --- SQL


def sql(random: Random) -> str:
    table, other = random.sample(TOPICS, 2)
    rows = orders(random, random.randint(3, 6))
    values = ",\n".join(
        f"    ({row['id']}, '{row['date']}', '{row['customer']}', '{row['city']}', {row['quantity']}, {row['price']}, '{row['status']}')"
        for row in rows
    )
    limit, days = random.randint(5, 50), random.randint(7, 365)
    parts = [
        f"CREATE TABLE {table}s (\n    id INTEGER PRIMARY KEY,\n    created_on DATE NOT NULL,\n    customer TEXT NOT NULL,\n    city VARCHAR(80),\n"
        f"    quantity INTEGER CHECK (quantity > 0),\n    price NUMERIC(10, 2) DEFAULT 0,\n    status TEXT REFERENCES {other}_states (name)\n);",
        f"INSERT INTO {table}s (id, created_on, customer, city, quantity, price, status) VALUES\n{values};",
        f"CREATE INDEX idx_{table}s_city ON {table}s (city, created_on DESC);",
        f"-- what each city is worth\nSELECT city, COUNT(*) AS n, SUM(quantity * price) AS revenue\nFROM {table}s\nWHERE status <> 'cancelled'\nGROUP BY city\n"
        f"HAVING COUNT(*) > {random.randint(1, 9)}\nORDER BY revenue DESC\nLIMIT {limit};",
        f"SELECT t.id, t.customer, o.started_at\nFROM {table}s AS t\nLEFT JOIN {other}s AS o ON o.{table}_id = t.id\nWHERE t.created_on >= CURRENT_DATE - INTERVAL '{days} days'\n"
        f"  AND o.id IS NULL;",
        f"WITH ranked AS (\n    SELECT *, ROW_NUMBER() OVER (PARTITION BY customer ORDER BY price DESC) AS place\n    FROM {table}s\n)\nSELECT customer, price FROM ranked WHERE place = 1;",
        f"UPDATE {table}s SET status = '{random.choice(STATES)}' WHERE id IN (SELECT {table}_id FROM {other}s WHERE closed);",
        f"BEGIN;\nDELETE FROM {other}s WHERE {table}_id NOT IN (SELECT id FROM {table}s);\nCOMMIT;",
        f"CREATE VIEW monthly_{table}s AS\nSELECT date_trunc('month', created_on) AS month, AVG(price) AS mean_price\nFROM {table}s GROUP BY 1;",
    ]
    return "\n\n".join(parts[index] for index in sorted(random.sample(range(len(parts)), random.randint(4, 6))))


# --- all of them


def chat(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A chat of alternating turns, the user's first."""
    turns = [{"role": "system", "content": system}] if system else []
    return turns + [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


def generated() -> Iterator[Made]:
    """Worked problems, tables and records, SQL, and chats of problems and extraction."""
    random = Random(10)
    for index in range(65):
        chosen = [random.choice(PROBLEMS)(random) for _ in range(random.randint(4, 7))]
        form = random.choice(
            ["**Problem {n}.** {q}\n\n**Solution.** {a}", "Exercise {n}\n{q}\n\nAnswer\n{a}", "Q{n}: {q}\n\nA: {a}"]
        )
        text = "\n\n".join(form.format(n=n, q=q, a=a) for n, (q, a) in enumerate(chosen, random.randint(1, 9)))
        yield "maths", "LaTeX", f"problems {index}", text
    for index in range(100):
        form, text = data(random)
        yield "data", form, f"data {index}", text[:6000]
    for index in range(14):
        yield "code", "SQL", f"sql {index}", sql(random)
    for index in range(50):
        (q, a), (r, b) = (random.choice(PROBLEMS)(random) for _ in range(2))
        how = random.choice(
            ["", "You are a patient maths tutor. Show every step.", "Answer with the working, briefly."]
        )
        yield (
            "chat",
            "English",
            f"maths chat {index}",
            chat(q, a, random.choice(["Thanks! And this one: ", "Next: ", ""]) + r, b, system=how),
        )
    for index in range(40):
        rows = orders(random, random.randint(2, 5))
        lines = "\n".join(
            f"{row['customer']} from {row['city']} ordered {row['quantity']} x {row['item']} on {row['date']} ({row['status']})."
            for row in rows
        )
        keys = random.sample(list(rows[0])[1:6], 3)
        wanted = json.dumps(
            [{key: row[key] for key in keys} for row in rows], ensure_ascii=False, indent=random.choice([None, 2])
        )
        ask = random.choice(
            [
                "Extract {k} as a JSON list:\n\n{t}",
                "{t}\n\nReturn a JSON array of objects with the keys {k}. No other text.",
            ]
        )
        yield (
            "chat",
            "English",
            f"extraction chat {index}",
            chat(
                ask.format(k=", ".join(keys), t=lines),
                wanted,
                "Now as a Markdown table.",
                markdown([{key: row[key] for key in keys} for row in rows]),
            ),
        )


QUESTIONS = [
    ("Introduction", "Background", "Give me some background on {c}."),
    ("Geography", "Climate", "What is the climate of {c} like?"),
    ("Geography", "Natural resources", "Which natural resources does {c} have?"),
    ("Economy", "Economy - overview", "How would you describe the economy of {c}?"),
    ("Economy", "Industries", "Name the main industries of {c}."),
    ("Geography", "Terrain", "Describe the terrain of {c}."),
    ("People and Society", "Religions", "Which religions are found in {c}?"),
    ("Government", "Legal system", "What kind of legal system does {c} have?"),
]


def countries(profiles: dict[str, bytes]) -> Iterator[Made]:
    """Chats and records from The World Factbook's profiles (JSON by file name)."""
    random = Random(20)
    for index, (path, raw) in enumerate(sorted(profiles.items())):
        profile = json.loads(raw)
        names = profile.get("Government", {}).get("Country name", {})
        country = names.get("conventional short form", {}).get("text", "").split(" (")[0]
        if not country or country == "none":
            continue
        turns = []
        for section, field, question in random.sample(QUESTIONS, len(QUESTIONS)):
            answer = profile.get(section, {}).get(field, {}).get("text", "")
            if 20 < len(answer) < 1800 and len(turns) < 6:
                turns += [
                    question.format(c=country if not turns else random.choice([country, "the country"])),
                    answer.strip(),
                ]
        if index % 2 and turns:
            yield (
                "chat",
                "English",
                path,
                chat(*turns, system=random.choice(["", "", "You are a well-read geography teacher."])),
            )
        elif section := profile.get(
            random.choice(["Geography", "Economy", "Energy", "Transportation", "Communications"])
        ):
            yield (
                "data",
                "JSON",
                path,
                json.dumps({country: section}, ensure_ascii=False, indent=random.choice([1, 2, None]))[:5000],
            )
