"""The house's ceilings: files of 400 lines, functions of 60, 8 parameters; no hasattr, no os.environ, no broad except.

Checked on src, bench, tests and tools by `make check`, or on the folders given; exits 1 and lists what is over.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src", "bench", "tests", "tools")
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
BROAD = {"Exception", "BaseException"}


def problems(path: Path) -> list[str]:
    """Return what is over in one file."""
    text, name = path.read_text(), path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    found = []
    if len(text.splitlines()) > FILE_LINES:
        found.append(f"{name}: {len(text.splitlines())} lines")
    for node in ast.walk(ast.parse(text)):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{where}: {node.name} has {length} lines")
            arguments = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            verb = path.parent.name == "cli" and any(a.arg == "as_json" for a in arguments)
            # parameters of kernels are pointers
            kernel = any(ast.unparse(d).startswith(("triton.jit", "gluon.jit")) for d in node.decorator_list)
            if len(arguments) > PARAMETERS and not verb and not kernel:  # a command's parameters are its options
                found.append(f"{where}: {node.name} has {len(arguments)} positional parameters")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            found.append(f"{where}: hasattr")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
            found.append(f"{where}: os.environ")
        if isinstance(node, ast.ExceptHandler):
            names = {ast.unparse(n) for n in ast.walk(node.type)} if node.type else BROAD
            reraises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            if names & BROAD and not reraises:
                found.append(f"{where}: broad except")
    return found


def main(given: list[str]) -> int:
    """Print what is over in some folders, all by default; return 1 if anything is."""
    folders = [Path(name).resolve() for name in given] or [ROOT / name for name in FOLDERS]
    found = [problem for folder in folders for path in sorted(folder.rglob("*.py")) for problem in problems(path)]
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
