"""Lesson 17, what makes it fast."""

import numpy as np

from ..question import Break, Function, Number

# --- 17.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "17.1",
    "the arithmetic intensity of a matrix product",
    minutes=5,
    difficulty=1,
    answer=2 * 64 * 256 * 1024 / (4 * (64 * 256 + 256 * 1024 + 64 * 1024)),
    hints=(
        "FLOP: each of the 64 x 1024 results is a sum of 256 products. A product and an addition are two.",
        "Bytes: both factors are read and the result is written, with 4 bytes a number.",
    ),
    why="2 * 64 * 256 * 1024 FLOP; 4 * (64 * 256 + 256 * 1024 + 64 * 1024) bytes: 24.4 FLOP per byte. Most of the "
    "bytes are the weight's, and 64 rows use each of its numbers 64 times. For one core, whose roofs meet at a few "
    "FLOP per byte, this is plenty; on a GPU, where they meet far above, memory would be the limit.",
)
q1.wrong("additions not counted", "A product and an addition are two FLOP; and a float32 has 4 bytes.")(q1.answer / 2)
q1.wrong("for each number, not for each byte", "A float32 has 4 bytes.")(q1.answer * 4)
q1.wrong("the result is not counted", "The result must be written: 64 x 1024 numbers more.")(
    2 * 64 * 256 * 1024 / (4 * (64 * 256 + 256 * 1024))
)
q1.wrong("C / 4", "C / 4 holds for N far above C. Here N is 64, so count all three matrices.")(64.0)
q1.wrong("the weight alone", "The input is read and the result is written too.")(32.0)
q1.wrong("bytes for each FLOP", "Intensity is FLOP divided by bytes, not bytes by FLOP.")(1 / q1.answer)


# --- 17.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "17.2",
    "online softmax",
    minutes=15,
    difficulty=2,
    returns=("m", "s", "y"),
    hints=(
        "m is the larger of the two. Each s was taken relative to its own m: by what must it be multiplied to be "
        "relative to the common one?",
        "By exp(m1 - m), and exp(m2 - m). Then s1 y1 and s2 y2, so corrected, are the two sums of exp(x - m) v.",
    ),
    why="With m = max(m1, m2), s1 exp(m1 - m) is the first piece's sum of exp(x - m); so s = s1 exp(m1 - m) + s2 exp("
    "m2 - m), and y = (s1 exp(m1 - m) y1 + s2 exp(m2 - m) y2) / s. No exponent is above 0, so nothing overflows.",
)


@q2.reference
def merge(m1, s1, y1, m2, s2, y2):
    m = max(m1, m2)
    a, b = s1 * np.exp(m1 - m), s2 * np.exp(m2 - m)
    return m, a + b, (a * y1 + b * y2) / (a + b)


@q2.cases
def _(normal):
    def piece(scores):
        m = scores.max()
        e = np.exp(scores - m)
        return m, e.sum(), e @ normal(len(scores), 3) / e.sum()

    yield "a second piece with the larger score", (*piece(normal(4) - 1), *piece(normal(6) + 1))
    yield "a first piece with the larger score", (*piece(normal(6) + 2), *piece(normal(4) - 1))
    yield "large scores", (*piece(1000 + normal(5)), *piece(1001 + normal(5)))
    yield "scores far below zero", (*piece(normal(5) - 1000), *piece(normal(5) - 1002))
    yield "scores far apart", (*piece(normal(3) + 900), *piece(normal(3) - 900))
    yield "nothing in the first piece", (-np.inf, 0.0, np.zeros(3), *piece(normal(5)))


q2.wrong("the sum is not corrected", "s1 was taken relative to m1, and s2 to m2: bring both to the common m first.")(
    lambda m1, s1, y1, m2, s2, y2: (max(m1, m2), s1 + s2, (s1 * y1 + s2 * y2) / (s1 + s2))
)
q2.wrong("only the first sum is corrected", "The second piece may have the smaller maximum: correct both sums.")(
    lambda m1, s1, y1, m2, s2, y2: (
        max(m1, m2),
        (a := s1 * np.exp(m1 - max(m1, m2))) + s2,
        (a * y1 + s2 * y2) / (a + s2),
    )
)


@q2.wrong("the maximum of the last piece", "m is the larger of m1 and m2: relative to m2 the first piece may overflow.")
def _(m1, s1, y1, m2, s2, y2):
    a = s1 * np.exp(m1 - m2)
    return m2, a + s2, (a * y1 + s2 * y2) / (a + s2)


@q2.wrong("corrected the wrong way", "The factor is exp(m1 - m), which is 1 or less, not exp(m - m1).")
def _(m1, s1, y1, m2, s2, y2):
    m = max(m1, m2)
    a, b = s1 * np.exp(m - m1), s2 * np.exp(m - m2)
    return m, a + b, (a * y1 + b * y2) / (a + b)


