# what: no function of include/ above 60 lines or complexity 20 but for those that docs/design.md lists; none of examples/ above 80 lines
# takes: 1 minute
# needs: python3-venv
folder=build/check/functions
python3 -m venv "$folder"
"$folder/bin/pip" install -q lizard
"$folder/bin/lizard" -l cpp --csv include/moxie >"$folder/include.csv"
"$folder/bin/lizard" -l cpp --csv examples >"$folder/examples.csv"
python3 tests/check/functions.py "$folder/include.csv" "$folder/examples.csv" docs/design.md
