#!/bin/sh
# Prints the version of this tree: CHANGELOG.md's newest one, 1.0.0; below `## Unreleased` 1.0.0+dev, and the commit where git knows it.
set -eu
cd "$(dirname "$0")/../.."
version=$(awk '/^## Unreleased/ { after = "+dev" } /^## [0-9]/ { print $2 after; exit }' CHANGELOG.md)
case $version in
*+dev) commit=$(git rev-parse --short=12 HEAD 2>/dev/null) && version=$version.$commit || true ;;
"") echo "CHANGELOG.md has no version" >&2; exit 1 ;;
esac
echo "$version"
