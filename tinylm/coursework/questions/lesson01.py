"""Lesson 01, the tape.

A tape here is a list with an entry for each number, in the order in which they were computed: a list of (index of an
input, slope of the number with respect to it). A number that was given and not computed has an empty entry.
"""

import numpy as np

from ..question import Break, Function, Number

# --- 01.1 -----------------------------------------------------------------------------------------------------------

q1 = Number(
    "01.1",
    "the gradient of a number that is used twice",
    minutes=3,
    difficulty=1,
    answer=4.0,
    hints=(
        "a is used twice: in the product, and in the sum.",
        "Each use gives a slope; they add up.",
    ),
    why="y = a b + a has the slope b + 1 with respect to a: b through the product and 1 through the sum, which is 4.",
)
q1.wrong("only the product", "a is used in the sum too: there the slope is 1.")(3.0)
q1.wrong("only the sum", "a is used in the product too: there the slope is b.")(1.0)
q1.wrong("the slope of b", "That is dy/db = a.")(2.0)
q1.wrong("the value of y", "That is y; its gradient with respect to a is wanted.")(8.0)


# --- 01.2 -----------------------------------------------------------------------------------------------------------

q2 = Function(
    "01.2",
    "a backward over a tape",
    minutes=15,
    difficulty=2,
    returns="gradients",
    hints=(
        "Start with the gradient 1 at the last number, and go from the last entry to the first.",
        "For each input of an entry: its gradient grows by slope times the entry's own gradient.",
    ),
    why="When the walk reaches a number, all numbers that use it have been walked, because they were computed later. "
    "So its gradient is complete, and may be passed on to its inputs: gradient[input] += slope * gradient[number].",
)


