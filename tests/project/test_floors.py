"""The house has floors: a room imports only rooms on lower floors, and nothing imports a command."""

import ast

import pytest
from reference import ROOT

# From the ground up. A file at the top of the tree is a room of its own.
FLOORS = """
    runtime utils modeling glm1 glm2 glm3 modes train_types rows checkpoints generation reports evaluation data_set
    training judging flags comparison
""".split()
COMMANDS = "train predict merge_lora score compare judge forgetting doctor".split()
MOST_FILES_AT_THE_TOP = 12


def modules():
    """{dotted name: path} of everything that the commands are made of."""
    paths = [*ROOT.glob("*.py"), *(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules()


def room(name):
    return name.split(".")[0]


class AtRuntime(ast.NodeTransformer):
    """Without what is imported for type hints alone."""

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imported(path, at_runtime=False):
    """Our modules that a file imports, inside functions too. at_runtime: not those of type hints alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(AtRuntime().visit(tree) if at_runtime else tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        yield from (name for name in names if name in MODULES)


IMPORTS = {name: set(imported(path)) - {name} for name, path in MODULES.items()}
AT_RUNTIME = {name: set(imported(path, at_runtime=True)) - {name} for name, path in MODULES.items()}


def test_the_top_is_a_table_of_contents():
    at_the_top = {path.stem for path in ROOT.glob("*.py")}
    assert len(at_the_top) <= MOST_FILES_AT_THE_TOP
    assert at_the_top - set(FLOORS) == set(COMMANDS)
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms <= set(FLOORS)


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_point_down(name):
    height = {floor: number for number, floor in enumerate([*FLOORS, "a command"])}
    own = height.get(room(name), len(FLOORS))
    for other in IMPORTS[name]:
        assert room(other) not in COMMANDS, f"{name} imports the command {other}"
        assert room(other) == room(name) or height[room(other)] < own, f"{name} imports {other}, which is not below it"


def test_nothing_imports_a_command():
    for folder in ("scripts", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            assert not {room(name) for name in imported(path)} & set(COMMANDS), path


def test_no_circles():
    """Inside a room files import each other, but not in circles; a type hint may name what lies above."""
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for other in sorted(AT_RUNTIME[name]):
                visit(other)
            done.add(open_.pop())

    for name in IMPORTS:
        visit(name)
