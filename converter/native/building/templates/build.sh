#!/bin/sh
# Builds model.so from the files of this folder. CXX: clang++ 16 or g++ 12 or newer (g++ makes slower kernels).
set -eu
cd "$(dirname "$0")"
CXX="${CXX:-clang++}"
CPU="${CPU:-@CPU@}" # for the kernels only: model.cpp checks the processor before it calls one
for source in kernel_*.cpp processor.cpp; do
    $CXX @FLAGS@ $CPU -c "$source"
done
$CXX @FLAGS@ -c model.cpp
$CXX -c weights.S
$CXX @LINK@ -o model.so *.o @LIBRARIES@
