# Sourced by demo.sh and test.sh: makes sure that compiler, Meson and libraries are there. On Debian
# and Ubuntu as root (or with sudo without a password) missing packages are installed; elsewhere
# their names are printed and the script ends with 1.

debian_packages="g++ meson ninja-build pkg-config nlohmann-json3-dev libcli11-dev libstb-dev doctest-dev"
fedora_packages="gcc-c++ meson ninja-build pkgconf json-devel cli11-devel stb-devel doctest-devel"
arch_packages="gcc meson ninja pkgconf nlohmann-json cli11 stb doctest"

missing_parts() {
  command -v g++ >/dev/null || echo "g++"
  command -v meson >/dev/null || echo "meson"
  command -v ninja >/dev/null || echo "ninja"
  command -v pkg-config >/dev/null || { echo "pkg-config"; return; }
  pkg-config --exists nlohmann_json || echo "nlohmann_json"
  pkg-config --exists CLI11 || echo "CLI11"
  pkg-config --exists stb || echo "stb_image_write"
  echo '#include <doctest/doctest.h>' | g++ -x c++ -E - >/dev/null 2>&1 || echo "doctest"
}

install_packages() {
  local missing root=""
  missing=$(missing_parts | paste -sd ' ')
  [ -z "$missing" ] && return
  if [ "$(id -u)" != 0 ]; then
    if sudo -n true 2>/dev/null; then root="sudo"; else root="none"; fi
  fi
  if ! command -v apt-get >/dev/null || [ "$root" = none ]; then
    echo "Missing: $missing. Install with one of:"
    echo "  Debian, Ubuntu:  apt-get install $debian_packages"
    echo "  Fedora:          dnf install $fedora_packages"
    echo "  Arch:            pacman -S $arch_packages"
    exit 1
  fi
  echo "Installing what is missing ($missing)"
  DEBIAN_FRONTEND=noninteractive
  export DEBIAN_FRONTEND
  $root apt-get update -qq
  # shellcheck disable=SC2086
  $root apt-get install -y -qq --no-install-recommends $debian_packages >/dev/null
}

# configure DIRECTORY OPTION...: a Meson build directory, made once; options are set in one that is
# there.
configure() {
  local directory=$1 command=setup
  shift
  if [ -f "$directory/build.ninja" ]; then
    [ $# = 0 ] && return
    command=configure
  fi
  meson "$command" "$directory" "$@" >"$directory.log" 2>&1 || {
    cat "$directory.log"
    exit 1
  }
}
