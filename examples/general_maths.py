"""Worked problems with LaTeX, made from templates: three to five different ones make a worksheet."""

from collections.abc import Callable
from fractions import Fraction
from math import comb, gcd, isqrt
from random import Random

NAMES = (
    "Amara Bruno Chen Dalia Emeka Farid Greta Hana Ivo Jun Kaja Luis Mina Noor Omar Pia Quinn Rosa Sven Tara".split()
)
PLACES = "the market,a school fair,the workshop,a farm,the harbour,a bakery,the library,a garden centre".split(",")
GOODS = "lemons,notebooks,screws,eggs,tickets,tiles,bulbs,candles,apples,postcards".split(",")


def frac(value: Fraction) -> str:
    """LaTeX of a fraction."""
    sign = "-" if value < 0 else ""
    over = f"\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return str(value.numerator) if value.denominator == 1 else sign + over


def term(factor: int, power: int, first: bool = False) -> str:
    """A term of a polynomial in x, with its sign."""
    if factor == 0:
        return ""
    sign = ("-" if factor < 0 else "") if first else (" - " if factor < 0 else " + ")
    number = str(abs(factor)) if abs(factor) != 1 or power == 0 else ""
    return sign + number + ("" if power == 0 else "x" if power == 1 else f"x^{power}")


def poly(factors: list[int]) -> str:
    """A polynomial from its factors, highest power first."""
    parts, first = "", True
    for i, factor in enumerate(factors):
        parts += term(factor, len(factors) - 1 - i, first)
        first = first and factor == 0
    return parts or "0"


def quadratic(r: Random) -> str:
    """A quadratic equation, by factoring or by the formula."""
    a, p, q = r.choice([1, 1, 2, 3]), r.randint(-9, 9), r.randint(-9, 9)
    b, c = -a * (p + q), a * p * q
    root = isqrt(b * b - 4 * a * c)
    return (
        f"Solve ${poly([a, b, c])} = 0$.\n\nThe discriminant is $D = b^2 - 4ac = {b * b} - ({4 * a * c}) = {root * root}$, "
        f"so $\\sqrt D = {root}$ and\n\n$$x_{{1,2}} = \\frac{{-b \\pm \\sqrt D}}{{2a}} = \\frac{{{-b} \\pm {root}}}{{{2 * a}}}.$$\n\n"
        f"The roots are $x_1 = {max(p, q)}$ and $x_2 = {min(p, q)}$. By Vieta, their sum is ${p + q} = -b/a$ and their "
        f"product ${p * q} = c/a$, as it should be."
    )


def system(r: Random) -> str:
    """Two linear equations."""
    x, y, a, b, c, d = r.randint(-6, 9), r.randint(-6, 9), *(r.randint(1, 9) for _ in range(4))
    if a * d == b * c:
        d += 1
    e, f = a * x + b * y, c * x + d * y
    return (
        f"Solve the system\n\n\\begin{{align}}\n{a}x + {b}y &= {e} \\\\\n{c}x + {d}y &= {f}\n\\end{{align}}\n\n"
        f"Multiply the first line by {d} and the second by {b}, and subtract: ${a * d - b * c}\\,x = {e * d - f * b}$, "
        f"so $x = {x}$. Insert it into the first line: ${b}y = {e} - {a * x} = {e - a * x}$, hence $y = {y}$.\n\n"
        f"Check in the second line: ${c}\\cdot({x}) + {d}\\cdot({y}) = {f}$."
    )


def derivative(r: Random) -> str:
    """Extrema of a cubic."""
    p, q = sorted(r.sample(range(-5, 6), 2))
    while (p + q) % 2:
        q += 1
    f = [2, -3 * (p + q), 6 * p * q, r.randint(-9, 9)]
    value = [2 * v**3 + f[1] * v * v + f[2] * v + f[3] for v in (p, q)]
    return (
        f"Find the local extrema of $f(x) = {poly(f)}$.\n\n$f'(x) = {poly([6, 2 * f[1], f[2]])} = 6(x - ({p}))(x - ({q}))$, "
        f"which is zero at $x = {p}$ and $x = {q}$. The second derivative is $f''(x) = {poly([12, 2 * f[1]])}$.\n\n"
        f"- $f''({p}) = {12 * p + 2 * f[1]} < 0$: a maximum at $({p}, {value[0]})$.\n"
        f"- $f''({q}) = {12 * q + 2 * f[1]} > 0$: a minimum at $({q}, {value[1]})$."
    )


