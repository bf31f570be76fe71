# On a machine: takes an archive of new files from stdin. It is unpacked beside and checked; only
# then does each file take its place, by a rename. The former files are kept.
umask 077
mkdir -p "$HOME_FOLDER"
cd "$HOME_FOLDER"
exec 9>lock
flock --nonblock 9 || { echo 'the last change is still at work' >&2; exit 1; }
rm -rf new archive
trap '[ $? = 0 ] || rm -rf new archive' EXIT
cat >archive
echo "$DIGEST  archive" | sha256sum --check --status || { echo 'the archive came in part' >&2; exit 1; }
mkdir new
tar -xzpf archive -C new
rm archive

# What is there works, or did before a change that has not come to its end: that is kept then.
if [ ! -e unfinished ]; then
  rm -rf former
  mkdir former
  paths=(etc/nixos var/lib/kubernetes etc/ssh/ssh_host_ed25519_key{,.pub})
  tar -C / --ignore-failed-read -cf - "${paths[@]}" | tar -xpf - -C former
fi
# Services that run may read their keys at any time: each stays its reader's. Owners of what is
# quite new are set by the switch.
cd new
find . -type f -print0 | while read -r -d '' file; do
  if [ -e "/$file" ]; then
    chown --reference="/$file" "$file"
    chmod --reference="/$file" "$file"
  fi
done
sync
touch ../unfinished
