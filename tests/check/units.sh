# what: translation units of two instruction sets, and libraries of two versions, in one program, at -O2 by both compilers
# takes: 5 minutes
for compiler in g++ clang++; do
  bash tests/units/units.sh "build/check/units/$compiler" "$compiler" -O2 -isystem /usr/include/eigen3
done
