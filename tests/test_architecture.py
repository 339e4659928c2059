"""The structure of the code: layers, cycles, sizes, names that stay where they are defined, and the
page that describes it. Each check also runs on a made-up source or page that violates it."""

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"

# From the ground up. A module imports from its own layer's packages only downwards, and from layers
# below; entries of one line do not import one another.
LAYERS = [
    ["utils"],
    ["preflab.objective", "preflab.distributed", "preflab.readers", "preflab.reports"],
    [
        "losses",
        "pair_losses",
        "list_losses",
        "token_losses",
        "preference_datasets",
        "preflab.batching",
        "preflab.settings",
    ],
    ["preflab.modeling", "preflab.sweeps"],
    ["preflab.training", "preflab.rewards"],
    ["preflab.serving"],
    ["preflab.evaluation"],
    ["trainers"],
    ["preflab.atlas", "preflab.online"],
    ["preflab.checks"],
    ["preflab.execution"],
    ["preflab.api"],
    ["preflab.study"],
    ["train", "hydra_plugins.preflab"],
    [
        "generate",
        "judge",
        "report",
        "study",
        "serve_reward",
        "train_risk_preferences",
        "rewards",
    ],
]

# What is optimised, how responses become rows, and where a model lives: no module of one axis
# imports a module of another.
AXES = {
    "objective": ["preflab.objective", "losses", "pair_losses", "list_losses", "token_losses"],
    "batching": ["preflab.batching"],
    "parallelism": [
        "preflab.distributed",
        "preflab.modeling.parallelism",
        "preflab.modeling.fsdp",
        "preflab.modeling.tensor_parallel",
        "preflab.modeling.placed_weights",
    ],
}

WIDEST = 100  # columns
LONGEST_FUNCTION = 60  # lines, without decorators
LONGEST_CLASS = 250  # lines, without decorators; not of tests
LONGEST_FILE = 500  # lines; not of tests

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
Graph = dict[str, set[str]]  # module: the project modules that it imports

# --------------------------------------------------------------------------------------- the source


@cache
def modules() -> dict[str, Path]:
    """All modules of the project by dotted name; tests, scripts and benchmarks are not layers."""
    folders = (ROOT / "preflab", ROOT / "hydra_plugins")
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return {dotted(path): path for path in sorted(paths)}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(source(path))


@cache
def tracked_files() -> list[Path]:
    """Every Python file that git tracks; without git, every one in the folders of the project."""
    command = ["git", "ls-files", "-z", "--", "*.py"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = done.stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        folders = ("preflab", "tests", "scripts", "experiments", "benchmarks")
        paths = [*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).rglob("*.py"))]
        names = [path.relative_to(ROOT).as_posix() for path in paths]
    return [ROOT / name for name in sorted(filter(None, names)) if (ROOT / name).is_file()]


# ------------------------------------------------------------------------------------------ imports


def imported(parsed: ast.Module, package: str, known: Iterable[str]) -> set[str]:
    """The modules among `known` that a source imports, anywhere in it.

    package: the one that the source is in, for relative imports. An imported package stands for its
    `__init__.py`.
    """
    names = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            origin = importlib.util.resolve_name(name, package)
            members = {f"{origin}.{alias.name}" for alias in node.names}
            submodules = members & set(known)
            names |= submodules
            if submodules != members:
                names.add(origin)
    return names & set(known)


@cache
def graph() -> Graph:
    imports = {}
    for name, path in modules().items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        imports[name] = imported(tree(path), package, modules().keys()) - {name}
    return imports


