#!/bin/sh
# Builds the program for each platform into dist/, or DIST, with the licences of what is in it and the checksums of all: make release.
# Statically linked, without paths of this machine: the same commit and the same Go give the same bytes. When the commit is tagged, the
# tag has to be v and CHANGELOG.md's version, and the tree has to be the commit's.
set -eu
cd "$(dirname "$0")/../.."
version=$(dev/scripts/version.sh) dist=${DIST:-dist}
tag=${TAG-$(git tag --points-at HEAD --list 'v*' 2>/dev/null | tail -n 1)}
if [ -n "$tag" ]; then
	if [ "$tag" != "v$version" ]; then
		echo "the tag is $tag, but CHANGELOG.md's newest version is $version: one of them is wrong" >&2
		exit 1
	fi
	if [ -n "$(git status --porcelain)" ]; then
		echo "$tag would have what is not in its commit: $(git status --porcelain | head -n 5)" >&2
		exit 1
	fi
fi
mkdir -p "$dist"
rm -f "$dist"/event-ingestion-* "$dist/LICENSES.txt" "$dist/SHA256SUMS"
for platform in ${PLATFORMS:-linux-amd64 linux-arm64 darwin-amd64 darwin-arm64}; do
	CGO_ENABLED=0 GOOS=${platform%-*} GOARCH=${platform#*-} go build -trimpath -ldflags="-s -w -X main.release=$version" -o "$dist/event-ingestion-$version-$platform" .
done
cp deploy/LICENSES.txt "$dist/"
cd "$dist"
if command -v sha256sum >/dev/null; then sha256sum event-ingestion-* LICENSES.txt; else shasum -a 256 event-ingestion-* LICENSES.txt; fi >SHA256SUMS
cat SHA256SUMS
