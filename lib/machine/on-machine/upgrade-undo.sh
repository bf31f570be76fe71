# On a machine: the channel as it was before an upgrade that was not made.
cd "$HOME_FOLDER"
[ -e former-channel ] || exit 0
{ read -r url && read -r generation; } <former-channel
nix-channel --add "$url" nixos
# channels-3-link
generation=${generation#channels-}
nix-channel --rollback "${generation%-link}"
rm -f former-channel result
