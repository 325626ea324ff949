"""The kinds of faults, on a few lines; that tests find them out is a matter of `python -m tests.mutation`."""

import ast

import pytest

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
