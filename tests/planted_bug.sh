#!/usr/bin/env bash
# Plants one bug of planted_bugs.txt into a copy of the headers, and succeeds if the tests named there compile and then fail.
# usage: planted_bug.sh BUG "TEST..." COMPILER [FLAG...]   (its scratch folder comes and goes in the current one)
set -euo pipefail

bug=$1 tests=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)

error() {
  printf 'planted_bug: %s\n' "$*" >&2
  exit 1
}

# Sets `header`, `text` and `becomes` from the block of the table that begins with this bug.
read_block() {
  local line inside=false
  header='' text='' becomes=''
  while IFS= read -r line; do
    case $line in
      "bug: "*) if [[ $(value "$line") == "$bug" ]]; then inside=true; else inside=false; fi ;;
      "in: "*) if $inside; then header=$(value "$line"); fi ;;
      "text: "*) if $inside; then text=$(value "$line"); fi ;;
      "becomes:"*) if $inside; then becomes=$(value "$line"); fi ;;
    esac
  done <"$here/planted_bugs.txt"
}
value() {
  local rest=${1#*:}
  printf '%s' "${rest#"${rest%%[! ]*}"}"
}

scratch=$(mktemp -d "$PWD/planted_bug.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
cp -r "$here/../include" "$here/../examples" "$scratch/"

read_block
file=$scratch/include/$header
[ -f "$file" ] || file=$scratch/examples/$header
[ -n "$text" ] || error "'$bug' has no text to replace"
[ -f "$file" ] || error "there is no header '$header'"
content=$(<"$file")
rest=${content#*"$text"}
[ "$rest" != "$content" ] || error "'$text' is not in $header"
[[ $rest != *"$text"* ]] || error "'$text' is in $header more than once"
printf '%s\n' "${content%%"$text"*}$becomes$rest" >"$file"

sources=()
for test in $tests; do
  case $test in
    -*) sources+=("$test") ;;
    *_test.cpp) sources+=("$here/$test") ;;
    *) sources+=("$scratch/$test") ;;
  esac
done
"$1" "-I$scratch/include" "-I$scratch/examples" "${@:2}" "${sources[@]}" -o "$scratch/tests" || error "does not compile"

status=0
output=$("$scratch/tests" --no-colors --abort-after=1 2>&1) || status=$?
printf '%s\n' "$output"
# 1 is doctest's word for failed tests; 134 is an assertion of the library or of Eigen, which doctest also puts to a test.
if [ "$status" -eq 0 ]; then
  error "the tests pass in spite of it"
elif [ "$status" -ne 1 ] && ! [[ $status -eq 134 && $output == *"test case CRASHED: SIGABRT"* ]]; then
  error "the tests end with status $status instead of failing"
fi