def integral(r: Random) -> str:
    """A definite integral of a polynomial."""
    a, b, c, top = r.randint(1, 5), r.randint(-6, 6), r.randint(-6, 6), r.randint(1, 4)
    value = Fraction(a * top**3, 3) + Fraction(b * top**2, 2) + c * top
    return (
        f"Compute $\\int_0^{{{top}}} ({poly([a, b, c])})\\,dx$.\n\nAn antiderivative is "
        f"$F(x) = {frac(Fraction(a, 3))}x^3 + ({frac(Fraction(b, 2))})x^2 + ({c})x$. Since $F(0) = 0$, the integral is\n\n"
        f"$$F({top}) = {frac(Fraction(a * top**3, 3))} + ({frac(Fraction(b * top**2, 2))}) + ({c * top}) = {frac(value)}.$$"
    )


def euclid(r: Random) -> str:
    """The greatest common divisor, with the steps."""
    g = r.randint(2, 30)
    a, b = g * r.randint(20, 90), g * r.randint(5, 40)
    x, y, steps = a, b, []
    while y:
        steps.append(f"{x} &= {x // y}\\cdot {y} + {x % y}")
        x, y = y, x % y
    return (
        f"Find $\\gcd({a}, {b})$ and $\\operatorname{{lcm}}({a}, {b})$.\n\nEuclid's algorithm:\n\n\\begin{{align*}}\n"
        + " \\\\\n".join(steps)
        + f"\n\\end{{align*}}\n\nThe last remainder that is not zero is {x}, so $\\gcd = {x}$, and "
        f"$\\operatorname{{lcm}} = {a}\\cdot{b}/{x} = {a * b // x}$."
    )


def hands(r: Random) -> str:
    """Probability without putting back."""
    red, blue, drawn = r.randint(3, 9), r.randint(3, 9), r.randint(2, 4)
    wanted = r.randint(0, min(red, drawn))
    ways, total = comb(red, wanted) * comb(blue, drawn - wanted), comb(red + blue, drawn)
    return (
        f"A box holds {red} red and {blue} blue balls. {drawn} are drawn without putting back. How likely are exactly "
        f"{wanted} red ones?\n\nOf $\\binom{{{red + blue}}}{{{drawn}}} = {total}$ equally likely hands, "
        f"$\\binom{{{red}}}{{{wanted}}}\\binom{{{blue}}}{{{drawn - wanted}}} = {ways}$ are of this kind, so "
        f"$P = {frac(Fraction(ways, total))} \\approx {ways / total:.4f}$."
    )


def shopping(r: Random) -> str:
    """A story with prices."""
    name, other = r.sample(NAMES, 2)
    good, count, price, off = r.choice(GOODS), r.randint(6, 60), r.randint(15, 400), r.choice([5, 10, 15, 20, 25])
    total = count * price
    return (
        f"At {r.choice(PLACES)}, {name} buys {count} {good} at {price / 100:.2f} each and gets {off} % off. {other} pays a "
        f"third of it. How much does {name} pay?\n\nWithout the discount: {count} × {price / 100:.2f} = {total / 100:.2f}. "
        f"The discount is {total / 100:.2f} × {off / 100} = {total * off / 10000:.2f}, which leaves "
        f"{total * (100 - off) / 10000:.2f}. {name} pays two thirds of that: **{total * (100 - off) / 15000:.2f}**."
    )


def matrix(r: Random) -> str:
    """Determinant, trace and inverse of a 2x2 matrix."""
    a, b, c, d = (r.randint(-6, 9) for _ in range(4))
    det = a * d - b * c
    inverse = "It is singular: the columns are multiples of each other, so there is no inverse."
    if det:
        cells = [frac(Fraction(v, det)) for v in (d, -b, -c, a)]
        inverse = (
            f"$$A^{{-1}} = \\begin{{pmatrix}} {cells[0]} & {cells[1]} \\\\ {cells[2]} & {cells[3]} \\end{{pmatrix}}.$$"
        )
    return (
        f"Let $A = \\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}}$. Then $\\operatorname{{tr}} A = {a + d}$ and "
        f"$\\det A = {a}\\cdot({d}) - ({b})\\cdot({c}) = {det}$; the characteristic polynomial is "
        f"$\\lambda^2 - ({a + d})\\lambda + ({det})$.\n\n{inverse}"
    )


