#!/bin/sh
# Usage: pkg_config.sh FOLDER_OF_THE_PC_FILE WORK_DIR
# Builds the consumers with the compilers alone, as pkg-config says, and runs them: against the shared library; against
# the archive, in a program that is dynamic otherwise; and without any shared library.
set -eu
export PKG_CONFIG_PATH=$1
work=$2
sources=$(dirname "$0")
rm -rf "$work"
mkdir -p "$work"

build_and_run() { # build_and_run KIND FLAG...
  kind=$1
  shift
  ${CC:-gcc} -std=c99 -Wall -Wextra -pedantic -Werror "$sources/main.c" -o "$work/c_$kind" "$@" -lm
  ${CXX:-g++} -std=c++17 -Wall -Wextra -Werror "$sources/main.cpp" -o "$work/cpp_$kind" "$@"
  for program in "$work/c_$kind" "$work/cpp_$kind"; do
    "$program"
    linked=no
    if readelf -d "$program" | grep -q 'NEEDED.*libflash_mla'; then linked=yes; fi
    case $kind,$linked in
      shared,no | archive,yes | static,yes) echo "$program: linked to the shared library: $linked" >&2 && exit 1 ;;
    esac
  done
}

libdir=$(pkg-config --variable=libdir flash_mla)
build_and_run shared $(pkg-config --cflags --libs flash_mla) "-Wl,-rpath,$libdir"
build_and_run archive $(pkg-config --cflags --libs flash_mla_static)
if echo 'int main() { return 0; }' | ${CXX:-g++} -static -x c++ - -o "$work/nothing"; then
  build_and_run static -static $(pkg-config --static --cflags --libs flash_mla)
else
  echo "no static C++ library here: a program without any shared library is left out"
fi
