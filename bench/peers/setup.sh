#!/usr/bin/env bash
# Create .venv-peers/NAME for each NAME: `calibrated` (llm-compressor with AutoRound, 2 GB, minutes) and `llama`
# (llama.cpp's library built from llama-cpp-python's source package: 10 minutes of two cores; its server as a wheel).
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3.11}

calibrated() {
    "${pip[@]}" torch==2.13.0 llmcompressor==0.14.0.1 auto-round==0.15.1
}

llama() {
    local sources=$venv/sources
    "${pip[@]}" numpy jinja2 diskcache typing-extensions cmake ninja xllamacpp==2026.10.11549
    mkdir -p "$sources"
    "$venv/bin/python" -m pip --disable-pip-version-check download --quiet --no-deps --no-binary :all: \
        --dest "$sources" llama-cpp-python==0.3.36
    tar xzf "$sources/llama_cpp_python-0.3.36.tar.gz" -C "$sources"
    # only the library; -O1 for its C++ since many files of it compile slowly and none is hot: ggml's kernels are C
    "$venv/bin/cmake" -G Ninja -S "$sources/llama_cpp_python-0.3.36/vendor/llama.cpp" -B "$sources/build" \
        -DCMAKE_MAKE_PROGRAM="$PWD/$venv/bin/ninja" -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE="-O2 -DNDEBUG" \
        -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
    nice "$venv/bin/ninja" -C "$sources/build" llama
    local packages
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    rm -rf "$packages/llama_cpp"
    cp -r "$sources/llama_cpp_python-0.3.36/llama_cpp" "$packages/llama_cpp"
    mkdir -p "$packages/llama_cpp/lib" "$packages/llama_cpp_python-0.3.36.dist-info"
    cp "$sources/llama_cpp_python-0.3.36/PKG-INFO" "$packages/llama_cpp_python-0.3.36.dist-info/METADATA"
    cp -L "$sources"/build/bin/lib*.so* "$packages/llama_cpp/lib/"
}

[ $# -gt 0 ] || { echo "usage: bash bench/peers/setup.sh calibrated|llama ..." >&2; exit 2; }
for name in "$@"; do
    case $name in
        calibrated | llama) ;;
        *) echo "unknown environment '$name'; known: calibrated, llama" >&2; exit 2 ;;
    esac
    venv=.venv-peers/$name
    [ -d "$venv" ] || "$python" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
    "$name"
    echo "$name is in $venv"
done
