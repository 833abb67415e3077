"""Code for another process, as text: the sources of a module of this package and of the modules that it imports, in one expression.

An expression and not pickled code, because bytecode belongs to one version of Python, and because text can be read by whoever is asked
to run it. The modules get a name of their own on the other side, after the hash of their sources, so that several versions may meet.
"""

import ast
import base64
import json
import zlib
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

_ROOT = "reasonscope."
_PACKING = Lock()  # Python 3.11 fails if two threads parse at once

# Runs once per process and version: makes the modules importable, and gives what makes the object.
_LOADER = """
import sys, types, importlib.abc, importlib.util

def load(packed, name, attribute, arguments):
    import base64, json, zlib
    root, sources = json.loads(zlib.decompress(base64.b64decode(packed)))
    if root not in sys.modules:
        folders = {root} | {module[:i] for module in sources for i, c in enumerate(module) if c == "."}
        class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, module, path=None, target=None):
                if module in sources or module in folders:
                    return importlib.util.spec_from_loader(module, self, is_package=module in folders)
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                module.__file__ = f"<{module.__name__}>"
                if module.__name__ in sources:
                    exec(compile(sources[module.__name__], f"<{module.__name__}>", "exec"), module.__dict__)
        sys.meta_path.append(Finder())
    made = getattr(importlib.import_module(root + "." + name), attribute)(*json.loads(arguments))
    expression = EXPRESSION % (LOADER, EXPRESSION, packed, name, attribute, arguments)
    base = type(made)
    again = type(base.__name__, (base,), {"__reduce__": lambda self: (eval, (expression,))})
    made.__class__ = again
    return made
"""
_EXPRESSION = (
    "(lambda l, e, *a: (lambda n: (exec(l, n), n['load'](*a))[1])"
    "({'__name__': 'reasonscope_shipped', 'LOADER': l, 'EXPRESSION': e}))(%r, %r, %r, %r, %r, %r)"
)


def shipped(module: str, attribute: str, *arguments: object) -> str:
    """The expression that gives `attribute(*arguments)` of a module of this package, in a process that does not have the package.

    Arguments are JSON. What it gives can be pickled again, as the same expression.
    """
    with _PACKING:
        packed = _packed(module)
    return _EXPRESSION % (
        _LOADER,
        _EXPRESSION,
        packed,
        module.removeprefix(_ROOT),
        attribute,
        json.dumps(arguments),
    )


@cache
def _packed(module: str) -> str:
    sources = _closure(module)
    root = f"reasonscope_{sha256(json.dumps(sorted(sources.items())).encode()).hexdigest()[:12]}"
    renamed = {
        f"{root}.{name.removeprefix(_ROOT)}": source.replace(f"from {_ROOT}", f"from {root}.")
        for name, source in sources.items()
    }
    return base64.b64encode(zlib.compress(json.dumps([root, renamed]).encode(), 9)).decode()


def _closure(module: str) -> dict[str, str]:
    """The sources of the module and of what it imports from this package at its top, by name."""
    todo, found = [module], dict[str, str]()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        found[name] = Path(spec.origin).read_text(encoding="utf-8")
        todo += [
            node.module
            for node in ast.parse(found[name]).body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(_ROOT)
        ]
    return found
