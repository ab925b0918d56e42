"""The packages of genkit are floors: imports go down only, without a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [  # from the ground up; packages of one floor do not import each other
    {"arguments", "console", "files", "errors", "garbage", "machine", "notebook", "seeds"},
    {"plots", "hub"},
    {"data", "engine"},
    {"models"},
    {"text"},
    {"metrics"},
    {"tabular"},
    {"qa", "vision", "training"},
    {"attacking", "loading", "recipes"},
    {"app"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
TRAVELLING = tuple(
    f"models/{name}.py"
    for name in (
        *("autoencoder", "gan", "diffusion", "stylizer", "translation", "text_diffusion"),
        "table_autoencoder",
    )
)


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[-1] != "__init__" else parts[1:-1])


MODULES = {module(path): path for path in (ROOT / "genkit").rglob("*.py")}


def imports(path: Path, lazy: bool) -> set[str]:
    """Modules of genkit that a file imports; with `lazy`, those inside functions, too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "genkit":
            base = node.module.partition(".")[2]
            for name in node.names:
                full = f"{base}.{name.name}".strip(".")
                found.add(full if full in MODULES else base)
    return found - {""}


def test_imports_go_down_only():
    wrong = []
    for name, path in MODULES.items():
        own = name.split(".")[0]
        for other in imports(path, lazy=True):
            package = other.split(".")[0]
            if name and package != own and FLOOR[package] >= FLOOR[own]:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_every_package_has_a_floor():
    assert {name.split(".")[0] for name in MODULES if name} == set(FLOOR)


def test_files_import_each_other_without_a_circle_in_chains_of_eleven():
    graph = {name: imports(path, lazy=False) for name, path in MODULES.items()}
    longest: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():  # raises at a circle
        longest[name] = 1 + max((longest[other] for other in graph[name]), default=0)
    assert max(longest.values()) <= 11, sorted(longest, key=longest.get)[-3:]


def test_families_that_travel_with_saved_models_import_nothing_of_genkit():
    for file in TRAVELLING:
        assert not imports(ROOT / "genkit" / file, lazy=True)


def test_no_module_bears_the_name_of_a_verb():
    import genkit

    assert not {path.stem for path in (ROOT / "genkit").glob("*.py")} & set(genkit.__all__)


def test_no_module_hands_on_names_of_another():
    for path in MODULES.values():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                assert not [n.name for n in node.names if n.asname == n.name], path
