"""The structure of the code: layers, cycles, sizes, and names that stay where they are defined."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A module imports from its own layer's packages only downwards, and from layers
# below; entries of one line do not import one another.
LAYERS = [
    ["utils"],
    ["preflab.objective", "preflab.distributed", "preflab.readers", "preflab.reports"],
    ["losses", "preference_datasets", "preflab.batching", "preflab.settings"],
    ["preflab.modeling"],
    ["preflab.training", "preflab.rewards"],
    ["preflab.evaluation"],
    ["trainers"],
    ["preflab.online"],
    ["preflab.checks"],
    ["preflab.execution"],
    ["preflab.api"],
    ["train"],
    [
        "generate", "judge", "report", "serve_reward", "train_risk_preferences", "rewards",
    ],
]  # fmt: skip

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@cache
def modules() -> dict[str, Path]:
    """All modules of the project by dotted name; tests, scripts and benchmarks are not layers."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "preflab").rglob("*.py")]
    return {dotted(path): path for path in sorted(paths)}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(name: str) -> set[str]:
    """Project modules that a module imports, anywhere in it; a package stands for its __init__."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = members & modules().keys()
            found |= submodules
            if submodules != members:
                found.add(node.module)
    return {module for module in found if module in modules()} - {name}


def room(name: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return ".".join(name.split(".")[:2])


def cycle_from(start: str) -> list[str]:
    """A path of imports from a module back to itself; empty if there is none."""
    stack = [(start, [start])]
    seen = set()
    while stack:
        here, path = stack.pop()
        for there in imports(here):
            if there == start:
                return [*path, start]
            if there not in seen:
                seen.add(there)
                stack.append((there, [*path, there]))
    return []


def test_every_module_belongs_to_a_layer():
    assert {room(name) for name in modules()} - {"preflab"} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(set(modules()) - {"preflab"}))
def test_imports_go_down_only(name):
    upward = {
        other
        for other in imports(name)
        if room(other) != room(name) and LEVEL.get(room(other), 99) >= LEVEL[room(name)]
    }
    assert not upward, f"{name} imports {', '.join(sorted(upward))}, which is no lower layer"


def test_the_package_imports_no_top_level_file_but_utils():
    outside = {
        f"{name} imports {other}"
        for name in modules()
        if name.startswith("preflab")
        for other in imports(name)
        if not other.startswith("preflab") and other != "utils"
    }
    assert not outside


def test_there_is_no_cycle():
    cycles = [cycle for name in modules() if (cycle := cycle_from(name))]
    assert not cycles, " -> ".join(cycles[0])
