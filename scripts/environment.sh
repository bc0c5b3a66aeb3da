# Sourced by the other scripts: a virtual environment in .venv with the given requirement files installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

use_environment() {  # use_environment FILE...: installs only when a file has changed since the last time
    local wanted
    wanted=$(cat requirements.txt benchmarks/requirements.txt "$@" | cksum | cut -d" " -f1)
    # An environment whose making was interrupted has a python, perhaps, but no pip that runs; made again in place, it
    # keeps what was installed.
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        rm -rf .venv/lib/python*/site-packages/{pip,pip-*.dist-info}
        python3 -m venv .venv
    fi
    if [ ! -f ".venv/installed-$wanted" ]; then
        echo "installing $* into .venv (several GB the first time)"
        local file
        for file in "$@"; do
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file"
        done
        touch ".venv/installed-$wanted"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
