#!/bin/sh
# Build the documentation site, build/site/index.html. Run by make docs, which sees to .venv.
#
# The pages are put together with .venv, which has torch and qtarget. MkDocs turns them into a site in an environment of its
# own, build/docs-env: it needs no torch (the reference is read from the source), and `make env` need not wait for it.
set -eu
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}
environment=build/docs-env

"$python" docs/site/stage.py
if [ ! -f "$environment/.ready" ] || [ constraints.txt -nt "$environment/.ready" ] || [ pyproject.toml -nt "$environment/.ready" ]; then
    printf '[docs] MkDocs, at the versions in constraints.txt\n'
    "$python" -m venv "$environment"
    # The packages of the extra `docs`, without the project itself, which would bring torch.
    wanted=$("$python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
    # shellcheck disable=SC2086
    "$environment/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt $wanted
    touch "$environment/.ready"
fi
NO_MKDOCS_2_WARNING=1 "$environment/bin/python" -m mkdocs build --strict --quiet
printf '[docs] open build/site/index.html in a browser\n'
