#!/usr/bin/env python3
"""Modules of include/moxie include only modules below them.

    module_order.py INCLUDE        reads every header under INCLUDE/moxie; prints each include that goes up, and exits with 1
    module_order.py INCLUDE plant  adds such an include to a copy for each pair of modules, and checks that it is found
"""
import pathlib
import re
import shutil
import sys
import tempfile

# Bottom first. A header includes its own module and those to the left of it.
ORDER = ["core", "kernel", "loss", "routing", "exchange", "expert", "layer"]
# Modules that no other includes, and the modules that each of them may include.
LEAVES = {"io": ["core"], "testing": ORDER, "cuda": ORDER}
# Headers beside the folders: macros, which anyone may include, and the umbrella.
MACROS = ["config.hpp", "version.hpp"]
UMBRELLA = "moxie.hpp"

ALLOWED = {module: ORDER[: i + 1] for i, module in enumerate(ORDER)}
ALLOWED |= {leaf: [leaf, *below] for leaf, below in LEAVES.items()}
ALLOWED |= {macro: [] for macro in MACROS}
ALLOWED |= {UMBRELLA: ORDER}


def module_of(header):
    """The folder of a header such as moxie/core/exec.hpp, or the name of one that is in no folder."""
    return header.split("/")[1]


def wrong_includes(root):
    """Lines that say which includes are not allowed, and why."""
    headers = sorted(path for path in (root / "moxie").rglob("*") if path.is_file())
    if not headers:
        yield f"there are no headers in {root / 'moxie'}"
    for path in headers:
        header = path.relative_to(root).as_posix()
        module = module_of(header)
        if module not in ALLOWED:
            yield f"{header}: module '{module}' has no place in the order of tests/module_order.py"
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = re.match(r'\s*#\s*include\s*(["<])([^">]*)', line)
            if include and include[1] == '"':
                yield f'{header}:{number}: includes "{include[2]}"; headers name each other as <moxie/...>'
            elif include and include[2].startswith("moxie/"):
                other = module_of(include[2])
                if other not in MACROS and other not in ALLOWED[module]:
                    yield f"{header}:{number}: {module} includes {include[2]}, which is not below it"


def plant(root):
    """Lines that say which upward includes are not found in a copy of the headers."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "include"
        shutil.copytree(root, copy)
        an_include = {module_of(p.relative_to(copy).as_posix()): p for p in sorted((copy / "moxie").rglob("*.hpp"))}
        for module, path in an_include.items():
            for other in an_include:
                if other in MACROS or other in ALLOWED[module]:
                    continue
                text = path.read_text()
                path.write_text(text + f"#include <{an_include[other].relative_to(copy).as_posix()}>\n")
                if not any(f"{module} includes" in line for line in wrong_includes(copy)):
                    yield f"nobody notices that {module} includes {other}"
                path.write_text(text)


def main():
    root = pathlib.Path(sys.argv[1])
    problems = list(plant(root) if sys.argv[2:] == ["plant"] else wrong_includes(root))
    print("\n".join(problems) or "every include goes down")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
