#!/bin/sh
# Build a wheel, install it into an environment that holds only what it declares, and use it outside of the repository,
# as after `pip install gruppo`. The model's package is fetched on the way.
#
#   sh scripts/test_wheel.sh VENV
set -eu
unset PYTHONPATH PYTHONHOME || true
venv=$PWD/$1
build=$PWD/build/wheel
rm -rf "$build"
mkdir -p "$build/empty"
"$venv/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$build" .
"$venv/bin/python" scripts/wheel_environment.py "$build"/gruppo-*.whl "$build/venv"

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
gruppo train mine.toml --out run --set run.steps=1 --set evaluation.questions=2 --set sampling.prompts_per_step=2
gruppo show run
test -s run/model/model.safetensors
echo "The wheel works in an environment that holds only what it declares."
