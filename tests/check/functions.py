"""Which functions are too long, too branched or have too many parameters?

    functions.py INCLUDE_CSV EXAMPLES_CSV DESIGN     the tables are `lizard --csv`'s of include/moxie and of examples

A function of include/ has at most 60 lines, a cyclomatic complexity of at most 20 and, where it is public, at most six parameters.
One of examples/ has at most 80 lines. Exceptions are listed in docs/design.md, under "## Long functions", one a line, at most three:

    * `moxie::balanced_k_means`: the reason
"""
import csv
import re
import sys

LINES, COMPLEXITY, PARAMETERS, EXAMPLE_LINES, EXCEPTIONS = 60, 20, 6, 80, 3


def functions(table):
    """(file, first line, name, lines, complexity, parameters) of each function of a table of lizard."""
    with open(table, newline="") as rows:
        for row in csv.reader(rows):
            yield row[6], int(row[9]), row[7].replace("inlineMOXIE_NAMESPACE::", ""), int(row[4]), int(row[1]), int(row[3])


def is_public(path, first, name):
    """Whether a user calls it: neither in a namespace detail nor private. Reads the indentation that clang-format gives."""
    if "detail::" in name or name.endswith("requires"):  # lizard takes the parameters of a concept for a function
        return False
    with open(path) as file:
        lines = file.read().splitlines()
    indentation = len(lines[first - 1]) - len(lines[first - 1].lstrip())
    for line in reversed(lines[: first - 1]):
        text = line.lstrip()
        if text and len(line) - len(text) < indentation:
            if re.match(r"(private|protected):", text):
                return False
            if re.match(r"(public:|struct\b|class\b)", text):
                return not text.startswith("class")
    return True


def exceptions(page):
    """The names that the page lists."""
    with open(page) as file:
        section = re.search(r"^## Long functions\n(.*?)(?=^## |\Z)", file.read(), re.MULTILINE | re.DOTALL)
    return re.findall(r"^\* `([^`]+)`: \S", section[1], re.MULTILINE) if section else []


def main():
    include, examples, page = sys.argv[1:]
    allowed = exceptions(page)
    problems = [f"{page} lists {len(allowed)} exceptions, at most {EXCEPTIONS} are allowed"] if len(allowed) > EXCEPTIONS else []
    seen = set()
    count = 0
    for path, first, name, lines, complexity, parameters in functions(include):
        count += 1
        said = [f"{lines} lines"] if lines > LINES else []
        said += [f"complexity {complexity}"] if complexity > COMPLEXITY else []
        if said and name in allowed:
            seen.add(name)
            said = []
        if parameters > PARAMETERS and is_public(path, first, name):
            said.append(f"{parameters} parameters")
        if said:
            problems.append(f"{path}:{first}: {name}: {', '.join(said)}")
    for path, first, name, lines, _, _ in functions(examples):
        count += 1
        if lines > EXAMPLE_LINES:
            problems.append(f"{path}:{first}: {name}: {lines} lines")
    problems += [f"{page}: {name} is no exception any more" for name in allowed if name not in seen]
    if count < 100:
        problems.append(f"lizard found only {count} functions")
    print("\n".join(sorted(problems)))
    print(f"{count} functions, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
