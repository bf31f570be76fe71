# On a machine: prepares the former files for taking their places again, if others have them.
mkdir -p "$HOME_FOLDER"
cd "$HOME_FOLDER"
exec 9>lock
# A push or a switch whose connection was cut goes on, and ends.
flock --timeout 600 9 || { echo 'the last change is still at work' >&2; exit 1; }
[ -e unfinished ] || exit 0
rm -rf back
cp -a former back
