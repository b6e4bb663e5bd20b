#!/bin/sh
# Writes the lock files beside it with uv (`make locks`): every version with the hashes of its files.
#
# torch is in none but SGLang's: the trainer's comes with the base image, or with the build argument TORCH.
set -eu
cd "$(dirname "$0")/.."
compile() { # lock, Python, platform, then what is compiled
    lock=$1 python=$2 platform=$3
    shift 3
    uv pip compile "$@" --upgrade --generate-hashes --python-version "$python" --python-platform "x86_64-$platform" \
        --custom-compile-command "make locks" --no-annotate --quiet --output-file "docker/$lock.lock"
}
without_torch=$(mktemp)
sglang=$(mktemp --suffix=.in)
trap 'rm -f "$without_torch" "$sglang"' EXIT
echo "torch ; sys_platform == 'never'" > "$without_torch"
grep '^sglang==' tests/support/sglang/requirements.txt > "$sglang"
# NGC's images and SGLang's kernels are of Ubuntu 24.04 (glibc 2.39); Debian 12 has 2.36.
compile trainer 3.12 manylinux_2_39 pyproject.toml --override "$without_torch"
compile cpu 3.11 manylinux_2_36 pyproject.toml --override "$without_torch"
compile sglang 3.12 manylinux_2_39 "$sglang"
