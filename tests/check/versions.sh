# what: kernels, routers, experts, layers and io with the oldest Eigen and xsimd that moxie takes, and the newest of PyPI
# takes: 20 minutes
# needs: python3-venv
folder=build/check/versions
mkdir -p "$folder"
python3 -m venv "$folder/venv"

# wheel NAME==VERSION FOLDER: unpacks a wheel, without what it depends on.
wheel() {
  "$folder/venv/bin/pip" download -q --no-deps -d "$folder" "$1"
  local name=${1%%==*}
  python3 -m zipfile -e "$folder/${name//-/_}-${1##*==}"-*.whl "$2"
}

# xsimd comes with the compiler Pythran: 0.11.0 has xsimd 8.0.5, 0.19.0 has 14.1.0.
wheel pythran==0.11.0 "$folder/pythran-oldest"
wheel pythran==0.19.0 "$folder/pythran-newest"
wheel cmeel-eigen==3.4.1 "$folder/eigen-newest"
wheel nlohmann-json==3.12.0 "$folder/json"
mkdir -p "$folder/json-newest"
ln -sfn ../json/nlohmann_json/include "$folder/json-newest/single_include"
for age in oldest newest; do
  mkdir -p "$folder/xsimd-$age/include"
  ln -sfn "../../pythran-$age/pythran/xsimd" "$folder/xsimd-$age/include/xsimd"
done

# version FILE MACRO...: the numbers that a header defines
version() {
  local macro numbers=()
  for macro in "${@:2}"; do numbers+=("$(sed -nE "s/^#define $macro +([0-9]+).*/\1/p" "$1")"); done
  (IFS=. && echo "${numbers[*]}")
}
for age in oldest newest; do
  eigen=/usr/include/eigen3
  [ "$age" = oldest ] || eigen=$folder/eigen-newest/cmeel.prefix/include/eigen3
  say "$age: Eigen $(version "$eigen/Eigen/src/Core/util/Macros.h" EIGEN_WORLD_VERSION EIGEN_MAJOR_VERSION EIGEN_MINOR_VERSION)," \
    "xsimd $(version "$folder/xsimd-$age/include/xsimd/config/xsimd_config.hpp" XSIMD_VERSION_{MAJOR,MINOR,PATCH})"
done
build_and_test oldest newest
# The build would also have found other versions in /usr/include.
for used in oldest:xsimd-oldest newest:xsimd-newest newest:eigen-newest newest:json-newest; do
  grep -q "isystem [^ ]*$folder/${used#*:}" "build/${used%:*}/compile_commands.json" || { echo "not used: ${used#*:}" >&2; exit 1; }
done
