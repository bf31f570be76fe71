# On a machine: puts the files of a prepared folder in their places, and takes away what is in our
# folders and not among them.
cd "$HOME_FOLDER/$FOLDER"
find . -type f -printf '/%P\n' | sort >../files
find /etc/nixos /var/lib/kubernetes -type f | sort >../there
find . -type d -printf '/%P\0' | xargs -0 mkdir -p
find . -type f -printf '%P\0' | while read -r -d '' file; do mv -fT "$file" "/$file"; done
comm -13 ../files ../there | tr '\n' '\0' | xargs -0 -r rm -f
cd ..
rm -rf "$FOLDER" files there
sync
