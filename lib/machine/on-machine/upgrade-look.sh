# On a machine: what is in the system that runs, and in the one that was built, a line each:
#   KERNEL NIXOS KUBERNETES
# The kernel of the first is the one that the machine was started with.
describe() {
  program=$(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$1/etc/systemd/system/$UNIT.service" | head -n 1)
  # "Kubernetes v1.36.3"
  version=$("$program" --version)
  echo "$(readlink -f "$2/kernel") $(cat "$1/nixos-version") ${version#Kubernetes }"
}
describe /run/current-system /run/booted-system
describe "$HOME_FOLDER/result" "$HOME_FOLDER/result"
