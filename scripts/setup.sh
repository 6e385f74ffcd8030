#!/bin/sh
# Makes an environment and installs jaxlab in it, with the versions pinned for its
# Python: setup.sh FOLDER [EXTRAS], as in `setup.sh .venv dev,docs`. The Makefile
# calls it. PYTHON names the interpreter of a new environment (python3), PINS a
# constraints file to take instead.
set -eu

folder=$1
extras=${2:-}
python=${PYTHON:-python3}
inside=$folder/bin/python

die() {
  echo "$*" >&2
  exit 1
}

# An environment that has pip is complete; `venv` mends one that was interrupted.
if ! "$inside" -m pip --version >/dev/null 2>&1; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || die \
    "jaxlab needs Python 3.11 or newer, and $python" \
    "$("$python" --version 2>/dev/null | sed 's/^/is /' | grep . || echo 'does not run'):" \
    "name another, as in 'make test PYTHON=python3.12'"
  "$python" -m venv "$folder"
fi

own=$("$inside" -c 'import sys; print("py%d%d.txt" % sys.version_info[:2])')
pins=${PINS:-constraints/$own}
if ! [ -f "$pins" ]; then
  newest=$(ls constraints/py*.txt | sort | tail -n 1)
  echo "no $pins yet: taking $newest, untested with this Python" >&2
  pins=$newest
fi

case ,$extras, in
  *,gpu,*) cuda= ;;
  *) cuda="-c constraints/no-cuda.txt" ;;
esac

echo "setting up $folder: jaxlab${extras:+[$extras]}, pinned by $pins (takes a minute)"
# shellcheck disable=SC2086  # $cuda is two words or none
"$inside" -m pip install -qq --disable-pip-version-check \
  --constraint "$pins" $cuda --editable ".${extras:+[$extras]}" || case $extras in
  *peers*) die "pip could not install the peers. Conflicting dependencies mean that it" \
    "found only torch's CUDA build, which constraints/no-cuda.txt refuses: put torch's" \
    "CPU wheel in a folder and name that by PIP_FIND_LINKS=FOLDER" ;;
  *) die "pip could not install jaxlab${extras:+[$extras]}: its error is above" ;;
esac
