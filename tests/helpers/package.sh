#!/usr/bin/env bash
# Build wheel (from the sdist) and sdist, check their metadata, install each into a fresh environment and try it there.
# Dependencies come from the environment of $PYTHON, which has them already; the package itself does not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
target=${1:-build/dist}
PYTHON=${PYTHON:-python3}
fresh=.cache/fresh

rm -rf "$target"
"$PYTHON" -m build --outdir "$target" . >"${TMPDIR:-/tmp}/lowrank-dist-build.log" 2>&1 || {
	cat "${TMPDIR:-/tmp}/lowrank-dist-build.log" >&2
	exit 1
}
"$PYTHON" -m twine check --strict "$target"/*
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' src/lowrank_dist/_version.py)
for file in "$target"/*; do
	"$PYTHON" -m venv --clear "$fresh"
	"$fresh/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps "$file"
	"$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$("$fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	(
		cd "$fresh"
		[[ $(bin/lowrank-dist --version) == "$version" ]]
		bin/lowrank-dist --help >/dev/null
		[[ $file == *.whl ]] || exit 0 # the rest takes its time, and holds for both
		bin/python -P "$OLDPWD/tests/helpers/installed.py"
		# nothing but JSON: no library has a word to say
		bin/lowrank-dist plan --config "$OLDPWD/configs/llama3-70b_qpissa_32gpu.yaml" --json 2>&1 | bin/python -m json.tool >/dev/null
	)
	echo "$file: installed and tried"
done
