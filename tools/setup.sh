# Sourced by tools/demo and tools/test: finds or installs what is needed and prepares .venv with pyccl installed in it.
# Sets $root (the repository), $python (a Python >= 3.11 of the system), $venv and $torch_venv. Everything printed goes
# to stderr.
# shellcheck shell=bash

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
torch_venv="$venv/torch"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s\n' "$*" >&2; }
die() { say "$0: $*"; exit 1; }

# The first Python >= 3.11, preferring one that can make virtual environments and compile extensions.
find_python() {
    local candidate fallback=""
    for candidate in "${PYTHON:-python3}" python3.{11,12,13,14} /usr/bin/python3; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if [ -z "$(python_lacks "$candidate")" ]; then
            command -v "$candidate"
            return
        fi
        fallback="${fallback:-$(command -v "$candidate")}"
    done
    printf '%s' "$fallback"
}

# Debian packages that a Python lacks: venv and the headers are packages of their own there.
python_lacks() {
    "$1" - <<'PY'
import importlib.util, os, sysconfig, sys
name = f"python{sys.version_info.major}.{sys.version_info.minor}"
lacking = []
if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
    lacking.append(f"{name}-venv")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    lacking.append(f"{name}-dev")
print(*lacking)
PY
}

# Names of the Debian packages to install; sets $python.
missing_packages() {
    local missing=()
    python="$(find_python)"
    if [ -z "$python" ]; then
        missing+=(python3 python3-venv python3-dev)
    else
        # shellcheck disable=SC2207
        missing+=($(python_lacks "$python"))
    fi
    command -v gcc >/dev/null || missing+=(gcc libc6-dev)
    command -v g++ >/dev/null || missing+=(g++)
    command -v cmake >/dev/null || missing+=(cmake)
    command -v make >/dev/null || missing+=(make)
    # For tests in network namespaces, which only root can make; who cannot install them has these tests skipped.
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        command -v ip >/dev/null || missing+=(iproute2)
        command -v nft >/dev/null || missing+=(nftables)
        command -v miniupnpd >/dev/null || missing+=(miniupnpd-nftables)
    fi
    # Without gcc the headers cannot be looked for; then they are asked for with it.
    printf '#include <openssl/opensslv.h>\n#if OPENSSL_VERSION_MAJOR < 3\n#error old\n#endif\n' |
        gcc -E -x c - >/dev/null 2>&1 || missing+=(libssl-dev)
    packages="${missing[*]}"
}

ensure_system() {
    missing_packages
    [ -z "$packages" ] && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "missing on this system: $packages. Install them (as root: apt-get install $packages) and run this again."
    fi
    say "installing $packages"
    # shellcheck disable=SC2086
    { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $packages; } >&2 ||
        die "apt-get could not install $packages"
    missing_packages
    [ -z "$packages" ] || die "still missing after apt-get: $packages (is this distribution's Python older than 3.11?)"
}

# The first clang that links libFuzzer; empty: there is none.
find_clang() {
    local candidate
    for candidate in clang clang-{20..14}; do
        command -v "$candidate" >/dev/null || continue
        printf 'int LLVMFuzzerTestOneInput(const unsigned char *x, unsigned long n) { return x != 0 && n > 9 ? 0 : 0; }' |
            "$candidate" -x c -fsanitize=fuzzer,address,undefined -o /dev/null - 2>/dev/null || continue
        echo "$candidate"
        return
    done
}

# Sets $clang. Installed as root: 100 MB.
ensure_clang() {
    clang="$(find_clang)"
    [ -n "$clang" ] && return
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "missing on this system: clang with libFuzzer. Install it (Debian: apt-get install clang libclang-rt-dev) and run this again."
    fi
    say "installing clang"
    apt-get -q update >&2
    local version
    version="$(apt-cache depends clang | sed -n 's/.*Depends: clang-//p' | head -n 1)"
    DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "clang-$version" "libclang-rt-$version-dev" >&2 ||
        die "apt-get could not install clang-$version"
    clang="$(find_clang)"
    [ -n "$clang" ] || die "clang-$version does not link libFuzzer"
}

# The requirements of one extra in pyproject.toml.
extra() {
    "$python" - "$root/pyproject.toml" "$1" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"][sys.argv[2]], sep="\n")
PY
}

# Requirements as pyproject.toml states them: those to build, to run, to test and to plot.
requirements() {
    "$python" - "$root/pyproject.toml" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    data = tomllib.load(file)
project = data["project"]
extras = project["optional-dependencies"]
print(*data["build-system"]["requires"], *project["dependencies"], *extras["dev"], *extras["plot"], sep="\n")
PY
}

# One hash over the names and contents of what goes into the installed package.
source_hash() {
    (cd "$root" && find CMakeLists.txt pyproject.toml native pyccl -type f ! -name '*.py[co]' ! -name '*.so' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
}

# Runs "$@" unless the stamp file $1 holds the text $2 already; writes the stamp afterwards.
unless_stamped() {
    local stamp="$1" text="$2"
    shift 2
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$text" ]; then
        rm -f "$stamp"
        "$@" >&2
        printf '%s\n' "$text" >"$stamp"
    fi
}

install_requirements() {
    say "installing Python packages into .venv"
    requirements >"$venv/requirements.txt"
    "$venv/bin/python" -m pip install -qq -r "$venv/requirements.txt" || die "pip could not install the requirements"
}

# Not editable: what runs is what a wheel carries. The build requirements are in .venv, so no isolated environment.
install_pyccl() {
    say "building and installing pyccl into .venv"
    (cd "$root" && "$venv/bin/python" -m pip install -qq --no-build-isolation --no-deps --force-reinstall .) ||
        die "pyccl could not be built"
}

ensure_venv() {
    if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        if [ -e "$venv" ] && [ ! -O "$venv" ]; then
            die "$venv belongs to $(stat -c %U "$venv") and does not work for $(id -un): remove it, or use a clone of your own"
        fi
        say "creating .venv with $python"
        rm -rf "$venv"
        "$python" -m venv "$venv" >&2 || die "could not create $venv"
    fi
    unless_stamped "$venv/requirements.stamp" "$(requirements)" install_requirements
    unless_stamped "$venv/pyccl.stamp" "$(source_hash)" install_pyccl
}

# An environment with torch on top of .venv, which stays without: what is installed there is seen here.
install_torch() {
    say "installing $(extra dev-torch) into .venv/torch"
    rm -rf "$torch_venv"
    "$venv/bin/python" -m venv --without-pip "$torch_venv" || die "could not create $torch_venv"
    "$torch_venv/bin/python" - "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PY'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "base.pth").write_text(sys.argv[1] + "\n")
PY
    # shellcheck disable=SC2046
    "$venv/bin/python" -m pip --python "$torch_venv/bin/python" install -qq $(extra dev-torch) ||
        die "pip could not install torch"
}

ensure_torch_venv() {
    unless_stamped "$venv/torch.stamp" "$(extra dev-torch)" install_torch
}
