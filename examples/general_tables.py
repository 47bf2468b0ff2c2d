"""Records in many forms, made from templates: CSV, TSV, JSON, JSON lines, YAML, TOML, Markdown, HTML, LaTeX, SQL, a log."""

import csv
import io
import json
from collections.abc import Callable
from random import Random

PEOPLE = (
    "Aylin Demir,Tomas Novak,Grace Obi,Li Wei,Maria Rossi,Sofia Lindqvist,Kofi Mensah,Anna Kowalska,José Ortega".split(
        ","
    )
)
PEOPLE += "Yuki Tanaka,Ravi Patel,Fatima Zahra,Noah Brandt,Olena Shevchenko,Chloé Martin,Minh Tran,Zoe Adams".split(",")
TOWNS = "Graz,Lyon,Porto,Turku,Leeds,Nagoya,Recife,Pune,Accra,Kraków,Oaxaca,Hobart,Izmir,Malmö,Quito,Durban".split(",")
ITEMS = "oak shelf,desk lamp,wool blanket,kettle,bike pump,rain jacket,notebook A5,steel bottle,garden hose,chess set".split(
    ","
)
STATES = ["open", "paid", "shipped", "returned", "cancelled"]
SPECIES = "blackbird,great tit,robin,swift,house sparrow,magpie,jay,wren,starling,goldfinch,nuthatch,grey heron".split(
    ","
)
PATHS = "/,/login,/api/orders,/api/orders/{},/static/app.js,/search?q={},/health,/cart,/account/settings".split(",")

Rows = list[dict[str, object]]


def orders(r: Random) -> Rows:
    """Orders of a shop."""
    return [
        {"order": 10_000 + r.randint(0, 89_999), "date": day(r), "customer": r.choice(PEOPLE), "item": r.choice(ITEMS),
         "quantity": r.randint(1, 12), "price": r.randint(199, 19_999) / 100, "state": r.choice(STATES)}
        for _ in range(r.randint(14, 26))
    ]  # fmt: skip


def weather(r: Random) -> Rows:
    """Measurements of stations."""
    return [
        {"station": r.choice(TOWNS), "time": f"{day(r)}T{r.randint(0, 23):02}:{r.choice('0123')}0:00Z",
         "temperature": r.randint(-120, 380) / 10, "humidity": r.randint(18, 100), "pressure": 980 + r.randint(0, 450) / 10,
         "wind": r.choice(["N", "NE", "E", "SE", "S", "SW", "W", "NW"]), "rain": r.choice([None, 0.0, 0.2, 1.4, 8.5])}
        for _ in range(r.randint(14, 26))
    ]  # fmt: skip


def staff(r: Random) -> Rows:
    """People of a company."""
    teams = ["research", "sales", "support", "finance", "design"]
    return [
        {"id": i, "name": name, "email": name.split()[0].lower() + "@example.org", "team": r.choice(teams),
         "city": r.choice(TOWNS), "since": r.randint(1998, 2024), "remote": r.random() < 0.4}
        for i, name in enumerate(r.sample(PEOPLE, r.randint(9, 16)), r.randint(1, 900))
    ]  # fmt: skip


def birds(r: Random) -> Rows:
    """Counts of birds."""
    return [
        {"species": r.choice(SPECIES), "place": r.choice(TOWNS), "count": r.randint(1, 80), "observer": r.choice(PEOPLE),
         "lat": round(r.uniform(-55, 65), 4), "lon": round(r.uniform(-120, 140), 4), "date": day(r)}
        for _ in range(r.randint(14, 24))
    ]  # fmt: skip


def trials(r: Random) -> Rows:
    """Runs of an experiment."""
    return [
        {"run": f"{r.getrandbits(32):08x}", "model": r.choice(["small", "base", "large"]), "lr": r.choice([1e-4, 3e-4, 1e-3]),
         "batch": r.choice([16, 32, 64, 128]), "epoch": r.randint(1, 40), "loss": round(r.uniform(0.1, 4), 4),
         "accuracy": round(r.uniform(0.4, 0.99), 4), "seconds": round(r.uniform(8, 900), 1)}
        for _ in range(r.randint(14, 22))
    ]  # fmt: skip


def day(r: Random) -> str:
    """A date."""
    return f"{r.randint(2015, 2025)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"


