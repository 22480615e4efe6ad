"""Who may import whom; the table of the design, enforced on the source."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hybrid_lora_plugin"
VERL = {"verl", "ray", "vllm"}
VERL_LAYERS = ("verl_backend", "cli", "conf")
# layer -> (importable anywhere, importable inside functions only), beside the standard library and this package
PURE = {
    "model_families.py": ({"torch"}, {"transformers"}),
    "base_checkpoint.py": (set(), set()),
    "base_identity.py": ({"numpy"}, {"huggingface_hub"}),
    "checkpoint_tensors.py": (set(), set()),
    "weight_loading.py": ({"torch"}, {"transformers"}),
    "candidates.py": ({"numpy", "torch"}, {"transformers"}),
    "linear_account.py": ({"torch"}, set()),
    "scoring": ({"numpy", "torch"}, set()),
    # safetensors and Matplotlib write the artifact; whoever only reads allocation.json needs neither.
    "allocation": ({"numpy", "torch"}, {"safetensors"}),
    "report": ({"numpy", "torch"}, {"matplotlib"}),
    # A verl worker scores every response with these: nothing heavy, and math-verify in a process of its own.
    "tasks": (set(), set()),
    "rewards": (set(), {"math_verify", "sympy"}),
}
#: What stands below every folder of the package.
CONFIG_PARTS = {
    "config_field",
    "config_selection",
    "config_probe",
    "config_trial",
    "config_sync",
    "config_checkpoint",
    "config_data",
    "config_evaluation",
    "config_plan",
    "config_evidence",
    "config_zeroth_order",
}
#: What looks at a whole configuration.
CONFIG_CHECKS = {"config_validation", "config_effect"}
GROUND = {"__version__", "errors", "names", "files", "seeding", "parameter_counts", "config"} | CONFIG_PARTS
#: What tells models apart, by their modules and their files.
MODELS = {
    "base_checkpoint",
    "base_identity",
    "candidates",
    "checkpoint_tensors",
    "linear_account",
    "model_families",
    "weight_loading",
}
# What a layer may use of this package: data flow one way, from the first row to the last.
INTERNAL = {
    **{
        f"config_{part}.py": {"config_field", "errors"}
        for part in ("selection", "probe", "trial", "sync", "checkpoint", "data", "evaluation", "plan", "evidence")
    },
    "config_zeroth_order.py": {"config_field", "errors"},
    "config.py": CONFIG_PARTS | {"errors"},
    "config_validation.py": CONFIG_PARTS | {"config", "errors"},
    "config_effect.py": CONFIG_PARTS | {"errors"},
    "model_families.py": {"errors"},
    "base_checkpoint.py": {"checkpoint_tensors", "errors", "model_families"},
    "base_identity.py": {"checkpoint_tensors"},
    "checkpoint_tensors.py": {"errors"},
    "weight_loading.py": {"base_checkpoint", "checkpoint_tensors", "errors"},
    "candidates.py": {"errors", "model_families"},
    "linear_account.py": {"candidates"},
    "scoring": GROUND | {"candidates"},
    "allocation": GROUND | {"candidates", "linear_account", "scoring"},
    "report": GROUND | {"candidates", "linear_account", "scoring", "allocation"},
    # A trial trains the hybrid model.
    "probing": GROUND | MODELS | {"config_validation", "scoring", "allocation", "report", "training"},
    "training": GROUND | MODELS | {"allocation"},
    "sync": GROUND | {"training"},
    "tasks": {"errors"},
    "rewards": GROUND | {"tasks"},
    # The probe's readers of files, which know every form that rows come in.
    "preparation": GROUND | {"config_validation", "tasks", "rewards", "probing"},
    "evaluation": GROUND | MODELS | {"config_validation", "tasks", "rewards", "preparation", "report", "training"},
    "plan": GROUND | MODELS | {"config_validation", "scoring", "allocation", "training", "sync", "report", "probing"},
    "evidence": GROUND
    | MODELS
    | CONFIG_CHECKS
    | {"scoring", "allocation", "report", "probing", "training", "evaluation"},
    "verl_backend": GROUND
    | MODELS
    | CONFIG_CHECKS
    | {"scoring", "allocation", "report", "probing", "training", "sync", "rewards", "plan"},
    "cli": GROUND
    | CONFIG_CHECKS
    | {"scoring", "allocation", "report", "probing", "training", "verl_backend"}
    | {"tasks", "rewards", "preparation", "evaluation", "plan", "evidence"},
}


def files(layer):
    path = PACKAGE / layer
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def imports(file):
    """(module, is inside a function) of every import of a file; lazy ones and those for type checking count too."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
            # Of a package a name may be a module: "from package import module".
            found.append((node.module, inside))
            found.extend((f"{node.module}.{alias.name}", inside) for alias in node.names)
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(file.read_text()), False)
    return found


