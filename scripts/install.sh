# shellcheck shell=bash
# Sourced by the other scripts, from the repository's root: makes a virtual environment and installs the project into it,
# once for each content of pyproject.toml. Sets $python; returns 1 where the packages cannot be had.
#
#   source scripts/install.sh [EXTRAS [FOLDER [PYTHON]]]        as in: source scripts/install.sh dev
#
# FOLDER is .venv where it is not given; PYTHON the first of 3.11 or newer that is found.
extras=${1:+[$1]} venv=${2:-.venv}
stamp="$venv/installed-$(cat pyproject.toml <(echo "$extras") | cksum | tr ' ' '-')"
if [ ! -e "$stamp" ]; then
  for python in ${3:-python3 python3.14 python3.13 python3.12 python3.11}; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || python=
  done
  [ -n "$python" ] || { echo "error: Python 3.11 or newer is needed." >&2; exit 2; }
  echo "installing into $venv (a few minutes the first time)"
  "$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear "$venv"  # a half-made one has no pip
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".$extras" || return 1
  touch "$stamp"
fi
python=$venv/bin/python