def room(name: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return ".".join(name.split(".")[:2])


def upward_imports(imports: Graph) -> list[str]:
    return [
        f"{name} imports {other}, which is no lower layer"
        for name, others in imports.items()
        for other in sorted(others)
        if name != "preflab" and room(other) != room(name)
        if LEVEL.get(room(other), 99) >= LEVEL[room(name)]
    ]


def imports_out_of_the_package(imports: Graph) -> list[str]:
    return [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in sorted(others)
        if room(name).startswith("preflab")
        if not room(other).startswith("preflab") and other != "utils"
    ]


def axis_of(name: str) -> str | None:
    for axis, members in AXES.items():
        if any(f"{name}.".startswith(f"{member}.") for member in members):
            return axis
    return None


def imports_between_axes(imports: Graph) -> list[str]:
    return [
        f"{name} ({axis_of(name)}) imports {other} ({axis_of(other)})"
        for name, others in imports.items()
        for other in sorted(others)
        if axis_of(name) and axis_of(other) not in (None, axis_of(name))
    ]


def cycle_from(start: str, imports: Graph) -> list[str]:
    """A path of imports from a module back to itself; empty if there is none."""
    stack = [(start, [start])]
    seen = set()
    while stack:
        here, path = stack.pop()
        for there in imports.get(here, ()):
            if there == start:
                return [*path, start]
            if there not in seen:
                seen.add(there)
                stack.append((there, [*path, there]))
    return []


def lines_of(problems: Iterable[str]) -> str:
    return "\n" + "\n".join(problems)


def test_every_module_belongs_to_a_layer():
    assert {room(name) for name in modules()} - {"preflab"} == set(LEVEL)


def test_imports_go_down_only():
    problems = upward_imports(graph())
    assert not problems, lines_of(problems)


def test_the_package_imports_no_top_level_file_but_utils():
    problems = imports_out_of_the_package(graph())
    assert not problems, lines_of(problems)


def test_the_axes_do_not_import_one_another():
    named = {member for members in AXES.values() for member in members}
    assert named <= {*modules(), *map(room, modules())}
    problems = imports_between_axes(graph())
    assert not problems, lines_of(problems)


def test_there_is_no_cycle():
    cycles = [cycle for name in modules() if (cycle := cycle_from(name, graph()))]
    assert not cycles, " -> ".join(cycles[0])


def test_imports_are_seen_in_every_form():
    known = ["utils", "preflab", "preflab.training", "preflab.training.learner"]
    forms = {
        "import utils as u": {"utils"},
        "def f():\n    from preflab.training import learner": {"preflab.training.learner"},
        "from preflab.training import learner, name": set(known[2:]),
        "from .training import learner": {"preflab.training.learner"},
        "from . import training": {"preflab.training"},
        "import torch\nfrom pathlib import Path": set(),
    }
    assert {text: imported(ast.parse(text), "preflab", known) for text in forms} == forms


def test_wrong_imports_are_caught():
    good: Graph = {"preflab.training.learner": {"preflab.modeling.fsdp", "utils"}}
    assert not upward_imports(good) and not imports_out_of_the_package(good)
    assert not imports_between_axes(good)
    up: Graph = {"preflab.modeling.loading": {"preflab.training.learner"}}
    assert upward_imports(up) == [
        "preflab.modeling.loading imports preflab.training.learner, which is no lower layer"
    ]
    beside: Graph = {"preflab.rewards.text": {"preflab.training.metrics"}}
    assert upward_imports(beside) and upward_imports({"losses": {"preflab"}})
    out: Graph = {"preflab.training.learner": {"losses"}}
    assert imports_out_of_the_package(out) == ["preflab.training.learner imports losses"]
    across: Graph = {"preflab.batching.collate": {"preflab.objective.types"}}
    assert not upward_imports(across) and imports_between_axes(across) == [
        "preflab.batching.collate (batching) imports preflab.objective.types (objective)"
    ]
    round_trip: Graph = {"a": {"b"}, "b": {"c"}, "c": {"d", "a"}, "d": set()}
    assert cycle_from("a", round_trip) == ["a", "b", "c", "a"] and not cycle_from("d", round_trip)


# -------------------------------------------------------------------------------------------- sizes


def is_test(path: Path) -> bool:
    return "tests" in path.relative_to(ROOT).parts


def wide_lines(text: str) -> list[str]:
    return [
        f"line {number} has {len(line)} columns"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > WIDEST
    ]


def long_definitions(parsed: ast.Module, *classes: type, limit: int) -> list[str]:
    """Functions or classes with more than `limit` lines, from `def` or `class` to the last."""
    sizes = {
        node: node.end_lineno - node.lineno + 1
        for node in ast.walk(parsed)
        if isinstance(node, classes)
    }
    return [
        f"{node.name} (line {node.lineno}) has {size} lines"
        for node, size in sizes.items()
        if size > limit
    ]


def long_functions(parsed: ast.Module) -> list[str]:
    classes = (ast.FunctionDef, ast.AsyncFunctionDef)
    return long_definitions(parsed, *classes, limit=LONGEST_FUNCTION)


def long_classes(parsed: ast.Module) -> list[str]:
    return long_definitions(parsed, ast.ClassDef, limit=LONGEST_CLASS)


def long_file(text: str) -> list[str]:
    size = len(text.splitlines())
    return [f"{size} lines"] if size > LONGEST_FILE else []


def in_files(check, read, *, tests: bool) -> list[str]:
    """The problems that `check(read(path))` reports of all files; tests: of tests as well."""
    return [
        f"{path.relative_to(ROOT).as_posix()}: {problem}"
        for path in tracked_files()
        if tests or not is_test(path)
        for problem in check(read(path))
    ]


def test_files_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    assert {"losses.py", "preflab/objective/types.py", "tests/test_architecture.py"} <= names


def test_lines_have_at_most_100_columns():
    problems = in_files(wide_lines, source, tests=True)
    assert not problems, lines_of(problems)


def test_files_have_at_most_500_lines():
    problems = in_files(long_file, source, tests=False)
    assert not problems, lines_of(problems)


def test_functions_have_at_most_60_lines():
    problems = in_files(long_functions, tree, tests=False)
    assert not problems, lines_of(problems)


def test_classes_have_at_most_250_lines():
    problems = in_files(long_classes, tree, tests=False)
    assert not problems, lines_of(problems)


def test_what_is_too_large_is_caught():
    assert not wide_lines("x" * 100 + "\n" + "y" * 100)
    assert wide_lines("x\n" + "y" * 101) == ["line 2 has 101 columns"]
    assert not long_file("x\n" * 500) and long_file("x\n" * 501) == ["501 lines"]

    def body(n: int) -> str:
        return "        x = 1\n" * n

    parsed = ast.parse(f"class A:\n    @d(\n        1\n    )\n    def f():\n{body(59)}")
    assert not long_functions(parsed)
    parsed = ast.parse(f"class A:\n    async def f():\n{body(60)}")
    assert long_functions(parsed) == ["f (line 2) has 61 lines"]
    inner = ast.parse(f"def f():\n    def g():\n{body(60)}")
    assert long_functions(inner) == ["f (line 1) has 62 lines", "g (line 2) has 61 lines"]
    assert not long_classes(ast.parse(f"class A:\n    if 1:\n{body(248)}"))
    parsed = ast.parse(f"x = 1\nclass A:\n    if 1:\n{body(249)}")
    assert long_classes(parsed) == ["A (line 2) has 251 lines"]


# ------------------------------------------------------------------------ names of losses, trainers


def registered_names(parsed: ast.Module) -> set[str]:
    """The names that a source registers, by `@register_loss("name")` and `@register_trainer`."""
    names = set()
    for node in ast.walk(parsed):
        for decorator in getattr(node, "decorator_list", ()):
            match decorator:
                case ast.Call(func=ast.Name("register_loss"), args=[ast.Constant(name), *_]):
                    names.add(name)
                case ast.Name("register_trainer"):
                    names.add(node.name)
    return names


def choices_by_name(parsed: ast.Module, names: set[str]) -> list[str]:
    """Where a source decides by one of `names`: it compares with the name, or with a class of that
    name, matches it, or looks it up in a collection.

    A text that contains a name, such as an error message, is none of these.
    """
    uses = {
        (expression.lineno, name)
        for node in ast.walk(parsed)
        for expression in _deciding(node)
        if (name := _name(expression)) in names
    }
    return [f"line {line} decides by the name {name}" for line, name in sorted(uses)]


def _name(node: ast.AST) -> str | None:
    match node:
        case ast.Constant(str(name)):
            return name
        # Of classes only: a variable may have the name of a loss.
        case ast.Name(name) | ast.Attribute(attr=name) if name[:1].isupper():
            return name
    return None


def _deciding(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions of a node on whose value something depends."""
    match node:
        case ast.Compare():
            yield from (node.left, *node.comparators)
        case ast.MatchValue(value):
            yield value
        case ast.MatchClass(cls=value):
            yield value
        case ast.Tuple(elts=values) | ast.List(elts=values) | ast.Set(elts=values):
            yield from (value for value in values if isinstance(value, ast.Constant))
        case ast.Dict(keys=keys):
            yield from (key for key in keys if key is not None)
        case ast.Subscript(slice=key):
            yield key
        case ast.Call(func=ast.Name("isinstance" | "issubclass"), args=[_, classes]):
            yield from classes.elts if isinstance(classes, ast.Tuple) else (classes,)
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith" | "get"), args=[key, *_]):
            yield key


@cache
def all_registered() -> set[str]:
    return set().union(*(registered_names(tree(path)) for path in modules().values()))


def test_registered_names_are_found():
    trainers = registered_names(tree(modules()["trainers"]))
    assert {"BasicTrainer", "FSDPTrainer"} <= trainers
    options = {path.stem for path in (ROOT / "config" / "loss").glob("*.yaml")}
    assert all_registered() - trainers == options


def test_nothing_is_decided_by_the_name_of_a_loss_or_trainer():
    problems = [
        f"{path.relative_to(ROOT).as_posix()}: {problem}"
        for path in modules().values()
        for problem in choices_by_name(tree(path), all_registered())
    ]
    assert not problems, lines_of(problems)


@pytest.mark.parametrize(
    "text",
    [
        'if config.loss.name == "tdpo2": pass',
        'x = "tdpo2" != name',
        'wide = loss.name in ("dpo", "tdpo2")',
        'KL = {"tdpo2"}\nx = name in KL',
        'factor = {"tdpo2": 2}[name]',
        'factor = table["tdpo2"]',
        'factor = factors.get("tdpo2", 1)',
        'if name.startswith("tdpo2"): pass',
        'match name:\n    case "dpo" | "tdpo2": pass',
        'if config.trainer == "FSDPTrainer": pass',
        "if isinstance(trainer, FSDPTrainer): pass",
        "if issubclass(cls, (A, trainers.FSDPTrainer)): pass",
        "if cls is trainers.FSDPTrainer: pass",
        "match trainer:\n    case FSDPTrainer(): pass",
    ],
)
def test_a_planted_decision_is_caught(text):
    [problem] = choices_by_name(ast.parse(text), {"tdpo2", "FSDPTrainer"})
    assert re.fullmatch(r"line \d decides by the name (tdpo2|FSDPTrainer)", problem)


@pytest.mark.parametrize(
    "text",
    [
        '@register_loss("tdpo2", reads={"token_kl"})\ndef tdpo2(pair): """tdpo2"""',
        'raise ConfigError(f"{name} does not do that; take trainer=FSDPTrainer, or loss=tdpo2")',
        'sys.argv[1:1] = ["function=eval", "loss=tdpo2"]',
        "@register_trainer\nclass FSDPTrainer(BasicTrainer): pass",
        "service = Service(config, folder, FSDPTrainer)",
        "if tdpo2 > 0: pass",
        'if "token_kl" in loss.reads and trainer.placement.shards_state: pass',
    ],
)
def test_a_definition_and_a_message_are_no_decisions(text):
    assert not choices_by_name(ast.parse(text), {"tdpo2", "FSDPTrainer"})


# ----------------------------------------------------------------------------- docs/architecture.md


def section(page: str, title: str) -> str:
    """The text below `## title`."""
    texts = re.findall(rf"(?ms)^## {re.escape(title)}$(.*?)(?=^## |\Z)", page)
    assert len(texts) == 1, f"docs/architecture.md has {len(texts)} sections {title!r}, expected 1"
    return texts[0]


def layers_of(page: str) -> list[set[str]]:
    """The entries of each row of the table of layers, from the ground up."""
    rows = re.findall(r"(?m)^\| (\d+) \| (.+?) \|", section(page, "Layers"))
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    return [set(re.findall(r"`([\w.]+)`", entries)) for _, entries in rows]


def axes_of(page: str) -> dict[str, set[str]]:
    rows = re.findall(r"(?m)^\| \*\*(\w+)\*\* \|.*\| (.+) \|$", section(page, "Three axes"))
    return {axis: set(re.findall(r"`([\w.]+)`", members)) for axis, members in rows}


def map_of(page: str) -> dict[str, list[str]]:
    """The files of each folder in the module map, as they stand there; "" is the top level."""
    folders: dict[str, list[str]] = {}
    for part in re.split(r"(?m)^### ", section(page, "Module map"))[1:]:
        heading, _, body = part.partition("\n")
        folder = "" if heading == "Top level" else heading.strip("`")
        assert folder not in folders, f"two tables of {heading}"
        rows = re.findall(r"(?m)^\| \[(.+?)\]\((.+?)\) \| (.*?) *\|$", body)
        for name, target, purpose in rows:
            assert (PAGE.parent / target).resolve() == ROOT / folder / name, f"{name}: {target}"
            assert purpose, f"{heading}/{name} has no purpose"
        assert len(rows) == len(re.findall(r"(?m)^\| ", body)) - 2, f"{heading}: an odd row"
        folders[folder] = [name for name, _, _ in rows]
    return folders


def map_of_code() -> dict[str, list[str]]:
    """The heading of a package stands for its `__init__.py`."""
    folders: dict[str, list[str]] = {"": [path.name for path in ROOT.glob("*.py")]}
    plugins = sorted(path.name for path in (ROOT / "hydra_plugins").glob("*.py"))
    folders["hydra_plugins"] = plugins  # a namespace package, without an __init__.py
    for init in sorted((ROOT / "preflab").rglob("__init__.py")):
        files = [path for path in init.parent.iterdir() if path.is_file() and path != init]
        names = [path.name for path in files if not path.name.startswith(".")]
        folders[init.parent.relative_to(ROOT).as_posix()] = names
    return {folder: sorted(names) for folder, names in folders.items()}


def differences(page: dict[str, list[str]], code: dict[str, list[str]]) -> list[str]:
    """What a module map has too much, too little or twice."""
    problems = []
    for folder in sorted({*page, *code}):
        listed, existing = page.get(folder, []), code.get(folder, [])
        problems += [f"{folder}/{name} is missing" for name in sorted({*existing} - {*listed})]
        problems += [f"{folder}/{name} does not exist" for name in sorted({*listed} - {*existing})]
        twice = {name for name in listed if listed.count(name) > 1}
        problems += [f"{folder}/{name} is there twice" for name in sorted(twice)]
    return problems


def unknown_names(page: str, defined: set[str]) -> list[str]:
    """Functions `f()`, methods `Class.f()` and classes `Class` of a page that no module defines."""
    text = re.sub(r"(?ms)^```.*?^```", "", page)
    functions = re.findall(r"`([A-Za-z_][\w.]*)\(\)`", text)
    classes = re.findall(r"`([A-Z]\w*[a-z]\w*)`", text)
    return sorted({name for name in (*functions, *classes) if name not in defined})


@cache
def defined_names() -> set[str]:
    """Functions, classes and `Class.method` of all modules."""
    names = set()
    for path in modules().values():
        for node in tree(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {
                    f"{node.name}.{method.name}"
                    for method in node.body
                    if isinstance(method, ast.FunctionDef)
                }
    return names


def test_the_page_has_the_layers():
    assert layers_of(source(PAGE)) == [set(names) for names in LAYERS]


def test_the_page_has_the_axes():
    assert axes_of(source(PAGE)) == {axis: set(members) for axis, members in AXES.items()}


def test_the_module_map_equals_the_code():
    problems = differences(map_of(source(PAGE)), map_of_code())
    assert not problems, lines_of(problems)


def test_the_page_names_what_exists():
    assert not unknown_names(source(PAGE), defined_names())


MADE_UP_PAGE = """
## Three axes
| axis | question | modules |
| --- | --- | --- |
| **objective** | what? | `preflab.objective`, `losses` |

## Layers
| layer | modules | may use |
| --- | --- | --- |
| 1 | `utils` | nothing of `ours` |
| 2 | `losses`, `preflab.batching` | |

## Module map
### Top level
| file | purpose |
| --- | --- |
| [losses.py](../losses.py) | losses |
| [utils.py](../utils.py) | helpers |

### `preflab/batching`
| file | purpose |
| --- | --- |
| [loader.py](../preflab/batching/loader.py) | order |
"""


def test_a_page_is_read():
    assert axes_of(MADE_UP_PAGE) == {"objective": {"preflab.objective", "losses"}}
    assert layers_of(MADE_UP_PAGE) == [{"utils"}, {"losses", "preflab.batching"}]
    code = {"": ["losses.py", "utils.py"], "preflab/batching": ["loader.py"]}
    assert map_of(MADE_UP_PAGE) == code and not differences(map_of(MADE_UP_PAGE), code)


def test_a_page_that_differs_from_the_code_is_caught():
    code = {"": ["losses.py", "train.py"], "preflab/batching": ["loader.py"], "preflab/new": ["a"]}
    page = {"": ["losses.py", "losses.py", "utils.py"], "preflab/batching": ["loader.py"]}
    assert differences(page, code) == [
        "/train.py is missing",
        "/utils.py does not exist",
        "/losses.py is there twice",
        "preflab/new/a is missing",
    ]
    moved = MADE_UP_PAGE.replace("(../preflab/batching/loader.py)", "(../preflab/loader.py)")
    no_purpose = MADE_UP_PAGE.replace("| order |", "| |")
    no_link = MADE_UP_PAGE.replace("[losses.py](../losses.py)", "losses.py")
    for page in (moved, no_purpose, no_link):
        with pytest.raises(AssertionError, match=r"loader\.py|Top level: an odd row"):
            map_of(page)
    skipped = MADE_UP_PAGE.replace("| 2 |", "| 3 |")
    with pytest.raises(AssertionError):
        layers_of(skipped)
    known = {"collate", "Loader", "Loader.ahead"}
    page = "`Loader.ahead()` calls `collate()`; `Loader` and `LATEST` and `seed` are no functions"
    assert not unknown_names(page, known)
    page = "`Loader.behind()`, `collates()`, `Loaders`"
    assert unknown_names(page, known) == ["Loader.behind", "Loaders", "collates"]