def modules():
    """Every module of the package by its dotted name."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def arrows():
    """module -> the modules of the package that it imports, each module of its packages' ``__init__`` included."""
    known = modules()
    drawn = {}
    for name, file in known.items():
        targets = {target for target, _ in imports(file) if target in known} - {name}
        # Importing a module runs the __init__ of the packages around it first.
        around = {".".join(target.split(".")[:end]) for target in targets for end in range(2, target.count(".") + 1)}
        mine = {".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1)}
        drawn[name] = (targets | around) - mine - {name}
    return drawn


def circles(graph):
    """Sets of two or more nodes that all reach each other (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            circle = set()
            while node not in circle:
                circle.add(stack.pop())
            if len(circle) > 1:
                found.append(circle)

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_circle_of_imports_between_files():
    graph = arrows()
    assert sum(map(len, graph.values())) > 300, "the imports were not read"
    assert circles(graph) == []


def test_no_circle_of_imports_between_folders():
    def folder(module):
        return module.split(".")[1] if "." in module else module

    between = {}
    for module, targets in arrows().items():
        between.setdefault(folder(module), set()).update(
            folder(target) for target in targets if folder(target) != folder(module) and "." in target
        )
    assert circles(between) == []


def test_a_circle_would_be_found():
    graph = arrows()
    graph["hybrid_lora_plugin.errors"] = {"hybrid_lora_plugin.verl_backend.engine"}
    (circle,) = circles(graph)
    assert {"hybrid_lora_plugin.errors", "hybrid_lora_plugin.verl_backend.engine"} <= circle


@pytest.mark.parametrize("layer", PURE)
def test_pure_layers_import_only_the_standard_library_numpy_and_torch(layer):
    anywhere, in_functions = PURE[layer]
    assert files(layer)
    for file in files(layer):
        for module, inside in imports(file):
            top = module.partition(".")[0]
            allowed = top in sys.stdlib_module_names or top == "hybrid_lora_plugin" or top in anywhere
            assert allowed or (inside and top in in_functions), f"{file.relative_to(ROOT)} imports {module}"


def test_only_the_backend_the_commands_and_the_configuration_group_know_verl():
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0] in VERL_LAYERS:
            continue
        for module, _ in imports(file):
            assert module.partition(".")[0] not in VERL, f"{file.relative_to(ROOT)} imports {module}"
            assert module.split(".")[:2] != ["hybrid_lora_plugin", "verl_backend"], (
                f"{file.relative_to(ROOT)} imports {module}"
            )


@pytest.mark.parametrize("layer", INTERNAL)
def test_data_flow_one_way_between_layers(layer):
    for file in files(layer):
        for module, _ in imports(file):
            parts = module.split(".")
            if parts[0] == "hybrid_lora_plugin" and len(parts) > 1:
                allowed = INTERNAL[layer] | {layer.removesuffix(".py")}
                assert parts[1] in allowed, f"{file.relative_to(ROOT)} imports {module}"


def test_importing_the_package_loads_nothing_and_its_names_need_no_verl():
    code = (
        "import sys, hybrid_lora_plugin as h\n"
        "assert 'torch' not in sys.modules\n"
        "h.find_candidates, h.hybrid_score, h.allocate, h.load_allocation\n"
        "assert not {'verl', 'ray', 'vllm', 'transformers', 'matplotlib', 'peft'} & set(sys.modules)\n"
        "assert set(dir(h)) >= {'find_candidates', 'apply_allocation'}\n"
        "try: h.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@cache
def names_of(module):
    """What a module of this repository has, as far as its source says; None where there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.exists():
        return {part.stem for part in path.glob("*.py")} if path.is_dir() else None
    found = {part.stem for part in path.iterdir()} if path.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_what_is_imported_from_this_repository_is_there():
    # Inside functions too: a benchmark that takes twenty minutes must not end at an import, and no test runs it.
    checked, wrong = 0, []
    for folder in ("hybrid_lora_plugin", "benchmarks", "recipes", "tests", "hydra_plugins"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in (
                    "hybrid_lora_plugin",
                    "benchmarks",
                    "recipes",
                    "tests",
                ):
                    continue
                there, where = names_of(node.module), f"{file.relative_to(ROOT)}:{node.lineno}"
                if there is None:
                    wrong.append(f"{where}: there is no {node.module}")
                else:
                    missing = set() if "__getattr__" in there else {alias.name for alias in node.names} - there
                    wrong += [f"{where}: {node.module} has no {name}" for name in sorted(missing)]
                    checked += 1
    assert not wrong, "\n".join(wrong)
    assert checked > 500
