# what: the headers are parsed for 32-bit x86 by g++ and for wasm32 by emscripten
# takes: 2 minutes
# needs: g++-12-multilib emscripten
mkdir -p build/check/portable
headers() { printf '#include <%s>\n' "$@"; }
( cd include && headers moxie/moxie.hpp moxie/io/*.hpp moxie/testing/*.hpp ) >build/check/portable/all.cpp
( cd include && headers moxie/moxie.hpp moxie/io/*.hpp ) >build/check/portable/wasm.cpp
# The package g++-multilib would bring /usr/include/asm, but cannot be installed beside the cross compiler that `sets` needs.
x86=(-m32 -std=c++20 -fsyntax-only -Wall -Wextra -Werror "${include_flags[@]}" -idirafter /usr/include/x86_64-linux-gnu)
say "32-bit x86"
g++ "${x86[@]}" build/check/portable/all.cpp
say "32-bit x86 with SSE2"
g++ "${x86[@]}" -msse2 build/check/portable/all.cpp
say "wasm32"
# Debian's emscripten has the library of clang 14 without std::ranges' algorithms, which moxie/testing uses; old_library.hpp
# gives it the rest. /usr/include itself would hide emscripten's own headers.
for library in eigen3 xsimd nlohmann; do ln -sfn "/usr/include/$library" "build/check/portable/$library"; done
em++ -std=c++20 -fsyntax-only -Wall -Wextra -Werror -include tests/check/old_library.hpp -Iinclude -isystem build/check/portable/eigen3 \
  -isystem build/check/portable build/check/portable/wasm.cpp
