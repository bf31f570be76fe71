# On the control plane: of former data directories, the last is enough.
for folder in "$DATA_DIR".former-*; do
  [ "$folder" = "$FORMER" ] || rm -rf "$folder"
done
