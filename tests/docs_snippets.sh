#!/usr/bin/env bash
# The pages show no C++ that is not compiled: every ```cpp block of README.md and docs/ has to follow one of the lines
#
#     <!-- from examples/03_custom_expert.cpp -->
#     <!-- from examples/00_quick_start.cpp [quick start] -->
#
# and to be contiguous lines of that file, or of that region of it, whatever their common indentation. In the file, a line
# `// [quick start]` switches its region on and off; such lines belong to no snippet.
#
#   docs_snippets.sh ROOT       prints what is wrong and where; exits with 1 if anything is
set -euo pipefail
shopt -s globstar nullglob
cd "${1:?usage: docs_snippets.sh ROOT}"

pages=(docs/**/*.md)
[ ! -e README.md ] || pages+=(README.md)
if [ ${#pages[@]} -eq 0 ]; then
  echo "docs_snippets: no pages in $PWD" >&2
  exit 1
fi

exec awk '
function fail(line, what) {
  printf "%s:%d: %s\n", page, line, what
  failures++
}
function without_trail(text) {
  sub(/[ \t\r]+$/, "", text)
  return text
}
function indentation(text) {
  match(text, /^[ \t]*/)
  return RLENGTH
}

# Reads the lines of a file, or of its region, into source[1 .. source_count]; returns what is wrong, or nothing.
function load(path, region,    text, name, on, switches, status) {
  source_count = 0
  if (path ~ /^\// || path ~ /(^|\/)\.\.(\/|$)/) {
    return "\"" path "\" is not a path inside the repository"
  }
  on = region == ""
  switches = 0
  while ((status = (getline text < path)) > 0) {
    text = without_trail(text)
    if (text ~ /^[ \t]*\/\/ \[[^]]+\]$/) {
      name = text
      sub(/^[ \t]*\/\/ \[/, "", name)
      sub(/\]$/, "", name)
      if (name == region) {
        on = !on
        switches++
      }
    } else if (on) {
      source[++source_count] = text
    }
  }
  close(path)
  if (status < 0) {
    return "there is no file " path
  }
  if (region != "" && switches == 0) {
    return path " has no region [" region "]"
  }
  if (switches % 2 == 1) {
    return "the region [" region "] of " path " has no end"
  }
  return ""
}

# How many lines of the block source[start ...] agrees with, from the first on.
function agreement(start,    i, shift, known, b, s) {
  known = 0
  for (i = 1; i <= block_count && start + i - 1 <= source_count; ++i) {
    b = block[i]
    s = source[start + i - 1]
    if (b == "" || s == "") {
      if (b != s) {
        break
      }
      continue
    }
    if (!known) {
      shift = indentation(s) - indentation(b)
      known = 1
    }
    if (indentation(s) - indentation(b) != shift || substr(s, indentation(s) + 1) != substr(b, indentation(b) + 1)) {
      break
    }
  }
  return i - 1
}

function check_block(    problem, start, best, n, where) {
  snippets++
  if (origin_path == "") {
    fail(block_line, "a C++ block that no <!-- from FILE --> precedes")
    return
  }
  problem = load(origin_path, origin_region)
  if (problem != "") {
    fail(origin_line, problem)
    return
  }
  best = 0
  for (start = 1; start <= source_count && best < block_count; ++start) {
    n = agreement(start)
    best = n > best ? n : best
  }
  where = origin_path (origin_region == "" ? "" : " [" origin_region "]")
  if (block_count == 0) {
    fail(block_line, "an empty block from " where)
  } else if (best < block_count) {
    fail(block_line + best + 1, "not in " where ": " block[best + 1])
  }
}

function forget_origin() {
  if (origin_path != "") {
    fail(origin_line, "no C++ block follows <!-- from " origin_path " -->")
  }
  origin_path = ""
}

function finish_page() {
  if (fence != "") {
    fail(block_line, "a block without an end")
  }
  forget_origin()
  fence = ""
}

FNR == 1 {
  if (page != "") {
    finish_page()
  }
  page = FILENAME
}

{
  line = without_trail($0)
  bare = substr(line, indentation(line) + 1)
}

fence != "" {  # inside a block, up to a fence of the same kind and at least the same length
  if (index(bare, fence) == 1 && bare ~ (fence ~ /^`/ ? "^`+$" : "^~+$")) {
    if (is_cpp) {
      check_block()
      origin_path = ""
    }
    fence = ""
  } else {
    block[++block_count] = line
  }
  next
}

bare ~ /^(```|~~~)/ {
  match(bare, bare ~ /^`/ ? "^`+" : "^~+")
  fence = substr(bare, 1, RLENGTH)
  language = tolower(substr(bare, RLENGTH + 1))
  sub(/^[ \t{.]+/, "", language)
  is_cpp = language ~ /^(c|h|cc|hh|cpp|hpp|cxx|c[+][+])([^a-z0-9+]|$)/
  if (!is_cpp) {
    forget_origin()
  }
  block_count = 0
  block_line = FNR
  next
}

bare ~ /^<!-- from .* -->$/ {
  forget_origin()
  origin_path = bare
  sub(/^<!-- from +/, "", origin_path)
  sub(/ +-->$/, "", origin_path)
  origin_region = ""
  if (match(origin_path, / +\[[^]]+\]$/)) {
    origin_region = substr(origin_path, RSTART)
    origin_path = substr(origin_path, 1, RSTART - 1)
    sub(/^ +\[/, "", origin_region)
    sub(/\]$/, "", origin_region)
  }
  origin_line = FNR
  next
}

bare != "" { forget_origin() }

END {
  finish_page()
  printf "docs_snippets: %d snippets, %d wrong\n", snippets, failures
  exit failures > 0
}
' "${pages[@]}"
