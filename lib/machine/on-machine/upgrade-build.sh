# On a machine: takes NixOS from a channel and builds the system of /etc/nixos with it, beside the
# one that runs. What the channel was before is kept, to go back to.
cd "$HOME_FOLDER"
if [ ! -e former-channel ]; then
  url=$(nix-channel --list | sed -n 's/^nixos //p')
  printf '%s\n' "${url:-$CHANNEL}" >former-channel.new
  readlink /nix/var/nix/profiles/per-user/root/channels >>former-channel.new
  mv former-channel.new former-channel
fi
nix-channel --add "$CHANNEL" nixos
nix-channel --update nixos
rm -f result
# Leaves a link to the system: result.
nixos-rebuild build