q2.wrong("no maximum is subtracted", "exp(m1) overflows for a score of 1000: use exp(m1 - m), which is 1 or less.")(
    q2.instead(
        s=lambda m1, s1, y1, m2, s2, y2: (s1 * np.exp(m1) + s2 * np.exp(m2)) / np.exp(max(m1, m2)),
        y=lambda m1, s1, y1, m2, s2, y2: (
            (s1 * np.exp(m1) * y1 + s2 * np.exp(m2) * y2) / (s1 * np.exp(m1) + s2 * np.exp(m2))
        ),
    )
)
q2.wrong("the plain mean of the averages", "Each average counts as much as its corrected sum.")(
    q2.instead(y=lambda m1, s1, y1, m2, s2, y2: (y1 + y2) / 2)
)
q2.wrong("weighted by the sums as they were", "Weigh the averages by the corrected sums, those relative to m.")(
    q2.instead(y=lambda m1, s1, y1, m2, s2, y2: (s1 * y1 + s2 * y2) / (s1 + s2))
)
q2.wrong(
    "the sums in the average are not corrected", "Divide by the new s what the corrected sums weigh, not s1 and s2."
)(q2.instead(y=lambda m1, s1, y1, m2, s2, y2: (s1 * y1 + s2 * y2) / merge(m1, s1, y1, m2, s2, y2)[1]))
q2.wrong("not divided by the sum", "y is an average: divide by the new s.")(
    q2.instead(y=lambda *args: merge(*args)[1] * merge(*args)[2])
)
q2.wrong("s1 and s2 left out of the average", "The weight of y1 is the corrected s1, not exp(m1 - m) alone.")(
    q2.instead(
        y=lambda m1, s1, y1, m2, s2, y2: (
            (np.exp(m1 - max(m1, m2)) * y1 + np.exp(m2 - max(m1, m2)) * y2) / merge(m1, s1, y1, m2, s2, y2)[1]
        )
    )
)


# --- 17.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "17.3",
    "the cache that a matrix product needs",
    minutes=15,
    difficulty=3,
    returns="size",
    hints=(
        "A pair of tiles: how many FLOP does their product take, and how many bytes have to come from memory for it?",
        "2 b^3 FLOP and 2 b^2 numbers, so b / 4 FLOP per byte. Where does that meet peak / bandwidth?",
    ),
    why="A pair of tiles takes 2 b^3 FLOP and brings 2 b^2 numbers, 8 b^2 bytes (the result is written once, which is "
    "little): b / 4 FLOP per byte. So b = 4 P / W, and three tiles are 12 b^2 = 192 (P / W)^2 bytes.",
)


@q3.reference
def cache_needed(peak, bandwidth):
    return 192 * (peak / bandwidth) ** 2


@q3.cases
def _(normal):
    yield "100 GFLOP/s and 20 GB/s", (100e9, 20e9)
    yield "30 GFLOP/s and 10 GB/s", (30e9, 10e9)
    yield "a large GPU", (67e12, 3.35e12)


q3.wrong("two tiles", "The tile of the result needs room too: three tiles.")(
    lambda peak, bandwidth: 128 * (peak / bandwidth) ** 2
)
q3.wrong("one tile", "Three tiles must be there: one of each factor, and one of the result.")(
    lambda peak, bandwidth: 64 * (peak / bandwidth) ** 2
)
q3.wrong("half the intensity", "A pair takes 2 b^3 FLOP and, as the result stays, 8 b^2 bytes: b / 4.")(
    lambda peak, bandwidth: 768 * (peak / bandwidth) ** 2
)
q3.wrong("a factor of 4 missing", "Count bytes, 4 a number; and tiles of both factors are read, 2 b^2 numbers.")(
    lambda peak, bandwidth: 48 * (peak / bandwidth) ** 2
)
q3.wrong("the result moved each time", "The result's tile stays in the cache: 2 b^2 numbers move for a pair.")(
    lambda peak, bandwidth: 432 * (peak / bandwidth) ** 2
)
q3.wrong("numbers for bytes in the intensity", "A number has 4 bytes: b / 4 FLOP per byte, not b FLOP per byte.")(
    lambda peak, bandwidth: 12 * (peak / bandwidth) ** 2
)
q3.wrong("the side of a tile", "That is b; three tiles have 3 b^2 numbers of 4 bytes.")(
    lambda peak, bandwidth: 4 * peak / bandwidth
)
q3.wrong("the ratio upside down", "Arithmetic is the limit from peak / bandwidth FLOP per byte on.")(
    lambda peak, bandwidth: 192 * (bandwidth / peak) ** 2
)


# --- 17.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "17.4",
    "numbers whose one-pass variance is wrong by more than 0.1",
    minutes=6,
    difficulty=2,
    takes="an array of 2 to 100 finite numbers, none beyond 1e15 in size",
    hints=(
        "A difference of two numbers that are nearly equal has few digits left. When are the two nearly equal?",
        "float64 has 16 digits. If the mean is 1e8, how large are the squares, and how far apart are two floats there?",
    ),
    why="For a mean far above the spread, both terms are nearly the square of the mean, and the variance is in the "
    "last digits, which are rounded. At 1e8 the squares are 1e16, where floats are 2 apart; in float32 1e4 is "
    "enough. Subtract the mean first, or use Welford's update (1962), which is one pass and safe.",
)


@q4.right
def _(x):
    return np.mean((x - np.mean(x)) ** 2)


@q4.breaks
def variance(x):
    return np.mean(x * x) - np.mean(x) ** 2


@q4.valid
def _(x):
    if x.ndim != 1 or not 2 <= x.size <= 100 or not np.isfinite(x).all() or (abs(x) > 1e15).any():
        return f"of shape {x.shape}" if x.ndim != 1 or not 2 <= x.size <= 100 else "its numbers are too large"
    return None


q4.example = np.array([1e8, 1e8 + 1, 1e8 + 2])
q4.wrong(
    "all numbers equal",
    "The variance is 0 then, and nearly so here; let the numbers vary.",
    when=lambda x: np.ptp(x) == 0,
)(np.full(4, 3.0))
q4.wrong(
    "a mean that is not far above the spread",
    "The two terms are then of different size, and little is lost, however large the numbers are.",
    when=lambda x: abs(x.mean()) < 100 * x.std(),
)(np.array([-1e9, 2e9, 5e9]))
q4.wrong(
    "the mean is not large enough",
    "The direction is right: float64 has 16 digits, so the squares must be about 1e15 or more.",
    when=lambda x: abs(x.mean()) < 1e7,
)(np.array([1000.0, 1001.0, 1002.0]))
