# Sourced by the other scripts, from the repository's root: makes .venv and installs the project into it, once for each
# content of pyproject.toml. Takes the extras to install, as in: source scripts/install.sh dev
extras=${1:+[$1]}
stamp=".venv/installed-$(cat pyproject.toml <(echo "$extras") | cksum | tr ' ' '-')"
if [ ! -e "$stamp" ]; then
  python=python3
  for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  done
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed." >&2; exit 2; }
  echo "installing into .venv (a few minutes the first time)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extras"
  touch "$stamp"
fi
python=.venv/bin/python
# XLA's large buffers come and go with every step on a CPU: huge pages save a quarter of the time (page faults).
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
