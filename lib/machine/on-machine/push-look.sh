# On a machine: what it has of the files that are pushed. A line each:
#   file SHA256 PATH           a file in our folders
#   text PATH BASE64           the content of one that may be shown
#   unfinished                 the last change did not come to its end
#   switching                  it is still at work
#   upgrading                  an upgrade, with its channel, did not come to its end
our_files() {
  find /etc/nixos /var/lib/kubernetes /etc/ssh/ssh_host_ed25519_key /etc/ssh/ssh_host_ed25519_key.pub \
    -type f "$@" 2>/dev/null || true
}
our_files -exec sha256sum {} + | sed -E 's/^([0-9a-f]+) [ *]/file \1 /'
while read -r path; do
  if [ -f "$path" ]; then echo "text $path $(base64 --wrap=0 "$path")"; fi
done <<<"$TEXTS"
if [ -e "$HOME_FOLDER/unfinished" ]; then echo unfinished; fi
if [ -e "$HOME_FOLDER/lock" ] && ! flock --nonblock "$HOME_FOLDER/lock" true; then echo switching; fi
if [ -e "$HOME_FOLDER/former-channel" ]; then echo upgrading; fi
