#!/bin/sh
# Holds deploy/kubernetes.yaml to the schema of Kubernetes' API, with a validator that brings the schemas along.
set -eu
venv=${XDG_CACHE_HOME:-$HOME/.cache}/event-ingestion/kubernetes-validate-1.37.0
if [ ! -x "$venv/bin/kubernetes-validate" ]; then
	python3 -m venv "$venv"
	"$venv/bin/pip" install -q kubernetes-validate==1.37.0 || { rm -rf "$venv"; exit 1; }
fi
"$venv/bin/kubernetes-validate" --strict -k 1.34 deploy/kubernetes.yaml