@q2.reference
def gradients(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    for i in reversed(range(len(tape))):
        for parent, slope in tape[i]:
            grads[parent] += slope * grads[i]
    return grads


CHAIN = [[], [(0, 2.0)], [(1, 3.0)]]
TWICE = [[], [(0, 1.0), (0, 1.0)], [(1, 1.0), (1, 1.0)]]  # b = a + a, c = b + b
FORK = [[], [], [(0, 5.0), (1, 2.0)], [(2, 3.0)], [(2, 1.0), (3, 4.0)], [(4, 2.0), (0, -1.0)]]
UNUSED = [[], [(0, 2.0)], [(0, 3.0)], [(2, 4.0)]]  # nothing uses number 1


@q2.cases
def _(normal):
    yield "a chain", (CHAIN,)
    yield "b = a + a, c = b + b", (TWICE,)
    yield "numbers that are used again later", (FORK,)
    yield "a number that the result does not use", (UNUSED,)
    yield "one number", ([[]],)


@q2.wrong("assigned, not added", "A number that is used twice gets a gradient from each use: +=.")
def _(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    for i in reversed(range(len(tape))):
        for parent, slope in tape[i]:
            grads[parent] = slope * grads[i]
    return grads


@q2.wrong("walked forwards", "Begin at the last number: the gradients come from there.")
def _(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    for i in range(len(tape)):
        for parent, slope in tape[i]:
            grads[parent] += slope * grads[i]
    return grads


@q2.wrong("passed on before it is complete", "This passes a gradient on at each visit, and counts parts of it again.")
def _(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1

    def visit(i):
        for parent, slope in tape[i]:
            grads[parent] += slope * grads[i]
            visit(parent)

    visit(len(tape) - 1)
    return grads


@q2.wrong("no start", "The last number's gradient with respect to itself is 1; everything is a multiple of that.")
def _(tape):
    return np.zeros(len(tape))


@q2.wrong("slopes not multiplied", "The chain rule multiplies: slope times the gradient of the number.")
def _(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    for i in reversed(range(len(tape))):
        for parent, slope in tape[i]:
            grads[parent] += slope
    return grads


@q2.wrong("only the first input", "A number may have several inputs; each one gets its share.")
def _(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    for i in reversed(range(len(tape))):
        for parent, slope in tape[i][:1]:
            grads[parent] += slope * grads[i]
    return grads


# --- 01.3 -----------------------------------------------------------------------------------------------------------

q3 = Function(
    "01.3",
    "the backward of a division",
    minutes=10,
    difficulty=2,
    returns=("da", "db"),
    hints=(
        "y = a / b is linear in a. What is its slope?",
        "1 / b has the slope -1 / b^2.",
    ),
    why="dy/da = 1 / b and dy/db = -a / b^2. Each output depends on its own a and b, so backward multiplies element by "
    "element: da = dy / b, db = -dy a / b^2.",
)


@q3.reference
def divide_backward(dy, a, b):
    return dy / b, -dy * a / (b * b)


@q3.cases
def _(normal):
    b = normal(4)
    yield "a row of numbers", (normal(4), normal(4), b + np.sign(b))
    b = normal(2, 3)
    yield "a matrix", (normal(2, 3), normal(2, 3), b + np.sign(b))


@q3.wrong("the sign of db", "A larger b makes y smaller: there is a minus.")
def _(dy, a, b):
    return dy / b, dy * a / (b * b)


@q3.wrong("b not squared", "The slope of 1 / b is -1 / b^2.")
def _(dy, a, b):
    return dy / b, -dy * a / b


@q3.wrong("a is missing in db", "y is a times 1 / b, so db has the factor a.")
def _(dy, a, b):
    return dy / b, -dy / (b * b)


@q3.wrong("dy is not used", "These are the right slopes; backward returns them times dy.")
def _(dy, a, b):
    return 1 / b, -a / (b * b)


@q3.wrong("as for a product", "In a product da is dy b; in a quotient it is dy / b.")
def _(dy, a, b):
    return dy * b, -dy * a / (b * b)


# --- 01.4 -----------------------------------------------------------------------------------------------------------

q4 = Break(
    "01.4",
    "a tape that a walk in breadth gets wrong",
    minutes=10,
    difficulty=3,
    takes="a tape: a list of lists of (index of an earlier number, slope), of at most 50 numbers",
    arrays=False,
    hints=(
        "A number is passed on as soon as it comes to the front of the queue. When is that too early?",
        "Let the last number use number 1 directly, and also by way of a longer path.",
    ),
    why="Let 2 be computed from 1, and 3 from 1 and 2. From 3 the queue takes 1, then 2. It passes 1 on before 2 has "
    "sent its part to 1, so that part never reaches 0. The order of computation has no such case.",
)


@q4.right
def _(tape):
    return gradients(tape)


@q4.breaks
def breadth_first(tape):
    grads = np.zeros(len(tape))
    grads[-1] = 1
    queue, seen = [len(tape) - 1], {len(tape) - 1}
    while queue:
        i = queue.pop(0)
        for parent, slope in tape[i]:
            grads[parent] += slope * grads[i]
            if parent not in seen:
                seen.add(parent)
                queue.append(parent)
    return grads


@q4.valid
def _(tape):
    fair = isinstance(tape, list) and 1 <= len(tape) <= 50
    for i, entry in enumerate(tape):
        fair = fair and isinstance(entry, list) and len(entry) <= 50
        fair = fair and all(0 <= parent < i and np.isfinite(slope) for parent, slope in entry)
    return None if fair else "it is no such tape"


q4.example = [[], [(0, 1.0)], [(1, 1.0)], [(1, 1.0), (2, 1.0)]]
q4.wrong(
    "a chain", "In a chain there is one path, and one order.", when=lambda tape: all(len(entry) < 2 for entry in tape)
)(CHAIN)
q4.wrong(
    "the same input twice",
    "b + b sends both parts at once. The parts must arrive at different times.",
    when=lambda tape: all(len({parent for parent, _ in entry}) < 2 for entry in tape),
)(TWICE)
q4.wrong(
    "paths of one length",
    "Here every number is complete when it comes up. Make one path to it longer than another.",
    when=lambda tape: True,
)([[], [(0, 1.0)], [(0, 2.0)], [(1, 1.0), (2, 1.0)]])