def modular(r: Random) -> str:
    """Powers modulo a number, by squaring."""
    base, power, m = r.randint(2, 12), r.randint(20, 99), r.choice([7, 11, 13, 17, 19, 23, 29, 31])
    lines, value, bit = [], base % m, 1
    while bit * 2 <= power:
        bit, value = bit * 2, value * value % m
        lines.append(f"{base}^{{{bit}}} \\equiv {value}")
    used = [2**i for i in range(7) if power >> i & 1]
    return (
        f"What is the remainder of ${base}^{{{power}}}$ divided by {m}?\n\nSquare again and again modulo {m}: $"
        + ",\\ ".join(lines)
        + f"$. Since ${power} = {' + '.join(map(str, used))}$, multiply those powers: the remainder is "
        f"**{pow(base, power, m)}**."
    )


def statistics(r: Random) -> str:
    """Mean, median and variance of a sample."""
    data = [r.randint(2, 40) for _ in range(r.choice([5, 6, 7, 8]))]
    n, ordered = len(data), sorted(data)
    mean, median = Fraction(sum(data), n), Fraction(ordered[(n - 1) // 2] + ordered[n // 2], 2)
    spread = sum((v - mean) ** 2 for v in data)
    return (
        f"{r.choice(NAMES)} measured {', '.join(map(str, data))}.\n\n- Mean: ${sum(data)}/{n} = {float(mean):.3f}$\n"
        f"- Median: sorted, {', '.join(map(str, ordered))}; the middle is {float(median):g}\n- Sample variance: $\\frac{{1}}{{{n - 1}}}"
        f"\\sum (x_i - \\bar x)^2 = {float(spread / (n - 1)):.3f}$, standard deviation {float(spread / (n - 1)) ** 0.5:.3f}"
    )


def series(r: Random) -> str:
    """A geometric or an arithmetic sum."""
    a, n = r.randint(1, 9), r.randint(6, 30)
    if r.random() < 0.5:
        d = r.randint(2, 12)
        return (
            f"Sum the first {n} terms of ${a}, {a + d}, {a + 2 * d}, \\ldots$\n\nThe last term is ${a} + {n - 1}\\cdot {d} = "
            f"{a + (n - 1) * d}$. Pairing first and last, $S = \\frac{{{n}}}{{2}}({a} + {a + (n - 1) * d}) = "
            f"{n * (2 * a + (n - 1) * d) // 2}$."
        )
    q = r.randint(2, 3)
    return (
        f"Show that $\\sum_{{k=0}}^{{n-1}} {a}\\cdot {q}^k = {a}\\,\\frac{{{q}^n - 1}}{{{q - 1}}}$ and evaluate it for $n = {n // 2}$.\n\n"
        f"Let $S$ be the sum. Then ${q}S - S = {a}\\cdot {q}^n - {a}$, since all terms between cancel, and dividing by "
        f"{q - 1} gives the formula. For $n = {n // 2}$ it is ${a * (q ** (n // 2) - 1) // (q - 1)}$."
    )


def geometry(r: Random) -> str:
    """A right triangle with whole sides."""
    m, n = sorted(r.sample(range(1, 9), 2), reverse=True)
    a, b, c = m * m - n * n, 2 * m * n, m * m + n * n
    g = gcd(gcd(a, b), c)
    return (
        f"In a triangle $ABC$ with the right angle at $C$, $BC = {a}$ and $CA = {b}$. Then $AB = \\sqrt{{{a}^2 + {b}^2}} = "
        f"\\sqrt{{{a * a + b * b}}} = {c}$. The area is ${frac(Fraction(a * b, 2))}$, the radius of the inscribed circle "
        f"$\\rho = \\frac{{a + b - c}}{{2}} = {frac(Fraction(a + b - c, 2))}$, and $\\sin A = {frac(Fraction(a, c))}$. "
        + ("The sides have no common factor." if g == 1 else f"All sides are multiples of {g}.")
    )


TEMPLATES: tuple[Callable[[Random], str], ...] = (
    quadratic, system, derivative, integral, euclid, hands, shopping, matrix, modular, statistics, series, geometry,
)  # fmt: skip


def worksheet(r: Random) -> str:
    """Four to six problems, numbered in one of three ways."""
    chosen, form = r.sample(TEMPLATES, r.randint(4, 6)), r.choice(["**Problem {}.** ", "## Exercise {}\n\n", "{}. "])
    return "\n\n".join(form.format(i) + template(r) for i, template in enumerate(chosen, 1))
