"""The kinds of faults, on a few lines; that tests find them out is a matter of `python -m tests.mutation`."""

import ast

import pytest

from tests.mutation.covering import Covered, function_at, that_may_find
from tests.mutation.mutants import mutants_of
from tests.mutation.running import ROOT, drawn


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("x = a < b", {"comparison: a <= b", "comparison: a >= b"}),
        ("x = a is None", {"comparison: a is not None"}),
        ("x = 3", {"number: 4", "number: 2"}),
        ("x = 0.1", {"number: 0.2"}),
        ("x = True", {"flag: False"}),
        ("x = a[-n:]", {"slice: n:", "slice: :n", "slice: :-n"}),
        ("x = a[:n]", {"slice: n:", "slice: :-n"}),
        ("x = f(a, b, c)", {"arguments: f(b, a, c)", "arguments: f(a, c, b)"}),
        ("x = f(a, a)", set()),
        ("x = min(a, b)", {"extreme: max(a, b)"}),
        ("x = a.amax(n)", {"extreme: a.amin(n)"}),
        ("x = a * b", {"arithmetic: a / b"}),
        ("x = a & ~b", {"logic: a | ~b", "logic: b"}),
        ("x = a and b", {"logic: a or b"}),
        ("x = a if b else c", {"choice: c if b else a"}),
        ("f(a)", {"statement: pass"}),
        ("x += a", {"statement: pass"}),
        ("if a:\n    raise E('text', 3)", {"guard: if False: raise E('text', 3)"}),
        ("if a:\n    f()", {"guard: if False: f()", "guard: if True: f()", "statement: pass"}),
        ('"""Text."""', set()),
        ("x = f'{3}'", set()),
        ("x: int = b", set()),
        ("def describe(self):\n    return 3", set()),
        ("if TYPE_CHECKING:\n    f()", set()),
    ],
)
def test_faults(line, faults):
    found = mutants_of(line, "a.py")
    assert {f"{mutant.kind}: {mutant.now}" for mutant in found} == faults
    for mutant in found:
        compile(mutant.tree, "a.py", "exec")
        assert ast.unparse(mutant.tree) != ast.unparse(ast.parse(line))


@pytest.mark.parametrize("room", ["operators", "positions"])
def test_the_same_numbers_draw_the_same_mutants(room):
    first, again, other = (list(map(str, drawn(room, 5, seed))) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 5
    assert all((ROOT / "mminfer" / place.partition(":")[0]).is_file() for place in first)


MODULE = """LIMIT = 3

class Rule:
    size = 4

    @property
    def least(self):
        def inner(x=5):
            return x + 1
        return inner()

def most(a, b=LIMIT):
    return max(a, b)
"""


def test_a_fault_belongs_to_the_innermost_function_whose_body_has_it():
    begins = [function_at(MODULE, line) for line in range(1, 14)]
    assert begins == [*[None] * 7, 6, 8, 6, None, None, 12]


def test_tests_that_never_enter_a_function_are_left_out():
    covered = [
        Covered("tests/a/test_slow.py::one", 9.0, frozenset({"a/rule.py:6", "a/rule.py:12"})),
        Covered("tests/a/test_fast.py::one[1]", 0.1, frozenset({"a/rule.py:6"})),
        Covered("tests/a/test_rule.py::one", 20.0, frozenset({"a/rule.py:6"})),
        Covered("tests/a/test_fast.py::other", 0.1, frozenset({"b/rule.py:12"})),
    ]
    slow, fast, named, _ = (c.test for c in covered)
    assert that_may_find(covered, "a/rule.py:10:0", MODULE) == [named, fast, slow]
    assert that_may_find(covered, "a/rule.py:13:4", MODULE) == [slow]
    for everybody in ("a/rule.py:1:0", "a/rule.py:9:4"):  # where a module loads, and where nobody was seen
        assert len(that_may_find(covered, everybody, MODULE)) == 4