def separated(rows: Rows, mark: str) -> str:
    """CSV or the like."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=mark, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(["" if value is None else value for value in row.values()] for row in rows)
    return out.getvalue().strip()


def markdown(rows: Rows, _: Random) -> str:
    """A padded Markdown table."""
    cells = [list(map(str, rows[0])), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "| " + " | ".join("-" * max(3, w) for w in widths) + " |", *lines[1:]])


def html(rows: Rows) -> str:
    """An HTML table."""
    head = "".join(f"<th>{key}</th>" for key in rows[0])
    body = "\n".join("    <tr>" + "".join(f"<td>{value}</td>" for value in row.values()) + "</tr>" for row in rows[:12])
    return f"<table>\n  <thead>\n    <tr>{head}</tr>\n  </thead>\n  <tbody>\n{body}\n  </tbody>\n</table>"


def latex(rows: Rows) -> str:
    """A LaTeX table."""
    lines = " \\\\\n".join(" & ".join(map(str, row.values())) for row in rows[:14])
    keys = " & ".join(f"\\textbf{{{key}}}" for key in rows[0])
    return f"\\begin{{tabular}}{{{'l' * len(rows[0])}}}\n\\hline\n{keys} \\\\\n\\hline\n{lines} \\\\\n\\hline\n\\end{{tabular}}"


def yaml(rows: Rows) -> str:
    """A YAML list."""
    return "\n".join(
        "- " + "\n  ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in row.items())
        for row in rows[:12]
    )


def toml(rows: Rows) -> str:
    """TOML tables."""
    return "\n\n".join(
        "[[record]]\n"
        + "\n".join(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in row.items() if v is not None)
        for row in rows[:12]
    )


def sql(rows: Rows, r: Random) -> str:
    """A table, its rows and queries."""
    types = {int: "INTEGER", float: "NUMERIC(12, 4)", bool: "BOOLEAN", str: "TEXT", type(None): "NUMERIC(12, 4)"}
    name, keys = r.choice(["records", "entries", "events", "log_2024"]), list(rows[0])
    columns = ",\n".join(f"    {key} {types[type(value)]}" for key, value in rows[0].items())
    quoted = [", ".join("NULL" if v is None else f"'{v}'" if isinstance(v, str) else str(v).upper() for v in row.values())
              for row in rows[:12]]  # fmt: skip
    a, b = r.sample(keys, 2)
    number = next(key for key, value in rows[0].items() if type(value) in (int, float))
    return (
        f"CREATE TABLE {name} (\n{columns}\n);\n\nINSERT INTO {name} ({', '.join(keys)}) VALUES\n    ("
        + "),\n    (".join(quoted)
        + f");\n\nCREATE INDEX {name}_{a} ON {name} ({a});\n\nSELECT {a}, count(*) AS n, avg({number}) AS mean\nFROM {name}\n"
        f"WHERE {b} IS NOT NULL\nGROUP BY {a}\nHAVING count(*) > {r.randint(1, 5)}\nORDER BY n DESC, {a}\nLIMIT {r.randint(5, 50)};\n\n"
        f"UPDATE {name} SET {number} = {number} + 1 WHERE {a} = (SELECT min({a}) FROM {name});"
    )


def access_log(rows: Rows, r: Random) -> str:
    """Lines of a web server's log."""
    return "\n".join(
        f"192.0.2.{r.randint(1, 254)} - - [{r.randint(1, 28):02}/Mar/2024:{r.randint(0, 23):02}:{r.randint(0, 59):02}:"
        f'{r.randint(0, 59):02} +0000] "{r.choice(["GET", "GET", "POST", "DELETE"])} '
        f'{r.choice(PATHS).format(r.randint(1, 9999))} HTTP/1.1" {r.choice([200, 200, 200, 304, 404, 500])} {r.randint(90, 90_000)}'
        for _ in rows
    )


RECORDS: tuple[Callable[[Random], Rows], ...] = (orders, weather, staff, birds, trials)
FORMS: tuple[Callable[[Rows, Random], str], ...] = (
    lambda rows, r: separated(rows, ","),
    lambda rows, r: separated(rows, r.choice("\t;|")),
    lambda rows, r: json.dumps(rows[:10], indent=2, ensure_ascii=False),
    lambda rows, r: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    markdown,
    lambda rows, r: html(rows),
    lambda rows, r: latex(rows),
    lambda rows, r: yaml(rows),
    lambda rows, r: toml(rows),
    sql,
    access_log,
)


def table(number: int, r: Random) -> str:
    """A document of one form: `number` goes round the forms and the records."""
    return FORMS[number % len(FORMS)](RECORDS[number % len(RECORDS)](r), r)
